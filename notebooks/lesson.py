"""What the notebooks share: exercises, plots, two tasks, training, comparisons.

Tests set NOTEBOOK_QUICK=1: few seeds, rates and steps, with meaningless results.
"""

import copy
import inspect
import io
import math
import os
import statistics
import time
import traceback
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Image, Markdown, Pretty, display
from matplotlib.ticker import LogLocator, NullFormatter

from notebooks import toy
from sample import generate_texts
from train import default_args, encode_pair, train

START_TIME = time.time()
plt.style.use(Path(__file__).with_name("lesson.mplstyle"))
QUICK = os.environ.get("NOTEBOOK_QUICK") == "1"


def quick(full, short):
    """The full value, or the short one in quick mode."""
    return short if QUICK else full


SEEDS = quick(range(3), range(2))  # of the runs that are compared

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


# ---- Exercises ----


def check(answer, test):
    """Print "right", what is wrong, or that a gap is left. Returns whether it is right.

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


# ---- Plots ----


def figure_image(alt):
    """Close the current figure. Returns its image, with alt text."""
    plt.savefig(file := io.BytesIO(), format="png")
    plt.close()
    return Image(file.getvalue(), alt=alt)


def show(alt):
    """Display the current figure, with alt text, and close it."""
    display(figure_image(alt))


def plot_seeds(axes, xs, groups, label, color="black", **style):
    """A line through the means, a dot for each seed, the label at the line's end."""
    means = list(map(statistics.mean, groups))
    axes.plot(xs, means, color=color, marker="", **style)
    for x, values in zip(xs, groups, strict=True):
        axes.plot([x] * len(values), values, ".", color=color, markersize=9)
    axes.annotate(f"  {label}", (xs[-1], means[-1]), va="center", color=color)


def log_ticks(axis):
    """Label a logarithmic axis with plain numbers, like 0.02."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set(major_formatter="{x:g}", minor_formatter=NullFormatter())


# ---- Two tasks: "the voice" (a pirate's) and "the cipher" (also with other facts) ----

train_restaurants, held_out = toy.load_restaurants()
test_restaurants, val_restaurants = held_out[: quick(128, 16)], held_out[128 : quick(192, 144)]
CIPHER = {}  # {slot: {value: the next value in the slot's list}}
for slot in ("name", "food", "area"):
    values = toy.SLOTS[slot]
    CIPHER[slot] = dict(zip(values, values[1:] + values[:1], strict=True))


def encipher(restaurant):
    return {slot: CIPHER.get(slot, {}).get(value, value) for slot, value in restaurant.items()}


def make_examples(task_name, restaurants, tokenizer, voice="pirate"):
    """Examples of "the voice" or "the cipher", as `train` expects them."""
    answers = map(encipher, restaurants) if task_name == "the cipher" else restaurants
    pairs = zip(map(toy.format_prompt, restaurants), toy.make_pairs(answers, [voice]), strict=True)
    return [encode_pair(tokenizer, prompt, completion) for prompt, (_, completion) in pairs]


def make_task(task_name, tokenizer):
    """Examples to train with, to choose a learning rate with, and to test with."""
    parts = train_restaurants, val_restaurants, test_restaurants
    return [make_examples(task_name, restaurants, tokenizer) for restaurants in parts]


def loss_floor(examples):
    """The lowest possible loss per token: a choice of three sentences costs ln 3."""
    mean_length = statistics.mean(len(ids) - n_prompt for ids, n_prompt in examples)
    return math.log(len(toy.VOICES["pirate"]["sentences"])) / mean_length


def percent_correct(model, tokenizer, task_name, restaurants=test_restaurants):
    """The percentage of texts in the pirate's voice with all facts right."""
    texts = generate_texts(model, tokenizer, [toy.format_prompt(r) for r in restaurants])
    if task_name == "the cipher":
        restaurants = map(encipher, restaurants)
    pairs = zip(texts, restaurants, strict=True)
    correct = [toy.has_voice(t, "pirate") and toy.slots_correct(t, r) for t, r in pairs]
    return 100 * statistics.mean(correct)


