"""notebooks/e2e.py: data, beam search, BLEU, Microsoft's adapters, and the command."""

import math
import os
import shutil
import sys
from pathlib import Path

import loralib
import pytest
import torch
from commands import error_message, run, write_jsonl
from conftest import assert_refused, make_gpt2, random_tokens

from gpt import EOS, GPT, encode_text, load_tokenizer
from lora import load_lora, lora_layers
from notebooks import e2e
from train import load_data

# ---- Data ----

PAIRS = [("name : B | food : Thai", "B is Thai ."), ("name : A", "A."), ("name : C", "C || c")]


def test_e2e_data(e2e_dir, gpt2_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path)
    monkeypatch.setattr(e2e, "E2E_URL", e2e_dir.as_uri() + "/")
    path = e2e.download_e2e("valid.txt")  # its hash is checked
    shutil.copy(path, path.with_name("train.txt"))  # the training data is large
    train_data, val_data = load_data("e2e", gpt2_tokenizer, 1024)
    assert len(train_data) == 4672 and len(val_data) == 256
    references = e2e.load_references(e2e_dir / "test.txt")
    assert len(references) == 630 and sum(map(len, references.values())) == 4693
    ids, n_prompt = train_data[0]
    prompt, text = (gpt2_tokenizer.decode(part) for part in (ids[:n_prompt], ids[n_prompt:]))
    assert prompt == f"name : Alimentum | area : city centre | family friendly : no{EOS}"
    assert text.startswith(" There is a place in the city centre , Al") and text.endswith(EOS)


# ---- Beam search ----


def random_gpts(dir, **sizes):
    """Our model and that of `transformers`. They do not just repeat the last token."""
    theirs = make_gpt2(**sizes)
    theirs.transformer.ln_f.weight.data.normal_(std=3)
    theirs.save_pretrained(dir)
    return GPT.from_pretrained(dir), theirs


@torch.no_grad()
def plain_beam_search(model, prompt, num_beams, max_new_tokens, length_penalty, n, eos_token_ids):
    """Beam search by its definition, without a cache."""
    beams, finished = [(0.0, [])], []
    while beams:
        candidates = []
        for score, tokens in beams:
            log_probs = model(torch.tensor([prompt + tokens]))[0, -1].double()
            ngrams = [tokens[i : i + n] for i in range(len(tokens) - n + 1)] if n else []
            for token in range(len(log_probs)):
                if n and [*tokens, token][-n:] in ngrams:
                    log_probs[token] = -math.inf
            log_probs = log_probs.log_softmax(-1).tolist()
            candidates += [(score + p, [*tokens, i]) for i, p in enumerate(log_probs)]
        beams = []
        for score, tokens in sorted(candidates, reverse=True)[:num_beams]:
            if tokens[-1] in eos_token_ids or len(tokens) == max_new_tokens:
                finished.append((score / len(tokens) ** length_penalty, tokens))
            else:
                beams.append((score, tokens))
    return [token for token in max(finished)[1] if token not in eos_token_ids]


SEARCHES = [  # num_beams, max_new_tokens, length_penalty, no_repeat_ngram_size, eos_token_ids
    (3, 8, 0.8, 0, {4}),
    (3, 8, 0.8, 2, {4}),
    (3, 8, 0, 0, {0, 3}),
    (3, 8, 3, 2, {9}),
    (1, 8, 0.8, 1, {4}),
]


@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_beam_search_equals_its_definition(tmp_path, options):
    prompts = [[0, 1, 2, 3], [3, 3, 3, 3], [1, 0, 1, 0]]
    model, _ = random_gpts(tmp_path, vocab_size=5)
    outputs = e2e.beam_search(model, torch.tensor(prompts), *options)
    assert outputs == [plain_beam_search(model, prompt, *options) for prompt in prompts]


def test_beam_search_equals_transformers_where_nothing_ends(tmp_path):
    model, theirs = random_gpts(tmp_path)
    idx = random_tokens(4, 9)
    theirs.generation_config.eos_token_id = None
    options = dict(num_beams=5, max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), **options)
    outputs = e2e.beam_search(model, idx, 5, 12, 0.8, 0, {97})
    assert outputs == expected[:, 9:].tolist()


# ---- BLEU ----

