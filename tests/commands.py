"""Helpers for tests of the commands: a tiny base, data files, and the message of an error."""

import csv
import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch

from gpt import GPT
from notebooks import toy

RUN_FILES = ["adapter_config.json", "adapter_model.safetensors", "log.csv", "settings.json"]


def make_base(dir, **sizes):
    """Save a tiny GPT-2 with random weights and the toy's tokenizer. Returns the folder."""
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_embd=16) | sizes
    GPT(dataclasses.replace(toy.CONFIG, **sizes)).save_pretrained(dir)
    toy.save_tokenizer(dir)
    return Path(dir)


def write_jsonl(path, pairs):
    """Save (prompt, completion) pairs. Returns the path."""
    lines = [json.dumps({"prompt": prompt, "completion": text}) for prompt, text in pairs]
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("\n".join(lines))
    return Path(path)


def toy_pairs(n, voice="text"):
    return toy.make_pairs(toy.load_restaurants()[0][:n], [voice])


def run(command, line):
    """Run train, sample or e2e in this process, as if with this command line."""
    command.main(shlex.split(line))


def error_message(command, line, capsys):
    """Run a command that must fail with one line and exit code 2. Returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run(command, line)
    message = capsys.readouterr().err
    name = command.__name__.rpartition(".")[2]
    assert exit_info.value.code == 2 and message.startswith(f"{name}.py: error: "), message
    assert message.count("\n") == 1, message
    return message


def read_log(dir):
    """The rows of log.csv. Each is a dict of strings."""
    return list(csv.DictReader(Path(dir, "log.csv").read_text().splitlines()))


def file_contents(dir):
    return {path: path.read_bytes() for path in Path(dir).rglob("*") if path.is_file()}
