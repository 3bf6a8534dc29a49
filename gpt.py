"""GPT-2 (Radford et al., 2019) in one file: the model, generation, OpenAI's weights, the tokenizer.

Notable:
- The logits are OpenAI's: pre-norm blocks, learned positions, the tanh GELU, an output head tied to the embedding.
- GPT-2's fused query-key-value layer `c_attn` is three `nn.Linear` here, `c_q`, `c_k` and `c_v`, so that
  LoRA on the query and value projections is LoRA on `c_q` and `c_v`, and nothing more.
- The loss never holds the logits of the whole batch, which for GPT-2 would be the largest tensor by far.
- Files have Hugging Face's layout: `transformers` reads what we write, and the other way round.

In the comments on shapes: B sequences, T tokens, C = n_embd, V = vocab_size.
"""

import base64
import http.client
import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@dataclass
class GPTConfig:
    block_size: int = 1024  # the longest sequence, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

    def check_length(self, T):
        """Raises ValueError if T tokens do not fit."""
        if T > self.block_size:
            raise ValueError(f"{T} tokens do not fit in the context of {self.block_size}: shorten it, or ask for less")


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_q = nn.Linear(config.n_embd, config.n_embd)
        self.c_k = nn.Linear(config.n_embd, config.n_embd)
        self.c_v = nn.Linear(config.n_embd, config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, pos=0):
        B, T, C = x.shape
        # (B, T, C) -> (B, n_head, T, C / n_head)
        q, k, v = (c(x).view(B, T, self.n_head, -1).transpose(1, 2) for c in (self.c_q, self.c_k, self.c_v))
        if cache is not None:  # keep these keys and values, attend to all that are kept
            keys, values = cache[0], cache[1]  # each (B, n_head, the cache's length, C / n_head)
            keys[:, :, pos : pos + T] = k
            values[:, :, pos : pos + T] = v
            k, v = keys[:, :, : pos + T], values[:, :, : pos + T]
        dropout = self.dropout if self.training else 0.0
        # A single new token comes after everything that is kept: it needs no mask. (Without a cache, causal is a
        # constant: one that depends on T would break a compiled block's graph wherever T varies.)
        causal = cache is None or T > 1
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # GPT-2's GELU; the exact one gives other logits
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, pos=0):
        x = x + self.attn(self.ln_1(x), cache, pos)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        V, T, C = config.vocab_size, config.block_size, config.n_embd
        self.wte = nn.Embedding.from_pretrained(torch.empty(V, C), freeze=False)  # tokens; also the output head
        self.wpe = nn.Embedding.from_pretrained(torch.empty(T, C), freeze=False)  # positions
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        if self.wte.weight.is_meta:  # shapes without values: there is nothing to draw
            return
        for name, p in self.named_parameters():  # initialised as GPT-2 was
            if p.ndim == 2:  # c_proj adds to the residual stream, 2 n_layer times: scaled down to keep its size
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer) ** 0.5 if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, cache=None, pos=0):
        """The last hidden states (B, T, C) of the tokens idx (B, T), of which the first is at position pos.

        With a cache, from `new_cache`, the keys and values of these tokens are stored in it, and they attend
        to the ones stored before. Then either pos is 0 (a whole prompt) or T is 1 (the next token).
        Raises ValueError if pos + T exceeds block_size.
        """
        T = idx.shape[1]
        self.config.check_length(pos + T)
        x = self.wte(idx) + self.wpe.weight[pos : pos + T]
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i], pos)
        return self.ln_f(x)

    def forward(self, idx, targets=None, label_smoothing=0.0):
        """Logits (B, T, V) of the tokens idx (B, T); with targets (B, T), the loss instead.

        targets[b, t] is the token that should follow idx[b, : t + 1], or -100 where the loss should not look.
        The loss is the mean cross-entropy over the others, a scalar in nats. Targets may stay on the CPU: which
        rows to keep is then known without waiting for the GPU.
        """
        x = self.hidden(idx)
        if targets is None:
            return F.linear(x, self.wte.weight)
        kept = (targets != -100).flatten().nonzero()[:, 0]
        x, targets = x.flatten(0, 1)[send(kept, x.device)], send(targets.flatten()[kept], x.device)
        # A Function would compute the gradient of a weight that asks for one even where gradients are off.
        weight = self.wte.weight if torch.is_grad_enabled() else self.wte.weight.detach()
        return ChunkedCrossEntropy.apply(x, weight, targets, label_smoothing)

    def new_cache(self, B, length):
        """An empty cache for the keys and values of B sequences of up to so many tokens."""
        c = self.config
        c.check_length(length)
        return self.wte.weight.new_empty(c.n_layer, 2, B, c.n_head, length, c.n_embd // c.n_head)

    def next_logits(self, idx, cache, pos):
        """Logits (B, V) of the token that follows idx (B, T), as in `hidden`. They are float32 whatever the model is:
        near -100, where GPT-2's are, bfloat16 has steps of a half."""
        x = self.hidden(idx, cache, pos)[:, -1].float()
        # For few rows this way round is the faster one on a CPU; a single one would be left to a single core.
        rows = x.repeat(2, 1) if len(x) == 1 else x
        logits = (self.wte.weight.float() @ rows.T).T[: len(x)]  # (B, V)
        if not logits.isfinite().all():
            raise ValueError("the logits are not finite numbers: the model or its adapter is damaged")
        return logits

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Continue the prompts idx (B, T), T >= 1: yields one (B,) tensor of token ids a step.

        temperature 0 is greedy; top_k keeps the k likeliest tokens; generator, a torch.Generator on the model's
        device, makes the draws repeatable. It goes on past <|endoftext|>: the caller stops when it has enough.
        Raises ValueError, at the first step, if T + max_new_tokens exceeds block_size.
        """
        B, T = idx.shape
        cache, pos = self.new_cache(B, T + max_new_tokens), 0
        for _ in range(max_new_tokens):
            logits = self.next_logits(idx, cache, pos)  # (B, V)
            pos += idx.shape[1]  # T, the whole prompt; from then on 1
            if temperature == 0:
                idx = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                logits /= temperature
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits[logits < kth] = -torch.inf
                idx = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            yield idx[:, 0]

    @classmethod
    def from_pretrained(cls, name_or_dir, dtype=torch.float32, device="cpu"):
        """GPT-2 with trained weights, in eval mode.

        name_or_dir is a key of PRETRAINED, or a folder with `config.json` and `model.safetensors`.
        Raises OSError (not found, no download) or ValueError (damaged, or not a GPT-2).
        """
        config = read_config(name_or_dir)
        file = find_pretrained(name_or_dir) if name_or_dir in PRETRAINED else Path(name_or_dir, "model.safetensors")
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        model.load_state_dict(read_weights(file, config, dtype, device), assign=True)
        return model.eval()

    def save_pretrained(self, dir, vocabulary=None):
        """Write the folder dir, for `from_pretrained` here and `transformers.GPT2LMHeadModel.from_pretrained`.

        vocabulary is the text of its `vocab.tiktoken`, if the model has another vocabulary than GPT-2's.
        Raises ValueError if the model has other parameters than GPT-2's, as one with unmerged adapters has.
        """
        config, weights, dir = self.config, self.state_dict(), Path(dir)
        with torch.device("meta"):
            if other := weights.keys() ^ GPT(config).state_dict().keys():
                raise ValueError(f"not a plain GPT-2, because of {min(other)}: merge adapters before saving")
        settings = {stored: getattr(config, ours) for ours, stored in SIZES.items()} | GPT2_SETTINGS
        settings |= dict(bos_token_id=config.vocab_size - 1, eos_token_id=config.vocab_size - 1)
        settings["architectures"] = ["GPT2LMHeadModel"]
        tensors = {}
        for stored, names in stored_names(weights).items():
            w = torch.cat([weights[name] for name in names])
            tensors[f"transformer.{stored}"] = as_stored(stored, w).contiguous()
        files = {dir / "config.json": json.dumps(settings, indent=2)}
        files[dir / "model.safetensors"] = lambda tmp: save_file(tensors, tmp, metadata={"format": "pt"})
        if vocabulary is not None:
            files[dir / "vocab.tiktoken"] = vocabulary
        write_whole(files)
        if vocabulary is None:
            (dir / "vocab.tiktoken").unlink(missing_ok=True)  # another model's


class ChunkedCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy of softmax(x Wᵀ) with the targets, a few rows of logits at a time.

    The logits of 8 x 512 tokens of GPT-2 are 0.8 GB, and so is their gradient. But that is known as soon as they are:

        d loss / d logits = (softmax(logits) - target distribution) / N

    So the forward pass takes a few rows, computes their logits, their part of the loss and of d loss / d x, and
    forgets the logits. Nothing is computed twice; the backward pass has only to scale.
    The target distribution is 1 - label_smoothing on the target, with label_smoothing spread evenly over V.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, label_smoothing):
        # x (N, C), weight (V, C), targets (N,)
        N, V = len(x), len(weight)
        on_target, elsewhere = 1 - label_smoothing, label_smoothing / V
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), device=x.device)
        parts = max(1, round(N * V / 2**24))  # of equal size; the logits of each take about 64 MiB in float32
        for i in range(parts):
            rows = slice(i * N // parts, (i + 1) * N // parts)
            target = targets[rows, None]
            logits = F.linear(x[rows], weight).float()  # the large one: from here on it is changed in place
            logits -= logits.amax(-1, keepdim=True)  # leaves the softmax as it is, and exp cannot overflow
            loss -= on_target * logits.gather(1, target).sum()
            if label_smoothing:
                loss -= elsewhere * logits.sum()
            total = logits.exp_().sum(-1, keepdim=True)
            loss += total.log().sum()  # log softmax = logits - log total
            if any(ctx.needs_input_grad):
                dlogits = logits.div_(total).sub_(elsewhere)
                dlogits = dlogits.scatter_add_(1, target, torch.full_like(total, -on_target)).to(x.dtype)
                dx[rows] = dlogits @ weight
                if dweight is not None:
                    dweight += dlogits.T @ x[rows]
                del dlogits
            del logits  # these go before the next ones come
        ctx.N = N
        ctx.save_for_backward(dx, dweight)
        return loss / N

    @staticmethod
    def backward(ctx, dloss):
        dx, dweight = ctx.saved_tensors
        scale = dloss / ctx.N
        return dx * scale, None if dweight is None else dweight * scale, None, None


def send(t, device):
    """The tensor on the device. A GPU fetches it from pinned memory while the CPU goes on."""
    if device.type == "cuda" and t.device.type == "cpu":
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


# ---- Files: OpenAI's weights, where they are and how they are stored ----

PRETRAINED = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
REVISIONS = {  # at huggingface.co/openai-community
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
SHA256 = {  # of model.safetensors, where we know it
    "gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "gpt2-xl": "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
}
# What config.json calls the sizes, and what else it must say: a model with other settings is not GPT-2.
SIZES = dict(block_size="n_positions", vocab_size="vocab_size", n_layer="n_layer", n_head="n_head", n_embd="n_embd")
GPT2_SETTINGS = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_inner=None)
GPT2_SETTINGS |= dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
GPT2_SETTINGS |= dict(add_cross_attention=False, tie_word_embeddings=True)
PATIENCE = 30  # seconds in which a server has to say something


def stored_names(ours):
    """{name in a file: our names}: three of ours, in this order, are one c_attn there."""
    names = {}
    for name in ours:
        names.setdefault(re.sub(r"\.c_[qkv]\.", ".c_attn.", name), []).append(name)
    return names


def as_stored(name, w):
    """GPT-2's files keep a linear layer's weight as (in, out), and torch as (out, in). Works both ways."""
    return w.T if ".c_" in name and w.ndim == 2 else w


def read_config(name_or_dir):
    """The GPTConfig of one of PRETRAINED, or in a folder. Raises FileNotFoundError, or ValueError if not a GPT-2's."""
    if name_or_dir in PRETRAINED:
        return PRETRAINED[name_or_dir]
    file = Path(name_or_dir, "config.json")
    if not file.is_file():
        names = ", ".join(PRETRAINED)
        raise FileNotFoundError(f"no model '{name_or_dir}': name one of {names}, or a folder with config.json")
    try:
        saved = json.loads(file.read_bytes())
        sizes = {ours: saved[stored] for ours, stored in SIZES.items()}
        if saved.get("n_inner") == 4 * sizes["n_embd"]:  # as it is by default
            saved["n_inner"] = None
        for key, value in GPT2_SETTINGS.items():
            if saved.get(key, value) != value:
                raise ValueError(f"{key} is {saved[key]!r}, and GPT-2's is {value!r}")
        sane = all(type(n) is int and 0 < n < 2**20 for n in sizes.values()) and sizes["n_layer"] < 2**10
        if not sane or sizes["n_embd"] % sizes["n_head"]:
            raise ValueError(f"its sizes cannot be: {sizes}")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{file} does not describe a GPT-2: {e}") from None
    return GPTConfig(**sizes)


def read_weights(file, config, dtype=torch.float32, device="meta"):
    """{our name: weight} of a safetensors file. On the meta device no values are kept: names and shapes are checked.

    Raises OSError, or ValueError if the file is damaged or is not that of a GPT-2 with this config.
    """
    with torch.device("meta"):
        expected = GPT(config).state_dict()
    layout, weights = stored_names(expected), {}
    try:
        open(file, "rb").close()  # says why, if it cannot be read
        with safe_open(file, "pt") as f:
            found = {key for key in f.keys() if not key.endswith((".attn.bias", ".attn.masked_bias"))}  # masks
            head, prefix = "lm_head.weight", "transformer." if "transformer.wte.weight" in found else ""
            if other := (found - {head}) ^ {prefix + stored for stored in layout}:
                raise ValueError(f"{file} is not the GPT-2 that its config.json describes: look for {min(other)}")
            if head in found and not torch.equal(f.get_tensor(head), f.get_tensor(f"{prefix}wte.weight")):
                raise ValueError(f"{file}: lm_head.weight differs from wte.weight, to which GPT-2 ties it")
        for stored, names in layout.items():  # wte, the largest, first: it is mapped while little else is there
            with safe_open(file, "pt") as f:  # anew for each: what was mapped for the last one is let go
                w = as_stored(stored, f.get_tensor(prefix + stored))
            rows, *rest = expected[names[0]].shape
            wanted = [len(names) * rows, *rest]
            if [*w.shape] != wanted or not w.is_floating_point() or w.itemsize == 1:
                raise ValueError(f"{file}: {stored} is {[*w.shape]} in {w.dtype}; wanted: {wanted} in floats")
            for name, part in zip(names, w.chunk(len(names)), strict=True):
                weights[name] = torch.empty(part.shape, dtype=dtype, device=device).copy_(part)
    except FileNotFoundError:
        raise FileNotFoundError(f"no weights at {file}: put model.safetensors there") from None
    except SafetensorError as e:
        raise ValueError(f"{file} is damaged or cut off ({e}): copy or download it again") from None
    return weights


def find_pretrained(name):
    """OpenAI's model.safetensors: in the Hugging Face cache, in torch.hub's folder, or downloaded. Raises OSError."""
    home = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", Path(home, "hub")))
    for repository in (f"openai-community--{name}", name):
        for file in cache.glob(f"models--{repository}/snapshots/*/model.safetensors"):
            return file
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{host}/openai-community/{name}/resolve/{REVISIONS[name]}/model.safetensors"
    file = Path(torch.hub.get_dir(), "lora-gpt2", name, "model.safetensors")
    return download(url, file, SHA256.get(name), check=lambda tmp: read_weights(tmp, PRETRAINED[name]))


def download(url, file, sha256=None, check=lambda tmp: None):
    """The path `file`, fetched from url unless it is there. check(tmp) raises ValueError if what came is wrong.

    Raises OSError that says what to do by hand, and leaves nothing behind.
    """

    def fetch(tmp):
        torch.hub.download_url_to_file(url, str(tmp), hash_prefix=sha256)
        check(tmp)

    socket.setdefaulttimeout(PATIENCE)
    try:
        if not file.exists():
            write_whole({file: fetch})
    except (OSError, ValueError, http.client.HTTPException) as e:
        if not file.exists():  # nor has another process brought it in the meantime
            why = " ".join(str(e.__cause__ or e).split())  # what write_whole caught, if it did
            raise OSError(f"cannot download {url} ({why}): try again, or put the file at {file} by hand") from None
    finally:
        socket.setdefaulttimeout(None)
    return file


def write_whole(files):
    """Write files {path: text, or a function that writes to a path}, each whole or not at all: all get temporary names,
    which belong to this process, then their own. Raises OSError that names the path."""
    tmps = {path: path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, tmp in tmps.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            tmp.touch()
            mode = tmp.stat().st_mode  # what the user's umask asks for: some writers give less
            if callable(files[path]):
                files[path](tmp)
            else:
                tmp.write_text(files[path], encoding="utf-8")
            tmp.chmod(mode)
        for path, tmp in tmps.items():
            tmp.replace(path)
    except (OSError, RuntimeError, SafetensorError) as e:  # the last two are how torch and safetensors say: disk full
        raise OSError(f"cannot write {path} ({e}): make room, or choose another folder") from e
    finally:
        for tmp in tmps.values():
            if tmp.exists():  # to remove what is not there is an error of its own where nothing can be written
                tmp.unlink()


# ---- The tokenizer ----

END = "<|endoftext|>"  # GPT-2's one special token: it ends a text, and starts one
WORDS = r" ?\w+| ?[^\w\s]+|\s+"  # a vocabulary of our own splits text into words, punctuation and white space


def own_vocabulary(name_or_dir):
    """The text of the folder's own `vocab.tiktoken`; None for a model that has GPT-2's."""
    file = Path(name_or_dir, "vocab.tiktoken")
    return file.read_text() if name_or_dir not in PRETRAINED and file.exists() else None


def load_tokenizer(name_or_dir):
    """GPT-2's tokenizer, or the one in the folder's `vocab.tiktoken`, as a tiktoken.Encoding.

    Raises OSError if GPT-2's vocabulary cannot be downloaded, ValueError if the folder's is damaged.
    """
    try:
        if (vocabulary := own_vocabulary(name_or_dir)) is not None:
            return make_tokenizer(vocabulary)
    except ValueError as e:
        raise ValueError(f"{name_or_dir}/vocab.tiktoken is no vocabulary in tiktoken's format ({e})") from None
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as e:
        why = f"cannot download GPT-2's vocabulary ({type(e).__name__})"
        raise OSError(f"{why}: set TIKTOKEN_CACHE_DIR to a folder where tiktoken has stored it") from None


def make_tokenizer(vocabulary):
    """The tiktoken.Encoding of a vocabulary in tiktoken's format, each line a token in base64 and its id.

    <|endoftext|> gets the next id. Raises ValueError.
    """
    lines = [line.split() for line in vocabulary.splitlines()]
    ranks = {base64.b64decode(token): int(i) for token, i in lines}
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError("the ids are not 0, 1, 2, ..., or one of the 256 bytes has none")
    return tiktoken.Encoding("own", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
