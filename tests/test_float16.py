"""Training in float16, in which a GPU without bfloat16 (a Colab T4) computes: tried on a CPU."""

import csv
import functools
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import make_gpt2
from safetensors.torch import load_file

import train
from gpt import GPT
from lora import add_lora
from notebooks import toy

TOP = Path(train.__file__).parent


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model, and with data that it can learn."""
    folder = tmp_path_factory.mktemp("base")
    make_gpt2(folder / "model", n_embd=32, vocab_size=380, n_positions=128)
    (folder / "model" / "vocab.tiktoken").write_text(toy.toy_vocabulary())
    pairs = toy.toy_pairs(toy.toy_world()[0][:100], ["text"])
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def from_scale(monkeypatch):
    """A function that makes the loss's scale start elsewhere."""
    scaler = torch.amp.GradScaler
    return lambda scale: monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(scaler, init_scale=scale))


def fit(base, method="lora", dtype="float16", report=None, optimizer=None, stopped=(), **changes):
    """(trained parameters, log) of a run that looks at every step; the base is held as train.py holds it."""
    full = method == "full"
    model = GPT.from_pretrained(base / "model", torch.float32 if full else getattr(torch, dtype))
    if not full:
        torch.manual_seed(0)
        add_lora(model)
    params = [p.requires_grad_() for p in model.parameters() if full or p.requires_grad]
    data = train.load_data(str(base / "data.jsonl"), train.load_tokenizer(base / "model"), 128)
    recipe = dict(steps=20, batch_size=4, warmup=2, eval_every=1, lr=1e-3 if full else 5e-3)
    args = train.settings(dtype=dtype, **recipe | changes)
    optimizer = optimizer and optimizer(params)
    log = train.train(model, *data, args, report and functools.partial(report, params), optimizer, stopped)
    return params, log


@pytest.mark.parametrize("method", ["lora", "full"])
def test_losses_are_those_of_float32_but_for_rounding(base, method):
    runs = {dtype: fit(base, method, dtype) for dtype in ("float16", "float32")}
    for what in ("loss", "val_loss"):
        losses, wanted = ([row[what] for row in log] for _, log in runs.values())
        assert losses == pytest.approx(wanted, abs=0.01) and losses != wanted
        assert wanted[-1] < wanted[0] - 0.1
    assert all(p.dtype == torch.float32 for p in runs["float16"][0])  # what is trained, and so the optimizer's state


@pytest.mark.parametrize("method", ["lora", "full"])
def test_steps_that_overflow_are_skipped_and_survived(base, method, from_scale):
    from_scale(2.0**25)
    seen, optimizers = [], []

    def adamw(params):
        optimizers.append(torch.optim.AdamW(params, lr=5e-3))
        return optimizers[0]

    def report(params, row):
        seen.append([p.detach().clone() for p in params])

    _, log = fit(base, method, report=report, optimizer=adamw)
    skipped = [all(map(torch.equal, *pair)) for pair in pairwise(seen)]
    n = skipped.index(False)
    assert n >= 3 and not any(skipped[n:])  # at first all overflow; when the scale is small enough, none
    assert [row["loss"] for row in log[: n + 1]] == pytest.approx([log[0]["loss"]] * (n + 1), abs=0.3)  # other batches
    assert log[-1]["val_loss"] < log[0]["val_loss"] - 0.1
    assert all(p.isfinite().all() for p in seen[-1])
    taken = {state["step"].item() for state in optimizers[0].state.values()}
    assert taken == {len(log) - 1 - n}  # what AdamW has seen: the skipped steps taught it nothing


def test_a_run_that_goes_on_has_its_scale_bit_for_bit(base, tmp_path, from_scale):
    from_scale(2.0**25)
    whole, log = fit(base)
    stopped = []
    with pytest.raises(KeyboardInterrupt):
        fit(base, report=lambda params, row: row["step"] == 12 and stopped.append(True), stopped=stopped, out=tmp_path)
    scale = torch.load(tmp_path / "state.pt", weights_only=True)["scaler"]["scale"]
    from_scale(2.0**40)  # from which it could not come down in the steps that are left
    parts, resumed = fit(base, out=tmp_path, resume=True)
    assert scale < 2.0**25 and all(map(torch.equal, parts, whole))
    assert [(row["loss"], row["val_loss"]) for row in resumed] == [(row["loss"], row["val_loss"]) for row in log]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_command_trains_in_float16_on_a_cpu(base, method, monkeypatch):
    monkeypatch.chdir(base)
    flags = f"--model model --data data.jsonl --out {method} --method {method} --dtype float16 --device cpu --lr 5e-3"
    train.main(f"{flags} --steps 20 --warmup 2 --eval-every 5".split())
    with open(base / method / "log.csv") as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"] != "nan"]
    assert len(losses) == 4 and losses[-1] < losses[0]
    weights = load_file(next((base / method).glob("*.safetensors")))
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values())


@pytest.mark.parametrize("native, dtype", [(True, "bfloat16"), (False, "float16")])
def test_a_gpu_gets_the_16_bits_that_it_computes_in(monkeypatch, native, dtype):
    # Where it is only emulated, bfloat16 is "supported", too, but slower than float32.
    supported = lambda including_emulation=True: including_emulation or native  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert train.pick_dtype(None, torch.device("cuda")) == dtype
    assert train.pick_dtype("float32", torch.device("cuda")) == "float32"
    for device in ("cpu", "mps"):
        assert train.pick_dtype(None, torch.device(device)) == "float32"
        assert train.pick_dtype("float16", torch.device(device)) == "float16"
