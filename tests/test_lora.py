"""lora.py against loralib, PEFT, plain formulas, and the paper's numbers."""

import json
import math
import shutil
from pathlib import Path

import loralib
import peft
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from conftest import make_gpt2
from safetensors.torch import load, save

import gpt
import lora
from gpt import GPT, GPTConfig
from lora import QKV, LoRALinear, add_lora, load_lora, lora_layers, merge_lora, save_lora, unmerge_lora

QV, EVERY = ("c_q", "c_v"), ("c_q", "c_k", "c_v", "c_proj", "c_fc")
WIDTH = 32  # n_embd of make_gpt2
IDX = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(1))


def make_base(dir, **sizes):
    make_gpt2(dir, **sizes)
    return dir


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the weights of make_gpt2()."""
    return make_base(tmp_path_factory.mktemp("base"))


def adapted(base, r=4, targets=QV, alpha=32, dropout=0.0, dtype=torch.float32):
    """A model with adapters as they are after training: B is not zero."""
    model = GPT.from_pretrained(base, dtype=dtype)
    torch.manual_seed(r)
    add_lora(model, r, alpha, dropout, targets)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.02)
    return model


def in_state(state, base):
    model = GPT.from_pretrained(base) if state == "plain" else adapted(base, r=2, targets=("c_q", "c_fc"))
    if state == "merged":
        merge_lora(model)
    return model


@torch.no_grad()
def logits(model):
    return getattr(y := model(IDX), "logits", y)


def fingerprint(model):
    """What a refused call may not touch: each module's type and mode, each parameter's bits and whether it trains."""
    bits = {name: hash(p.detach().view(torch.uint8).numpy().tobytes()) for name, p in model.named_parameters()}
    modules = {name: (type(m), m.training) for name, m in model.named_modules()}
    return modules | {name: (bits[name], p.dtype, p.requires_grad) for name, p in model.named_parameters()}


def assert_close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


# ---- The layer ---------------------------------------------------------------------------------------------


def with_gradients(y, *parameters):
    """y, and the gradient of some scalar of y for all the parameters, one after the other."""
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return y, torch.cat([g.flatten() for g in torch.autograd.grad(y, parameters, dy)])


@pytest.mark.parametrize("n_in, n_out", [(24, 24), (24, 96), (96, 24)])
@pytest.mark.parametrize("r", [1, 3, 4, 24])
def test_outputs_and_gradients_are_those_of_loralib(r, n_in, n_out):
    torch.manual_seed(0)
    theirs = loralib.Linear(n_in, n_out, r, lora_alpha=32, merge_weights=False)
    ours = LoRALinear(nn.Linear(n_in, n_out), r, alpha=32)
    nn.init.normal_(ours.lora_B)
    theirs.load_state_dict({name.removeprefix("linear."): p for name, p in ours.state_dict().items()})
    x = torch.randn(2, 5, n_in, requires_grad=True)
    pairs = (with_gradients(layer(x), x, layer.lora_A, layer.lora_B) for layer in (ours, theirs))
    for a, b in zip(*pairs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("r", [1, 3, 4, 24])
def test_query_and_value_are_those_of_loralibs_merged_linear(r):
    torch.manual_seed(0)
    theirs = loralib.MergedLinear(24, 72, r, lora_alpha=32, enable_lora=[True, False, True], merge_weights=False)
    nn.init.normal_(theirs.lora_B)
    q, k, v = (nn.Linear(24, 24) for _ in QKV)
    for part, weight, bias in zip((q, k, v), theirs.weight.chunk(3), theirs.bias.chunk(3), strict=True):
        part.load_state_dict(dict(weight=weight, bias=bias))
    q, v = (LoRALinear(part, r, alpha=32) for part in (q, v))
    for part, A, B in zip((q, v), theirs.lora_A.chunk(2), theirs.lora_B.chunk(2), strict=True):
        part.load_state_dict(part.state_dict() | dict(lora_A=A, lora_B=B))
    x = torch.randn(2, 5, 24, requires_grad=True)
    ours = with_gradients(torch.cat([q(x), k(x), v(x)], -1), x, q.lora_A, v.lora_A, q.lora_B, v.lora_B)
    for a, b in zip(ours, with_gradients(theirs(x), x, theirs.lora_A, theirs.lora_B), strict=True):
        assert_close(a, b)


def test_A_starts_gaussian_and_B_at_zero():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(4000, 8), r=8, alpha=32)
    A = layer.lora_A * (3 * 4000) ** 0.5
    # The fourth moment of a uniform distribution would be 1.8.
    assert [A.pow(n).mean().item() for n in (1, 2, 4)] == pytest.approx([0, 1, 3], abs=0.1)
    assert not layer.lora_B.any()


def test_dropout_is_on_what_A_sees_and_in_training_only():
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(24, 16), r=4, alpha=32, dropout=0.3), torch.randn(5, 24)
    nn.init.normal_(layer.lora_B)
    torch.manual_seed(1)
    ours = layer(x)
    torch.manual_seed(1)
    assert_close(ours, layer.linear(x) + 8 * F.dropout(x, 0.3) @ layer.lora_A.T @ layer.lora_B.T)
    assert_close(layer.eval()(x), layer.linear(x) + x @ layer.delta().T)


# ---- The model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [QV, EVERY])
def test_an_adapted_model_starts_as_its_base(base, targets):
    model = GPT.from_pretrained(base)
    add_lora(model, targets=targets)
    assert torch.equal(logits(model), logits(GPT.from_pretrained(base)))


def test_training_changes_A_and_B_and_nothing_else(base):
    model = GPT.from_pretrained(base).train()
    add_lora(model, dropout=0.1)
    before = fingerprint(model)
    adapters = {f"{name}.{p}" for name in lora_layers(model) for p in ("lora_A", "lora_B")}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDX[:, :-1], IDX[:, 1:]).backward()
        optimizer.step()
    assert {name for name, value in fingerprint(model).items() if value != before[name]} == adapters


@pytest.mark.parametrize("targets", ["c_proj", "attn.c_proj", "mlp.c_proj c_q", "h.1.mlp.c_fc", "1.attn.c_k"])
def test_targets_match_as_pefts_do(targets):
    ours, theirs = (GPT(GPTConfig(n_layer=12, n_embd=12, vocab_size=97)) for _ in range(2))  # has h.1 and h.11
    add_lora(ours, targets=targets.split())
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets.split()), theirs)
    chosen = {name for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert lora_layers(ours).keys() == chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_shared_and_adapters_are_float32(base, dtype):
    model = GPT.from_pretrained(base, dtype=dtype)
    before = model.h[0].attn.c_q.weight.data_ptr()
    add_lora(model)
    assert model.h[0].attn.c_q.linear.weight.data_ptr() == before
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == dtype


# Sections 4.2 and 5 of the paper: the numbers that r = 4 on query and value trains, and those of the whole model.
GPT3 = GPTConfig(block_size=2048, n_layer=96, n_head=96, n_embd=12288)
COUNTS = [(gpt.PRETRAINED["gpt2-medium"], 393_216, 354.8e6), (GPT3, 18_874_368, 174.6e9)]


@pytest.mark.parametrize("config, trained, total", COUNTS, ids=["GPT-2 medium", "GPT-3"])
def test_trained_parameters_are_as_many_as_the_papers(config, trained, total):
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(total, rel=1e-3)
    add_lora(model, r=4, targets=QV)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


# ---- Merging -----------------------------------------------------------------------------------------------


def test_a_merged_model_is_a_plain_gpt(base, tmp_path):
    plain, model = GPT.from_pretrained(base), adapted(base)
    expected = logits(model)
    merge_lora(model)
    assert [(name, type(m)) for name, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    assert_close(logits(transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_restores_every_bit_after_1000_rounds(base, dtype):
    model = adapted(base, dtype=dtype)
    before = fingerprint(model)
    for _ in range(1000):
        merge_lora(model)
        unmerge_lora(model)
    assert fingerprint(model) == before


ROUNDING = [
    (torch.float32, torch.int32, 1e-5),
    (torch.bfloat16, torch.int16, 0.02),
    (torch.float16, torch.int16, 0.002),
]


@pytest.mark.parametrize("dtype, bits, tolerance", ROUNDING)
def test_merging_is_off_by_the_rounding_of_the_dtype(base, dtype, bits, tolerance):
    model = adapted(base, targets=EVERY, dtype=dtype)
    expected = {n: (m.linear.weight.double() + m.delta().double()).to(dtype) for n, m in lora_layers(model).items()}
    unmerged = logits(model)
    merge_lora(model)
    assert_close(logits(model), unmerged, tolerance)
    for name, weight in expected.items():  # as integers, neighbouring floats differ by one
        assert (model.get_submodule(name).weight.view(bits).long() - weight.view(bits)).abs().max() <= 1


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_set_while_merged_stays(base, training):
    model = adapted(base).train(not training)
    merge_lora(model)
    model.train(training)
    unmerge_lora(model)
    assert {m.training for m in model.modules()} == {training}


MISUSES = {
    "merge a plain model": ("plain", merge_lora, "nothing to merge"),
    "merge twice": ("merged", merge_lora, "merged already"),
    "unmerge a plain model": ("plain", unmerge_lora, "nothing to unmerge"),
    "unmerge twice": ("adapted", unmerge_lora, "nothing to unmerge"),
    "save a plain model": ("plain", lambda model: save_lora(model, "out"), "nothing to save"),
    "save a merged model": ("merged", lambda model: save_lora(model, "out"), "nothing to save.*merged"),
    "add twice": ("adapted", add_lora, "already"),
    "add to a merged model": ("merged", add_lora, "already"),
    "rank 0": ("plain", lambda model: add_lora(model, r=0), "1 to 32"),
    "rank above the width": ("plain", lambda model: add_lora(model, r=33), "r = 33.*32 x 32"),
    "unknown target": ("plain", lambda model: add_lora(model, targets=["c_q", "c_x"]), r"'c_x'.*attn\.c_proj.*c_q"),
    "half a name": ("plain", lambda model: add_lora(model, targets=["proj"]), "'proj'.*c_proj"),  # as in PEFT
}


@pytest.mark.parametrize("state, misuse, message", MISUSES.values(), ids=MISUSES)
def test_misuse_is_refused_and_changes_nothing(base, tmp_path, monkeypatch, state, misuse, message):
    monkeypatch.chdir(tmp_path)
    model = in_state(state, base)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        misuse(model)
    assert fingerprint(model) == before
    assert not any(tmp_path.iterdir())


# ---- Files -------------------------------------------------------------------------------------------------

TARGETS = [QV, ("c_q",), ("c_k",), QKV, ("c_q", "c_v", "c_proj"), ("mlp.c_proj",), EVERY]
ADAPTERS = [(targets, 3) for targets in TARGETS] + [(targets, r) for targets in (QV, EVERY) for r in (1, 4, WIDTH)]


@pytest.mark.parametrize("targets, r", ADAPTERS)
def test_peft_loads_what_we_save_and_computes_the_same_outputs_and_gradients(base, tmp_path, targets, r):
    ours = adapted(base, r, targets)
    save_lora(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_gpt2(), tmp_path, is_trainable=True).eval()
    transformer, dy = theirs.base_model.model.transformer, torch.randn(2, 16, 97)
    for wpe in (ours.wpe, transformer.wpe):  # the gradient of the positions stands for the input's
        wpe.requires_grad_()
    assert not torch.allclose(logits(ours), logits(GPT.from_pretrained(base)), atol=0.01)
    assert_close(logits(ours), logits(theirs))
    ours(IDX).backward(dy)
    theirs(IDX).logits.backward(dy)
    assert_close(ours.wpe.weight.grad, transformer.wpe.weight.grad)
    for name, layer in lora_layers(ours).items():
        block, _, part = name.rpartition(".")
        fused = transformer.get_submodule(f"{block}.c_attn" if part in QKV else name)
        dA, dB = (p["default"].weight.grad for p in (fused.lora_A, fused.lora_B))
        if part in QKV:
            i = [p for p in QKV if p in targets].index(part)
            dA, dB = dA.split(r)[i], dB.chunk(3)[QKV.index(part)].split(r, dim=1)[i]
        assert_close(layer.lora_A.grad, dA)
        assert_close(layer.lora_B.grad, dB)


@pytest.mark.parametrize("targets, r", ADAPTERS)
def test_a_saved_adapter_is_itself_again(base, tmp_path, targets, r):
    model, again = adapted(base, r, targets, alpha=20, dropout=0.1), GPT.from_pretrained(base)
    save_lora(model, tmp_path)
    load_lora(again, tmp_path)
    assert fingerprint(again) == fingerprint(model)
    assert torch.equal(logits(again), logits(model))
    assert {(layer.r, layer.alpha, layer.dropout) for layer in lora_layers(again).values()} == {(r, 20, 0.1)}


PEFT_CONFIGS = {
    "c_attn": dict(target_modules=["c_attn"]),
    "c_proj": dict(target_modules=["c_proj"]),
    "c_fc": dict(target_modules=["c_fc"], init_lora_weights="gaussian", lora_dropout=0.1),
    "any but": dict(target_modules="all-linear", exclude_modules=["mlp.c_proj"]),
    "one layer": dict(target_modules=["c_attn", "mlp.c_proj"], layers_to_transform=[1], layers_pattern="h"),
    "regular expression": dict(target_modules=r".*h\.1\.(attn|mlp)\.c_.*"),
    "ranks": dict(target_modules=["c_attn", "c_proj"], rank_pattern={"attn.c_proj": 2, "h.1.attn.c_attn": 7}),
    "alphas": dict(target_modules=["c_attn", "c_fc"], alpha_pattern={"h.0.mlp.c_fc": 3, "c_attn": 50}),
    "two alphas": dict(target_modules=["c_attn"], alpha_pattern={"c_attn": 50, "0.attn.c_attn": 5}),  # PEFT sorts them
}


@pytest.mark.parametrize("kind", [transformers.GPT2LMHeadModel, transformers.GPT2Model])
@pytest.mark.parametrize("config", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_we_load_what_peft_saves(base, tmp_path, config, kind):
    model = peft.get_peft_model(kind.from_pretrained(base), peft.LoraConfig(r=5, fan_in_fan_out=True, **config))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(base), tmp_path).eval()
    plain, ours = GPT.from_pretrained(base), GPT.from_pretrained(base)
    load_lora(ours, tmp_path)
    with torch.no_grad():
        assert not torch.allclose(ours.hidden(IDX), plain.hidden(IDX), atol=0.01)
        assert_close(ours.hidden(IDX), theirs(IDX, output_hidden_states=True).hidden_states[-1])


def test_we_load_what_peft_has_not_trained(base, tmp_path):
    theirs = peft.get_peft_model(make_gpt2(), peft.LoraConfig(r=5, target_modules=["c_attn"], fan_in_fan_out=True))
    theirs.save_pretrained(tmp_path)
    load_lora(model := GPT.from_pretrained(base), tmp_path)
    assert torch.equal(logits(model), logits(GPT.from_pretrained(base)))
    A = theirs.base_model.model.transformer.h[1].attn.c_attn.lora_A["default"].weight
    assert all(torch.equal(model.h[1].attn.get_submodule(part).lora_A, A) for part in QKV)


@pytest.mark.parametrize("state", ["adapted", "merged"])
def test_swapping_adapters_leaves_no_trace(base, tmp_path, state):
    save_lora(adapted(base, r=4), tmp_path / "first")
    save_lora(adapted(base, r=3, targets=("c_k", "c_proj")), tmp_path / "second")
    model, fresh = in_state(state, base), GPT.from_pretrained(base)
    load_lora(fresh, tmp_path / "first")
    for name in ("first", "second", "first"):
        load_lora(model, tmp_path / name)
        last = fingerprint(model), logits(model)
        if state == "merged":
            merge_lora(model)
    assert last[0] == fingerprint(fresh)
    assert torch.equal(last[1], logits(fresh))


# ---- Adapters that are refused -----------------------------------------------------------------------------

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A = "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"
B = A.replace("lora_A", "lora_B")


def content(name, edit):
    return lambda dir: (dir / name).write_bytes(edit((dir / name).read_bytes()))


def setting(**changes):
    return content(CONFIG, lambda file: json.dumps(json.loads(file) | changes).encode())


def tensors(edit):
    return content(WEIGHTS, lambda file: save(edit(load(file))))


def by_peft(target, **config):
    config = peft.LoraConfig(target_modules=[target], fan_in_fan_out=True, init_lora_weights=False, **config)
    return lambda dir: peft.get_peft_model(make_gpt2(), config).save_pretrained(dir)


def for_another_base(**sizes):
    return lambda dir: save_lora(adapted(make_base(dir / "base", **sizes)), dir)


NOT_BUILT = dict(use_dora=True, use_rslora=True, modules_to_save=["lm_head"], bias="all", lora_bias=True)
NOT_BUILT |= dict(trainable_token_indices=[1], init_lora_weights="pissa", layer_replication=[[0, 1]], peft_type="LOHA")
DAMAGES = {key: (setting(**{key: value}), ValueError, key) for key, value in NOT_BUILT.items()} | {
    "bias of LoRA only": (setting(bias="lora_only"), ValueError, "bias = 'lora_only'"),
    "OLoRA": (setting(init_lora_weights="olora"), ValueError, "init_lora_weights = 'olora'"),
    "embeddings by PEFT": (by_peft("wte"), ValueError, "wte"),
    "head by PEFT": (by_peft("lm_head"), ValueError, "lm_head"),
    "rank above the width": (by_peft("c_fc", r=33), ValueError, "r = 33"),
    "a wider base": (for_another_base(n_embd=64), ValueError, r"\(64, 64\).*\(32, 32\)"),
    "a deeper base": (for_another_base(n_layer=3), ValueError, r"h\.2\."),
    "no folder": (shutil.rmtree, ValueError, CONFIG),
    "no config": (lambda dir: (dir / CONFIG).unlink(), ValueError, CONFIG),
    "no weights": (lambda dir: (dir / WEIGHTS).unlink(), ValueError, WEIGHTS),
    "cut-off weights": (content(WEIGHTS, lambda file: file[:-1]), ValueError, "cannot use"),
    "no tensors": (tensors(lambda weights: {}), ValueError, "cannot use"),
    "config not JSON": (content(CONFIG, lambda file: file[:-9]), ValueError, "cannot use"),
    "config not an object": (content(CONFIG, lambda file: b"[]"), ValueError, "cannot use"),
    "no alpha": (content(CONFIG, lambda file: file.replace(b"lora_alpha", b"revision")), ValueError, "lora_alpha"),
    "alpha a string": (setting(lora_alpha="16"), ValueError, "cannot use"),
    "A without B": (tensors(lambda weights: {A: weights[A]}), ValueError, A),
    "B without A": (tensors(lambda weights: {B: weights[B]}), ValueError, A),
    "rank 0": (tensors(lambda weights: weights | {A: weights[A][:0], B: weights[B][:, :0] + 0}), ValueError, A),
    "not a number": (tensors(lambda weights: weights | {A: weights[A] * math.nan}), ValueError, "not finite"),
    "infinite": (tensors(lambda weights: weights | {B: weights[B] / 0}), ValueError, "not finite"),
    "alpha infinite": (setting(lora_alpha=math.inf), ValueError, "not finite"),
    "A and B of two ranks": (tensors(lambda weights: weights | {A: weights[A][1:].clone()}), ValueError, A),
}


@pytest.mark.parametrize("state", ["plain", "adapted", "merged"])
@pytest.mark.parametrize("damage, error, culprit", DAMAGES.values(), ids=DAMAGES)
def test_what_cannot_be_used_is_refused_in_one_line_and_changes_nothing(base, tmp_path, damage, error, culprit, state):
    save_lora(adapted(base), tmp_path / "adapter")
    damage(tmp_path / "adapter")
    model = in_state(state, base)
    before = fingerprint(model)
    with pytest.raises(error, match=culprit) as e:
        load_lora(model, tmp_path / "adapter")
    assert "\n" not in str(e.value)
    assert fingerprint(model) == before


@pytest.mark.parametrize("owner, write, path", [(lora, "save_file", 1), (Path, "write_text", 0)])
def test_a_save_that_fails_leaves_the_earlier_adapter(base, tmp_path, monkeypatch, owner, write, path):
    def fill_the_disk(*args, **kwargs):
        Path(args[path]).write_bytes(b"half")
        raise OSError("disk full")

    save_lora(adapted(base), tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(owner, write, fill_the_disk)
    with pytest.raises(OSError, match="disk full"):
        save_lora(adapted(base, r=2, alpha=1), tmp_path)
    assert {file: file.read_bytes() for file in before} == before
