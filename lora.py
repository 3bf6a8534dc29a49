"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv:2106.09685).

The pretrained weight W0 (out, in) is frozen. Fine-tuning learns a low-rank update
ΔW = (alpha / r) B A, where B is (out, r), A is (r, in) and r << in, out (section 4.1):

    h = W0 x + (alpha / r) B A x                                            (equation 3)
"""

import json
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gpt import QKV, atomic_write, split_c_attn


class LoRALinear(nn.Module):
    """W0 x + (alpha / r) B A x. Wraps and freezes the layer that holds W0."""

    def __init__(self, linear, r, alpha, dropout=0.0):
        super().__init__()
        if r < 1 or not 0 <= dropout < 1:
            raise ValueError(f"need r >= 1 and 0 <= dropout < 1, got {r} and {dropout}")
        self.linear = linear.requires_grad_(False)  # W0
        self.r, self.alpha, self.dropout = r, alpha, dropout
        (out_features, in_features), device = linear.weight.shape, linear.weight.device
        # A is random, B is zero: ΔW starts at zero (section 4.1). Both are float32.
        # A's standard deviation, (3 in)^(-1/2), comes from the authors' code.
        A = torch.randn(r, in_features, device=device)
        self.lora_A = nn.Parameter(A / (3 * in_features) ** 0.5)
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device))
        self.train(linear.training)

    def forward(self, x):
        h = self.linear(x)  # W0 x
        x = F.dropout(x, self.dropout, self.training)
        # B (A x): two thin products, instead of the large matrix ΔW.
        z = self.alpha / self.r * F.linear(x, self.lora_A.to(x.dtype))  # (..., r)
        return h.add_(F.linear(z, self.lora_B.to(x.dtype)))  # in place: saves memory

    def delta_weight(self):
        """ΔW = (alpha / r) B A, of shape (out, in)."""
        return self.alpha / self.r * self.lora_B @ self.lora_A

    def extra_repr(self):
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}"


def lora_layers(model):
    """The model's LoRA layers, as {name: LoRALinear}."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model, r=4, alpha=32, dropout=0.0, targets=("c_q", "c_v")):
    """Freeze the model and replace its target modules with LoRALinear layers, in place.

    targets: suffixes of layer names; "c_proj" matches attn.c_proj and mlp.c_proj.
    Raises ValueError if a target matches no layer, or if there are LoRA layers already.
    """
    if lora_layers(model) or hasattr(model, "merged_lora"):  # set by merge_lora
        raise ValueError("the model already has LoRA layers")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linears):
            choices = {re.sub(r"^h\.\d+\.", "", name) for name in linears}
            raise ValueError(f"no '{target}' layer: choose from {sorted(choices)}")
    suffixes = tuple(f".{target}" for target in targets)
    matching = {name: m for name, m in linears.items() if f".{name}".endswith(suffixes)}
    layers = {name: LoRALinear(m, r, alpha, dropout) for name, m in matching.items()}
    set_lora_layers(model, layers)


def set_lora_layers(model, layers):
    """Freeze the model, and make `layers`, {name: LoRALinear}, its only LoRA layers."""
    if hasattr(model, "merged_lora"):
        unmerge_lora(model)  # W0 goes back into the nn.Linears that `layers` wrap
    model.requires_grad_(False)
    old_linears = {name: layer.linear for name, layer in lora_layers(model).items()}
    for name, layer in (old_linears | layers).items():  # removes old ones, too
        model.set_submodule(name, layer)


