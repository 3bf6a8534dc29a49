"""The paper's E2E experiment (section 5.4): data and settings, beam search, BLEU.

    python train.py --model gpt2-medium --data e2e
    python -m notebooks.e2e --model gpt2-medium --lora out/gpt2-medium-e2e --out outputs.txt

The model turns facts, "name : The Vaults | food : Thai | ...", into a text about a restaurant.
With `--data FILE.jsonl`, the same works for other data, such as WebNLG and DART.
`--lora FILE.pt` evaluates an adapter that the authors published.
"""

import argparse
import hashlib
import json
import urllib.request
from functools import partial
from itertools import zip_longest
from pathlib import Path

import sample  # sets GOMP_SPINCOUNT, so it must precede torch
import torch

from gpt import GPT, atomic_write, encode_text, load_tokenizer
from lora import add_lora, load_lora, lora_layers, merge_lora

RECIPE = {"epochs": 5, "batch_size": 8, "lr": 2e-4, "eval_every": 500}  # from table 11
RECIPE |= {"label_smoothing": 0.1, "lora_dropout": 0.1}
E2E_URL = "https://raw.githubusercontent.com/microsoft/LoRA/"
E2E_URL += "c4593f060e6a368d7bb5af5273b8e42810cdef90/examples/NLG/data/e2e/"
E2E_SHA1 = {  # git's hashes of the files
    "train.txt": "2f92a2790c00a48574dcc89465a326f33d7e7cc6",
    "valid.txt": "94f87112e11198710d65a1d5dc7d0b8d9155a07d",
    "test.txt": "084da9f4409d98058bcb020614afa83824440484",
}


def load_pairs(path):
    """(training, validation) pairs of E2E; for e2e:FILE, a 1-tuple of all its pairs."""
    if path:
        return (read_pairs(path),)
    return read_pairs(download_e2e("train.txt")), read_pairs(download_e2e("valid.txt"))


def download_e2e(filename):
    """The path of an E2E file, downloaded if missing."""
    path = Path(torch.hub.get_dir(), "lora-gpt2", "e2e", filename)
    if not path.exists():
        with urllib.request.urlopen(E2E_URL + filename, timeout=30) as response:
            content = response.read()
        git_sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if git_sha1 != E2E_SHA1[filename]:
            raise OSError(f"{E2E_URL}{filename}: the download was corrupted; try again")
        atomic_write(path, lambda tmp: tmp.write_bytes(content))
    return path


def read_text(path):
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # -sig removes a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: {error}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def read_pairs(path):
    """[(prompt, completion)] from a .jsonl file, or from lines like prompt||completion.

    Raises OSError, or a ValueError that names the line.
    """
    is_jsonl = str(path).lower().endswith(".jsonl")
    expected = '{"prompt": "", "completion": ""}' if is_jsonl else "prompt||completion"
    pairs = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            if is_jsonl:
                example = json.loads(line)
                prompt, completion = example["prompt"] + "", example["completion"] + ""
            else:
                prompt, completion = line.strip().split("||", 1)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: expected {expected}") from None
        pairs.append((prompt, completion))
    return pairs


