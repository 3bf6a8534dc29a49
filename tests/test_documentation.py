"""Every command that the README, a docstring or a run shows works when it is pasted."""

import re
from pathlib import Path

import pytest
from commands import make_base, run, write_jsonl

import gpt
import sample
import train
from gpt import GPT, GPTConfig
from lora import add_lora, save_lora
from notebooks import e2e, toy

ROOT = Path(gpt.__file__).parent
FILES = ["README.md", "train.py", "sample.py", "notebooks/e2e.py"]
COMMAND = r"^ *python (?:-m )?(train|sample|notebooks\.e2e)(?:\.py)?(.*?)(?: +#.*)?$"
TEXT = "\n".join(Path(ROOT, name).read_text(encoding="utf-8") for name in FILES)
COMMANDS = sorted(set(re.findall(COMMAND, TEXT, re.MULTILINE)))


@pytest.fixture
def stand_ins(tmp_path, monkeypatch, gpt2_tokenizer):
    """Small random models and a little data, under the names that the commands use."""
    monkeypatch.chdir(tmp_path)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=4))
    model.save_pretrained("hub")
    monkeypatch.setattr(gpt, "hf_hub_download", lambda name, filename: f"hub/{filename}")
    make_base("out/tiny")
    Path("my.txt").write_text("The dog ran. " * 20)
    write_jsonl("my.jsonl", [("name : Blue Spice", "Blue Spice is a pub.")] * 3)
    monkeypatch.setattr(e2e, "download_e2e", lambda filename: "my.jsonl")
    add_lora(model)
    return model


@pytest.mark.parametrize("command, flags", COMMANDS, ids=str)
def test_a_documented_command_runs(command, flags, stand_ins):
    if "--resume" in flags:  # a run that ended before its first checkpoint
        run(train, "--model gpt2 --data my.txt --steps 1")
        for path in Path("out/gpt2-my").glob("adapter*"):
            path.unlink()
    elif command == "train":
        flags += " --steps 1"
    for dir in re.findall(r"--lora (\S+/\S+)", flags):
        stand_ins.name_or_path = "gpt2"
        save_lora(stand_ins, dir)
    run({"train": train, "sample": sample, "notebooks.e2e": e2e}[command], flags)


def test_the_snippets_in_the_readme_run(stand_ins, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    Path("my.csv").write_text("question,answer\nWho?,Me.\n")
    run(train, "--model gpt2 --data my.txt --steps 1")
    for source in re.findall(r"```python\n(.*?)```|python -c \"([^\"]*)\"", TEXT, re.DOTALL):
        exec("".join(source), {})
    assert e2e.read_pairs("qa.jsonl") == [("Who?", "Me.")]


@pytest.mark.slow
def test_the_first_run_and_the_command_that_it_prints(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)  # the first run may have left its base in out/
    train.main([])
    [flags] = re.findall(r"python sample\.py (.*--lora.*)", capsys.readouterr().out)
    run(sample, flags)
    prompt, _, text = capsys.readouterr().out.partition(gpt.EOS)
    facts = dict(field.split(" : ") for field in prompt.split(" | "))
    assert toy.has_voice(text, "pirate") and toy.slots_correct(text, facts)
