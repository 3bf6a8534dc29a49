"""gpt.py: model, loss and generation, against `transformers` and plain PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import make_gpt2, random_tokens

from gpt import GPT, ChunkedCrossEntropy, GPTConfig

# ---- The model ----

SHAPES = [
    {},
    dict(n_head=3, n_embd=33),
    dict(n_positions=1024),
    dict(n_layer=48, n_head=25, n_embd=100),  # as deep as gpt2-xl
    pytest.param(vars(transformers.GPT2Config()), id="gpt2", marks=pytest.mark.slow),
]


def small_gpt(**sizes):
    sizes = dict(block_size=64, vocab_size=97, n_layer=2, n_head=2, n_embd=8) | sizes
    return GPT(GPTConfig(**sizes))


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@torch.no_grad()
def test_logits_equal_those_of_transformers(tmp_path, sizes):
    theirs = make_gpt2(tmp_path, **sizes)
    idx = random_tokens(2, theirs.config.n_positions, theirs.config.vocab_size)
    ours = GPT.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=0, atol=1e-4)


def test_initial_weights_are_small_and_smaller_before_the_residual_stream():
    torch.manual_seed(0)
    model = small_gpt(n_layer=8, n_embd=128)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert torch.all(p == (1 if name.endswith("weight") else 0)), name  # LayerNorm, bias


# ---- The loss ----


def loss_inputs(needs_grad=("x", "weight")):
    """x (N, C), weight (V, C), targets (N,), with GPT-2's large V."""
    torch.manual_seed(0)
    N, V, C = 640, GPTConfig().vocab_size, 8
    x = torch.randn(N, C, requires_grad="x" in needs_grad)
    weight = torch.randn(V, C, requires_grad="weight" in needs_grad)
    return x, weight, torch.randint(V, (N,))


@pytest.mark.parametrize("trained", [("x", "weight"), ("x",)], ids=["head trained", "head frozen"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_and_gradients_equal_cross_entropy(trained, label_smoothing):
    x, weight, targets = loss_inputs(trained)
    logits = x.double() @ weight.double().T
    theirs = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    ours = ChunkedCrossEntropy.apply(x, weight, targets, label_smoothing)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    # 10 times the loss: the gradient that reaches the loss is not always 1.
    grads = (torch.autograd.grad(10 * loss, [x, weight][: len(trained)]) for loss in (ours, theirs))
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()  # as PyTorch's float32


def test_loss_is_the_mean_over_targets_that_are_not_ignored():
    model, idx, targets = small_gpt(), random_tokens(3, 64), random_tokens(3, 64, seed=2)
    targets[torch.rand(targets.shape) < 0.5] = -100
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(model(idx, targets), expected)


def test_loss_never_holds_the_logits_of_the_batch():
    x, weight, targets = loss_inputs()
    with torch.profiler.profile(record_shapes=True) as profile:
        ChunkedCrossEntropy.apply(x, weight, targets, 0.1).backward()
    largest = max(math.prod(shape) for event in profile.events() for shape in event.input_shapes)
    assert weight.numel() < largest <= 0.5 * len(x) * len(weight)


# ---- Generation ----


def generate_uncached(model, idx, max_new_tokens, temperature, top_k, generator):
    T = idx.shape[1]
    for _ in range(max_new_tokens):
        probs = (model(idx)[:, -1] / (temperature or 1)).softmax(-1)  # (B, V)
        if top_k is not None:
            probs[probs < probs.sort(descending=True).values[:, :top_k][:, -1:]] = 0
        token = torch.multinomial(probs, 1, generator=generator)
        idx = torch.cat([idx, token if temperature else probs.argmax(-1, keepdim=True)], dim=1)
    return idx[:, T:]


SAMPLING = [(0, None), (0.3, None), (2, 5), (1, 1000)]


@pytest.mark.parametrize("temperature, top_k", SAMPLING)
@torch.no_grad()
def test_the_kv_cache_does_not_change_the_tokens(tmp_path, temperature, top_k):
    make_gpt2(tmp_path)
    model, prompts = GPT.from_pretrained(tmp_path), random_tokens(3, 7)
    a, b = (torch.Generator().manual_seed(0) for _ in range(2))
    cached = torch.stack(list(model.generate(prompts, 57, temperature, top_k, a)), dim=1)
    assert torch.equal(cached, generate_uncached(model, prompts, 57, temperature, top_k, b))


def test_greedy_generation_equals_that_of_transformers(tmp_path):
    theirs = make_gpt2(tmp_path)
    theirs.generation_config.eos_token_id = None  # do not stop, as ours
    model, prompts = GPT.from_pretrained(tmp_path), random_tokens(3, 7)
    expected = theirs.generate(prompts, max_new_tokens=40, do_sample=False)[:, 7:]
    assert torch.equal(torch.stack(list(model.generate(prompts, 40, temperature=0)), 1), expected)
    alone = torch.cat(list(model.generate(prompts[:1], 40, temperature=0)))  # a batch of one
    assert torch.equal(alone, expected[0])


def test_more_tokens_than_block_size_are_refused():
    model = small_gpt(block_size=64)
    assert len(list(model.generate(random_tokens(1, 60), 4))) == 4
    with pytest.raises(ValueError, match="65.*64"):
        next(model.generate(random_tokens(1, 60), 5))
    with pytest.raises(ValueError, match="65.*64"):
        model(random_tokens(1, 65))
