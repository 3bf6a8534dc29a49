"""after.ipynb's methods, taken out of its cells, against PEFT, and NF4 against its published table.

The cells that define a method carry the tag `method`; they are run here in order, with lora.py's names and no others.
"""

import copy
import statistics
from pathlib import Path

import nbformat
import peft
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import make_gpt2
from peft.optimizers import create_loraplus_optimizer

import lora
from gpt import GPT

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "after.ipynb"


def methods():
    names = {"copy": copy, "torch": torch, "nn": nn, "F": F, "statistics": statistics}
    names |= {name: getattr(lora, name) for name in ("LoRALinear", "lora_layers", "swap")}
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        if "method" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    return names


M = methods()
TOLERANCE = 1e-5
TARGETS = ["c_proj"]  # attn.c_proj and mlp.c_proj: two shapes, and not the fused c_attn


@pytest.fixture
def base(tmp_path):
    """Our GPT, and a function that gives PEFT's model of the same base."""
    make_gpt2(tmp_path)
    return GPT.from_pretrained(tmp_path), lambda config: peft.get_peft_model(make_gpt2(), config)


def lora_config(r=4, alpha=8, **changes):
    return peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=TARGETS, fan_in_fan_out=True, **changes)


def with_lora(model, r=4, alpha=8):
    lora.add_lora(model, r, alpha, targets=TARGETS)
    return model


def with_dora(model):
    layers = lora.lora_layers(with_lora(model))
    lora.swap(model, {name: M["DoRALinear"](layer.linear, 4, 8) for name, layer in layers.items()})
    return model


def their_layers(theirs):
    """{our name of a layer: PEFT's layer}"""
    layers = theirs.base_model.model.transformer.named_modules()
    return {name: layer for name, layer in layers if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)}


def randomize(theirs):
    """Give what PEFT trains random values: a B of zero would hide what is done with A, a length of |W0| what it is."""
    torch.manual_seed(1)
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            p.data = p.abs() * (1 + 0.5 * torch.rand_like(p)) if "magnitude" in name else torch.randn_like(p) / 4


def copy_lora(theirs, ours):
    for name, layer in lora.lora_layers(ours).items():
        their = their_layers(theirs)[name]
        layer.lora_A.data.copy_(their.lora_A["default"].weight)
        layer.lora_B.data.copy_(their.lora_B["default"].weight)
        if hasattr(layer, "magnitude"):
            layer.magnitude.data.copy_(their.lora_magnitude_vector["default"].weight.flatten())


def tokens(B=3, T=9, seed=2):
    return torch.randint(97, (B, T), generator=torch.Generator().manual_seed(seed))


def close(a, b):
    return torch.allclose(a, b, atol=TOLERANCE, rtol=TOLERANCE)


def same_logits(ours, theirs):
    with torch.no_grad():
        return close(ours(tokens()), theirs(tokens()).logits)


def loss_of(theirs):
    """PEFT's model with the loss that ours computes."""
    return lambda idx, targets: F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())


def steps(model, optimizer, n=3):
    for i in range(n):
        model(tokens(seed=i), tokens(seed=i + 10)).backward()
        optimizer.step()
        optimizer.zero_grad()


def same_adapters(ours, theirs):
    pairs = [(layer, their_layers(theirs)[name]) for name, layer in lora.lora_layers(ours).items()]
    return all(
        close(layer.lora_A, their.lora_A["default"].weight) and close(layer.lora_B, their.lora_B["default"].weight)
        for layer, their in pairs
    )


def merges(model, plain):
    """Whether merging gives a plain GPT that computes the same."""
    with torch.no_grad():
        before = model(tokens())
        lora.merge_lora(model)
        named = [(name, type(m)) for name, m in model.named_modules()]
        return named == [(name, type(m)) for name, m in plain.named_modules()] and close(model(tokens()), before)


def test_rank_stabilised(base):
    ours, peft_of = base
    theirs = peft_of(lora_config(use_rslora=True))
    randomize(theirs)
    copy_lora(theirs, with_lora(ours))
    assert not same_logits(ours, theirs)
    M["rank_stabilised"](ours)
    assert same_logits(ours, theirs)


