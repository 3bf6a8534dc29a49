"""The methods in after.ipynb and methods.ipynb, against PEFT, published numbers or counts.

The cells that define a method have the tag `method`. They run here after the cell of imports.
"""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import peft
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import make_gpt2, random_tokens
from peft.optimizers import create_loraplus_optimizer

from gpt import GPT, GPTConfig
from lora import add_lora, lora_layers, merge_lora, set_lora_layers

CONFIG = GPTConfig(block_size=64, vocab_size=97, n_layer=2, n_head=4, n_embd=32)
TARGETS = ["c_proj"]  # attn.c_proj and mlp.c_proj: two shapes, and not the fused c_attn
IDX, NEXT_IDS = random_tokens(3, 9), random_tokens(3, 9, seed=2)
PEFT_NAMES = {"lora_A": "lora_A", "lora_B": "lora_B", "magnitude": "lora_magnitude_vector"}
PEFT_NAMES |= {"d": "vera_lambda_d", "b": "vera_lambda_b"}  # of our parameters


def load_methods(filename):
    """What the method cells of a notebook define."""
    path = Path(__file__).parent.parent / "notebooks" / filename
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    names = {"config": CONFIG, "MODEL": None}
    exec(next(cell.source for cell in cells if "\nimport torch\n" in cell.source), names)
    for cell in cells:
        if "method" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    return SimpleNamespace(**names)


AFTER = load_methods("after.ipynb")
METHODS = load_methods("methods.ipynb").METHODS  # {name: (prepare, budget)}


@pytest.fixture
def base(tmp_path):
    make_gpt2(tmp_path)
    return GPT.from_pretrained(tmp_path)


def with_lora(base, alpha=8):
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    add_lora(model, r=4, alpha=alpha, targets=TARGETS)
    return model


def replace_lora(model, new_layer):
    set_lora_layers(model, {name: new_layer(m.linear) for name, m in lora_layers(model).items()})


def with_peft_lora(**options):
    """PEFT's model on the same base."""
    config = dict(r=4, lora_alpha=8, target_modules=TARGETS, fan_in_fan_out=True) | options
    return peft.get_peft_model(make_gpt2(), peft.LoraConfig(**config))


def peft_layer(peft_model, name):
    return peft_model.base_model.model.transformer.get_submodule(name)


def param_pairs(model, peft_model):
    """(our parameter, PEFT's parameter) of all adapted layers."""
    for name, layer in lora_layers(model).items():
        for our_name in PEFT_NAMES.keys() & vars(layer)["_parameters"].keys():
            p = getattr(peft_layer(peft_model, name), PEFT_NAMES[our_name])["default"]
            yield getattr(layer, our_name), getattr(p, "weight", p)


def copy_params(model, peft_model):
    for ours, theirs in param_pairs(model, peft_model):
        ours.data.copy_(theirs.view_as(ours))


def peft_loss(peft_model, idx, next_ids):
    return F.cross_entropy(peft_model(idx).logits.flatten(0, 1), next_ids.flatten())


def train(loss, optimizer):
    for i in range(3):
        loss(random_tokens(3, 9, seed=i), random_tokens(3, 9, seed=10 + i)).backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def assert_close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b.view_as(a), atol=tolerance, rtol=tolerance)


@torch.no_grad()
def assert_same_logits(model, other):
    assert_close(model(IDX), other(IDX) if isinstance(other, GPT) else other(IDX).logits)


def assert_trains_as_peft(model, optimizer, peft_model, peft_optimizer):
    train(model, optimizer)
    train(lambda *batch: peft_loss(peft_model, *batch), peft_optimizer)
    for ours, theirs in param_pairs(model, peft_model):
        assert_close(ours, theirs)


