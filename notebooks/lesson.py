"""What the notebooks share: progress, plots, verdicts, the cipher task, training runs, adapters.

NOTEBOOK_QUICK=1 in the environment selects quick mode: one seed, fewer learning rates, a tenth of
the steps. Tests use it to run every cell. Its results mean nothing.
"""

import copy
import math
import os
import statistics
import time

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from IPython.display import display
from matplotlib.ticker import LogLocator, NullFormatter

from notebooks.toy import SLOTS, VOICES, format_prompt, has_voice, make_pairs, slots_correct
from sample import generate_texts
from train import default_args, encode_pair, train

QUICK = os.environ.get("NOTEBOOK_QUICK") == "1"


def quick(full, short):
    """The full value, or the short one in quick mode."""
    return short if QUICK else full


# ---- Progress and timing ----


def live_line():
    """Display an empty line. Returns update(text), which sets the line's text."""
    handle = display({"text/plain": ""}, raw=True, display_id=True)
    return lambda text: handle.update({"text/plain": text}, raw=True)


def progress_callback(update):
    """An on_log for `train` that shows the step and the loss in a live line."""
    return lambda metrics: update("step {step}, training loss {train_loss:.3f}".format(**metrics))


def progress(items, label):
    """Iterate over the items. A live line shows the current one."""
    items, update, start_time = list(items), live_line(), time.time()
    for i, item in enumerate(items, 1):
        update(f"{label} {i} of {len(items)} ({time.time() - start_time:.0f} s)")
        yield item
    update(f"{label} {len(items)} of {len(items)}: done in {time.time() - start_time:.0f} s")


start_times = {}  # {part of the notebook: time.time() at its first cell}


def start_timer(part):
    start_times[part] = time.time()


def print_timings():
    """Print how many seconds each part took. A part ends when the next one starts."""
    times = [*start_times.values(), time.time()]
    print(f"{'part':<18} seconds")
    for part, start, end in zip(start_times, times[:-1], times[1:], strict=True):
        print(f"{part:<18} {end - start:>7.0f}")
    print(f"{'total':<18} {times[-1] - times[0]:>7.0f}")


# ---- Verdicts ----

verdicts = []  # (claim, result, verdict)


def record_verdict(claim, paper, result, verdict):
    """Print and store a claim, the paper's numbers, the notebook's result and the verdict."""
    verdicts.append((claim, result, verdict))
    print(f"claim    {claim}\npaper    {paper}\nhere     {result}\nverdict  {verdict}")


def print_verdicts():
    for claim, result, verdict in verdicts:
        print(f"{claim}\n    here: {result}\n    {verdict}")


# ---- Plots ----


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
line_styles = {
    "color": ["black", "#0072b2", "#d55e00"],
    "marker": ["o", "s", "^"],
    "linestyle": ["-", "--", ":"],
}
rc_params = {
    "figure.figsize": (7.5, 3),
    "figure.dpi": 90,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": plt.cycler(**line_styles),
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


def argmin(losses):
    """The key with the lowest value."""
    return min(losses, key=losses.get)


# ---- Adapter layers, which the paper compares LoRA with ----


class BottleneckAdapter(nn.Module):
    """y + up(relu(down(norm(y)))) with y = layer(x). It starts as y, since up is zero."""

    def __init__(self, layer, n_embd, width, use_norm=False):
        super().__init__()
        self.layer = layer
        self.norm = nn.LayerNorm(n_embd) if use_norm else nn.Identity()
        self.down, self.up = nn.Linear(n_embd, width), nn.Linear(width, n_embd)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, *args):
        y = self.layer(*args)
        return y + self.up(F.relu(self.down(self.norm(y))))


def add_bottleneck_adapters(model, width, houlsby):
    """Houlsby et al.: after attention and MLP. Otherwise, Lin et al.: after MLP, with norm."""
    for block in model.h:
        block.mlp = BottleneckAdapter(block.mlp, model.config.n_embd, width, use_norm=not houlsby)
        if houlsby:
            block.attn = BottleneckAdapter(block.attn, model.config.n_embd, width)
