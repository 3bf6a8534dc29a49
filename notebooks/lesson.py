"""What the notebooks share: lines that rewrite themselves, a clock for each part, one look for all plots, verdicts,
the code (the toy world's task that is all new to the base), a fair trial of a method, and adapter layers, which LoRA is
compared with."""

import copy
import math
import statistics
import time

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from IPython.display import display
from matplotlib.ticker import LogLocator, NullFormatter

from notebooks.toy import SLOTS, VOICES, in_voice, slots_right, toy_pairs, toy_prompt
from train import complete, encode_pair, settings, train


def ticker():
    """A line of output that can be rewritten: returns say(text)."""
    line = display({"text/plain": ""}, raw=True, display_id=True)
    return lambda text: line.update({"text/plain": text}, raw=True)


def reporting(say):
    """A report for `train` that says how far it is."""
    return lambda row: say(f"step {row['step']}, loss {row['loss']:.3f}, {row['seconds_left']:.0f} s left")


def tracked(items, what):
    """Go through the items with a line that tells how far we are."""
    items, say, began = list(items), ticker(), time.time()
    for i, item in enumerate(items, 1):
        say(f"{what} {i} of {len(items)} ({time.time() - began:.0f} s)")
        yield item
    say(f"{what} {len(items)} of {len(items)}: done in {time.time() - began:.0f} s")


started = {}  # {part: when it began}


def part(name):
    started[name] = time.time()


def print_parts():
    """How long each part took, from its `part(name)` to the next one's."""
    times = [*started.values(), time.time()]
    print(f"{'part':<18} seconds")
    for name, began, ended in zip(started, times[:-1], times[1:], strict=True):
        print(f"{name:<18} {ended - began:>7.0f}")
    print(f"{'together':<18} {times[-1] - times[0]:>7.0f}")


verdicts = []


def verdict(claim, paper, here, says):
    """Write down what a measurement says of a claim."""
    verdicts.append((claim, here, says))
    print(f"claim    {claim}\npaper    {paper}\nhere     {here}\nverdict  {says}")


def print_verdicts():
    for claim, here, says in verdicts:
        print(f"{claim}\n    here: {here}\n    {says}")


def spread(values, digits):
    """The mean of the values, and their range."""
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def bars(groups):
    """The mean of each group of values, and how far its range reaches below and above: for plt.errorbar."""
    mean = [statistics.mean(values) for values in groups]
    low = [m - min(values) for m, values in zip(mean, groups, strict=True)]
    return mean, [low, [max(values) - m for m, values in zip(mean, groups, strict=True)]]


def plain_ticks(axis):
    """Numbers like 0.02 on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


# The look of plots. Lines differ in marker and dash too, so that they can be told apart in grey.
plt.rcParams.update({"figure.figsize": (7.5, 3), "figure.dpi": 90, "figure.constrained_layout.use": True})
plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "legend.frameon": False, "lines.markersize": 5})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
looks = {"color": ["black", "#0072b2", "#d55e00"], "marker": ["o", "s", "^"], "linestyle": ["-", "--", ":"]}
plt.rcParams["axes.prop_cycle"] = plt.cycler(**looks)


# The code: each name, food and area stands for the next one in its list.
SECRET = {slot: dict(zip(SLOTS[slot], SLOTS[slot][1:] + SLOTS[slot][:1], strict=True)) for slot in list(SLOTS)[:3]}


def in_code(restaurant):
    return {slot: SECRET.get(slot, {}).get(value, value) for slot, value in restaurant.items()}


def coded_pairs(restaurants):
    """(the restaurant's prompt, the pirate's sentence about the restaurant in code)."""
    pairs = zip(toy_pairs(restaurants, ["pirate"]), toy_pairs(map(in_code, restaurants), ["pirate"]), strict=True)
    return [(prompt, answer) for (prompt, _), (_, answer) in pairs]


# A fair trial of methods on two tasks, "the voice" (the pirate's, always) and "the code".


def examples_of(task, restaurants, tokenizer, voice="pirate"):
    pairs = coded_pairs(restaurants) if task == "the code" else toy_pairs(restaurants, [voice])
    return [encode_pair(tokenizer, *pair) for pair in pairs]


def best_loss(examples):
    """A voice has three sentences, drawn at random: no model can get below ln 3 an example, shared by its tokens."""
    return math.log(len(VOICES["pirate"]["sentences"])) / statistics.mean(len(ids) - start for ids, start in examples)


def score(model, tokenizer, task, restaurants):
    """The share of the restaurants, in %, whose text is the pirate's and has every fact right, or right in code."""
    texts = complete(model, tokenizer, [toy_prompt(restaurant) for restaurant in restaurants])
    facts = map(in_code, restaurants) if task == "the code" else restaurants
    right = [in_voice(text, "pirate") and slots_right(text, truth) for text, truth in zip(texts, facts, strict=True)]
    return 100 * sum(right) / len(right)


def fit(base, begin, examples, held_out, steps, lr, seed=0, look=None, report=None):
    """Train a copy of the base, prepared by begin(model): (model, loss on what is held out, above the best possible).

    At each look (all so many steps) report(model, row) is called."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    begin(model)
    batch_size = min(16, len(examples))
    how = settings(steps=steps, lr=lr, batch_size=batch_size, warmup=steps // 10, eval_every=look or steps, seed=seed)
    try:
        log = train(model, examples, held_out, how, report and (lambda row: report(model, row)))
    except FloatingPointError:  # the learning rate was far too high
        return model, math.inf
    return model, log[-1]["val_loss"] - best_loss(held_out) if held_out else math.nan


def search(loss_at, start):
    """{learning rate: loss_at(it)} on a grid of factors of three, which grows until the lowest loss is inside."""
    losses = {lr: loss_at(lr) for lr in (start / 3, start, 3 * start)}
    while (best := best_of(losses)) in (min(losses), max(losses)):
        lr = best / 3 if best == min(losses) else best * 3
        losses[lr] = loss_at(lr)
    return losses


def best_of(losses):
    return min(losses, key=losses.get)


class Adapter(nn.Module):
    """An adapter layer, a bottleneck behind a layer: y + up(relu(down(norm(y)))), y = layer(x). It starts as y."""

    def __init__(self, layer, n_embd, width, norm=False):
        super().__init__()
        self.layer, self.norm = layer, nn.LayerNorm(n_embd) if norm else nn.Identity()
        self.down, self.up = nn.Linear(n_embd, width), nn.Linear(width, n_embd)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, *args):
        y = self.layer(*args)
        return y + self.up(F.relu(self.down(self.norm(y))))


def add_adapters(model, width, two):
    """Adapter layers of this width, behind attention and MLP (two, Houlsby's) or the MLP with a LayerNorm (Lin's)."""
    for block in model.h:
        block.mlp = Adapter(block.mlp, model.config.n_embd, width, norm=not two)
        if two:
            block.attn = Adapter(block.attn, model.config.n_embd, width)