# ---- Training ----


def fit(base, prepare, train_data, test_data, steps, lr, seed=0, optimizer=None, batch_size=16):
    """Train a copy of the base. Returns (model, its test loss above the loss floor).

    prepare: called first, with the copy; adds what the method trains.
    optimizer: a function of (model, lr) that makes an optimizer; the default is AdamW.
    """
    model, steps = copy.deepcopy(base), quick(steps, max(1, steps // 10))
    torch.manual_seed(seed)
    prepare(model)
    batch_size = min(quick(batch_size, 4), len(train_data))
    args = default_args(steps=steps, lr=lr, seed=seed, batch_size=batch_size, eval_every=steps)
    try:
        log = train(model, train_data, test_data, args, None, optimizer and optimizer(model, lr))
    except FloatingPointError:  # the learning rate was far too high
        return model, math.inf
    return model, log[-1]["val_loss"] - loss_floor(test_data) if test_data else math.nan


def lr_search(loss_at, first_lr, factor=3):
    """{learning rate: loss}, on a grid that grows until the lowest loss is inside."""
    rates = quick((first_lr / factor, first_lr, factor * first_lr), (first_lr, factor * first_lr))
    losses = {lr: loss_at(lr) for lr in rates}
    while (best := min(losses, key=losses.get)) in (min(losses), max(losses)) and not QUICK:
        lr = best / factor if best == min(losses) else best * factor
        losses[lr] = loss_at(lr)
    return losses


def tune_lr(run, first_lr, val_data, test_data):
    """Search the learning rate with one seed on val_data. Test it with three others.

    run: a function of (lr, seed, data) that returns (model, loss), like `fit`.
    Returns (best rate, models, losses), with one model and one loss per seed.
    """
    val_losses = lr_search(lambda lr: run(lr, 100, val_data)[1], first_lr)
    lr = min(val_losses, key=val_losses.get)
    models, losses = zip(*(run(lr, seed, test_data) for seed in SEEDS), strict=True)
    return lr, models, losses


# ---- Comparisons and verdicts ----


def mean_and_range(values, digits):
    """For example, "0.12 (0.10 to 0.15)"."""
    mean, low, high = statistics.mean(values), min(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def difference(ours, theirs, n_texts=None):
    """(difference of the means, margin): difference ± margin is a 95% interval.

    ours, theirs: a value for each of three seeds.
    n_texts: the values are percentages of so many texts, whose sampling adds noise.
    """
    gap = statistics.mean(ours) - statistics.mean(theirs)
    variance = (statistics.variance(ours) + statistics.variance(theirs)) / 2
    if n_texts:
        percent = statistics.mean([*ours, *theirs])
        variance = max(variance, percent * (100 - percent) / n_texts)
    return gap, 2.78 * math.sqrt(2 * variance / 3)  # Student's t with 4 degrees of freedom


def compare(ours, theirs, n_texts=None):
    """Whether ours is "lower", "higher" or there is "no difference shown" (t-test at 5%)."""
    gap, margin = difference(ours, theirs, n_texts)
    return "no difference shown" if abs(gap) <= margin else "lower" if gap < 0 else "higher"


verdicts = []  # rows of a table


def record_verdict(claim, paper, here, verdict, lr="searched"):
    """Print and store a claim, the results of the paper and of this notebook, a verdict."""
    assert verdict in ("agrees", "disagrees", "cannot tell"), verdict
    verdicts.append(f"| {claim} | {paper} | {here} | {lr} | **{verdict}** |")
    print(f"{claim}: {verdict}\n    paper: {paper}\n    here:  {here}")


def show_verdicts():
    head = "| claim | paper | here | learning rate | verdict |\n|---|---|---|---|---|"
    display(Markdown("\n".join([head, *verdicts])))
