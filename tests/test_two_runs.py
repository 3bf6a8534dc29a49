"""Two runs on one machine share it: neither spins on a core that the other waits for (GOMP_SPINCOUNT in train.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What `python train.py` does. It tells its steps a second, and asks how many seconds it should go on.
RUN = """
import time

import train  # first: it says how long threads may spin while they wait
from gpt import GPT
from lora import add_lora

config, tokenizer = train.describe_base("tiny")
examples, _ = train.load_data("toy:pirate", tokenizer, config.block_size)
model, steps, began, seconds = GPT(config), 0, time.monotonic(), 0.0
add_lora(model)

def report(row):
    global steps, began, seconds
    steps += 1
    if (passed := time.monotonic() - began) > seconds:
        print(steps / passed, flush=True)
        seconds = float(input())
        steps, began = 0, time.monotonic()

train.train(model, examples, [], train.settings(steps=10**5, eval_every=1), report)
"""


def two_runs(seconds, rounds=3, **environment):
    """[(steps a second of a run alone, of the slower of two at once)] of some rounds of so many seconds each.

    Where train.py does not say it, GNU's OpenMP has GOMP_SPINCOUNT=300000.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    env |= {"PYTHONPATH": str(Path(__file__).parent.parent)} | environment
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    runs = [subprocess.Popen([sys.executable, "-c", RUN], env=env, text=True, **pipes) for _ in range(2)]

    def slowest(runs):
        for run in runs:
            print(seconds, file=run.stdin, flush=True)
        return min(float(run.stdout.readline()) for run in runs)

    try:
        for run in runs:
            run.stdout.readline()  # the first step is done, and now it waits
        return [(slowest(runs[:1]), slowest(runs)) for _ in range(rounds)]
    finally:
        for run in runs:
            run.kill()
            run.communicate()


def cores():
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 0


@pytest.mark.slow
@pytest.mark.skipif(cores() < 2, reason="needs Linux and two cores")
def test_two_runs_at_once_each_keep_their_share():
    if "libgomp" not in Path("/proc/self/maps").read_text():
        pytest.skip("another OpenMP than GNU's")
    rounds = two_runs(seconds=1)
    # A fair share is 0.5, and 0.35 was measured; without the setting 0.02 to 0.16. Other programs may disturb a round.
    assert max(together / alone for alone, together in rounds) >= 0.2, rounds
