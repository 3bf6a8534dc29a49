"""lora.py: the layer, the model, merging, against loralib and plain formulas."""

import loralib
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import assert_refused, assert_same_weights, lora_model, random_tokens

from gpt import GPT
from lora import LoRALinear, add_lora, lora_layers, merge_lora, unmerge_lora

ALL = ("c_q", "c_k", "c_v", "c_proj", "c_fc")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDX = random_tokens(2, 16)


def lora_linear(in_features=24, out_features=40, r=4, alpha=32, dropout=0.0):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(in_features, out_features), r, alpha, dropout)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


# ---- The layer ----


def test_A_starts_random_as_in_loralib_and_B_at_zero():
    torch.manual_seed(0)
    ours, theirs = LoRALinear(nn.Linear(4000, 8), 8, 32), loralib.Linear(4000, 8, 8)
    assert ours.lora_A.std().item() == pytest.approx(theirs.lora_A.std().item(), rel=0.02)
    assert not ours.lora_B.any()


@pytest.mark.parametrize("r", [1, 3, 24])
def test_output_and_gradients_equal_those_of_loralib(r):
    ours = lora_linear(r=r)
    theirs = loralib.Linear(24, 40, r, lora_alpha=32, merge_weights=False)
    theirs.load_state_dict({n.removeprefix("linear."): p for n, p in ours.state_dict().items()})
    x = torch.randn(5, 24)
    torch.testing.assert_close(ours(x), theirs(x))
    grads = [torch.autograd.grad(m(x).mean(), [m.lora_A, m.lora_B]) for m in (ours, theirs)]
    torch.testing.assert_close(*grads)


def test_dropout_acts_on_the_input_of_A_and_only_in_training():
    layer, x = lora_linear(dropout=0.3), torch.randn(5, 24)
    torch.manual_seed(1)
    h = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(h, layer.linear(x) + F.dropout(x, 0.3) @ layer.delta_weight().T)
    torch.testing.assert_close(layer.eval()(x), layer.linear(x) + x @ layer.delta_weight().T)


# ---- The model ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_lora_layers_share_W0_and_change_no_logit(base_dir, dtype):
    model = GPT.from_pretrained(base_dir, dtype)
    W0, logits = model.h[0].attn.c_q.weight, model(IDX)
    add_lora(model, targets=ALL)
    assert model.h[0].attn.c_q.linear.weight is W0
    assert torch.equal(model(IDX), logits)


def test_a_target_is_the_end_of_a_dotted_name(base_dir):
    model = lora_model(base_dir, targets=["attn.c_proj", "1.mlp.c_fc"])
    assert set(lora_layers(model)) == {"h.0.attn.c_proj", "h.1.attn.c_proj", "h.1.mlp.c_fc"}


@pytest.mark.parametrize("target", ["c_x", "proj", "wte"])
def test_an_unknown_target_is_refused_and_changes_nothing(base_dir, target):
    model = GPT.from_pretrained(base_dir)
    match = rf"{target}.*attn\.c_q.*mlp\.c_fc"
    assert_refused(match, add_lora, model, targets=["c_q", target])
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_adding_or_merging_twice_is_refused(base_dir):
    model = lora_model(base_dir)
    assert_refused("already", add_lora, model)
    merge_lora(model)
    assert_refused("already", add_lora, model)
    assert_refused("already", merge_lora, model)


def test_printing_the_model_shows_r_and_alpha(base_dir):
    assert "r=3, alpha=20" in str(lora_model(base_dir, r=3, alpha=20))


# ---- Merging ----


def test_a_merged_model_is_a_plain_gpt_with_the_same_logits(base_dir):
    model, base = lora_model(base_dir, targets=ALL), GPT.from_pretrained(base_dir)
    expected = model(IDX)
    merge_lora(model)
    assert str(model) == str(base)
    assert model.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(model(IDX), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerging_restores_every_bit_after_100_merges(base_dir, dtype):
    model, untouched = (lora_model(base_dir, dtype, targets=ALL) for _ in range(2))
    for _ in range(100):
        merge_lora(model)
        unmerge_lora(model)
    assert_same_weights(model, untouched)
    assert str(model) == str(untouched)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_rounds_once(base_dir, dtype):
    model = lora_model(base_dir, dtype)
    layer = model.h[0].attn.c_q
    exact = layer.linear.weight.double() + layer.delta_weight().double()
    merge_lora(model)
    error = (model.h[0].attn.c_q.weight.double() - exact).abs()
    assert (error <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-7).all()
