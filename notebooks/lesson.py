"""What the notebooks share: progress, exercises, verdicts, plots, the cipher task, training.

NOTEBOOK_QUICK=1 in the environment selects quick mode: one seed, fewer learning rates, a tenth of
the steps. Tests use it to run every cell. Its results mean nothing.
"""

import copy
import inspect
import io
import math
import os
import statistics
import time
import traceback

import matplotlib.pyplot as plt
import torch
from IPython.display import Image, Pretty, display
from matplotlib.ticker import LogLocator, NullFormatter

from notebooks.toy import SLOTS, VOICES, format_prompt, has_voice, make_pairs, slots_correct
from sample import generate_texts
from train import default_args, encode_pair, train

START_TIME = time.time()
QUICK = os.environ.get("NOTEBOOK_QUICK") == "1"


def quick(full, short):
    """The full value, or the short one in quick mode."""
    return short if QUICK else full


# ---- Progress and timing ----


def progress(items, label):
    """Iterate over the items. A live line shows the current one."""
    items, start_time = list(items), time.time()
    line = display(Pretty(""), display_id=True)
    for i, item in enumerate(items, 1):
        line.update(Pretty(f"{label} {i} of {len(items)} ({time.time() - start_time:.0f} s)"))
        yield item
    line.update(Pretty(f"{label}: {len(items)} in {time.time() - start_time:.0f} s"))


def print_run_time():
    """Print the time since the notebook imported this module."""
    print(f"{(time.time() - START_TIME) / 60:.1f} minutes on {torch.get_num_threads()} threads")


# ---- Exercises and verdicts ----


def check(answer, test):
    """Print whether an exercise is right, what is wrong, or that a gap is left. Returns a bool.

    answer: a class, a function or a value; a gap is `...`.
    test: a function of the answer that asserts what must be true.
    """
    values = vars(answer).values() if inspect.isclass(answer) else [answer]
    codes = [value.__code__ for value in values if inspect.isfunction(value)]
    if answer is ... or any(... in code.co_consts for code in codes):
        print("not yet: replace every ... in the exercise, run it, then run this cell again")
        return False
    try:
        test(answer)
        print("right")
        return True
    except AssertionError as error:
        print(f"not right: {error}")
    except Exception as error:  # a mistake in Python: name the line of the exercise
        files = {code.co_filename for code in codes}
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f"line {f.lineno}: " for f in frames if f.filename in files]
        print(f"not right: {''.join(lines[-1:])}{type(error).__name__}: {error}")
    return False


verdicts = []  # (claim, result, verdict)


def record_verdict(claim, paper, result, verdict):
    """Print and store a claim, the paper's numbers, the notebook's result and the verdict."""
    verdicts.append((claim, result, verdict))
    print(f"claim    {claim}\npaper    {paper}\nhere     {result}\nverdict  {verdict}")


def print_verdicts():
    for claim, result, verdict in verdicts:
        print(f"{claim}\n    here: {result}\n    {verdict}")


# ---- Plots ----


def figure_image(alt):
    """Close the current figure. Returns its image, with alt text."""
    file = io.BytesIO()
    plt.savefig(file, format="png")
    plt.close()
    return Image(file.getvalue(), alt=alt)


def show(alt):
    """Display the current figure, with alt text, and close it."""
    display(figure_image(alt))


