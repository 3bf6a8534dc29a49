"""Several devices: this script trains an adapter with `accelerate`, one process per device.

import sys
import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import GPT2LMHeadModel
from train import collate, load_data, load_tokenizer

base, data, adapter, out = sys.argv[1:]
accelerator = Accelerator()
model = GPT2LMHeadModel.from_pretrained(base)
model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
train_data, _ = load_data(data, load_tokenizer(base), model.config.n_positions)
loader = torch.utils.data.DataLoader(
    train_data, batch_size=8, shuffle=True, collate_fn=lambda batch: collate(batch, "cpu")
)
params = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(params, lr=1e-2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for idx, targets in loader:  # each process gets other batches
    logits = model(input_ids=idx).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    accelerator.backward(loss)  # averages the gradients of all processes
    optimizer.step()
    optimizer.zero_grad()
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(out)
"""

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from commands import make_base, toy_pairs, write_jsonl
from conftest import random_tokens
from transformers import GPT2LMHeadModel

import gpt
from gpt import GPT
from lora import add_lora, load_lora, lora_layers, merge_lora, save_lora

SCRIPT = __doc__.partition("\n\n")[2]


@pytest.mark.slow
def test_an_adapter_is_trained_on_in_two_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_base("base", n_layer=2, n_embd=32)
    write_jsonl("data.jsonl", toy_pairs(200))
    model = GPT.from_pretrained("base")
    add_lora(model)
    save_lora(model, "adapter")

    Path("more.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += "--nproc-per-node 2 more.py base data.jsonl adapter more".split()
    env = {"PYTHONPATH": str(Path(gpt.__file__).parent), "ACCELERATE_USE_CPU": "true"}
    env = os.environ | env | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    theirs = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained("base"), "more")
    trained = GPT.from_pretrained("base")
    load_lora(trained, "more")
    # PEFT trains the zeros of the fused B, too. So rank 4 on q and v becomes rank 8 on q, k, v.
    assert len(lora_layers(trained)) == 3 * len(model.h)
    assert {layer.r for layer in lora_layers(trained).values()} == {8}
    merge_lora(trained)
    idx = random_tokens(2, 40, model.config.vocab_size)
    with torch.no_grad():
        expected = theirs.eval()(idx).logits
        torch.testing.assert_close(trained(idx), expected, atol=1e-5, rtol=0)
        assert (model(idx) - expected).abs().max() > 1e-3
