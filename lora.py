"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021, arXiv:2106.09685), from scratch.

A pretrained weight W0 (out, in) is frozen. What fine-tuning would add to it is learned as the product of two thin
matrices, ΔW = B A, where B is (out, r), A is (r, in), and r is far below in and out (section 4.1):

    h = W0 x + (alpha / r) B A x                                                                (equation 3)
"""

import json
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from gpt import write_whole


class LoRALinear(nn.Module):
    """A frozen linear layer, shared and not copied, with a low-rank update beside it: (..., in) -> (..., out).

    A and B are float32 whatever the layer is. Raises ValueError unless 1 <= r <= min(in, out).
    """

    def __init__(self, linear, r, alpha, dropout=0.0):
        super().__init__()
        n_out, n_in = linear.weight.shape
        if not 1 <= r <= min(n_in, n_out):
            raise ValueError(f"rank r = {r} does not fit a layer of {n_out} x {n_in}: use 1 to {min(n_in, n_out)}")
        self.linear = linear.requires_grad_(False)  # W0
        self.r, self.alpha, self.scaling, self.dropout = r, alpha, alpha / r, dropout
        # A is Gaussian and B is zero, so that ΔW = B A starts at zero (section 4.1). A's standard deviation is that of
        # the authors' code: the paper does not say.
        self.lora_A = nn.Parameter(torch.randn(r, n_in, device=linear.weight.device) / (3 * n_in) ** 0.5)
        self.lora_B = nn.Parameter(torch.zeros(n_out, r, device=linear.weight.device))
        self.train(linear.training)

    def forward(self, x):
        h = self.linear(x)  # W0 x
        x = F.dropout(x, self.dropout, self.training)
        # B (A x), not (B A) x: two thin products, and ΔW is never formed.
        z = self.scaling * F.linear(x, self.lora_A.to(x.dtype))  # (alpha / r) A x: (..., r)
        return h.add_(F.linear(z, self.lora_B.to(x.dtype)))  # in place: nobody else holds h

    def delta(self):
        """ΔW = (alpha / r) B A: (out, in), float32."""
        return self.scaling * self.lora_B @ self.lora_A


def lora_layers(model):
    """{name: LoRALinear} of the model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model, r=4, alpha=32, dropout=0.0, targets=("c_q", "c_v")):
    """Freeze the model and swap its target layers, in place, for LoRALinear ones.

    A target is the end of a dotted name: "c_proj" is every attn.c_proj and mlp.c_proj, "attn.c_proj" only the first.
    Raises ValueError for a target that no layer has, a rank that does not fit, or a model that has LoRA already.
    """
    if lora_layers(model) or hasattr(model, "unmerged"):
        raise ValueError("the model has LoRA layers already")
    linears = {f".{name}": m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for target in targets:
        if not any(name.endswith(f".{target}") for name in linears):
            valid = {".".join(name.split(".")[-n:]) for name in linears for n in (1, 2)}
            raise ValueError(f"no layer is called '{target}': the targets are {', '.join(sorted(valid))}")
    ends = tuple(f".{target}" for target in targets)
    swap(model, {name[1:]: LoRALinear(m, r, alpha, dropout) for name, m in linears.items() if name.endswith(ends)})


def swap(model, layers):
    """Freeze the model and give it these {name: LoRALinear} in the place of any that it has."""
    if hasattr(model, "unmerged"):
        unmerge_lora(model)
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.linear)
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)


@torch.no_grad()
def merge_lora(model):
    """Turn each LoRALinear into the nn.Linear it was made of, with the weight W0 + ΔW: a plain GPT again (section 4.1).

    The sum is in float32, then cast. W0 and the LoRA layers wait in `model.unmerged`, outside the state dict.
    """
    if not (layers := lora_layers(model)):
        raise ValueError("nothing to merge: the model has no LoRA layers, or they are merged already")
    model.unmerged = {name: (layer, layer.linear.weight) for name, layer in layers.items()}
    for name, (layer, W0) in model.unmerged.items():
        layer.linear.weight = nn.Parameter((W0.float() + layer.delta()).to(W0.dtype), requires_grad=False)
        model.set_submodule(name, layer.linear)


def unmerge_lora(model):
    """Put the LoRA layers back, with the very W0 they had: subtracting ΔW would only come near."""
    if not hasattr(model, "unmerged"):
        raise ValueError("nothing to unmerge: the model is not merged")
    for name, (layer, W0) in model.unmerged.items():
        layer.to(layer.linear.weight.device).train(layer.linear.training)  # the model may have moved since
        layer.linear.weight = nn.Parameter(W0.to(layer.linear.weight), requires_grad=False)
        model.set_submodule(name, layer)
    del model.unmerged


# ---- Files. For PEFT, GPT-2 has one fused layer c_attn (3C, C) where we have c_q, c_k and c_v. Rank r on c_q and on
# c_v is there one adapter of rank 2r, with the same scaling and with zeros that keep the parts from each other:
#     A = [A_q; A_v]  (2r, C)        B = [[B_q, 0], [0, 0], [0, B_v]]  (3C, 2r)
QKV = ("c_q", "c_k", "c_v")


