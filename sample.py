"""Let a base model, or an adapted one, write: on from a prompt, or one output for each input of a test set.

    python sample.py --lora out/tiny-toy-pirate --prompt "name : The Mill | food : Thai<|endoftext|>"
    python sample.py --model gpt2 --prompt "The dog"
    python sample.py --model gpt2-medium --lora out/gpt2-medium-e2e --data e2e --out predictions.txt

Models that were trained on pairs of prompt and completion expect `<|endoftext|>` between the two.
"""

import codecs
import os
import re
import time
from itertools import groupby, zip_longest
from pathlib import Path

import torch

import train
from gpt import END, PRETRAINED, stored_as, write_whole
from lora import LoRALinear, load_lora, merge_lora, swap

# ---- Beam search, as in the paper's code -------------------------------------------------------------------


@torch.no_grad()
def beam_search(model, idx, beam, max_new_tokens, length_penalty, no_repeat_ngram, ends):
    """The best continuation of each prompt in idx (B, T) that is found: B lists of token ids, without the end token.

    Each step keeps the `beam` likeliest continuations of those it has; with beam 1 that is greedy. One that ends, with
    a token in `ends` or at max_new_tokens, is taken out, and the search goes on to the last step. The best score wins:

        log p(output | prompt) / length ** length_penalty            (the end token counts in both)

    No n-gram of no_repeat_ngram tokens is written twice, unless that is 0: the probability goes to other tokens.
    `transformers` differs: it counts the prompt's n-grams too, and their probability goes to no other token; it fills
    the places of those that end at a step in that step; by default it may stop before the best one is found.
    """
    (B, T), device = idx.shape, idx.device
    cache = model.new_cache(B, T + max_new_tokens)
    logits = model.head(model.hidden(idx, cache)[:, -1])  # (B, V)
    # From now on row b * beam + k is beam k of prompt b. They are still the same: only the first may go on.
    logits, cache = logits.repeat_interleave(beam, dim=0), cache.repeat_interleave(beam, dim=2)
    scores = torch.full((B, beam), -torch.inf, device=device)  # log p of what each beam has written
    scores[:, 0] = 0
    written, first_row = idx.new_empty(B * beam, 0), torch.arange(0, B * beam, beam, device=device)[:, None]
    best, best_score = [[]] * B, torch.full((B,), -torch.inf, device=device)
    for length in range(1, max_new_tokens + 1):
        block_repeats(logits, written, no_repeat_ngram)
        logp = logits.float().log_softmax(-1).view(B, beam, -1)  # (B, beam, V)
        scores, chosen = (scores[:, :, None] + logp).flatten(1).topk(beam)  # (B, beam), of beam * V
        rows, tokens = (first_row + chosen // logp.shape[-1]).flatten(), chosen % logp.shape[-1]
        written = torch.cat([written[rows], tokens.view(-1, 1)], dim=1)  # (B * beam, length)

        ended = torch.isin(tokens, torch.tensor([*ends], device=device)) | (length == max_new_tokens)
        score, k = torch.where(ended, scores / length**length_penalty, -torch.inf).max(-1)
        for b in (score > best_score).nonzero().flatten().tolist():
            best[b] = written[b * beam + k[b]].tolist()
        best_score = best_score.maximum(score)
        scores = scores.masked_fill(ended, -torch.inf)
        # log p only falls. When no beam could win even if it stayed as it is to the last step, the search is over.
        if (scores.amax(-1) / max_new_tokens**length_penalty <= best_score).all():
            break
        for kv in cache:  # a row's keys and values follow its tokens; a prompt's are the same in all its rows
            kv[:, :, :, T : T + length - 1] = kv[:, rows, :, T : T + length - 1]
        logits = model.head(model.hidden(tokens.view(-1, 1), cache, T + length - 1)[:, -1])  # (B * beam, V)
    return [[token for token in tokens if token not in ends] for tokens in best]


def block_repeats(logits, written, n):
    """Set to -inf, in place, the logits (R, V) of tokens that would write an n-gram of written (R, L) once more."""
    start = written.shape[1] - n + 1  # of the last n - 1 tokens
    if n and start > 0:
        grams = written.unfold(1, n, 1)  # (R, start, n)
        row, i = (grams[:, :, :-1] == written[:, None, start:]).all(-1).nonzero(as_tuple=True)
        logits[row, grams[row, i, -1]] = -torch.inf


# ---- A test set: its references, the outputs, the score ----------------------------------------------------


def read_references(name):
    """{prompt: [reference, ...]} of e2e, e2e:FILE or FILE.jsonl, in the file's order. Raises OSError or ValueError."""
    kind, _, file = name.partition(":")
    if kind != "e2e" and not name.endswith(".jsonl"):
        raise ValueError(f"--data {name}: name e2e, e2e:FILE or FILE.jsonl")
    pairs = train.e2e_pairs(file or train.e2e_file("test.txt")) if kind == "e2e" else train.jsonl_pairs(name)
    references = {}
    for prompt, completion in pairs:
        if not (line := " ".join(completion.split())):
            raise ValueError(f"{name}: an output is compared with the completion of {prompt!r}, which is empty")
        references.setdefault(prompt, []).append(line)
    return references


def decode(model, tokenizer, prompts, batch_size=16, **search):
    """What the model writes after each prompt of {prompt: token ids}: a list of texts, one line each.

    search: beam, max_new_tokens, length_penalty and no_repeat_ngram of `beam_search`.
    """
    # The paper's outputs end at a blank line, too. An id beyond <|endoftext|>, in a padded vocabulary, is no text.
    blank_line = tokenizer.encode_ordinary("\n\n")
    ends = {*range(tokenizer.eot_token, model.config.vocab_size), *(blank_line if len(blank_line) == 1 else [])}
    texts, began = {}, time.time()
    # Prompts of one length make a batch without padding. The longest come first: if memory is short, it shows at once.
    for _, group in groupby(sorted(prompts, key=lambda p: -len(prompts[p])), key=lambda p: len(prompts[p])):
        group = list(group)
        for batch in (group[i : i + batch_size] for i in range(0, len(group), batch_size)):
            idx = torch.tensor([prompts[prompt] for prompt in batch], device=model.wte.weight.device)
            found = beam_search(model, idx, ends=ends, **search)
            for prompt, tokens in zip(batch, found, strict=True):
                texts[prompt] = " ".join(tokenizer.decode(tokens).split("\n\n")[0].split())
            left = round((time.time() - began) / len(texts) * (len(prompts) - len(texts)))
            print(f"\r{len(texts)}/{len(prompts)} prompts  {left // 60}:{left % 60:02} left ", end="", flush=True)
    print()
    return [texts[prompt] for prompt in prompts]


def bleu(outputs, references):
    """Corpus BLEU, from 0 to 100, of the outputs and a list of references for each. Raises ImportError.

    The options are those of the E2E challenge's scorer (pymteval.py in tuetschek/e2e-metrics): mteval-v13a's tokens, in
    lower case; the reference of the closest length; no smoothing. Only outputs of less than 4 tokens count otherwise.
    """
    import sacrebleu  # not among the requirements

    columns = list(zip_longest(*references))  # the first reference of each, the second or None, ...
    return sacrebleu.corpus_bleu(outputs, columns, lowercase=True, smooth_method="none", force=True).score


# ---- Microsoft's adapters ----------------------------------------------------------------------------------


def load_microsoft(model, file):
    """Put an adapter that the paper's authors published (gpt2_md_lora_e2e.pt, ...) on a plain model.

    They adapt the query's and the value's part of GPT-2's fused c_attn, and stack the two; C = n_embd:

        lora_A = [A_q; A_v]  (2r, C)      lora_B = [B_q; B_v]  (2C, r)      alpha = 32, which is not in the file

    Raises OSError, or ValueError if the file is not such an adapter, or is one for another base.
    """
    with open(file, "rb") as f:
        try:
            saved = torch.load(f, map_location="cpu", weights_only=True)
            saved = saved.get("model_state_dict", saved)
            saved = {re.sub(r"^(module\.)?(transformer\.)?", "", name): w.float() for name, w in saved.items()}
        except Exception as e:  # torch raises many things for a damaged file
            raise ValueError(f"{file} is damaged, or holds no tensors ({type(e).__name__}): copy it again") from None
    C, layers = model.config.n_embd, {}
    adapter = {f"h.{i}.attn.c_attn.lora_{part}" for i in range(len(model.h)) for part in "AB"}
    # The base may be in the file, too, with its masks, and with its embedding once more as the head.
    base = {stored_as(name, model.config)[0] for name in model.state_dict()}
    extra = re.compile(r"lm_head\.(decoder\.)?weight|h\.\d+\.attn\.(masked_)?bias")
    if odd := {name for name in saved.keys() - base if not extra.fullmatch(name)} ^ adapter:
        raise ValueError(f"{file} is no adapter of Microsoft's for this model: look for {min(odd)}")
    for i, block in enumerate(model.h):
        A, B = (saved[f"h.{i}.attn.c_attn.lora_{part}"] for part in "AB")
        r = A.numel() // (2 * C)
        if r == 0 or A.shape != (2 * r, C) or B.shape != (2 * C, r):
            raise ValueError(f"{file}, layer {i}: A is {[*A.shape]}, B {[*B.shape]}, and not [2r, {C}], [{2 * C}, r]")
        for name, A_part, B_part in zip(("c_q", "c_v"), A.chunk(2), B.chunk(2), strict=True):
            layers[f"h.{i}.attn.{name}"] = layer = LoRALinear(getattr(block.attn, name), r, alpha=32)
            layer.lora_A.data.copy_(A_part)
            layer.lora_B.data.copy_(B_part)
    swap(model, layers)


# ---- The command -------------------------------------------------------------------------------------------


def make_parser():
    parser = train.Parser("sample.py", description="Let GPT-2, with or without an adapter, write.")
    add = parser.add_argument
    add("--model", default="tiny", help=f"the base: tiny, {', '.join(PRETRAINED)}, or a folder (tiny)")
    add("--lora", help="the folder of an adapter, or a FILE.pt that Microsoft published (its alpha is taken to be 32)")
    add("--merge", action="store_true", help="merge the adapter into the base first: the same text, no extra work")
    add("--max-new-tokens", type=train.count, help="tokens to write at most (200, or as many as fit; with --data 64)")
    add("--device", choices=["cuda", "mps", "cpu"], help="found by itself")
    add("--dtype", choices=["float32", "bfloat16"], help="of the weights (as train.py picks it; with --data float32)")
    add = parser.add_argument_group("on from a prompt").add_argument
    add("--prompt", help=f"what to write on from; without one, the start of a text, {END}")
    add("--temperature", type=train.nonnegative, default=0.7, help="0: the likeliest token; 1: draw as trained (0.7)")
    add("--top-k", type=train.count, help="draw among the k likeliest tokens only")
    add("--seed", type=train.natural, default=0, help="of the draws (0)")
    add = parser.add_argument_group("one output for each input of a test set, by beam search").add_argument
    add("--data", help="e2e, e2e:FILE, or a FILE.jsonl with prompts and completions, which are the references")
    add("--out", type=Path, help="file for the outputs, one a line; the references go into another beside it")
    add("--beam", type=train.count, default=10, help="continuations to keep at each step; 1 is greedy (10)")
    exponent = train.number(float, lambda x: 0 <= x <= 10, "a number from 0 to 10")
    add("--length-penalty", type=exponent, default=0.8, help="the score is log-probability / length ** this (0.8)")
    add("--no-repeat-ngram", type=train.natural, default=4, help="tokens in a row that no output has twice; 0: any (4)")
    add("--batch-size", type=train.count, default=16, help="inputs at a time (16)")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with train.one_line_errors(parser):
        run(args)


def run(args):
    if args.merge and not args.lora:
        raise ValueError("--merge: there is nothing to merge without --lora")
    if args.data and args.prompt is not None:
        raise ValueError("--data has its own prompts: leave --prompt or --data out")
    if bool(args.data) != bool(args.out):
        raise ValueError("--data, the inputs, and --out, the file for the outputs, go together: give both")
    if args.out and (args.out.is_dir() or not os.access(f"{args.out.parent}/", os.W_OK)):
        raise ValueError(f"--out {args.out}: no file can be written there; name another")
    device = train.pick_device(args.device)
    config, tokenizer = train.describe_base(args.model)
    if args.data:
        references = read_references(args.data)
        prompts = {prompt: tokenizer.encode_ordinary(prompt) + [tokenizer.eot_token] for prompt in references}
    else:
        prompt = args.prompt or ""
        prompts = {prompt: tokenizer.encode(prompt, allowed_special={END}) or [tokenizer.eot_token]}
    longest = max(map(len, prompts.values()))
    n = args.max_new_tokens or (64 if args.data else min(200, config.block_size - longest))
    if n < 1 or longest + n > config.block_size:
        raise ValueError(
            f"the prompt's {longest} tokens and {max(n, 1)} new ones do not fit in the model's context of "
            f"{config.block_size}: shorten the prompt or lower --max-new-tokens"
        )
    # Near -100, where GPT-2's logits are, bfloat16 has steps of a half: beams would be ranked by chance.
    dtype = train.pick_dtype(args.dtype or ("float32" if args.data else None), device)
    model = train.load_base(args.model, dtype, device)
    if args.lora:
        (load_microsoft if args.lora.endswith(".pt") else load_lora)(model, args.lora)
    if args.merge:
        merge_lora(model)
    if args.data:
        search = dict(beam=args.beam, length_penalty=args.length_penalty, no_repeat_ngram=args.no_repeat_ngram)
        outputs = decode(model, tokenizer, prompts, args.batch_size, max_new_tokens=n, **search)
        write_outputs(args.out, outputs, list(references.values()))
        return
    idx, generator = torch.tensor([prompts[prompt]], device=device), torch.Generator(device).manual_seed(args.seed)
    print(prompt, end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token can end in the middle of a character
    for token in model.generate(idx, n, args.temperature, args.top_k, generator):
        if token.item() == tokenizer.eot_token:
            break
        print(decoder.decode(tokenizer.decode_single_token_bytes(token.item())), end="", flush=True)
    print()


def write_outputs(out, outputs, references):
    """Write the outputs, and their references in the format of the E2E challenge's scorer; print the BLEU."""
    beside = out.with_suffix(".references.txt")
    blocks = "\n".join("".join(line + "\n" for line in block) for block in references)  # an empty line between
    write_whole(beside, lambda tmp: tmp.write_text(blocks, encoding="utf-8"))
    write_whole(out, lambda tmp: tmp.write_text("".join(line + "\n" for line in outputs), encoding="utf-8"))
    print(f"{len(outputs)} outputs in {out}, their references in {beside}")
    try:
        print(f"BLEU {bleu(outputs, references):.2f}")
    except ImportError:
        print(f"for BLEU, pip install sacrebleu; or in tuetschek/e2e-metrics: measure_scores.py -p {beside} {out}")


if __name__ == "__main__":
    main()