def test_loraplus(base):
    ours, peft_of = base
    theirs = peft_of(lora_config())
    copy_lora(theirs, with_lora(ours))
    steps(ours, M["loraplus"](ours, 1e-3, 16))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    steps(loss_of(theirs), optimizer)
    assert same_adapters(ours, theirs)


def test_loraplus_is_a_larger_alpha(base):
    plus, larger = with_lora(copy.deepcopy(base[0])), with_lora(base[0], alpha=16 * 8)
    larger.load_state_dict(plus.state_dict())
    steps(plus, M["loraplus"](plus, 1e-3, 16))
    steps(larger, torch.optim.AdamW([p for p in larger.parameters() if p.requires_grad], lr=1e-3, weight_decay=0))
    for one, other in zip(lora.lora_layers(plus).values(), lora.lora_layers(larger).values(), strict=True):
        assert one.lora_B.abs().max() > 0.01
        assert close(one.lora_B / 16, other.lora_B) and close(one.lora_A, other.lora_A)


def test_lora_fa(base):
    ours, peft_of = base
    theirs = peft_of(lora_config())
    copy_lora(theirs, with_lora(ours))
    M["freeze_A"](ours)
    for name, p in theirs.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    A = {name: layer.lora_A.clone() for name, layer in lora.lora_layers(ours).items()}
    for model, run in ((ours, ours), (theirs, loss_of(theirs))):
        steps(run, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    assert same_adapters(ours, theirs)
    assert all(torch.equal(layer.lora_A, A[name]) for name, layer in lora.lora_layers(ours).items())


def test_pissa(base):
    ours, peft_of = base
    plain = copy.deepcopy(ours)
    theirs = peft_of(lora_config(init_lora_weights="pissa"))
    M["pissa"](with_lora(ours))
    for name, layer in lora.lora_layers(ours).items():
        their = their_layers(theirs)[name]
        assert close(layer.linear.weight, their.base_layer.weight.T)
        assert close(layer.delta(), their.get_delta_weight("default").T)  # a direction's sign is free in A and in B
        assert close(layer.lora_A.abs(), their.lora_A["default"].weight.abs())
    with torch.no_grad():
        assert close(ours(tokens()), plain(tokens()))
    randomize(theirs)
    copy_lora(theirs, ours)
    assert same_logits(ours, theirs)
    assert merges(ours, plain)


def test_dora(base):
    ours, peft_of = base
    plain = copy.deepcopy(ours)
    theirs = peft_of(lora_config(use_dora=True))
    assert same_logits(with_dora(ours), theirs)  # the start is the base
    with torch.no_grad():
        assert close(ours(tokens()), plain(tokens()))
    randomize(theirs)
    copy_lora(theirs, ours)
    assert same_logits(ours, theirs)
    ours(tokens(), tokens(seed=3)).backward()
    loss_of(theirs)(tokens(), tokens(seed=3)).backward()
    for name, layer in lora.lora_layers(ours).items():
        their = their_layers(theirs)[name]
        assert close(layer.lora_A.grad, their.lora_A["default"].weight.grad)
        assert close(layer.lora_B.grad, their.lora_B["default"].weight.grad)
        assert close(layer.magnitude.grad, their.lora_magnitude_vector["default"].weight.grad.flatten())
    assert merges(ours, plain)
    assert same_logits(ours, theirs)


def test_vera(base):
    ours, peft_of = base
    plain = copy.deepcopy(ours)
    theirs = peft_of(peft.VeraConfig(r=16, target_modules=TARGETS, fan_in_fan_out=True))
    M["share_random"](with_lora(ours), r=16)
    one, other = ours.h[0].attn.c_proj, ours.h[1].mlp.c_proj
    assert one.A.untyped_storage().data_ptr() == other.A.untyped_storage().data_ptr()
    their_A, their_B = (getattr(theirs.base_model, name)["default"] for name in ("vera_A", "vera_B"))
    layers = {name: M["VeRALinear"](layer.linear, their_A, their_B) for name, layer in lora.lora_layers(ours).items()}
    assert other.A.shape == their_A.shape and other.B.shape == their_B.shape
    assert their_A.abs().max() * 0.9 < other.A.abs().max() < their_A.abs().max() * 1.1  # the same distribution
    assert their_B.abs().max() * 0.9 < other.B.abs().max() < their_B.abs().max() * 1.1
    lora.swap(ours, layers)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == theirs.get_nb_trainable_parameters()[0]
    for name, layer in layers.items():  # they start alike
        assert torch.equal(layer.d, their_layers(theirs)[name].vera_lambda_d["default"])
        assert torch.equal(layer.b, their_layers(theirs)[name].vera_lambda_b["default"])
    randomize(theirs)
    for name, layer in layers.items():
        layer.d.data.copy_(their_layers(theirs)[name].vera_lambda_d["default"])
        layer.b.data.copy_(their_layers(theirs)[name].vera_lambda_b["default"])
    assert same_logits(ours, theirs)
    assert merges(ours, plain)


PUBLISHED = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
    -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""  # QLoRA's appendix E, and bitsandbytes


def test_nf4():
    levels = torch.tensor([float(x) for x in PUBLISHED.split()])
    assert close(M["NF4"], levels)
    torch.manual_seed(0)
    W = torch.randn(32, 128)
    numbers, largest = M["quantize"](W)
    nearest = (W.reshape(-1, 64) / largest)[..., None].sub(levels).abs().argmin(-1)
    assert torch.equal(numbers.long(), nearest)
    packed = M["pack"](numbers)
    assert packed.dtype == torch.uint8 and packed.numel() == W.numel() // 2
    assert torch.equal(M["unpack"](packed), numbers)
    rounded = M["dequantize"](numbers, largest, W.shape)
    assert close(rounded, (levels[nearest] * largest).reshape(W.shape))

    linear = nn.Linear(128, 32)
    linear.weight = nn.Parameter(W)
    small = M["NF4Linear"](linear)
    assert 8 * sum(t.nbytes for t in small.buffers()) / W.numel() == 4.5
    x, other = torch.randn(2, 3, 128, requires_grad=True), torch.randn(2, 3, 128)
    other.copy_(x.detach()).requires_grad_()
    small(x).square().sum().backward()
    F.linear(other, rounded, linear.bias).square().sum().backward()
    assert torch.allclose(small(x), F.linear(x, rounded, linear.bias), atol=TOLERANCE)
    assert torch.allclose(x.grad, other.grad, atol=1e-3)  # of the size of 100


def test_qlora(base):
    """The adapter of a model in 4 bits is LoRA on the rounded weights, and nothing keeps these for the way back."""
    ours, kept = base[0], []
    rounded = with_lora(copy.deepcopy(ours))
    for layer in rounded.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = M["dequantize"](*M["quantize"](layer.weight), layer.weight.shape)
    torch.manual_seed(1)
    small = with_lora(copy.deepcopy(ours))
    for name, layer in lora.lora_layers(small).items():
        layer.lora_B.data.normal_()
        rounded.get_submodule(name).load_state_dict({"lora_A": layer.lora_A, "lora_B": layer.lora_B}, strict=False)
    M["in_four_bits"](small)
    assert not any(isinstance(m, nn.Linear) for m in small.modules())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = small(tokens(), tokens(seed=3))
    assert not any(t.shape in [(32, 128), (128, 32), (32, 32)] for t in kept)
    loss.backward()
    rounded(tokens(), tokens(seed=3)).backward()
    for name, layer in lora.lora_layers(small).items():
        assert close(layer.lora_A.grad, rounded.get_submodule(name).lora_A.grad)
        assert close(layer.lora_B.grad, rounded.get_submodule(name).lora_B.grad)


def test_many_adapters(base):
    models = [with_lora(copy.deepcopy(base[0])) for _ in range(3)]
    torch.manual_seed(1)
    for layer in (layer for model in models for layer in lora.lora_layers(model).values()):
        layer.lora_B.data.normal_()
    server, rows, idx = M["together"](models), [2, 0, 0, 1], tokens(B=4)
    M["choose"](server, torch.tensor(rows))
    alone = [models[row](idx[i : i + 1]) for i, row in enumerate(rows)]
    with torch.no_grad():
        assert close(server(idx), torch.cat(alone))
    written = torch.stack(list(server.generate(idx, 20, temperature=0)), 1)
    for i, row in enumerate(rows):
        one = torch.stack(list(models[row].generate(idx[i : i + 1], 20, temperature=0)), 1)
        assert torch.equal(written[i : i + 1], one)