OUTPUTS = [
    "The Mill serves Thai food, near the park; it is cheap (1,200 yen).",
    "blue spice is a family-friendly pub for \u00a320-25.",
    "Aromi is an Aromi Coffee shop",
]
REFERENCES = """\
the mill is a cheap Thai restaurant near the park .
Near the Park, The Mill serves Thai food for 1,200 yen.

Blue Spice is a family-friendly pub with prices of \u00a320-25.
A pub, Blue Spice: \u00a320-25, "family friendly".

Aromi is a coffee shop in the city centre .
A coffee shop: Aromi
Aromi has coffee & tea"""
REFERENCES = [block.split("\n") for block in REFERENCES.split("\n\n")]


def test_bleu_is_that_of_the_official_scorer():
    # `measure_scores.py -p` of tuetschek/e2e-metrics: 42.8837. (Case-sensitive: 33.94.)
    assert e2e.compute_bleu(OUTPUTS, REFERENCES) == pytest.approx(42.8837, abs=1e-4)


# ---- Microsoft's adapters ----


def loralib_model(dir, r=3):
    """A GPT-2 of `transformers`, saved in dir, and then given loralib's layers."""
    theirs = make_gpt2(dir)
    for block in theirs.transformer.h:
        linear, C = block.attn.c_attn, block.attn.embed_dim
        options = dict(r=r, lora_alpha=32, enable_lora=[True, False, True], fan_in_fan_out=True)
        layer = loralib.MergedLinear(C, 3 * C, merge_weights=False, **options)
        layer.weight.data, layer.bias.data = linear.weight.data, linear.bias.data
        torch.nn.init.normal_(layer.lora_A)
        torch.nn.init.normal_(layer.lora_B)
        block.attn.c_attn = layer
    return theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "module."])
def test_microsoft_adapter_equals_loralib(tmp_path, prefix):
    theirs, idx = loralib_model(tmp_path), random_tokens(2, 20)
    state_dict = {prefix + name: w for name, w in loralib.lora_state_dict(theirs).items()}
    torch.save({"model_state_dict": state_dict} if prefix else state_dict, tmp_path / "a.pt")
    model = GPT.from_pretrained(tmp_path)
    e2e.load_microsoft_adapter(model, tmp_path / "a.pt")
    torch.testing.assert_close(model(idx), theirs(idx).logits, atol=1e-4, rtol=1e-4)
    assert {(layer.r, layer.alpha) for layer in lora_layers(model).values()} == {(3, 32)}


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


LAYER = "transformer.h.{}.attn.c_attn.lora_{}"
OTHERS = {  # what is added to the tensors of a good file
    "code": {"trap": Trap()},
    "one block too many": {LAYER.format(2, "B"): torch.ones(64, 3)},
    "one column": {LAYER.format(1, "B"): torch.ones(64, 1)},
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_other_pt_files_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    state_dict = loralib.lora_state_dict(loralib_model("base"))
    torch.save(state_dict | content, "a.pt")
    assert_refused(r"a\.pt", e2e.load_microsoft_adapter, GPT.from_pretrained("base"), "a.pt")
    assert not Path("sprung").exists()


# ---- The command ----

LINE = "--model base --data data.jsonl --out p.txt --max-new-tokens 8"


def test_command_writes_outputs_and_references_and_prints_bleu(folder, capsys):
    write_jsonl("data.jsonl", [*PAIRS, (PAIRS[0][0], "Thai:  B.")])
    run(e2e, f"{LINE} --lora adapter --num-beams 2 --batch-size 2")
    outputs = Path("p.txt").read_text().splitlines()
    blocks = Path("p.references.txt").read_text().rstrip("\n").split("\n\n")  # as the scorer does
    assert blocks == ["B is Thai .\nThai: B.", "A.", "C || c"]
    assert "BLEU" in capsys.readouterr().out
    model, tokenizer = GPT.from_pretrained("base"), load_tokenizer("base")
    load_lora(model, "adapter")
    for (prompt, _), output in zip(PAIRS, outputs, strict=True):
        idx = torch.tensor([encode_text(tokenizer, prompt + EOS)])
        [tokens] = e2e.beam_search(model, idx, 2, 8, 0.8, 4, {tokenizer.eot_token})
        assert output == " ".join(tokenizer.decode(tokens).split())


@pytest.mark.parametrize("existing", ["p.txt", "p.references.txt"])
def test_nothing_is_overwritten(folder, existing, capsys):
    Path(existing).write_text("notes")
    assert "--out" in error_message(e2e, LINE, capsys)
    assert Path(existing).read_text() == "notes"


def test_sacrebleu_is_asked_for_before_decoding(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setattr(e2e, "beam_search", None)
    assert "pip install sacrebleu" in error_message(e2e, LINE, capsys)
