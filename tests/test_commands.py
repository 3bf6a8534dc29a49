"""train.py as a command: its folders, --model new, and mistakes in one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import httpx
import nbformat
import pytest
import torch
from commands import RUN_FILES, error_message, file_contents, read_log, run, toy_pairs, write_jsonl
from nbclient import NotebookClient

import gpt
import sample
import train
from gpt import GPT
from notebooks import toy

pytestmark = pytest.mark.usefixtures("folder")
LINE = "--model base --data data.jsonl --steps 3 --batch-size 4 --eval-every 5 --device cpu"
ROOT = Path(train.__file__).parent


# ---- The result ----


def test_result_has_an_adapter_settings_and_log(capsys):
    run(train, f"{LINE} --out out/x")
    assert sorted(os.listdir("out/x")) == RUN_FILES
    assert json.loads(Path("out/x/settings.json").read_text())["steps"] == 3
    assert [row["step"] for row in read_log("out/x")] == ["1", "2", "3"]


def test_same_command_again_trains_again(capsys):
    for flags in ("", "--save-every 0"):  # which changes nothing in the result
        run(train, f"{LINE} {flags}")
        assert capsys.readouterr().out.count("loss ") == 3


def test_printed_command_works_in_any_shell(capsys):
    write_jsonl("my data.jsonl", [('Say "hi" to $USER, `please`!', "Arr")] * 20)
    run(train, f"{LINE} --data 'my data.jsonl'")
    [line] = re.findall("sample.py (.*)", capsys.readouterr().out)
    assert not set("$`!") & set(line) and line.count('"') == 4
    run(sample, f"{line} --max-new-tokens 2")
    assert capsys.readouterr().out.startswith("Say hi to USER, please ")


def test_method_full_saves_a_base_with_its_tokenizer():
    run(train, f"{LINE} --method full --out full")
    run(train, f"{LINE} --model full")
    assert Path("full/merges.txt").read_bytes() == Path("base/merges.txt").read_bytes()


def test_the_commands_run_in_jupyter(monkeypatch):
    Path("notebooks").mkdir()
    Path("notebooks/__init__.py").write_text("raise ImportError('of another package')")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    source = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sample, train\n"
    source += f"train.main({LINE.split()}); sample.main(['--lora', 'adapter'])"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook).execute()  # raises if a cell does


def test_a_closed_pipe_ends_a_run_that_can_be_resumed():
    command = f"{sys.executable} {train.__file__} {LINE} --steps 50 --out out | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in result.stderr and os.listdir("out") == ["settings.json"]
    run(train, "--resume out")
    assert sorted(os.listdir("out")) == RUN_FILES


def test_text_that_the_base_cannot_read_is_a_warning(capsys):
    run(train, f"{LINE} --lr 0.02 --steps 30 --method full --out trained")
    capsys.readouterr()
    run(train, f"{LINE} --model trained")
    assert "warning" not in capsys.readouterr().out
    Path("a.txt").write_text("ZXQ? 123 %& " * 20)
    run(train, "--model trained --data a.txt --steps 1")
    assert "warning: trained cannot read" in capsys.readouterr().out


# ---- One folder, one run ----


@pytest.mark.parametrize("flags", ["--lr 1", "--data other/data.jsonl", "--out base"])
def test_files_of_another_run_are_not_overwritten(flags, capsys):
    run(train, f"{LINE} --out out")
    write_jsonl("other/data.jsonl", toy_pairs(40))
    before = file_contents(".")
    assert "--out" in error_message(train, f"{LINE} --out out {flags}", capsys)
    assert file_contents(".") == before


def test_other_data_in_the_same_file_is_another_run(capsys):
    run(train, f"{LINE} --out out")
    write_jsonl("data.jsonl", toy_pairs(40, "plain"))
    assert "--out" in error_message(train, f"{LINE} --out out", capsys)


def test_the_first_run_makes_its_base_once(monkeypatch):
    main, restaurants = train.main, toy.load_restaurants()
    monkeypatch.setattr(toy, "load_restaurants", lambda: [split[:8] for split in restaurants])
    monkeypatch.setattr(toy, "CONFIG", GPT.from_pretrained("base").config)
    flags = ["--steps", "2", "--batch-size", "2", "--device", "cpu"]
    monkeypatch.setattr(train, "main", lambda argv: main([*argv, *flags]))
    train.main([])
    assert sorted(os.listdir("out")) == ["tiny", "tiny-toy-pirate"]
    before = file_contents("out/tiny")
    train.load_base("out/tiny")
    assert file_contents("out/tiny") == before


# ---- Mistakes: one line, exit code 2 ----

TRAIN_MISTAKES = {  # flags: what the line names
    "--model absent": "absent",
    "--model new": "--model new",
    "--model new --data e2e": "--model new",
    "--data absent.txt": "absent.txt",
    "--data data.csv": "data.csv",
    "--data bad.jsonl": "line 3",
    "--data toy:parrot": "pirate",
    "--targets c_x": "c_x",
    "--r 0": "r >= 1",
    "--lora-dropout 1": "dropout",
    "--lr -1": "-1",
    "--lr 1e38": "lower --lr",
    "--batch-size 0": "batch_size must",
    "--steps 0": "steps must",
    "--batch 8": "--batch 8",
    "--method full --r 8": "r has no effect",
    "--data empty.txt": "empty",
    "--data latin1.txt": "latin1.txt is not in UTF-8",
    "--data long.jsonl": "gpt2",
    "--model adapter": "--lora",
    "--out data.jsonl/x": "data.jsonl",
}


@pytest.mark.parametrize("flags", TRAIN_MISTAKES)
def test_mistakes_in_training(flags, capsys):
    Path("bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"}\n')
    Path("data.csv").write_text("a,b\n")
    Path("empty.txt").write_text("\n")
    Path("latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    write_jsonl("long.jsonl", toy_pairs(1) + [("Arr", "Arr" * 100)] * 2)
    assert TRAIN_MISTAKES[flags] in error_message(train, f"{LINE} {flags}", capsys)


@pytest.mark.parametrize("flags", ["--targets c_x", "--r 0", "--lr -1", "--batch-size 0"])
def test_a_mistake_can_be_corrected(flags, capsys):
    error_message(train, f"{LINE} {flags}", capsys)
    run(train, LINE)  # in the same folder


@pytest.mark.parametrize("flags", ["--lora absent", "--model base --lora ''"])
def test_an_adapter_that_is_missing_is_not_ignored(flags, capsys):
    assert "adapter_config.json" in error_message(sample, flags, capsys)


@pytest.mark.parametrize("error", [httpx.ReadError("cut"), OSError("no network")], ids=str)
def test_a_download_that_fails(error, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "hf_hub_download", Mock(side_effect=error))
    assert f"from the Hub: {error}" in error_message(train, f"{LINE} --model gpt2", capsys)


def test_out_of_memory_names_the_batch_size(monkeypatch, capsys):
    monkeypatch.setattr(train, "train", lambda *args, **kwargs: torch.empty(2**50))
    assert "--batch-size" in error_message(train, LINE, capsys)