def assert_equals_peft(model, peft_model, base):
    """It starts as the base, has PEFT's logits when trained, and merges into a plain GPT."""
    assert_same_logits(model, base)
    for p in filter(lambda p: p.requires_grad, peft_model.parameters()):  # as after training
        nn.init.normal_(p, std=0.25)
    copy_params(model, peft_model)
    assert_same_logits(model, peft_model)
    merge_lora(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert_same_logits(model, peft_model)


# ---- after.ipynb ----


def test_rslora_equals_peft(base):
    model = with_lora(base)
    AFTER.rank_stabilized(model)
    assert_equals_peft(model, with_peft_lora(use_rslora=True), base)


def test_loraplus_trains_as_peft(base):
    model, theirs = with_lora(base), with_peft_lora()
    copy_params(model, theirs)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    assert_trains_as_peft(model, AFTER.loraplus(model, 1e-3, ratio=16), theirs, optimizer)


def test_lora_fa_trains_as_peft_with_a_frozen_A(base):
    model, theirs = with_lora(base), with_peft_lora()
    copy_params(model, theirs)
    AFTER.freeze_A(model)
    for name, p in theirs.named_parameters():
        p.requires_grad_("lora_B" in name)
    assert_trains_as_peft(model, adamw(model), theirs, adamw(theirs))


def test_pissa_equals_peft(base):
    model, theirs = with_lora(base), with_peft_lora(init_lora_weights="pissa")
    AFTER.pissa(model)
    for name, layer in lora_layers(model).items():
        assert_close(layer.linear.weight, peft_layer(theirs, name).base_layer.weight.T.contiguous())
    assert_equals_peft(model, theirs, base)


def test_dora_equals_peft(base):
    model, theirs = with_lora(base), with_peft_lora(use_dora=True)
    replace_lora(model, lambda linear: AFTER.DoRALinear(linear, r=4, alpha=8))
    assert_equals_peft(copy.deepcopy(model), theirs, base)
    copy_params(model, theirs)
    model(IDX, NEXT_IDS).backward()
    peft_loss(theirs, IDX, NEXT_IDS).backward()
    for ours, peft_param in param_pairs(model, theirs):
        assert_close(ours.grad, peft_param.grad)


def test_vera_equals_peft(base):
    config = peft.VeraConfig(r=16, target_modules=TARGETS, fan_in_fan_out=True)
    model, theirs = with_lora(base), peft.get_peft_model(make_gpt2(), config)
    A, B = theirs.base_model.vera_A["default"], theirs.base_model.vera_B["default"]
    replace_lora(model, lambda linear: AFTER.VeRALinear(linear, A, B))
    assert_equals_peft(model, theirs, base)
    drawn = with_lora(base)
    AFTER.share_random(drawn, r=16)
    layer = drawn.h[0].mlp.c_proj  # the largest
    assert drawn.h[1].attn.c_proj.A.data_ptr() == layer.A.data_ptr()
    assert_close(layer.A.std(), A.std(), tolerance=0.1)
    assert_close(layer.B.std(), B.std(), tolerance=0.1)


def test_nf4_rounds_to_the_nearest_published_level():
    levels = torch.tensor([float(x) for x in AFTER.published.split()])
    W = random_tokens(32, 128, vocab_size=1000) / 500 - 1.0
    numbers, largest = AFTER.quantize(W)
    nearest = (W.reshape(-1, 64, 1) / largest[..., None] - levels).abs().argmin(-1)
    assert torch.equal(AFTER.unpack(AFTER.pack(numbers)).long(), nearest)
    assert_close(AFTER.dequantize(numbers, largest, W.shape), levels[nearest] * largest)


def test_qlora_is_lora_on_rounded_weights(base):
    model, rounded, saved_shapes = with_lora(base), with_lora(base), []
    for layer in [m for m in rounded.modules() if isinstance(m, nn.Linear)]:
        layer.weight.data = AFTER.dequantize(*AFTER.quantize(layer.weight), layer.weight.shape)
    AFTER.in_four_bits(model)
    hooks = (lambda t: saved_shapes.append(t.shape) or t), (lambda t: t)
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        loss = model(IDX, NEXT_IDS)
    loss.backward()
    rounded(IDX, NEXT_IDS).backward()
    for name, layer in lora_layers(model).items():
        assert layer.linear.shape not in saved_shapes  # the backward pass dequantizes again
        assert_close(layer.lora_B.grad, rounded.get_submodule(name).lora_B.grad)


def test_a_batch_of_many_adapters_equals_each_alone(base):
    models, rows = [with_lora(base) for _ in range(3)], [2, 0, 1]
    for layer in [layer for model in models for layer in lora_layers(model).values()]:
        nn.init.normal_(layer.lora_B)
    server = AFTER.together(models)
    AFTER.choose(server, torch.tensor(rows))
    alone = [models[row](IDX[i : i + 1]) for i, row in enumerate(rows)]
    assert_close(server(IDX), torch.cat(alone))


# ---- methods.ipynb ----

V, T, L, C = CONFIG.vocab_size, CONFIG.block_size, CONFIG.n_layer, CONFIG.n_embd
BLOCK = 12 * C * C + 13 * C  # parameters of a block
TRAINED = {  # {method: (how many parameters it trains with a budget, their names)}
    "LoRA, q v": (lambda r: L * 2 * r * 2 * C, r"c_[qv]\.lora_[AB]"),
    "LoRA, all": (lambda r: L * r * 18 * C, r"lora_[AB]"),
    "BitFit": (lambda _: L * 11 * C + C, r"bias"),
    "top block": (lambda n: n * BLOCK, r"h\.\d+\."),
    "prefix-embedding": (lambda length: length * C, r"prefix"),
    "prefix-layer": (lambda length: L * length * C, r"prefix"),
    "Adapter^H": (lambda w: L * 2 * (2 * C * w + w + C), r"(attn|mlp)\.(down|up)\."),
    "Adapter^L": (lambda w: L * (2 * C * w + w + C + 2 * C), r"mlp\.(norm|down|up)\."),
    "full": (lambda _: (V + T) * C + L * BLOCK + 2 * C, r""),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods(method):
    (prepare, budget), (n_trained, names) = METHODS[method], TRAINED[method]
    torch.manual_seed(0)
    base = GPT(CONFIG).requires_grad_(False)
    model = copy.deepcopy(base)
    prepare(model, budget)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == n_trained(budget)
    assert all(re.search(names, name) for name in trained)
    if "prefix" not in method:
        assert_same_logits(model, base)
    for p in model.parameters():  # as after training
        p.data += 0.05 * torch.randn_like(p)
    tokens = torch.stack(list(model.generate(IDX, 4, temperature=0)), dim=1)
    logits = model(torch.cat([IDX, tokens], dim=1))  # without the KV cache
    assert torch.equal(logits[:, IDX.shape[1] - 1 : -1].argmax(-1), tokens)
    model(IDX, NEXT_IDS).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained.keys()
