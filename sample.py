"""Let a base model, or an adapted one, write: on from a prompt, or one output for each input of a test set.

    python sample.py --lora out/tiny-toy-pirate --prompt "name : The Mill | food : Thai<|endoftext|>"
    python sample.py --model gpt2 --prompt "The dog"
    python sample.py --model gpt2-medium --lora out/gpt2-medium-e2e --data e2e --out predictions.txt

Models that were trained on pairs of prompt and completion expect `<|endoftext|>` between the two.
"""

import argparse
import codecs
import os
import re
import signal
from itertools import zip_longest
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as in train.py
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

import train
from gpt import END, PRETRAINED, write_whole
from lora import load_lora, merge_lora, put

# ---- Beam search, as in the paper's code ----


@torch.no_grad()
def beam_search(model, idx, beam, max_new_tokens, length_penalty, no_repeat_ngram, ends):
    """The best continuation of each prompt in idx (B, T) that is found: B lists of token ids, without the end token.

    Each step keeps the `beam` likeliest continuations of those it has; with beam 1 that is greedy. One that ends, with
    a token in `ends` or at max_new_tokens, is taken out; the search goes on until no other can win. The score is

        log p(output | prompt) / length ** length_penalty            (the end token counts in both)

    No n-gram of no_repeat_ngram tokens is written twice, unless that is 0: the probability goes to other tokens.
    `transformers` differs: it counts the prompt's n-grams too, and their probability goes to no other token; it fills
    the places of those that end at a step in that step; by default it may stop before the best one is found.
    """
    (B, T), V, device = idx.shape, model.config.vocab_size, idx.device
    cache = model.new_cache(B, T + max_new_tokens)
    logits = model.next_logits(idx, cache, 0)  # (B, V)
    # From now on row b * beam + k is beam k of prompt b. They are still the same: only the first may go on.
    logits, cache = logits.repeat_interleave(beam, dim=0), cache.repeat_interleave(beam, dim=2)
    scores = torch.full((B, beam), -torch.inf, device=device)  # log p of what each beam has written
    scores[:, 0] = 0
    written, first_row = idx.new_empty(B * beam, 0), torch.arange(0, B * beam, beam, device=device)[:, None]
    best, best_score = [[]] * B, torch.full((B,), -torch.inf, device=device)
    for length in range(1, max_new_tokens + 1):
        block_repeats(logits, written, no_repeat_ngram)
        candidates = scores[:, :, None] + logits.log_softmax(-1).view(B, beam, V)
        scores, chosen = candidates.flatten(1).topk(beam)  # (B, beam), of beam * V
        rows, tokens = (first_row + chosen // V).flatten(), chosen % V
        written = torch.cat([written[rows], tokens.view(-1, 1)], dim=1)  # (B * beam, length)

        ended = torch.isin(tokens, torch.tensor([*ends], device=device)) | (length == max_new_tokens)
        final_score, winner = torch.where(ended, scores / length**length_penalty, -torch.inf).max(-1)
        for b in (final_score > best_score).nonzero().flatten().tolist():
            best[b] = written[b * beam + winner[b]].tolist()
        best_score = best_score.maximum(final_score)
        scores = scores.masked_fill(ended, -torch.inf)
        # log p only falls: this is what a beam would reach if it stayed as it is to the last step.
        within_reach = scores.amax(-1) / max_new_tokens**length_penalty
        if (within_reach <= best_score).all():
            break
        for kv in cache:  # a row's keys and values follow its tokens; a prompt's are the same in all its rows
            kv[:, :, :, T : T + length - 1] = kv[:, rows, :, T : T + length - 1]
        logits = model.next_logits(tokens.view(-1, 1), cache, T + length - 1)  # (B * beam, V)
    return [[token for token in output if token not in ends] for output in best]


def block_repeats(logits, written, n):
    """Set to -inf, in place, the logits (R, V) of tokens that would write an n-gram of written (R, L) once more."""
    start = written.shape[1] - n + 1  # of the last n - 1 tokens
    if n and start > 0:
        grams = written.unfold(1, n, 1)  # (R, start, n)
        row, i = (grams[:, :, :-1] == written[:, None, start:]).all(-1).nonzero(as_tuple=True)
        logits[row, grams[row, i, -1]] = -torch.inf


# ---- A test set: its references, the score ----


def read_references(name):
    """({prompt: [reference, ...]}, file) of e2e, e2e:FILE or FILE.jsonl. Raises OSError or ValueError."""
    if name.partition(":")[0] != "e2e" and not name.endswith(".jsonl"):
        raise ValueError(f"--data {name}: name e2e, e2e:FILE or FILE.jsonl")
    references, file = {}, train.e2e_file("test.txt") if name == "e2e" else name.removeprefix("e2e:")
    for prompt, completion in train.read_pairs(file):
        if not (line := " ".join(completion.split())):
            raise ValueError(f"{name}: an output is compared with the completion of {prompt!r}, which is empty")
        references.setdefault(prompt, []).append(line)
    return references, file


def bleu(outputs, references):
    """Corpus BLEU, from 0 to 100, of the outputs and a list of references for each. Raises ImportError.

    The options are those of the E2E challenge's scorer (pymteval.py in tuetschek/e2e-metrics): mteval-v13a's tokens, in
    lower case; the reference of the closest length; no smoothing. (Outputs of less than 4 tokens it counts otherwise.)
    """
    import sacrebleu  # not among the requirements

    columns = list(zip_longest(*references))  # the first reference of each, the second or None, ...
    return sacrebleu.corpus_bleu(outputs, columns, lowercase=True, smooth_method="none", force=True).score


# ---- Microsoft's adapters ----


def load_microsoft(model, file):
    """Put an adapter that the paper's authors published (gpt2_md_lora_e2e.pt, ...) on a plain model.

    They adapt the query's and the value's part of GPT-2's fused c_attn, and stack the two; C = n_embd:

        lora_A = [A_q; A_v]  (2r, C)      lora_B = [B_q; B_v]  (2C, r)      alpha = 32, which is not in the file

    Raises OSError, or ValueError if the file is not such an adapter, or is one for another base.
    """
    Path(file).open("rb").close()  # can it be read?
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        saved = saved.get("model_state_dict", saved)
        saved = {re.sub(r"^(module\.)?(transformer\.)?", "", name): w.float() for name, w in saved.items()}
    except Exception as e:  # torch raises many things for a damaged file
        raise ValueError(f"{file} is damaged, or holds no tensors ({type(e).__name__}): copy it again") from None
    wanted = {f"h.{i}.attn.c_attn.lora_{part}" for i in range(len(model.h)) for part in "AB"}
    if odd := {name for name in saved if "lora_" in name} ^ wanted:  # the base may be in the file, too
        raise ValueError(f"{file} is no adapter of Microsoft's for this model: look for {min(odd)}")
    adapter = []
    for i in range(len(model.h)):
        A, B = (saved[f"h.{i}.attn.c_attn.lora_{part}"] for part in "AB")
        if A.ndim != 2 or B.ndim != 2 or not 0 < len(A) == 2 * B.shape[1]:
            raise ValueError(f"{file}, layer {i}: A is {[*A.shape]}, B {[*B.shape]}, and not [2r, C], [2C, r]")
        for part, A_part, B_part in zip(("c_q", "c_v"), A.chunk(2), B.chunk(2), strict=True):
            adapter.append((f"h.{i}.attn.{part}", A_part, B_part, 32, 0.0))
    put(model, adapter, file)


# ---- The command ----


def make_parser():
    parser = argparse.ArgumentParser("sample.py", usage=argparse.SUPPRESS, description="Let GPT-2 write.")
    add, number, positive = parser.add_argument, train.number, train.number(int, 1)
    add("--model", default="tiny", help=f"the base: tiny, {', '.join(PRETRAINED)}, or a folder (tiny)")
    add("--lora", help="the folder of an adapter, or a FILE.pt that Microsoft published (its alpha is taken to be 32)")
    add("--merge", action="store_true", help="merge the adapter into the base first: the same text, no extra work")
    add("--max-new-tokens", type=positive, help="tokens at most (200, or as many as fit; with --data 64)")
    add("--device", choices=["cuda", "mps", "cpu"], help="found by itself")
    add("--dtype", choices=train.DTYPES, default="float32", help="of the weights (float32)")
    add = parser.add_argument_group("on from a prompt").add_argument
    add("--prompt", help=f"what to write on from; without one, the start of a text, {END}")
    add("--temperature", type=number(float, 0, 100), default=0.7, help="0: the likeliest; 1: draw as trained (0.7)")
    add("--top-k", type=positive, help="draw among the k likeliest tokens only")
    add("--seed", type=number(int, 0), default=0, help="of the draws (0)")
    add = parser.add_argument_group("one output for each input of a test set, by beam search").add_argument
    add("--data", help="e2e, e2e:FILE, or a FILE.jsonl with prompts and completions, which are the references")
    add("--out", type=Path, help="file for the outputs, one a line; the references go into another beside it")
    add("--beam", type=positive, default=10, help="continuations to keep at each step; 1 is greedy (10)")
    add("--length-penalty", type=number(float, 0, 10), default=0.8, help="log-probability / length ** this (0.8)")
    add("--no-repeat-ngram", type=number(int, 0), default=4, help="tokens that no output has twice; 0: any (4)")
    add("--batch-size", type=positive, default=16, help="inputs at a time (16)")
    return parser


def main(argv=None):
    parser = make_parser()
    with train.one_line_errors(parser):
        run(parser.parse_args(argv))


def run(args):
    if args.merge and args.lora is None:
        raise ValueError("--merge: there is nothing to merge without --lora")
    if bool(args.data) != bool(args.out) or args.data and args.prompt is not None:
        raise ValueError("give --prompt, or both --data, the inputs, and --out, the file for the outputs")
    device = train.pick_device(args.device)
    config, tokenizer = train.describe_base(args.model)
    if args.data:
        (references, inputs), beside = read_references(args.data), args.out.with_suffix(".references.txt")
        longest = max(len(tokenizer.encode_ordinary(prompt)) + 1 for prompt in references)
        for out in (args.out, beside):
            fine = out.suffix == ".txt" and (not out.exists() or out.is_file()) and os.access(f"{out.parent}/", os.W_OK)
            if not fine or out.resolve() == Path(inputs).resolve():
                raise ValueError(f"--out {out}: the inputs, or no .txt file that can be written; name another")
    else:
        ids = tokenizer.encode(args.prompt or "", allowed_special={END}) or [tokenizer.eot_token]
        longest = len(ids)
    n = args.max_new_tokens or (64 if args.data else max(1, min(200, config.block_size - longest)))
    config.check_length(longest + n)
    model = train.load_base(args.model, getattr(torch, args.dtype), device)
    if args.lora is not None:
        (load_microsoft if args.lora.endswith(".pt") else load_lora)(model, args.lora)
    if args.merge:
        merge_lora(model)
    if args.data:
        blank_line = tokenizer.encode_ordinary("\n\n")  # the paper's outputs end at one, too
        ends = {*range(tokenizer.eot_token, config.vocab_size), *(blank_line if len(blank_line) == 1 else [])}

        def search(idx):
            return beam_search(model, idx, args.beam, n, args.length_penalty, args.no_repeat_ngram, ends)

        texts = train.complete(model, tokenizer, references, search=search, batch_size=args.batch_size)
        outputs = [" ".join(text.split("\n\n")[0].split()) for text in texts]
        blocks = ["\n".join(block) + "\n" for block in references.values()]  # as the E2E scorer reads them
        write_whole({args.out: "\n".join(outputs) + "\n", beside: "\n".join(blocks)})
        print(f"\n{len(outputs)} outputs in {args.out}, their references in {beside}")
        try:
            print(f"BLEU {bleu(outputs, [*references.values()]):.2f}")
        except ImportError:
            print(f"for BLEU, pip install sacrebleu; or with e2e-metrics: measure_scores.py -p {beside} {args.out}")
        return
    idx, generator = torch.tensor([ids], device=device), torch.Generator(device).manual_seed(args.seed)
    print(args.prompt or "", end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token can end in the middle of a character
    for token in model.generate(idx, n, args.temperature, args.top_k, generator):
        if token.item() >= tokenizer.eot_token:  # what is beyond it, in a padded vocabulary, has no text either
            break
        print(decoder.decode(tokenizer.decode_single_token_bytes(token.item())), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
