"""gpt.py against `transformers`, against plain formulas, and against published numbers."""

import base64
import hashlib
import json
import math
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import tiktoken
import torch
import torch.nn.functional as F
import transformers
from conftest import make_gpt2
from safetensors.torch import load, save

import gpt
from gpt import GPT, ChunkedCrossEntropy, GPTConfig


def random_tokens(B, T, vocab_size=97):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(1))


def assert_same_logits(ours, theirs):
    idx = random_tokens(2, theirs.config.n_positions, theirs.config.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=0, atol=1e-4)


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- Folders that are read and written ---------------------------------------------------------------------

SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=48),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=64),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=80),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=100),
    "odd width": dict(n_head=3, n_embd=33),
    "long sequence": dict(n_positions=1024),
    "full size": dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, n_positions=1024),
}


@pytest.mark.parametrize("name", [*list(SIZES)[:-1], pytest.param("full size", marks=pytest.mark.slow)])
def test_logits_are_those_of_transformers(tmp_path, name):
    theirs = make_gpt2(tmp_path, **SIZES[name])
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_every_layout_of_the_file_loads(tmp_path, prefix, old):
    theirs = make_gpt2(tmp_path)
    if not prefix:
        theirs.transformer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load(file.read_bytes())
    assert prefix + "wte.weight" in weights
    if old:  # the causal mask and a copy of the tied head
        for i in range(2):
            weights[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
            weights[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        weights["lm_head.weight"] = weights[prefix + "wte.weight"].clone()
        file.write_bytes(save(weights))
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)


def test_transformers_loads_what_we_save(tmp_path):
    theirs = make_gpt2(tmp_path / "theirs", n_head=3, n_embd=33)
    ours = GPT.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    assert_same_weights(again, theirs)
    assert_same_logits(ours, again)  # the settings are GPT-2's too
    for key in ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions"):
        assert getattr(again.config, key) == getattr(theirs.config, key)


def test_a_save_that_fails_leaves_the_earlier_model_with_its_vocabulary(tmp_path, monkeypatch):
    def fill_the_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=4))
    model.save_pretrained(tmp_path, "a vocabulary")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(gpt, "save_file", fill_the_disk)
    with pytest.raises(OSError, match="model.safetensors.*disk full"):
        model.save_pretrained(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_model_with_adapters_is_not_saved(tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=4))
    model.h[0].attn.c_q.lora_A = torch.nn.Parameter(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="h.0.attn.c_q.lora_A.*merge"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


COUNTS = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}


@pytest.mark.parametrize("name, count", COUNTS.items())
def test_parameters_are_as_many_as_published(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(gpt.PRETRAINED[name]).parameters()) == count


