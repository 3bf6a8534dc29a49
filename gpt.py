"""GPT-2 (Radford et al. 2019) in one file: model, loss, generation, files, tokenizer.

- OpenAI's architecture: pre-norm blocks, learned positions, tanh GELU, tied head.
- The fused `c_attn` is three `nn.Linear`s here, so LoRA can adapt `c_q` and `c_v`.
- The loss is computed in chunks, so a large batch's logits are never all in memory.
- Generation uses a preallocated KV cache and yields one token per step.
- Model folders use Hugging Face's layout: `transformers` can read and write them.
- Shapes: B sequences, T tokens, C = n_embd, V = vocab_size, H = n_head.
"""

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # not read from Hugging Face's files
    eos_token_id: int = 50256  # <|endoftext|>


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_q = nn.Linear(config.n_embd, config.n_embd)
        self.c_k = nn.Linear(config.n_embd, config.n_embd)
        self.c_v = nn.Linear(config.n_embd, config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, layer_cache=None, start_pos=0):
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, C / H)
        k = self.c_k(x).view(B, T, self.n_head, -1).transpose(1, 2)
        v = self.c_v(x).view(B, T, self.n_head, -1).transpose(1, 2)
        if layer_cache is not None:  # store k and v, then attend to all tokens so far
            k_cache, v_cache = layer_cache  # each (B, H, max_length, C / H)
            k_cache[:, :, start_pos : start_pos + T] = k
            v_cache[:, :, start_pos : start_pos + T] = v
            k, v = k_cache[:, :, : start_pos + T], v_cache[:, :, : start_pos + T]
        # With is_causal, query i sees keys 0 to i. One new token must see all keys.
        is_causal = layer_cache is None or T > 1  # T > 1 alone works, but recompiles for each T
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenate the heads
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # as in GPT-2
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, layer_cache=None, start_pos=0):
        x = x + self.attn(self.ln_1(x), layer_cache, start_pos)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.name_or_path = None  # where from_pretrained found the weights
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # positions
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.init_weights()

    def init_weights(self):
        """As in GPT-2: smaller weights in layers that add to the residual stream."""
        residual_std = 0.02 / (2 * self.config.n_layer) ** 0.5
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=residual_std if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def compute_hidden_states(self, idx, kv_cache=None, start_pos=0):
        """The output (B, T, C) of the last LayerNorm for the token ids idx (B, T).

        kv_cache, start_pos: the keys and values of idx go into the cache at start_pos.
            Either start_pos is 0 (the prompt), or T is 1 (the next token).
        """
        T = idx.shape[1]
        if start_pos + T > self.config.block_size:
            raise ValueError(f"{start_pos + T} tokens > block_size {self.config.block_size}")
        x = self.wte(idx) + self.wpe.weight[start_pos : start_pos + T]
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, None if kv_cache is None else kv_cache[i], start_pos)
        return self.ln_f(x)

    def forward(self, idx, targets=None, label_smoothing=0.0):
        """Logits (B, T, V) or, with targets, the mean cross-entropy in nats.

        idx: token ids (B, T).
        targets: the next token at each position of idx (B, T); -100 is ignored.
        label_smoothing: share of the target probability spread evenly over all tokens.
        """
        x = self.compute_hidden_states(idx)
        if targets is None:
            return F.linear(x, self.wte.weight)
        # Keep only positions with a target. If targets are on the CPU, this never waits for a GPU.
        positions = (targets != -100).flatten().nonzero().squeeze(1)
        x = x.flatten(0, 1)[positions.to(x.device, non_blocking=True)]
        targets = targets.flatten()[positions].to(x.device, non_blocking=True)
        return ChunkedCrossEntropy.apply(x, self.wte.weight, targets, label_smoothing)

    def new_kv_cache(self, batch_size, max_length):
        """Keys and values, uninitialized: (n_layer, 2, B, H, max_length, C / H)."""
        c = self.config
        if max_length > c.block_size:
            raise ValueError(f"prompt + new tokens: {max_length} > block_size {c.block_size}")
        shape = (c.n_layer, 2, batch_size, c.n_head, max_length, c.n_embd // c.n_head)
        return self.wte.weight.new_empty(shape)

    def next_token_logits(self, idx, kv_cache, start_pos):
        """Logits (B, V) of the token after idx (B, T), in float32."""
        # GPT-2's logits are near -100, where bfloat16 has steps of 0.5.
        x = self.compute_hidden_states(idx, kv_cache, start_pos)[:, -1].float()
        # On a CPU, PyTorch multiplies one row on one core, but two rows on all cores.
        padded_x = x.repeat(2, 1) if len(x) == 1 else x
        return (self.wte.weight.float() @ padded_x.T).T[: len(x)]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Continue the prompts idx (B, T): yield one (B,) tensor of token ids per step.

        Generation does not stop at the end-of-text token: the caller must end the loop.
        temperature: divides the logits; 0 is greedy.
        top_k: sample from the k most likely tokens only.
        generator: a torch.Generator on the model's device, for repeatable samples.
        """
        kv_cache = self.new_kv_cache(len(idx), idx.shape[1] + max_new_tokens)
        start_pos = 0
        for _ in range(max_new_tokens):
            logits = self.next_token_logits(idx, kv_cache, start_pos)  # (B, V)
            start_pos += idx.shape[1]  # T for the prompt, then 1
            if temperature == 0:
                idx = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                logits = logits / temperature
                if top_k:  # 0 means all tokens, too
                    top_logits = logits.topk(min(top_k, logits.shape[-1])).values
                    logits[logits < top_logits[:, -1:]] = -torch.inf
                idx = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            yield idx[:, 0]

    @classmethod
    def from_pretrained(cls, name_or_dir, dtype=torch.float32, device="cpu"):
        """A GPT-2 with trained weights, in eval mode. Raises OSError or ValueError.

        name_or_dir: a folder, or a name on the Hugging Face Hub, like "gpt2".
        """
        with torch.device("meta"):  # shapes without memory
            model = cls(load_config(name_or_dir))
        path = find_file(name_or_dir, "model.safetensors")
        try:
            model.load_state_dict(load_weights(path, dtype, device), assign=True)
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged or does not fit: {str(error)[:300]}") from None
        model.name_or_path = str(name_or_dir)
        return model.eval()

    def save_pretrained(self, dir):
        """Write config.json, weights and tokenizer files that `transformers` can load."""
        weights = self.state_dict()
        with torch.device("meta"):
            unexpected = weights.keys() - GPT(self.config).state_dict().keys()
        if unexpected:
            raise ValueError(f"cannot save {min(unexpected)}: merge or unwrap the model")
        tensors = {}
        for name, weight in weights.items():
            if ".c_q." in name:
                weight = torch.cat([weights[name.replace("c_q", part)] for part in QKV])
                name = name.replace("c_q", "c_attn")
            if ".c_k." not in name and ".c_v." not in name:  # c_attn has these
                tensors[f"transformer.{name}"] = transpose_conv1d(name, weight).contiguous()
        hf_config = vars(self.config) | REQUIRED_CONFIG | {"architectures": ["GPT2LMHeadModel"]}
        hf_config["n_positions"] = self.config.block_size
        hf_config["bos_token_id"] = self.config.eos_token_id
        dir, text = Path(dir), json.dumps(hf_config, indent=2)
        atomic_write(dir / "config.json", lambda tmp: tmp.write_text(text))
        save_tensors = partial(save_file, tensors, metadata={"format": "pt"})
        atomic_write(dir / "model.safetensors", save_tensors)
        tokenizer_dir = None if is_openai_model(self.name_or_path) else self.name_or_path
        for filename in TOKENIZER_FILES:  # copy the base's; OpenAI's tokenizer needs none
            path = tokenizer_dir and find_file(tokenizer_dir, filename, required=False)
            if path is None:
                (dir / filename).unlink(missing_ok=True)  # left by another model
            else:
                atomic_write(dir / filename, partial(Path.write_bytes, data=path.read_bytes()))


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits x Wᵀ, computed a chunk of rows at a time.

    GPT-2's logits for 8 x 512 tokens take 0.8 GB, and their gradient as much again.
    But the gradient of the summed loss has a closed form:

        d loss / d logits = softmax(logits) - target distribution

    So the forward pass computes each chunk's logits, loss and gradients, then frees the
    logits. The backward pass only divides by N, for the mean. With label smoothing s,
    the target distribution is (1 - s) one-hot + s / V.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, label_smoothing):
        # x (N, C), weight (V, C), targets (N,)
        N, V = len(x), len(weight)
        total_loss = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x)
        needs_grad = ctx.needs_input_grad[0]  # x's: no_grad makes it False, but not weight's
        grad_weight = torch.zeros_like(weight) if needs_grad and ctx.needs_input_grad[1] else None
        n_chunks = max(1, round(N * V / 16e6))  # about 64 MB of logits per chunk
        chunks = (t.tensor_split(n_chunks) for t in (x, targets, grad_x))
        for x_chunk, target_chunk, grad_x_chunk in zip(*chunks, strict=True):
            rows = torch.arange(len(target_chunk), device=x.device)
            # In place to save memory: the logits, then exp(logits), then the gradient.
            logits = F.linear(x_chunk, weight).float()  # (rows, V)
            logits -= logits.amax(-1, keepdim=True)  # so that exp cannot overflow
            total_loss -= (1 - label_smoothing) * logits[rows, target_chunk].sum()
            if label_smoothing:
                total_loss -= label_smoothing / V * logits.sum()
            exp_sum = logits.exp_().sum(-1, keepdim=True)
            total_loss += exp_sum.log().sum()
            if needs_grad:
                grad_logits = logits.div_(exp_sum)  # softmax(logits)
                if label_smoothing:
                    grad_logits -= label_smoothing / V
                grad_logits[rows, target_chunk] -= 1 - label_smoothing
                grad_logits = grad_logits.to(x.dtype)
                grad_x_chunk.copy_(grad_logits @ weight)
                if grad_weight is not None:
                    grad_weight += grad_logits.T @ x_chunk
            logits = grad_logits = None  # free them before the next chunk
        ctx.N = N
        ctx.save_for_backward(grad_x, grad_weight)
        return total_loss / N

    @staticmethod
    def backward(ctx, grad_output):
        scale = grad_output / ctx.N
        return *(None if grad is None else grad * scale for grad in ctx.saved_tensors), None, None


QKV = ("c_q", "c_k", "c_v")  # the parts of the fused layer c_attn, in order
IGNORED_KEYS = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # masks, tied head
# Settings that affect the results. A config.json with other values is rejected.
REQUIRED_CONFIG = dict(model_type="gpt2", activation_function="gelu_new")
REQUIRED_CONFIG |= dict(layer_norm_epsilon=1e-5, scale_attn_weights=True)
REQUIRED_CONFIG |= dict(scale_attn_by_inverse_layer_idx=False)
REQUIRED_CONFIG |= dict(add_cross_attention=False, tie_word_embeddings=True)


def find_file(name_or_dir, filename, required=True):
    """The path of a file in a folder or on the Hub; None if missing and not required.
    A name that exists as a folder or looks like a path counts as a folder. Raises OSError."""
    path = Path(name_or_dir, filename).expanduser()
    if path.parent.is_dir() or path.is_absolute() or str(name_or_dir).startswith((".", "out/")):
        return path if required or path.exists() else None
    try:
        return Path(hf_hub_download(name_or_dir, filename))
    except Exception as error:  # the Hub client lets errors from many libraries through
        if isinstance(error, RemoteEntryNotFoundError) and not required:
            return None
        raise OSError(f"{name_or_dir}: cannot get {filename} from the Hub: {error}") from None


def atomic_write(path, write):
    """Call write(tmp), then rename tmp to path, so that nobody reads half a file."""
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        tmp.touch()
        permissions = tmp.stat().st_mode  # from the umask; save_file would change them
        write(tmp)
        tmp.chmod(permissions)
        tmp.replace(path)
    except (RuntimeError, SafetensorError) as error:  # raised when the disk is full
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        tmp.unlink(missing_ok=True)


def load_config(name_or_dir):
    """The GPTConfig in config.json. Raises OSError, or ValueError if it is not GPT-2."""
    path = find_file(name_or_dir, "config.json")
    if not path.exists() and path.with_name("adapter_config.json").exists():
        raise ValueError(f"{name_or_dir} is an adapter: use --lora or load_lora")
    hf_config = json.loads(path.read_bytes())
    for key, value in REQUIRED_CONFIG.items():
        if hf_config.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {hf_config[key]!r}, but GPT-2 has {value!r}")
    if not isinstance(hf_config.get("eos_token_id", 0), int):
        raise ValueError(f"{path}: eos_token_id must be one id")
    hf_config["block_size"] = hf_config.get("n_positions", 1024)
    return GPTConfig(**{key: hf_config[key] for key in vars(GPTConfig()) if key in hf_config})


def transpose_conv1d(name, weight):
    """From GPT-2's "Conv1D" (in, out) to nn.Linear's (out, in), or back."""
    return weight.T if ".c_" in name and weight.ndim == 2 else weight


def load_weights(path, dtype, device):
    """The state dict of our model from a model.safetensors."""
    weights = {}
    with safe_open(path, "pt") as file:
        keys = [key for key in file.keys() if not key.endswith(IGNORED_KEYS)]
    for key in sorted(keys, reverse=True):  # wte, the largest, first: lowers the peak memory
        with safe_open(path, "pt") as file:  # reopened each time, to free memory
            weight = transpose_conv1d(key, file.get_tensor(key))
        names = split_c_attn(key.removeprefix("transformer."))
        for name, chunk in zip(names, weight.chunk(len(names)), strict=True):
            weights[name] = torch.empty(chunk.shape, dtype=dtype, device=device).copy_(chunk)
    return weights


def split_c_attn(name):
    """Our names for a name in the files: three for c_attn, one for any other."""
    return list(dict.fromkeys(name.replace("c_attn", part) for part in QKV))


OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TOKENIZER_FILES = ("vocab.json", "merges.txt")
EOS = "<|endoftext|>"  # GPT-2's only special token
# BPE works within these pieces: words with their leading space, numbers, the rest.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# vocab.json and merges.txt represent bytes as printable characters: a space is "Ġ".
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
CHAR_TO_BYTE = {chr(byte): byte for byte in PRINTABLE}
CHAR_TO_BYTE |= {chr(256 + i): byte for i, byte in enumerate(OTHERS)}


def is_openai_model(name_or_dir):
    name = str(name_or_dir).removeprefix("openai-community/")
    return name in OPENAI_MODELS and not Path(name_or_dir).is_dir()


def load_tokenizer(name_or_dir):
    """The model's tokenizer. EOS encodes to eos_token_id. Raises OSError or ValueError."""
    if is_openai_model(name_or_dir):
        return tiktoken.get_encoding("gpt2")
    config = load_config(name_or_dir)
    find = partial(find_file, name_or_dir, required=False)
    vocab_path, merges_path = map(find, TOKENIZER_FILES)
    if vocab_path and merges_path:
        ranks = load_bpe_ranks(vocab_path, merges_path)
    elif vocab_path or merges_path or find("tokenizer.json") or config.vocab_size < 50257:
        raise ValueError(f"{name_or_dir}: its tokenizer needs vocab.json and merges.txt")
    else:  # no tokenizer files, and a vocabulary as large as GPT-2's
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    if max(*ranks.values(), config.eos_token_id) >= config.vocab_size:
        raise ValueError(f"{name_or_dir}: token ids exceed vocab_size {config.vocab_size}")
    # Name all other ids, so that whatever a model generates can be decoded.
    unused_ids = set(range(config.vocab_size)) - {*ranks.values(), config.eos_token_id}
    special = {EOS: config.eos_token_id} | {f"<|unused{i}|>": i for i in unused_ids}
    return tiktoken.Encoding("own", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def load_bpe_ranks(vocab_path, merges_path):
    """{token as bytes: id} of a byte-level BPE. tiktoken merges the lowest id first."""
    vocab = json.loads(vocab_path.read_bytes())  # {token: id}
    lines = merges_path.read_text(encoding="utf-8").strip().split("\n")
    merged_tokens = [line.replace(" ", "") for line in lines if not line.startswith("#version")]
    tokens = [*CHAR_TO_BYTE, *merged_tokens]
    is_byte_level = all(token in vocab and set(token) <= CHAR_TO_BYTE.keys() for token in tokens)
    if not is_byte_level or merged_tokens != sorted(merged_tokens, key=vocab.get):
        raise ValueError(f"{vocab_path} is not a byte-level BPE with ids in merge order")
    return {bytes(map(CHAR_TO_BYTE.get, token)): vocab[token] for token in tokens}


def encode_text(tokenizer, text):
    """Token ids of the text. EOS in the text becomes the end-of-text token."""
    return tokenizer.encode(text, allowed_special={EOS}, disallowed_special=())
