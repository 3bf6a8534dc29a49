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
from dataclasses import dataclass
from itertools import groupby
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
            cache[0, :, :, pos : pos + T] = k
            cache[1, :, :, pos : pos + T] = v
            k, v = cache[:, :, :, : pos + T]
        dropout = self.dropout if self.training else 0.0
        # A single new token comes after everything that is kept: it needs no mask.
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
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
        # Given a _weight, nn.Embedding leaves its initialisation to us.
        self.wte = nn.Embedding(V, C, _weight=torch.empty(V, C))  # tokens; its transpose is the output head
        self.wpe = nn.Embedding(T, C, _weight=torch.empty(T, C))  # positions
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():  # initialised as GPT-2 was
            if p.is_meta:  # a shape without values: touching it would make torch import 70 MB of itself
                continue
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
        B, T = idx.shape
        if pos + T > self.config.block_size:
            raise ValueError(f"{pos + T} tokens do not fit in the model's context of {self.config.block_size}")
        x = self.wte(idx) + self.wpe.weight[pos : pos + T]
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i], pos)
        return self.ln_f(x)

    def head(self, x):
        """Logits (..., V) of hidden states (..., C)."""
        W = self.wte.weight
        # The same twice. For the few rows (B, C) of a step of generation, W xᵀ is the faster way round on a CPU.
        return (W @ x.T).T if x.ndim == 2 else F.linear(x, W)

    def forward(self, idx, targets=None, label_smoothing=0.0):
        """Logits (B, T, V) of the tokens idx (B, T); with targets (B, T), the loss instead.

        targets[b, t] is the token that should follow idx[b, : t + 1], or -100 where the loss should not look.
        The loss is the mean cross-entropy over the others, a scalar in nats.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.head(x)
        keep = targets != -100
        # A Function would compute the gradient of a weight that asks for one even where gradients are off.
        weight = self.wte.weight if torch.is_grad_enabled() else self.wte.weight.detach()
        return ChunkedCrossEntropy.apply(x[keep], weight, targets[keep], label_smoothing)

    def new_cache(self, B, T):
        """An empty cache for the keys and values of B sequences of up to T tokens."""
        c = self.config
        return self.wte.weight.new_empty(c.n_layer, 2, B, c.n_head, T, c.n_embd // c.n_head)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Continue the prompts idx (B, T), T >= 1: yields one (B,) tensor of token ids a step.

        temperature 0 is greedy; top_k keeps the k likeliest tokens; generator, a torch.Generator on the model's
        device, makes the draws repeatable. It goes on past <|endoftext|>: the caller stops when it has enough.
        Raises ValueError, at the first step, if T + max_new_tokens exceeds block_size.
        """
        B, T = idx.shape
        if T + max_new_tokens > self.config.block_size:
            raise ValueError(
                f"{T} tokens of prompt and {max_new_tokens} new ones do not fit in the model's context of "
                f"{self.config.block_size}: shorten the prompt or ask for fewer"
            )
        cache = self.new_cache(B, T + max_new_tokens)
        for pos in range(T, T + max_new_tokens):
            logits = self.head(self.hidden(idx, cache, pos - idx.shape[1])[:, -1])  # (B, V)
            if temperature == 0:
                idx = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                logits = logits.float() / temperature
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits[logits < kth] = -torch.inf
                idx = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            yield idx[:, 0]

    @classmethod
    def from_pretrained(cls, name_or_dir, dtype=torch.float32, device="cpu"):
        """GPT-2 with trained weights, in eval mode.

        name_or_dir is a key of PRETRAINED, or a folder with `config.json` and `model.safetensors`.
        Raises OSError (not found, cannot be downloaded) or ValueError (damaged, or not a GPT-2).
        """
        if name_or_dir in PRETRAINED:
            file, config = find_pretrained(name_or_dir), PRETRAINED[name_or_dir][0]
        else:
            file, config = Path(name_or_dir) / "model.safetensors", read_config(name_or_dir)
        prefix = check_weights(file, config)
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        weights = {}
        # Mapping the file anew for each block lets go of the pages already copied: the peak is the model
        # and one block, not the model and the file.
        for _, names in groupby(model.state_dict(), key=lambda name: name.split(".")[:2]):
            with safe_open(file, "pt") as f:
                for name in names:
                    stored, columns = stored_as(name, config)
                    w = f.get_tensor(prefix + stored)[..., columns]
                    w = w.T if is_transposed(name) else w
                    weights[name] = torch.empty(w.shape, dtype=dtype, device=device).copy_(w)
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def save_pretrained(self, dir):
        """Write `config.json` and `model.safetensors` into the folder dir, for `from_pretrained` here and for
        `transformers.GPT2LMHeadModel.from_pretrained`.

        Raises ValueError if the model has other parameters than GPT-2's, as one with unmerged adapters has.
        """
        config, weights = self.config, self.state_dict()
        with torch.device("meta"):
            if other := weights.keys() ^ GPT(config).state_dict().keys():
                raise ValueError(f"not a plain GPT-2, because of {min(other)}: merge adapters before saving")
        settings = {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            **{stored: getattr(config, ours) for ours, stored in SIZES.items()},
            **{stored: config.dropout for stored in ("embd_pdrop", "attn_pdrop", "resid_pdrop")},
            **GPT2_SETTINGS,
            "bos_token_id": config.vocab_size - 1,
            "eos_token_id": config.vocab_size - 1,
        }
        parts = {}
        for name, w in weights.items():
            parts.setdefault("transformer." + stored_as(name, config)[0], []).append(w.T if is_transposed(name) else w)
        tensors = {name: torch.cat(part, dim=-1).contiguous() for name, part in parts.items()}
        Path(dir).mkdir(parents=True, exist_ok=True)
        write_whole(Path(dir) / "config.json", lambda tmp: tmp.write_text(json.dumps(settings, indent=2)))
        write_whole(Path(dir) / "model.safetensors", lambda tmp: save_file(tensors, tmp, metadata={"format": "pt"}))


class ChunkedCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy of softmax(x Wᵀ) with the targets, a few rows of logits at a time.

    The logits of 8 x 512 tokens of GPT-2 are 0.8 GB, and their gradient is as large again. But that gradient
    is known as soon as the logits are:

        d loss / d logits = (softmax(logits) - target distribution) / N

    So the forward pass takes a few rows, computes their logits, their part of the loss and at once their part
    of d loss / d x, and forgets the logits. Nothing is computed twice; the backward pass has only to scale.
    The target distribution is 1 - label_smoothing on the target, with label_smoothing spread evenly over V.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, label_smoothing):
        # x (N, C), weight (V, C), targets (N,)
        N, V = len(x), len(weight)
        want_x, want_weight, _, _ = ctx.needs_input_grad
        dx = torch.empty_like(x) if want_x else None
        dweight = torch.zeros_like(weight) if want_weight else None
        loss = torch.zeros((), device=x.device)
        parts = max(1, round(N * V / 2**24))  # of equal size; the logits of each take about 64 MiB in float32
        for rows in (slice(N * i // parts, N * (i + 1) // parts) for i in range(parts)):
            target = targets[rows, None]
            logits = F.linear(x[rows], weight).float()  # the large one: from here on it is changed in place
            logits -= logits.amax(-1, keepdim=True)  # leaves the softmax as it is, and exp cannot overflow
            loss -= (1 - label_smoothing) * logits.gather(1, target).sum()
            if label_smoothing:
                loss -= label_smoothing * logits.mean(-1).sum()
            total = logits.exp_().sum(-1, keepdim=True)
            loss += total.log().sum()  # log softmax = logits - log total
            if want_x or want_weight:
                dlogits = logits.div_(total).sub_(label_smoothing / V)
                dlogits.scatter_add_(1, target, torch.full_like(total, label_smoothing - 1))
                dlogits = dlogits.to(x.dtype)
            if want_x:
                dx[rows] = dlogits @ weight
            if want_weight:
                dweight += dlogits.T @ x[rows]
            logits = dlogits = None  # these go before the next ones come
        ctx.N = N
        ctx.save_for_backward(dx, dweight)
        return loss / N

    @staticmethod
    def backward(ctx, dloss):
        dx, dweight = ctx.saved_tensors
        return *(None if d is None else d * (dloss / ctx.N) for d in (dx, dweight)), None, None


# ---- OpenAI's weights: where they are, how they are stored -------------------------------------------------

# Shape, revision at huggingface.co/openai-community, and sha256 of model.safetensors where we know it.
PRETRAINED = {
    "gpt2": (
        GPTConfig(n_layer=12, n_head=12, n_embd=768),
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "gpt2-medium": (
        GPTConfig(n_layer=24, n_head=16, n_embd=1024),
        "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        None,
    ),
    "gpt2-large": (
        GPTConfig(n_layer=36, n_head=20, n_embd=1280),
        "32b71b12589c2f8d625668d2335a01cac3249519",
        None,
    ),
    "gpt2-xl": (
        GPTConfig(n_layer=48, n_head=25, n_embd=1600),
        "15ea56dee5df4983c59b2538573817e1667135e2",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
}
# What config.json calls the sizes, and what else it must say: a model with other settings is not GPT-2.
SIZES = dict(block_size="n_positions", vocab_size="vocab_size", n_layer="n_layer", n_head="n_head", n_embd="n_embd")
GPT2_SETTINGS = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "n_inner": None,  # four times n_embd
}


def stored_as(name, config):
    """Where GPT-2's files keep our parameter `name`: in which tensor, and in which of its columns."""
    for i, part in enumerate(("c_q", "c_k", "c_v")):
        if f".{part}." in name:  # a third of the fused layer
            return name.replace(part, "c_attn"), slice(i * config.n_embd, (i + 1) * config.n_embd)
    return name, slice(None)


def is_transposed(name):
    """GPT-2's files keep a linear layer's weight as (in, out); torch keeps it as (out, in)."""
    return ".c_" in name and name.endswith("weight")


def read_config(dir):
    """The GPTConfig in the folder dir. Raises FileNotFoundError, or ValueError if it is not a GPT-2's."""
    file = Path(dir) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no model '{dir}': name one of {', '.join(PRETRAINED)}, or a folder with config.json and model.safetensors"
        )
    try:
        saved = json.loads(file.read_bytes())
        if saved["model_type"] != "gpt2":
            raise ValueError(f"it describes a {saved['model_type']!r}, and this is GPT-2 only")
        config = GPTConfig(**{ours: saved[stored] for ours, stored in SIZES.items()})
        for stored in SIZES.values():
            if type(saved[stored]) is not int or not 0 < saved[stored] < 2**20:
                raise ValueError(f"{stored} is {saved[stored]!r}, not a sensible size")
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        for key, value in GPT2_SETTINGS.items():
            if saved.get(key, value) != value and not (key == "n_inner" and saved[key] == 4 * config.n_embd):
                raise ValueError(f"{key} is {saved[key]!r}, and GPT-2's is {value!r}")
    except KeyError as e:
        raise ValueError(f"{file}: {e} is missing") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"{file}: {e}") from None
    return config


def check_weights(file, config):
    """Compare the names and shapes in a safetensors file with the config's, before anything is allocated.

    Returns the prefix that the file's names have: "transformer." or "". Raises OSError or ValueError.
    """
    try:
        with safe_open(file, "pt") as f:
            found = {name: f.get_slice(name) for name in f.keys()}
            prefix = "transformer." if "transformer.wte.weight" in found else ""
            if len(found) < config.n_layer:
                raise ValueError(f"{file} holds {len(found)} tensors, too few for n_layer = {config.n_layer}")
            with torch.device("meta"):
                weights = GPT(config).state_dict()
            expected = {}
            for name, w in weights.items():
                stored, _ = stored_as(name, config)
                shape = list(w.T.shape if is_transposed(name) else w.shape)
                expected[stored] = [*shape[:-1], 3 * shape[-1]] if "c_attn" in stored else shape
            for name, wanted in expected.items():
                if (name := prefix + name) not in found:
                    raise ValueError(f"{file} has no tensor {name}: it is not the GPT-2 that its config.json describes")
                shape, kind = found[name].get_shape(), found[name].get_dtype()
                if shape != wanted:
                    raise ValueError(f"{file}: {name} is {shape}, but its config.json asks for {wanted}")
                if kind not in ("F32", "F16", "BF16"):
                    raise ValueError(f"{file}: {name} holds {kind}, but weights are F32, F16 or BF16")
            for name in found.keys() - {prefix + name for name in expected}:
                if name == "lm_head.weight":  # a copy of wte.weight
                    if not torch.equal(f.get_tensor(name), f.get_tensor(prefix + "wte.weight")):
                        raise ValueError(f"{file}: {name} differs from wte.weight, to which GPT-2 ties it")
                elif not name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, in older files
                    raise ValueError(f"{file} has a tensor {name}, which GPT-2 does not have")
    except FileNotFoundError:
        raise FileNotFoundError(f"no weights at {file}: put model.safetensors there") from None
    except SafetensorError as e:
        raise ValueError(f"{file} is damaged or cut off ({e}): copy or download it again") from None
    return prefix


def find_pretrained(name):
    """The path of OpenAI's model.safetensors: in the Hugging Face cache, in torch.hub's folder, or downloaded.

    Raises OSError.
    """
    config, revision, sha256 = PRETRAINED[name]
    home = os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", Path(home) / "hub"))
    for repository in (f"openai-community--{name}", name):
        for file in cache.glob(f"models--{repository}/snapshots/*/model.safetensors"):
            return file
    file = Path(torch.hub.get_dir()) / "lora-gpt2" / name / "model.safetensors"
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{host}/openai-community/{name}/resolve/{revision}/model.safetensors"
    return download(url, file, sha256, check=lambda tmp: check_weights(tmp, config))


def download(url, file, sha256=None, check=lambda tmp: None):
    """The path `file`, fetched from url unless it is there. check(tmp) raises ValueError if what came is wrong.

    Raises OSError that says what to do by hand, and leaves nothing behind.
    """

    def fetch(tmp):
        try:
            torch.hub.download_url_to_file(url, str(tmp), hash_prefix=sha256)
        except RuntimeError as e:  # the hash is another one
            raise ValueError(e) from None
        check(tmp)

    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, fetch)
        except (OSError, ValueError, http.client.HTTPException) as e:
            why = " ".join(str(e).split())
            raise OSError(f"cannot download {url} ({why}): try again, or put the file at {file} by hand") from None
    return file