def test_bfloat16_is_near_float32(tmp_path):
    make_gpt2(tmp_path)
    full, half = (GPT.from_pretrained(tmp_path, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    idx = random_tokens(2, 64)
    torch.testing.assert_close(half(idx).float(), full(idx), rtol=0, atol=0.1 * full(idx).std().item())
    torch.testing.assert_close(half(idx, idx), full(idx, idx), rtol=0.01, atol=0)


def test_dropout_acts_in_training_only():
    sizes = dict(block_size=8, vocab_size=97, n_layer=1, n_head=1, n_embd=4)
    model, plain, idx = GPT(GPTConfig(**sizes, dropout=0.5)), GPT(GPTConfig(**sizes)), random_tokens(1, 8)
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(model(idx), model(idx))
    assert torch.equal(model.eval()(idx), plain(idx))


PEAK = """
import sys, torch, gpt
def peak():  # of this process; what getrusage tells is at least what the parent had
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
model = gpt.GPT.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    GPT(GPTConfig(n_embd=640, n_head=10)).save_pretrained(tmp_path)  # 92M parameters
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-c", PEAK, str(tmp_path), dtype]
        ratio = float(subprocess.check_output(command, cwd=Path(gpt.__file__).parent))
        assert 1 <= ratio < 1.3, dtype


# ---- Folders that are refused ------------------------------------------------------------------------------


def content(name, edit):
    return lambda dir: (dir / name).write_bytes(edit((dir / name).read_bytes()))


def setting(**changes):
    return content("config.json", lambda file: json.dumps(json.loads(file) | changes).encode())


def tensor(name, value):
    def edit(file):
        return save({n: w for n, w in (load(file) | {name: value}).items() if w is not None})

    return content("model.safetensors", edit)


DAMAGES = {
    "no folder": (shutil.rmtree, FileNotFoundError, "no model '.*folder"),
    "no config": (lambda dir: (dir / "config.json").unlink(), FileNotFoundError, "config.json"),
    "no weights": (lambda dir: (dir / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors"),
    "config not JSON": (content("config.json", lambda file: file[:-9]), ValueError, "config.json does not describe"),
    "config not an object": (content("config.json", lambda file: b"[]"), ValueError, "config.json does not describe"),
    "config not text": (content("config.json", lambda file: b"\xff"), ValueError, "config.json does not describe"),
    "config without sizes": (content("config.json", lambda file: b'{"model_type": "gpt2"}'), ValueError, "n_positions"),
    "another model": (setting(model_type="llama"), ValueError, "llama"),
    "another activation": (setting(activation_function="relu"), ValueError, "activation_function.*relu"),
    "another MLP": (setting(n_inner=64), ValueError, "n_inner.*64"),
    "heads that do not divide": (setting(n_head=5), ValueError, "n_head': 5"),
    "no heads": (setting(n_head=0), ValueError, "n_head"),
    "size not a number": (setting(n_embd="32"), ValueError, "n_embd': '32'"),
    "one layer too many": (setting(n_layer=3), ValueError, r"h\.2\."),
    "one layer too few": (setting(n_layer=1), ValueError, r"h\.1\."),
    "far too many layers": (setting(n_layer=99999), ValueError, "n_layer': 99999"),
    "another vocabulary": (setting(vocab_size=96), ValueError, r"wte\.weight.*97.*96"),
    "missing tensor": (tensor("transformer.h.0.ln_1.bias", None), ValueError, r"h\.0\.ln_1\.bias"),
    "misshapen tensor": (tensor("transformer.h.0.ln_1.bias", torch.zeros(33)), ValueError, r"ln_1\.bias.*33.*32"),
    "integer tensor": (tensor("transformer.ln_f.bias", torch.zeros(32, dtype=int)), ValueError, r"ln_f\.bias.*int64"),
    "unknown tensor": (tensor("transformer.h.0.attn.lora_A", torch.zeros(1)), ValueError, r"h\.0\.attn\.lora_A"),
    "one weight by two names": (tensor("wte.weight", torch.zeros(97, 32)), ValueError, r"look for wte\.weight"),
    "untied head": (tensor("lm_head.weight", torch.zeros(97, 32)), ValueError, r"lm_head\.weight.*wte"),
    "cut-off weights": (content("model.safetensors", lambda file: file[:-1]), ValueError, "model.safetensors.*cut off"),
    "empty weights": (content("model.safetensors", lambda file: b""), ValueError, "model.safetensors.*cut off"),
}


@pytest.mark.parametrize("damage, error, culprit", DAMAGES.values(), ids=DAMAGES)
def test_damaged_folders_are_refused_in_one_line(tmp_path, damage, error, culprit):
    make_gpt2(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(error, match=culprit) as e:
        GPT.from_pretrained(tmp_path / "model")
    assert str(tmp_path / "model") in str(e.value)
    assert "\n" not in str(e.value)


# ---- Downloads ---------------------------------------------------------------------------------------------


def http(body):
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for huggingface.co that has a small gpt2; all caches are empty."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/openai-community/gpt2/resolve/rev/model.safetensors"
            self.wfile.write(server.answer)

    def close():
        server.shutdown()
        server.server_close()

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.close = close
    server.model = make_gpt2(tmp_path / "made")
    server.file = (tmp_path / "made" / "model.safetensors").read_bytes()
    server.answer = http(server.file)
    server.place = tmp_path / "torch" / "hub" / "lora-gpt2" / "gpt2" / "model.safetensors"
    monkeypatch.setitem(gpt.PRETRAINED, "gpt2", gpt.read_config(tmp_path / "made"))
    monkeypatch.setitem(gpt.REVISIONS, "gpt2", "rev")
    monkeypatch.setitem(gpt.SHA256, "gpt2", hashlib.sha256(server.file).hexdigest())
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    yield server
    close()


@pytest.mark.parametrize("hash_is_known", [True, False])
def test_a_download_is_kept(hub, tmp_path, hash_is_known):
    if not hash_is_known:
        del gpt.SHA256["gpt2"]
    first = GPT.from_pretrained("gpt2")
    assert_same_logits(first, hub.model)
    assert list(hub.place.parent.iterdir()) == [hub.place]
    hub.close()
    assert_same_weights(GPT.from_pretrained("gpt2"), first)


# What the hub answers in place of http(file), and whether we know the hash.
BAD_DOWNLOADS = {
    "wrong hash": (lambda file: http(file[:-1] + b"?"), True),
    "cut off, hash known": (lambda file: http(file)[:-1], True),
    "cut off, hash not known": (lambda file: http(file)[:-1], False),
    "cut off in a chunk": (lambda file: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n?", False),
    "login page": (lambda file: http(b"<html>Welcome to our hotel</html>"), False),
    "not there": (lambda file: b"HTTP/1.1 404 Not Found\r\n\r\n", True),
    "not HTTP": (lambda file: b"SSH-2.0-OpenSSH\r\n\r\n", True),
    "no network": (None, True),
}


@pytest.mark.parametrize("answer, hash_is_known", BAD_DOWNLOADS.values(), ids=BAD_DOWNLOADS)
def test_a_bad_download_is_refused_in_one_line_and_leaves_nothing(hub, answer, hash_is_known):
    if not hash_is_known:
        del gpt.SHA256["gpt2"]
    if answer is None:
        hub.close()
    else:
        hub.answer = answer(hub.file)
    with pytest.raises(OSError) as e:
        GPT.from_pretrained("gpt2")
    assert f"put the file at {hub.place} by hand" in str(e.value)
    assert "\n" not in str(e.value)
    assert list(hub.place.parent.iterdir()) == []
    hub.place.write_bytes(hub.file)  # the advice works
    assert_same_logits(GPT.from_pretrained("gpt2"), hub.model)


@pytest.mark.parametrize("variable, folder", [("HF_HOME", "cache/hub"), ("HF_HUB_CACHE", "cache")])
@pytest.mark.parametrize("repository", ["models--openai-community--gpt2", "models--gpt2"])
def test_a_copy_in_the_hugging_face_cache_needs_no_network(hub, tmp_path, monkeypatch, variable, folder, repository):
    hub.close()
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    snapshot = tmp_path / folder / repository / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(hub.file)
    assert_same_logits(GPT.from_pretrained("gpt2"), hub.model)


# ---- The loss ----------------------------------------------------------------------------------------------


def large_vocabulary():
    """A model and a batch whose loss takes three parts of about 360 rows."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=400, n_layer=1, n_head=2, n_embd=8))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    idx, targets = random_tokens(6, 400, 50257).view(2, 3, 400)
    targets[torch.rand(targets.shape) < 0.1] = -100
    return model, idx, targets


@pytest.mark.parametrize("head", ["trained", "frozen"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_the_formula(head, label_smoothing):
    model, idx, targets = large_vocabulary()
    model.wte.requires_grad_(head == "trained")
    parameters = [p for p in model.parameters() if p.requires_grad]
    # In float64: torch's own label smoothing is off by 1e-4 in float32.
    plain = F.cross_entropy(model(idx).flatten(0, 1).double(), targets.flatten(), label_smoothing=label_smoothing)
    ours = model(idx, targets, label_smoothing)
    with torch.no_grad():
        assert model(idx, targets, label_smoothing) == ours
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    # Times 10: the gradient that reaches a loss need not be 1.
    for a, b in zip(*(torch.autograd.grad(10 * loss, parameters) for loss in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_loss_is_finite_where_exp_would_overflow():
    x, weight, targets = torch.full((2, 4), 100.0), torch.tensor([[3.0] * 4, [-2.0] * 4]), torch.tensor([0, 1])
    for loss in (ChunkedCrossEntropy.apply(x, weight, targets, 0.0), F.cross_entropy(x @ weight.T, targets)):
        assert loss == 1000.0  # 0 nats for the one, and for the other the 2000 between 1200 and -800


def test_full_training_can_compute_in_bfloat16():
    model, idx, targets = large_vocabulary()
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(idx, targets)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    exact, rounded = (torch.cat([g.flatten() for g in each]) for each in gradients)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def operations(f):
    """(name, elements of the largest input) of each operation that f runs."""
    with torch.profiler.profile(record_shapes=True) as profile:
        f()
    return [(e.name, max(map(math.prod, e.input_shapes), default=0)) for e in profile.events()]


def test_the_loss_never_holds_the_logits_of_the_batch():
    model, idx, targets = large_vocabulary()
    largest = max(numel for _, numel in operations(lambda: model(idx, targets).backward()))
    assert 333 * 50257 <= largest < 0.4 * (targets != -100).sum() * 50257


def test_without_gradients_the_loss_does_no_work_for_them():
    model, idx, targets = large_vocabulary()
    with torch.no_grad():
        products = [name for name, _ in operations(lambda: model(idx, targets)) if name == "aten::mm"]
    assert len(products) == 3  # the logits of each part


# ---- Generation --------------------------------------------------------------------------------------------


def generate_uncached(model, idx, n, temperature, top_k, generator):
    T = idx.shape[1]
    for _ in range(n):
        p = (model(idx)[:, -1] / (temperature or 1)).softmax(-1)
        if top_k:
            p[p < p.sort(descending=True).values[:, :top_k][:, -1:]] = 0
        token = torch.multinomial(p, 1, generator=generator) if temperature else p.argmax(-1, keepdim=True)
        idx = torch.cat([idx, token], 1)
    return idx[:, T:]


@pytest.mark.parametrize("temperature, top_k", [(0, None), (1, None), (0.3, None), (2, 5), (1, 1), (1, 1000)])
def test_cached_and_uncached_generation_give_the_same_tokens(tmp_path, temperature, top_k):
    make_gpt2(tmp_path)
    model, prompts = GPT.from_pretrained(tmp_path), random_tokens(3, 7)
    for seed in range(3):
        a, b = (torch.Generator().manual_seed(seed) for _ in range(2))
        cached = torch.stack(list(model.generate(prompts, 57, temperature, top_k, generator=a)), 1)
        assert cached.tolist() == generate_uncached(model, prompts, 57, temperature, top_k, generator=b).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_are_chosen_by_float32_logits_whatever_the_weights_are(tmp_path, dtype):
    make_gpt2(tmp_path)
    model, prompts = GPT.from_pretrained(tmp_path, dtype=dtype), random_tokens(20, 7)
    weight = model.wte.weight.data
    weight[:, 0], model.ln_f.bias.data[0] = -1, 100  # logits near -100, where GPT-2's are and 16 bits take large steps
    with torch.no_grad():
        exact = model.hidden(prompts)[:, -1].double() @ weight.double().T
        logits = model.next_logits(prompts, model.new_cache(20, 7), 0)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-4)
    assert next(model.generate(prompts, 1, temperature=0)).tolist() == exact.argmax(-1).tolist()
    assert exact.to(dtype).argmax(-1).tolist() != exact.argmax(-1).tolist()


def test_greedy_is_that_of_transformers_alone_and_in_a_batch(tmp_path):
    theirs = make_gpt2(tmp_path)
    theirs.generation_config.eos_token_id = None  # go on, as ours does
    model, prompts = GPT.from_pretrained(tmp_path), random_tokens(3, 7)
    expected = theirs.generate(prompts, max_new_tokens=40, do_sample=False)[:, 7:].tolist()
    assert torch.stack(list(model.generate(prompts, 40, temperature=0)), 1).tolist() == expected
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert [token.item() for token in model.generate(prompt[None], 40, temperature=0)] == tokens


def test_more_than_the_context_holds_is_refused(tmp_path):
    make_gpt2(tmp_path, n_positions=64)
    model = GPT.from_pretrained(tmp_path)
    assert len(list(model.generate(random_tokens(1, 60), 4))) == 4
    with pytest.raises(ValueError, match="65 tokens .* 64"):
        next(model.generate(random_tokens(1, 60), 5))
    with pytest.raises(ValueError, match="65 tokens .* 64"):
        model(random_tokens(1, 65))


# ---- The tokenizer -----------------------------------------------------------------------------------------


def test_tokens_are_those_of_gpt2(vocabulary, tmp_path):
    assert vocabulary.n_vocab == 50257
    assert vocabulary.encode("The dog") == [464, 3290]
    assert vocabulary.encode(gpt.END, allowed_special={gpt.END}) == [50256]
    text = "  naïve 日本語 🦜\n\n\tit's 12,345 "
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert gpt.load_tokenizer(tmp_path).name == "gpt2"  # a folder without its own


BYTES = [bytes([i]) for i in range(256)]


def write_vocabulary(dir, tokens, ids):
    lines = (f"{base64.b64encode(token).decode()} {i}\n" for token, i in zip(tokens, ids, strict=True))
    (dir / "vocab.tiktoken").write_text("".join(lines))


def test_a_folder_can_have_its_own_vocabulary(tmp_path):
    write_vocabulary(tmp_path, [*BYTES, b"th", b"the", b" the"], range(259))
    tokenizer = gpt.load_tokenizer(tmp_path)
    assert tokenizer.encode("the the th") == [257, 258, 32, 256]
    assert tokenizer.decode(tokenizer.encode("thé\n 日")) == "thé\n 日"
    assert tokenizer.encode(gpt.END, allowed_special={gpt.END}) == [259]
    assert tokenizer.n_vocab == 260


BAD_VOCABULARIES = {
    "binary": lambda dir: (dir / "vocab.tiktoken").write_bytes(b"\xff\xfe"),
    "not base64": lambda dir: (dir / "vocab.tiktoken").write_text("dGg 0\n"),
    "without ids": lambda dir: (dir / "vocab.tiktoken").write_text("dGg=\n"),
    "empty": lambda dir: write_vocabulary(dir, [], []),
    "an id twice": lambda dir: write_vocabulary(dir, [*BYTES, b"th"], [*range(256), 255]),
    "a negative id": lambda dir: write_vocabulary(dir, [*BYTES, b"th"], [*range(256), -1]),
    "the id of the end of text": lambda dir: write_vocabulary(dir, [*BYTES, b"th"], [*range(256), 257]),
    "bytes missing": lambda dir: write_vocabulary(dir, BYTES[:200], range(200)),
}


@pytest.mark.parametrize("write", BAD_VOCABULARIES.values(), ids=BAD_VOCABULARIES)
def test_a_broken_vocabulary_is_refused_in_one_line(tmp_path, write):
    write(tmp_path)
    with pytest.raises(ValueError, match="vocab.tiktoken") as e:
        gpt.load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


def test_without_a_network_the_tokenizer_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # what is loaded already
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="TIKTOKEN_CACHE_DIR") as e:
        gpt.load_tokenizer("gpt2")
    assert "\n" not in str(e.value)


# ---- OpenAI's weights, where they are ----------------------------------------------------------------------


@pytest.fixture
def gpt2(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # look, but do not download
    try:
        gpt.find_pretrained("gpt2")
    except OSError:
        pytest.skip("needs OpenAI's 124M weights in the Hugging Face cache or in torch.hub's folder")
    return GPT.from_pretrained("gpt2")


@pytest.mark.slow
def test_openai_weights_continue_as_published(gpt2):
    # huggingface/transformers, tests of GPT-2, test_lm_generate_gpt2
    ids = [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]
    assert [token.item() for token in gpt2.generate(torch.tensor([ids[:2]]), 18, temperature=0)] == ids[2:]


@pytest.mark.slow
def test_openai_weights_train_as_published(gpt2):
    # karpathy/llm.c, test_gpt2.c: the start of tiny Shakespeare, with <|endoftext|> before each paragraph
    tokens = """
    50256 5962 22307 25 198 8421 356 5120 597 2252 11 3285 502 2740 13 628 50256 3237 25 198 5248 461 11 2740 13 628
    50256 5962 22307 25 198 1639 389 477 12939 2138 284 4656 621 284 1145 680 30 628 50256 3237 25 198 4965 5634 13
    12939 13 628 50256 5962 22307 25 198 5962 11 345 760 327 1872 385 1526 28599 318 4039 4472 284 262 661 13 628
    50256 3237 25 198 1135 760 470 11 356 760 470 13 628 50256 5962 22307 25 198 5756 514 1494 683 11 290 356 1183
    423 11676 379 674 898 2756 13 198 3792 470 257 15593 30 628 50256 3237 25 198 2949 517 3375 319 470 26 1309 340
    307 1760 25 1497 11 1497 0 628 50256 12211 22307 25 198 3198 1573 11 922 4290 13 628 50256 5962 22307 25 198
    1135 389 17830 3595 4290 11 262 1458 1173 1547 922 13 198 2061 4934 969 5036 896 319 561 26958 514 25 611 484
    198 19188 7800 514 475 262 48713 414 11 981 340 547 198 1929 4316 462 11 356 1244 4724 484 22598 514 31533 306
    26 198 4360 484 892 356 389 1165 13674 25 262 10904 1108 326 198 2001 42267 514 11 262 2134 286 674 24672 11 318
    355 281 198 24807 284 1948 786 511 20038 26 674 198 82 13712 590 318 257 4461 284 606 3914 514 15827 428 351 198
    454 279
    """
    losses = [5.270007, 4.059707, 3.375123, 2.800783, 2.315382, 1.849029, 1.394656, 0.999147, 0.624080, 0.376511]
    tokens = torch.tensor([int(token) for token in tokens.split()])
    idx, targets = tokens[:256].view(4, 64), tokens[1:].view(4, 64)
    optimizer = torch.optim.AdamW(gpt2.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    for expected in losses:
        loss = gpt2(idx, targets)
        assert loss.item() == pytest.approx(expected, abs=1e-2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
