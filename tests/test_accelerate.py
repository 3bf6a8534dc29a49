"""An adapter goes to two processes of accelerate and comes back, by the very lines of the README."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import make_gpt2
from transformers import GPT2LMHeadModel

from gpt import GPT, load_tokenizer
from lora import add_lora, load_lora, lora_layers, merge_lora, save_lora
from notebooks import toy
from train import load_data, settings, train

TOP = Path(__file__).parent.parent
SECTION = (TOP / "README.md").read_text(encoding="utf-8").partition("## Beyond one card")[2]
SCRIPT, BACK = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)[:2]


@pytest.mark.slow
def test_an_adapter_goes_to_two_processes_and_comes_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_gpt2("base", vocab_size=380, n_positions=128)
    Path("base", "vocab.tiktoken").write_text(toy.toy_vocabulary())
    pairs = toy.toy_pairs(toy.toy_world()[0][:700], ["pirate"])
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    Path("my.jsonl").write_text("\n".join(lines))
    model = GPT.from_pretrained("base")
    examples, held_out = load_data("my.jsonl", load_tokenizer("base"), 128)
    add_lora(model)
    train(model, examples, held_out, settings(steps=20, warmup=2))
    save_lora(model, "adapter")

    assert len(SCRIPT.splitlines()) <= 25
    Path("more.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "more.py"]
    env = os.environ | {"PYTHONPATH": str(TOP), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, "base", "my.jsonl", "adapter", "more"], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", result.stdout)]
    assert len(losses) == -(-len(examples) // 16)  # two processes, each with a batch of 8
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.1

    idx = torch.randint(380, (2, 40), generator=torch.Generator().manual_seed(0))
    back = GPT.from_pretrained("base")
    load_lora(back, "more")
    theirs = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained("base"), "more").eval()
    names = dict(GPT=GPT, load_lora=load_lora, merge_lora=merge_lora)
    exec(BACK.replace('"gpt2"', '"base"').replace('"out/more"', '"more"'), names)
    with torch.no_grad():
        wanted = theirs(idx).logits
        torch.testing.assert_close(back(idx), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(names["model"](idx), wanted, atol=1e-5, rtol=0)
        assert (model(idx) - wanted).abs().max() > 1e-2
    assert {layer.r for layer in lora_layers(back).values()} == {8} and len(lora_layers(back)) == 3 * len(model.h)
    assert not lora_layers(names["model"])