@torch.no_grad()
def beam_search(
    model, idx, num_beams, max_new_tokens, length_penalty, no_repeat_ngram_size, eos_token_ids
):
    """The best continuation of each prompt in idx (B, T), as token ids without EOS.

    Each step keeps the num_beams most likely continuations; one beam is greedy search. A
    beam ends at any token in eos_token_ids, or at max_new_tokens. The search stops
    when no beam can beat the best finished one. The score is

        log p(sequence | prompt) / length ** length_penalty     (length includes EOS)

    no_repeat_ngram_size: no n-gram of this size is generated twice; 0 turns this off.
    """
    (B, T), V, device = idx.shape, model.config.vocab_size, idx.device
    eos_token_ids = torch.tensor(sorted(eos_token_ids), device=device)
    kv_cache = model.new_kv_cache(B, T + max_new_tokens)
    logits = model.next_token_logits(idx, kv_cache, 0)  # (B, V)
    # From here on, row b * num_beams + k is beam k of prompt b.
    logits = logits.repeat_interleave(num_beams, dim=0)
    kv_cache = kv_cache.repeat_interleave(num_beams, dim=2)
    batch_offset = torch.arange(0, B * num_beams, num_beams, device=device)[:, None]  # (B, 1)
    sequences = idx.new_empty(B * num_beams, 0)
    # log p of each beam. All beams are equal at first, so only one gets a finite score.
    beam_scores = torch.full((B, num_beams), -torch.inf, device=device)
    beam_scores[:, 0] = 0
    best_sequences, best_scores = [[]] * B, torch.full((B,), -torch.inf, device=device)
    for length in range(1, max_new_tokens + 1):
        ban_repeated_ngrams(logits, sequences, no_repeat_ngram_size)
        log_probs = logits.log_softmax(-1).view(B, num_beams, V)
        candidate_scores = (beam_scores[:, :, None] + log_probs).flatten(1)  # (B, beams * V)
        beam_scores, top_idx = candidate_scores.topk(num_beams)  # (B, num_beams)
        beam_idx = (batch_offset + top_idx // V).flatten()  # the row that it continues
        beam_tokens = (top_idx % V).view(-1, 1)
        sequences = torch.cat([sequences[beam_idx], beam_tokens], dim=1)

        is_finished = torch.isin(top_idx % V, eos_token_ids) | (length == max_new_tokens)
        finished_scores = beam_scores / length**length_penalty
        finished_scores = finished_scores.masked_fill(~is_finished, -torch.inf)
        top_finished_scores, top_finished_beams = finished_scores.max(-1)  # (B,)
        for b in (top_finished_scores > best_scores).nonzero().flatten().tolist():
            best_sequences[b] = sequences[b * num_beams + top_finished_beams[b]].tolist()
        best_scores = best_scores.maximum(top_finished_scores)
        beam_scores = beam_scores.masked_fill(is_finished, -torch.inf)
        # Log p cannot rise. Stop when no beam can beat the best sequence.
        best_possible_scores = beam_scores.amax(-1) / max_new_tokens**length_penalty
        if (best_possible_scores <= best_scores).all():
            break
        for layer_cache in kv_cache:  # the cache of a beam moves with its tokens
            generated = slice(T, T + length - 1)  # the prompt is the same in all beams
            layer_cache[:, :, :, generated] = layer_cache[:, beam_idx, :, generated]
        logits = model.next_token_logits(beam_tokens, kv_cache, T + length - 1)
    eos_token_ids = eos_token_ids.tolist()
    return [[token for token in seq if token not in eos_token_ids] for seq in best_sequences]


def ban_repeated_ngrams(logits, sequences, ngram_size):
    """In logits (R, V), ban tokens that would repeat an n-gram of sequences (R, L)."""
    tail_start = sequences.shape[1] - ngram_size + 1  # of the last n - 1 tokens
    if ngram_size > 0 and tail_start > 0:
        ngrams = sequences.unfold(1, ngram_size, 1)  # (R, tail_start, n)
        is_repeated = (ngrams[:, :, :-1] == sequences[:, None, tail_start:]).all(-1)
        rows, positions = is_repeated.nonzero(as_tuple=True)
        logits[rows, ngrams[rows, positions, -1]] = -torch.inf


def load_references(path):
    """{prompt: [reference, ...]}, each reference on one line."""
    references = {}
    for prompt, completion in read_pairs(path):
        references.setdefault(prompt, []).append(" ".join(completion.split()))
    return references


def compute_bleu(outputs, references):
    """Corpus BLEU, 0 to 100, with a list of references for each output.

    The options are those of the E2E challenge's scorer (tuetschek/e2e-metrics): the
    mteval-v13a tokenizer, lower case, closest reference length, no smoothing.
    """
    import sacrebleu

    streams = list(zip_longest(*references))  # the first reference of each output, ...
    options = {"lowercase": True, "smooth_method": "none", "force": True}
    return sacrebleu.corpus_bleu(outputs, streams, **options).score


def load_microsoft_adapter(model, path):
    """Load one of the authors' adapters (gpt2_md_lora_e2e.pt, ...) into a plain model.

    They adapt the query and value parts of c_attn and stack the two: lora_A (2r, C) is
    [A_q; A_v], lora_B (2C, r) is [B_q; B_v]. Their alpha, 32, is not in the file.
    Raises ValueError if the file is missing or does not fit the model.
    """
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
        state_dict = state_dict.get("model_state_dict", state_dict)
        tensors = {name[name.index("h.") :]: w for name, w in state_dict.items() if "lora_" in name}
        add_lora(model, r=len(tensors["h.0.attn.c_attn.lora_A"]) // 2, alpha=32)
        assert len(tensors) == len(lora_layers(model))  # 2 per block: A, B; c_q, c_v
        for name, layer in lora_layers(model).items():
            fused, half = name[:-3] + "c_attn", ["c_q", "c_v"].index(name[-3:])
            A, B = (tensors[f"{fused}.lora_{letter}"].chunk(2)[half] for letter in "AB")
            layer.load_state_dict({"lora_A": A, "lora_B": B}, strict=False)
    except Exception as error:  # torch.load raises many kinds of error
        raise ValueError(f"{path} is no adapter for this model: {str(error)[:80]}") from None


def main(argv=None):
    parser = argparse.ArgumentParser("e2e.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.description = "Generate E2E texts and compute their BLEU. In (): defaults."
    add = parser.add_argument
    add("--model", required=True, help="base model")
    add("--lora", help="adapter folder, or one of the authors' .pt files")
    add("--data", default="e2e", help="e2e for the E2E test set, e2e:FILE or FILE.jsonl (e2e)")
    add("--out", required=True, help="file for the outputs; references go beside it")
    add("--num-beams", type=int, default=10, help="beams to keep; 1 is greedy (10)")
    # 0.8, as in the authors' commands; the paper's table 11 says 0.9.
    add("--length-penalty", type=float, default=0.8, help="higher: longer outputs (0.8)")
    add("--no-repeat-ngram-size", type=int, default=4, help="0 turns this off (4)")
    add("--max-new-tokens", type=int, default=64, help="token limit per output (64)")
    add("--batch-size", type=int, default=16, help="prompts per batch (16)")
    add("--device", choices=["cuda", "mps", "cpu"], help="default: the fastest")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args(argv)
    with sample.cli_errors(parser):
        run(args)


def run(args):
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        raise OSError("BLEU needs sacrebleu: pip install sacrebleu") from None
    data_path = download_e2e("test.txt") if args.data == "e2e" else args.data.removeprefix("e2e:")
    out_path, references_path = Path(args.out), Path(args.out).with_suffix(".references.txt")
    if out_path.exists() or references_path.exists():
        raise ValueError(f"{out_path} or {references_path} exists: choose another --out")
    references = load_references(data_path)
    # The official scorer's input format: references in blocks, a blank line after each.
    blocks = ["\n".join([*texts, "", ""]) for texts in references.values()]
    write_text = partial(Path.write_text, encoding="utf-8")
    atomic_write(references_path, partial(write_text, data="".join(blocks)))
    device = sample.pick_device(args.device)
    model = GPT.from_pretrained(args.model, getattr(torch, args.dtype), device)
    tokenizer = load_tokenizer(args.model)
    if args.lora:
        is_microsoft = args.lora.endswith(".pt")
        (load_microsoft_adapter if is_microsoft else load_lora)(model, args.lora)
        merge_lora(model)
    # As in the authors' code, a blank line also ends an output.
    eos_token_ids = {tokenizer.eot_token}
    blank_line_ids = encode_text(tokenizer, "\n\n")
    if len(blank_line_ids) == 1:
        eos_token_ids.update(blank_line_ids)

    prompts, outputs, n_done = list(references), [""] * len(references), 0
    for prompt_indices, idx in sample.batch_by_length(tokenizer, prompts, args.batch_size):
        beam_options = (args.num_beams, args.max_new_tokens, args.length_penalty)
        beam_options += (args.no_repeat_ngram_size, eos_token_ids)
        sequences = beam_search(model, idx.to(device), *beam_options)
        for i, token_ids in zip(prompt_indices, sequences, strict=True):
            outputs[i] = " ".join(tokenizer.decode(token_ids).split("\n\n")[0].split())
        n_done += len(prompt_indices)
        print(f"\r{n_done} of {len(prompts)} prompts ", end="", flush=True)
    atomic_write(out_path, partial(write_text, data="\n".join([*outputs, ""])))
    print(f"\n{len(outputs)} outputs in {out_path}, their references in {references_path}")
    print(f"BLEU {compute_bleu(outputs, list(references.values())):.2f}")


if __name__ == "__main__":
    main()