def write_whole(path, write):
    """Call write(tmp) on a temporary path, then rename it to path: a reader finds the whole file or none."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        write(tmp)
        os.replace(tmp, path)
    except (RuntimeError, SafetensorError) as e:  # how torch and safetensors say that a disk is full
        raise OSError(f"cannot write {path} ({e}): make room, or choose another folder") from None
    finally:
        tmp.unlink(missing_ok=True)


# ---- The tokenizer -----------------------------------------------------------------------------------------

END = "<|endoftext|>"  # GPT-2's one special token: it ends a text, and starts one
WORDS = r" ?\w+| ?[^\w\s]+|\s+"  # a vocabulary of our own splits text into words, punctuation and white space


def load_tokenizer(name_or_dir):
    """GPT-2's tokenizer, or the one in the folder's `vocab.tiktoken`, as a tiktoken.Encoding.

    Raises OSError if GPT-2's vocabulary cannot be downloaded, ValueError if the folder's is damaged.
    """
    file = Path(name_or_dir) / "vocab.tiktoken"
    if name_or_dir in PRETRAINED or not file.exists():
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as e:
            why = f"cannot download GPT-2's vocabulary ({type(e).__name__})"
            raise OSError(f"{why}: set TIKTOKEN_CACHE_DIR to a folder where tiktoken has stored it") from None
    try:
        return make_tokenizer(file.read_text())
    except ValueError as e:
        raise ValueError(f"{file} is not a vocabulary in tiktoken's format ({e})") from None


def make_tokenizer(vocabulary):
    """The tiktoken.Encoding of a vocabulary in tiktoken's format, each line a token in base64 and its id.

    <|endoftext|> gets the next id. Raises ValueError.
    """
    lines = [line.split() for line in vocabulary.splitlines()]
    ranks = {base64.b64decode(token): int(i) for token, i in lines}
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError("the ids are not 0, 1, 2, ..., or one of the 256 bytes has none")
    return tiktoken.Encoding("own", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
