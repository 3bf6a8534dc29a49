"""Let a base model, or an adapted one, write on from a prompt.

    python sample.py --lora out/tiny-toy-pirate --prompt "name : The Mill | food : Thai<|endoftext|>"
    python sample.py --model gpt2 --prompt "The dog"

Models that were trained on pairs of prompt and completion expect `<|endoftext|>` between the two.
"""

import codecs

import torch

from gpt import END, PRETRAINED
from lora import load_lora, merge_lora
from train import (
    Parser,
    count,
    describe_base,
    load_base,
    natural,
    nonnegative,
    one_line_errors,
    pick_device,
    pick_dtype,
)


def make_parser():
    parser = Parser("sample.py", description="Let GPT-2, with or without an adapter, write on from a prompt.")
    add = parser.add_argument
    add("--model", default="tiny", help=f"the base: tiny, {', '.join(PRETRAINED)}, or a folder (tiny)")
    add("--lora", help="the folder of an adapter")
    add(
        "--merge",
        action="store_true",
        help="merge the adapter into the base first: the same text, no extra work a token",
    )
    add("--prompt", default="", help=f"what to write on from; without one, the start of a text, {END}")
    add("--max-new-tokens", type=count, help="tokens to write at most (200, or as many as fit)")
    add(
        "--temperature",
        type=nonnegative,
        default=0.8,
        help="0 always takes the likeliest token; 1 draws as trained (0.8)",
    )
    add("--top-k", type=count, help="draw among the k likeliest tokens only")
    add("--seed", type=natural, default=0, help="of the draws (0)")
    add("--device", choices=["cuda", "mps", "cpu"], help="found by itself")
    add("--dtype", choices=["float32", "bfloat16"], help="of the weights (bfloat16 on a GPU that computes in it)")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        run(args)


def run(args):
    if args.merge and not args.lora:
        raise ValueError("--merge: there is nothing to merge without --lora")
    device = pick_device(args.device)
    config, tokenizer = describe_base(args.model)
    ids = tokenizer.encode(args.prompt, allowed_special={END}) or [tokenizer.eot_token]
    n = args.max_new_tokens or min(200, config.block_size - len(ids))
    if n < 1 or len(ids) + n > config.block_size:
        raise ValueError(
            f"the prompt's {len(ids)} tokens and {max(n, 1)} new ones do not fit in the model's context of "
            f"{config.block_size}: shorten --prompt or lower --max-new-tokens"
        )
    model = load_base(args.model, pick_dtype(args.dtype, device), device)
    if args.lora:
        load_lora(model, args.lora)
    if args.merge:
        merge_lora(model)
    generator = torch.Generator(device).manual_seed(args.seed)
    print(args.prompt, end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token can end in the middle of a character
    for token in model.generate(torch.tensor([ids], device=device), n, args.temperature, args.top_k, generator):
        if token.item() == tokenizer.eot_token:
            break
        print(decoder.decode(tokenizer.decode_single_token_bytes(token.item())), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
