"""Generate text with GPT-2, with or without a LoRA adapter.

    python sample.py --model gpt2 --prompt "The dog"
    python sample.py --lora out/gpt2-my --prompt "The dog"

A model trained on prompt-completion pairs expects <|endoftext|> after the prompt."""

import argparse
import codecs
import contextlib
import json
import os
import sys
from pathlib import Path

# Idle threads soon stop spinning. Otherwise, two runs at once slow each other down 40-fold.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch

from gpt import EOS, GPT, encode_text, load_tokenizer
from lora import load_lora, merge_lora

TINY_MODEL = "out/tiny"  # the base model that the first `python train.py` trains
# For str.translate: shows control characters, except newlines and tabs, as \x1b etc.
ESCAPES = {i: f"\\x{i:02x}" for i in (*range(9), *range(11, 32), *range(127, 160))}


def batch_by_length(tokenizer, prompts, batch_size):
    """Yield (indices, ids (B, T)) of equally long prompts, each with EOS. Longest first."""
    all_prompt_ids = [encode_text(tokenizer, prompt + EOS) for prompt in prompts]
    for length in sorted({len(ids) for ids in all_prompt_ids}, reverse=True):
        same_length = [i for i, ids in enumerate(all_prompt_ids) if len(ids) == length]
        for start in range(0, len(same_length), batch_size):
            indices = same_length[start : start + batch_size]
            yield indices, torch.tensor([all_prompt_ids[i] for i in indices])


def generate_texts(model, tokenizer, prompts, max_new_tokens=64, temperature=0.7, seed=0):
    """One sampled completion for each prompt, from a model trained on pairs."""
    device, was_training = model.wte.weight.device, model.training
    generator = torch.Generator(device).manual_seed(seed)
    texts = [""] * len(prompts)
    model.eval()
    for prompt_indices, idx in batch_by_length(tokenizer, prompts, batch_size=256):
        columns, idx = [], idx.to(device)
        is_finished = torch.zeros(len(idx), dtype=torch.bool, device=device)
        for next_tokens in model.generate(idx, max_new_tokens, temperature, generator=generator):
            columns.append(next_tokens)  # (B,)
            is_finished |= next_tokens == tokenizer.eot_token
            if is_finished.all():
                break
        for i, ids in zip(prompt_indices, torch.stack(columns, dim=1).tolist(), strict=True):
            texts[i] = tokenizer.decode(ids).split(EOS)[0].strip()
    model.train(was_training)
    return texts


@contextlib.contextmanager
def cli_errors(parser):
    """Turn a user's mistake into a one-line message and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # Jupyter's streams have no such method
            stream.reconfigure(errors="backslashreplace")  # instead of UnicodeEncodeError
    try:
        yield
    except (OSError, ValueError, ArithmeticError) as error:
        parser.error(" ".join(str(error).split()))
    except RuntimeError as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        parser.error("out of memory: try a smaller --model or, in training, --batch-size")


def pick_device(name=None):
    """The torch.device of this name; without a name, the fastest available."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if (name == "cuda" and not has_cuda) or (name == "mps" and not has_mps):
        raise ValueError(f"--device {name} is not available on this machine")
    return torch.device(name or ("cuda" if has_cuda else "mps" if has_mps else "cpu"))


def pick_dtype(device):
    """The name of the default compute dtype for training."""
    has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    return "float32" if device.type != "cuda" else "bfloat16" if has_bfloat16 else "float16"


def main(argv=None):
    parser = argparse.ArgumentParser("sample.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    add = parser.add_argument
    add("--model", help="base model (default: the adapter's own, or out/tiny)")
    add("--lora", metavar="DIR", help="adapter folder")
    add("--prompt", default="", help="text to continue (default: start a new text)")
    add("--max-new-tokens", type=int, help="default: 200, or as many as fit")
    add("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    add("--top-k", type=int, help="sample from the K most likely tokens only")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    add("--device", choices=["cuda", "mps", "cpu"], help="default: the fastest")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args(argv)
    with cli_errors(parser):
        run(args)


def run(args):
    base_name = args.model
    if args.lora is not None:  # read first: it names the base
        config = json.loads(Path(args.lora, "adapter_config.json").read_bytes())
        base_name = base_name or config.get("base_model_name_or_path")
    base_name = base_name or TINY_MODEL
    if base_name == TINY_MODEL and not Path(base_name, "model.safetensors").exists():
        raise FileNotFoundError(f"{TINY_MODEL} is missing: run `python train.py` first")
    device = pick_device(args.device)
    model = GPT.from_pretrained(base_name, getattr(torch, args.dtype), device)
    tokenizer = load_tokenizer(base_name)
    if args.lora is not None:
        load_lora(model, args.lora)
        merge_lora(model)  # for speed

    prompt_ids = encode_text(tokenizer, args.prompt) or [tokenizer.eot_token]
    max_new_tokens = args.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = min(200, max(1, model.config.block_size - len(prompt_ids)))
    idx = torch.tensor([prompt_ids], device=device)
    generator = torch.Generator(device).manual_seed(args.seed)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # tokens may split a character
    print(args.prompt.translate(ESCAPES), end="", flush=True)
    for token in model.generate(idx, max_new_tokens, args.temperature, args.top_k, generator):
        if token.item() == tokenizer.eot_token:
            break
        token_bytes = tokenizer.decode_single_token_bytes(token.item())
        print(decoder.decode(token_bytes).translate(ESCAPES), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
