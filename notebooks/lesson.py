"""What the notebooks share: lines that rewrite themselves, a clock for each part, one look for all plots, verdicts,
and the code, the toy world's task that is all new to the base."""

import statistics
import time

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.ticker import LogLocator, NullFormatter

from notebooks.toy import SLOTS, toy_pairs


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