def mean_and_range(values, digits):
    """For example, "0.12 (0.10 to 0.15)"."""
    mean, low, high = statistics.mean(values), min(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def error_bars(groups):
    """y and yerr for `plt.errorbar`: the mean and the range of each list of values."""
    means = [statistics.mean(values) for values in groups]
    below = [mean - min(values) for mean, values in zip(means, groups, strict=True)]
    above = [max(values) - mean for mean, values in zip(means, groups, strict=True)]
    return means, [below, above]


def log_ticks(axis):
    """Label a logarithmic axis with plain numbers, like 0.02."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


# Each line has its own marker and dashes, so that plots are readable in black and white.
colors, markers, dashes = ["black", "#0072b2", "#d55e00"], ["o", "s", "^"], ["-", "--", ":"]
line_styles = plt.cycler(color=colors, marker=markers, linestyle=dashes)
rc_params = {
    "figure.figsize": (8, 3.6),
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": line_styles,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 5,
}
plt.rcParams.update(rc_params)

# ---- Two tasks: "the voice" is the pirate's by default; "the cipher" also changes the facts ----

CIPHER = {}  # {slot: {value: the next value in the slot's list}}
for slot in ("name", "food", "area"):
    CIPHER[slot] = dict(zip(SLOTS[slot], SLOTS[slot][1:] + SLOTS[slot][:1], strict=True))


def encipher(restaurant):
    return {slot: CIPHER.get(slot, {}).get(value, value) for slot, value in restaurant.items()}


def cipher_pairs(restaurants):
    """(prompt, completion): the restaurant's prompt, a pirate sentence with enciphered facts."""
    prompts = [format_prompt(restaurant) for restaurant in restaurants]
    enciphered_pairs = make_pairs(map(encipher, restaurants), ["pirate"])
    return [(prompt, pair[1]) for prompt, pair in zip(prompts, enciphered_pairs, strict=True)]


def make_examples(task_name, restaurants, tokenizer, voice="pirate"):
    """Examples of "the voice" or "the cipher", as `train` expects them."""
    is_cipher = task_name == "the cipher"
    pairs = cipher_pairs(restaurants) if is_cipher else make_pairs(restaurants, [voice])
    return [encode_pair(tokenizer, *pair) for pair in pairs]


def loss_floor(examples):
    """The lowest possible loss per token: choosing one of three sentences costs ln 3."""
    mean_length = statistics.mean(len(ids) - n_prompt for ids, n_prompt in examples)
    return math.log(len(VOICES["pirate"]["sentences"])) / mean_length


def percent_correct(model, tokenizer, task_name, restaurants):
    """The percentage of texts in the pirate's voice with all facts right."""
    texts = generate_texts(model, tokenizer, [format_prompt(r) for r in restaurants])
    if task_name == "the cipher":
        restaurants = map(encipher, restaurants)
    correct = [
        has_voice(text, "pirate") and slots_correct(text, restaurant)
        for text, restaurant in zip(texts, restaurants, strict=True)
    ]
    return 100 * statistics.mean(correct)


# ---- Training runs ----


def fit(base, prepare, train_data, val_data, steps, lr, seed=0, n_evals=1, on_log=None):
    """Train a copy of the base. Returns (model, validation loss above the loss floor).

    prepare: called first, with the copy; adds what the method trains.
    n_evals: evaluations per run.
    on_log: called with (model, metrics).
    """
    model, steps = copy.deepcopy(base), quick(steps, max(1, steps // 10))
    torch.manual_seed(seed)
    prepare(model)
    batch_size = min(quick(16, 4), len(train_data))
    args = default_args(steps=steps, lr=lr, seed=seed, batch_size=batch_size)
    args.eval_every = max(1, steps // n_evals)
    callback = on_log and (lambda metrics: on_log(model, metrics))
    try:
        log = train(model, train_data, val_data, args, callback)
    except FloatingPointError:  # the learning rate was far too high
        return model, math.inf
    return model, log[-1]["val_loss"] - loss_floor(val_data) if val_data else math.nan


def lr_search(loss_at, first_lr):
    """{learning rate: loss}, on a grid that grows until the lowest loss is not at an edge."""
    rates = quick((first_lr / 3, first_lr, 3 * first_lr), (first_lr, 3 * first_lr))
    losses = {lr: loss_at(lr) for lr in rates}
    while (best := argmin(losses)) in (min(losses), max(losses)) and not QUICK:
        lr = best / 3 if best == min(losses) else best * 3
        losses[lr] = loss_at(lr)
    return losses


def tune_lr(run, first_lr):
    """Search the learning rate with one seed, then run the best rate with others.

    run: a function of (lr, seed) that returns (model, loss), like `fit`.
    Returns (best rate, a list of (model, loss), one for each of three seeds).
    """
    lr = argmin(lr_search(lambda lr: run(lr, seed=100)[1], first_lr))
    return lr, [run(lr, seed) for seed in quick(range(3), range(1))]


def argmin(losses):
    """The key with the lowest value."""
    return min(losses, key=losses.get)