def save_lora(model, dir):
    """Write the adapter into the folder dir, for `load_lora` and `peft.PeftModel.from_pretrained`."""
    if not (layers := lora_layers(model)):
        raise ValueError("nothing to save: the model has no LoRA layers, or they are merged")
    groups, tensors, ranks, alphas = {}, {}, {}, {}
    for name, layer in layers.items():
        block, _, part = name.rpartition(".")
        groups.setdefault(f"{block}.c_attn" if part in QKV else name, {})[part] = layer
    for name, parts in groups.items():
        A = torch.cat([layer.lora_A for layer in parts.values()])  # in the order of the modules: c_q, c_k, c_v
        empty = A.new_zeros(A.shape[1], 0)  # a part that is not adapted has rows of zeros, and no columns
        B = [parts[part].lora_B if part in parts else empty for part in (QKV if "c_attn" in name else parts)]
        tensors[f"base_model.model.transformer.{name}.lora_A.weight"] = A.detach()
        tensors[f"base_model.model.transformer.{name}.lora_B.weight"] = torch.block_diag(*B).detach()
        first = next(iter(parts.values()))  # all have its alpha / r, and its dropout
        ranks[name], alphas[name] = len(A), len(A) * first.alpha / first.r
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", target_modules=list(groups), lora_dropout=first.dropout)
    config["fan_in_fan_out"] = True  # transformers keeps the weights of GPT-2's linear layers transposed
    config["r"], config["lora_alpha"] = max(ranks.values()), max(alphas.values())
    config["rank_pattern"] = {name: r for name, r in ranks.items() if r != config["r"]}
    config["alpha_pattern"] = {name: alpha for name, alpha in alphas.items() if alpha != config["lora_alpha"]}
    files = {Path(dir, "adapter_model.safetensors"): lambda tmp: save_file(tensors, tmp, metadata={"format": "pt"})}
    write_whole(files | {Path(dir, "adapter_config.json"): json.dumps(config, indent=2)})


def load_lora(model, path):
    """Put the adapter in the folder path, ours or PEFT's, on the model, in the place of any that it has.

    Raises ValueError if it is missing, damaged, for another base, or asks for what is not built here.
    """
    put(model, list(read_peft(path)), path)


def put(model, adapter, path):
    """Put an adapter from the file path, (name, A, B, alpha, dropout) of each layer, on the model."""
    linears = {name: getattr(m, "linear", m) for name, m in model.named_modules()}
    for name, A, B, alpha, _ in adapter:  # check all before changing any
        shape, linear = (len(B), A.shape[1]), linears.get(name)
        wanted = tuple(linear.weight.shape) if isinstance(linear, nn.Linear) else "missing"
        if shape != wanted:
            raise ValueError(f"{path} is for another base: its {name} is {shape}, the model's is {wanted}")
        if not (A.isfinite().all() and B.isfinite().all() and abs(alpha) < torch.inf):
            raise ValueError(f"{path}: its {name} holds numbers that are not finite: train it again")
    new = {name: LoRALinear(linears[name], len(A), alpha, dropout) for name, A, _, alpha, dropout in adapter}
    for name, A, B, _, _ in adapter:
        new[name].lora_A.data.copy_(A)
        new[name].lora_B.data.copy_(B)
    swap(model, new)


# What PEFT's config may say without changing the adapter. Anything else that is set is refused.
KNOWN = """r lora_alpha lora_dropout rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform
    layers_pattern fan_in_fan_out task_type base_model_name_or_path revision auto_mapping inference_mode
    peft_version megatron_core qalora_group_size""".split()
HARMLESS = (None, False, {}, [], "none", "LORA", "gaussian")


def read_peft(dir):
    """Yield (our name of it, A, B, alpha, dropout) for each layer that the adapter in the folder dir adapts."""
    try:
        config = json.loads(Path(dir, "adapter_config.json").read_bytes())
        dropout, patterns = float(config.get("lora_dropout", 0.0)), config.get("alpha_pattern", {})
        tensors = load(Path(dir, "adapter_model.safetensors").read_bytes())
        for key, value in config.items():
            if key not in KNOWN and value not in HARMLESS and (key, value) != ("init_lora_weights", True):
                raise ValueError(f"it asks for {key} = {value!r}, which is not built here")
        if not all(re.fullmatch(r"[\w.]+", end) for end in patterns):
            raise ValueError(f"its alpha_pattern {patterns} has regular expressions, which are not built here")
        for key in {key.replace("lora_B", "lora_A") for key in tensors} or {"(there is none)"}:
            A, B = tensors.get(key), tensors.get(key.replace("lora_A", "lora_B"))
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key)
            if not match or A is None or B is None or A.ndim != 2 or B.ndim != 2 or not 0 < len(A) == B.shape[1]:
                raise ValueError(f"its tensor {key} is not, or does not fit, an A and a B")
            alpha = next((a for end, a in patterns.items() if f".{match[1]}".endswith(f".{end}")), config["lora_alpha"])
            block, _, last = match[1].removeprefix("transformer.").rpartition(".")
            parts = zip(QKV, B.chunk(3), strict=True) if last == "c_attn" else [(last, B)]
            for part, B_part in parts:
                # A column of B is a part's if it is not zero there. If it is zero everywhere, it may be anybody's.
                mine = B_part.any(dim=0) | ~B.any(dim=0)
                if r := int(mine.sum()):
                    yield f"{block}.{part}", A[mine], B_part[:, mine], alpha * r / len(A), dropout
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as e:
        raise ValueError(f"cannot use the adapter in {dir} ({e}): make it or copy it again") from None
