"""A run that is interrupted, in any way, continues as if nothing had happened."""

import functools
import os
import re
import subprocess
import sys

import pytest
import torch
from commands import RUN_FILES, error_message, file_contents, read_log, run
from safetensors.torch import load_file

import train

pytestmark = pytest.mark.usefixtures("folder")
LINE = "--model base --data data.jsonl --batch-size 4 --eval-every 5 --device cpu"
RUNS = {
    "lora": "",
    "full": "--method full",
    "float16": "--dtype float16",
    "full float16": "--method full --dtype float16",
    "dropout": "--lora-dropout 0.3 --label-smoothing 0.1",
    "accumulation": "--grad-accum 3 --batch-size 2",
    "a log every three steps": "--eval-every 15",
}


@pytest.fixture
def large_loss_scale(monkeypatch):
    """In float16, the first steps overflow. The later scale is not the first one."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**28)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)


def interrupt(line, step):
    """Press Ctrl-C after this log step, before its checkpoint."""

    def print_metrics(metrics):
        if metrics["step"] == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr(train, "print_metrics", print_metrics)
        run(train, line)
    assert exit_info.value.code == 130


def assert_same_result(a, b):
    # A killed process may leave the temporary file that it was writing.
    files = [{name for name in os.listdir(dir) if not name.endswith(".tmp")} for dir in (a, b)]
    assert files[0] == files[1] and "checkpoint.pt" not in files[0]
    filename = next(name for name in os.listdir(a) if name.endswith(".safetensors"))
    a_weights, b_weights = load_file(f"{a}/{filename}"), load_file(f"{b}/{filename}")
    assert all(torch.equal(a_weights[name], b_weights[name]) for name in a_weights)
    for a_row, b_row in zip(read_log(a), read_log(b), strict=True):
        assert all(a_row[name] == b_row[name] for name in ("step", "train_loss", "val_loss", "lr"))


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_a_resumed_run_equals_an_uninterrupted_one(flags, large_loss_scale):
    line = f"{LINE} --steps 15 --lr 5e-3 --save-every 0 {flags}"
    run(train, f"{line} --out whole")
    interrupt(f"{line} --out parts", step=3)
    interrupt(f"{line} --out parts", step=9)  # the same command resumes, too
    run(train, "--resume parts --device cpu")
    assert_same_result("whole", "parts")


def test_a_killed_process_is_resumed():
    line = f"{LINE} --steps 100 --eval-every 50"
    command = f"{sys.executable} {train.__file__} {line} --save-every 0 --out killed"
    process = subprocess.Popen(command.split(), stdout=subprocess.PIPE, text=True)
    next(text for text in process.stdout if re.match("step +20 ", text))
    process.kill()
    process.communicate()
    files = os.listdir("killed")
    assert "checkpoint.pt" in files and "adapter_model.safetensors" not in files
    run(train, "--resume killed --device cpu")
    run(train, f"{line} --out whole")
    assert_same_result("whole", "killed")


@pytest.mark.parametrize("flags, advice", [("--save-every 0", '--resume "out"'), ("", "without")])
def test_ctrl_c_says_how_to_go_on(flags, advice, capsys):
    interrupt(f"{LINE} --steps 3 --out out {flags}", step=2)
    assert advice in capsys.readouterr().err
    run(train, "--resume out --device cpu")  # without a checkpoint, from step 0
    assert sorted(os.listdir("out")) == RUN_FILES


# What follows --resume: what the line names
MISTAKES = {"out --steps 9": "--out", "out --r 4": "--out", "out --out other": "--out"}
MISTAKES |= {"done": "finished", "absent": "absent", "base": "base", "data.jsonl": "data.jsonl"}


@pytest.mark.parametrize("flags", MISTAKES)
def test_what_cannot_be_resumed_is_refused_and_not_changed(flags, capsys):
    interrupt(f"{LINE} --steps 3 --r 2 --out out", step=2)
    run(train, f"{LINE} --steps 3 --out done")
    before = file_contents(".")
    assert MISTAKES[flags] in error_message(train, f"--resume {flags}", capsys)
    assert file_contents(".") == before