@torch.no_grad()
def merge_lora(model):
    """Make the model a plain GPT with the weights W0 + ΔW (section 4.1)."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("no LoRA layers to merge, or they are merged already")
    model.merged_lora = {name: (layer, layer.linear.weight) for name, layer in layers.items()}
    for name, (layer, W0) in model.merged_lora.items():
        merged_W = (W0.float() + layer.delta_weight()).to(W0.dtype)  # the sum is in float32
        layer.linear.weight = nn.Parameter(merged_W, requires_grad=False)
        model.set_submodule(name, layer.linear)


def unmerge_lora(model):
    """Put W0 and the LoRA layers back. Subtracting ΔW would leave rounding errors."""
    for name, (layer, W0) in model.merged_lora.items():
        merged_W = layer.linear.weight  # may have moved to another device or dtype by now
        layer.to(merged_W.device).train(layer.linear.training)
        layer.linear.weight = nn.Parameter(W0.to(merged_W), requires_grad=False)
        model.set_submodule(name, layer)
    del model.merged_lora


# Adapter files have PEFT's format, in which rank r on c_q and c_v is rank 2r on c_attn:
#     A = [A_q]  (2r, C)      B = [B_q   0 ]  (3C, 2r)
#         [A_v]                   [ 0    0 ]
#                                 [ 0   B_v]
# Alpha doubles, too. Our metadata has each layer's [r, alpha], in A's row order.
PEFT_KEY = "base_model.model.{}.lora_{}.weight"
# Options that load_lora uses, or that change nothing. (A's shape gives the rank.)
SUPPORTED_OPTIONS = """r lora_alpha rank_pattern alpha_pattern lora_dropout
    target_modules fan_in_fan_out peft_type task_type base_model_name_or_path revision
    auto_mapping inference_mode peft_version megatron_core qalora_group_size""".split()
OFF_VALUES = (None, False, {}, [], "none", "gaussian")  # all other options must be off


def peft_name(name):
    return "transformer." + re.sub(r"c_[qkv]$", "c_attn", name)


def save_lora(model, dir):
    """Write the adapter to a folder, for `load_lora` and PEFT's `from_pretrained`."""
    layers = lora_layers(model)
    if not layers or any(name[:2] != "h." or "_orig_mod" in name for name in layers):
        raise ValueError("nothing to save: LoRA layers are absent, merged or wrapped")
    tensors, ranks, alphas = {}, {}, {}
    for module in dict.fromkeys(map(peft_name, layers)):
        our_names = split_c_attn(module.removeprefix("transformer."))
        adapted = [layers[name] for name in our_names if name in layers]
        if len({layer.alpha / layer.r for layer in adapted}) > 1:
            raise ValueError(f"PEFT needs the same alpha / r for all parts of {module}")
        A = torch.cat([layer.lora_A for layer in adapted])
        empty_B = A.new_zeros(A.shape[1], 0)  # (C, 0): becomes C rows of zeros
        B_blocks = [layers[name].lora_B if name in layers else empty_B for name in our_names]
        tensors[PEFT_KEY.format(module, "A")] = A.detach()
        tensors[PEFT_KEY.format(module, "B")] = torch.block_diag(*B_blocks).detach()
        ranks[module], alphas[module] = len(A), sum(layer.alpha for layer in adapted)
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", lora_dropout=adapted[0].dropout)
    config |= dict(base_model_name_or_path=model.name_or_path, fan_in_fan_out=True)
    config |= dict(target_modules=list(ranks), r=len(A), lora_alpha=alphas[module])
    config |= dict(rank_pattern=ranks, alpha_pattern=alphas)  # override r, lora_alpha
    saved_layers = {name: [layer.r, layer.alpha] for name, layer in layers.items()}
    metadata = dict(format="pt", layers=json.dumps(saved_layers), n_layer=str(len(model.h)))
    dir, text = Path(dir), json.dumps(config, indent=2)
    atomic_write(dir / "adapter_config.json", lambda tmp: tmp.write_text(text))
    atomic_write(dir / "adapter_model.safetensors", lambda tmp: save_file(tensors, tmp, metadata))


def load_lora(model, dir):
    """Load an adapter, ours or PEFT's, from a folder. It replaces the model's adapter.
    Raises OSError, or ValueError if it does not fit or uses an unsupported option."""
    config = json.loads(Path(dir, "adapter_config.json").read_bytes())
    for option, value in config.items():
        is_off = value in OFF_VALUES or (option, value) == ("init_lora_weights", True)
        if option not in SUPPORTED_OPTIONS and not is_off:
            raise ValueError(f"{dir}: {option} = {value!r} is not supported")
    try:
        with safe_open(Path(dir, "adapter_model.safetensors"), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{dir}: damaged, or a .bin that PEFT must save again: {error}") from None
    named_modules = model.named_modules()  # h.0.attn.c_q.linear is inside a LoRALinear
    linears = {n.removesuffix(".linear"): m for n, m in named_modules if isinstance(m, nn.Linear)}
    saved_layers = json.loads(metadata.get("layers", "{}"))  # PEFT's files have none
    suffixes = tuple(f".{target}" for target in config["target_modules"])
    names = list(saved_layers) or [n for n in linears if f".{peft_name(n)}".endswith(suffixes)]
    expected_keys = {PEFT_KEY.format(peft_name(name), letter) for name in names for letter in "AB"}
    same_depth = int(metadata.get("n_layer", len(model.h))) == len(model.h)
    if not same_depth or expected_keys != tensors.keys() or set(names) - linears.keys():
        raise ValueError(f"{dir} does not fit: the layers differ")
    alphas = config.get("alpha_pattern", {}) | {"": config["lora_alpha"]}  # "" is for all
    layers = {}
    for name in names:
        module = peft_name(name)
        A, B = tensors[PEFT_KEY.format(module, "A")], tensors[PEFT_KEY.format(module, "B")]
        B = B.chunk(3)[QKV.index(name[-3:])] if name[-3:] in QKV else B
        if name in saved_layers:  # r rows of A, after those of the earlier parts
            r, alpha = saved_layers[name]
            row = sum(len(layers[n].lora_A) for n in layers if peft_name(n) == module)
            A, B = A[row : row + r], B[:, row : row + r]
        else:  # PEFT wrote the file: q, k and v each use all of A
            alpha = next(a for p, a in alphas.items() if re.search(rf"\b({p})$", module))
        if (len(B), A.shape[1]) != linears[name].weight.shape or len(A) != B.shape[1]:
            raise ValueError(f"{dir} does not fit: the shape of {name} differs")
        layers[name] = LoRALinear(linears[name], len(A), alpha, config["lora_dropout"])
        layers[name].load_state_dict({"lora_A": A, "lora_B": B}, strict=False)
    base_name = Path(config.get("base_model_name_or_path") or "").name
    if model.name_or_path and base_name not in ("", Path(model.name_or_path).name):
        print(f"warning: {dir} is for another model, {base_name}", file=sys.stderr)
    set_lora_layers(model, layers)
