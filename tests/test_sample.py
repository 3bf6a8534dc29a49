"""sample.py: beam search, the files and the score of a test set, Microsoft's adapters, the command's mistakes."""

import json
import math
import os
import pickle
import re
import sys
from collections import Counter

import loralib
import pytest
import sacrebleu
import torch
from conftest import make_gpt2

import sample
import train
from gpt import GPT, GPTConfig, make_tokenizer
from lora import add_lora, lora_layers, save_lora
from notebooks import toy


def make_model(dir, **sizes):
    """A GPT-2 of `transformers` with random weights that doesn't just repeat its last token, and ours with the same."""
    theirs = make_gpt2(**sizes)
    theirs.transformer.ln_f.weight.data.normal_(std=3)
    theirs.save_pretrained(dir)
    return GPT.from_pretrained(dir), theirs


# ---- Beam search -------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_search(model, prompt, beam, steps, penalty, n, ends):
    """Beam search by its definition, without a cache. With beam None it looks at every sequence there is."""
    open, done = [(0.0, [])], []
    for _ in range(steps):
        new = []
        for logp, tokens in open:
            logits = model(torch.tensor([prompt + tokens]))[0, -1].double()
            grams = {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)} if n else {}
            for token in range(len(logits)):
                if n and tuple([*tokens, token][-n:]) in grams:
                    logits[token] = -math.inf
            logprobs = logits.log_softmax(-1).tolist()
            new += [(logp + p, [*tokens, token]) for token, p in enumerate(logprobs) if p > -math.inf]
        new = sorted(new, reverse=True)[:beam]
        ended = [tokens[-1] in ends or len(tokens) == steps for _, tokens in new]
        done += [(logp / len(tokens) ** penalty, tokens) for (logp, tokens), e in zip(new, ended, strict=True) if e]
        open = [hypothesis for hypothesis, e in zip(new, ended, strict=True) if not e]
    tokens = max(done)[1]
    return tokens[:-1] if tokens[-1] in ends else tokens


@pytest.mark.parametrize("steps, beam, every", [(4, 5**3, True), (9, 3, False), (9, 1, False)])
@pytest.mark.parametrize("penalty, n, ends", [(0.8, 0, {4}), (0.8, 2, {4}), (0, 1, {0, 3}), (3, 2, {2}), (0.8, 3, {9})])
def test_beam_search_finds_what_its_definition_does(steps, beam, every, penalty, n, ends, tmp_path):
    steps, found = min(steps, 5) if n == 1 else steps, set()  # there are 5 tokens
    for seed in range(3):
        model, _ = make_model(tmp_path, vocab_size=5, seed=seed)
        prompts = [[0, 1, 2, 3], [3, 3, 3, 3], [1, 0, 1, 0]]
        outputs = sample.beam_search(model, torch.tensor(prompts), beam, steps, penalty, n, ends)
        assert outputs == [plain_search(model, p, None if every else beam, steps, penalty, n, ends) for p in prompts]
        found |= {tuple(output) for output in outputs}
    assert len(found) > 3


@pytest.mark.parametrize("beam", [2, 5, 10])
def test_beam_search_equals_transformers_where_nothing_ends_or_is_blocked(beam, tmp_path):
    model, theirs = make_model(tmp_path)
    idx = torch.randint(97, (4, 9), generator=torch.Generator().manual_seed(1))
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
        idx, attention_mask=torch.ones_like(idx), num_beams=beam, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert sample.beam_search(model, idx, beam, 12, 0.8, 0, {97}) == expected[:, 9:].tolist()


def test_beam_1_is_greedy_and_fills_the_context(tmp_path):
    model, _ = make_model(tmp_path)
    idx = torch.randint(97, (3, 44), generator=torch.Generator().manual_seed(1))
    greedy = torch.stack(list(model.generate(idx, 20, temperature=0)), dim=1).tolist()
    end = greedy[0][12]
    expected = [row[: row.index(end)] if end in row else row for row in greedy]
    assert sample.beam_search(model, idx, 1, 20, 0.8, 0, {end}) == expected
    with pytest.raises(ValueError, match="context of 64"):
        sample.beam_search(model, idx, 1, 22, 0.8, 0, {97})


@pytest.mark.parametrize(
    "n, written, blocked",
    [
        (0, [1, 1, 1, 1], set()),
        (1, [1, 2, 1], {1, 2}),
        (2, [], set()),
        (2, [1], set()),
        (2, [1, 2, 3, 1], {2}),
        (2, [1, 2, 1, 3, 1], {2, 3}),
        (2, [1, 1], {1}),
        (3, [1, 2], set()),
        (4, [1, 2, 3, 4, 1, 2], set()),
        (4, [1, 2, 3, 4, 1, 2, 3], {4}),
    ],
)
def test_blocks_the_token_that_would_repeat_an_ngram(n, written, blocked):
    logits = torch.zeros(2, 6)
    sample.block_repeats(logits, torch.tensor([written, [5] * len(written)]).long(), n)
    assert set((logits[0] == -math.inf).nonzero().flatten().tolist()) == blocked


# ---- A test set --------------------------------------------------------------------------------------------

PROMPTS = ["name : B | food : Thai", "name : A", "name : The Mill | area : park | price : low", "name : C"]
DATA = "".join(
    f"{PROMPTS[i]}||{text}\n" for i, text in ((0, "B  is Thai ."), (1, "A."), (0, "Thai: B."), (2, "Mill é"))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, an adapter that does nothing, and a test set."""
    top = tmp_path_factory.mktemp("files")
    make_model(top / "model", vocab_size=384, n_positions=96)  # a vocabulary padded by 4
    (top / "model" / "vocab.tiktoken").write_text(toy.toy_vocabulary())
    model = GPT.from_pretrained(top / "model")
    add_lora(model)
    save_lora(model, top / "adapter")
    (top / "data.txt").write_text(DATA, encoding="utf-8")
    (top / "empty.jsonl").write_text('{"prompt": "a", "completion": " "}\n')
    (top / "cut.pt").write_bytes(b"")
    return top


def run(folder, line):
    sample.main(f"--model {folder}/model --max-new-tokens 12 {line}".split())


def read_blocks(file):
    """The references as e2e-metrics reads them: an empty line ends a block."""
    return [block.split("\n") for block in file.read_text(encoding="utf-8").rstrip("\n").split("\n\n")]


def test_the_command_writes_outputs_and_references_and_prints_bleu(folder, tmp_path, capsys):
    out = tmp_path / "predictions.txt"
    run(folder, f"--data e2e:{folder}/data.txt --lora {folder}/adapter --merge --out {out}")
    outputs = out.read_text(encoding="utf-8").split("\n")
    assert outputs.pop() == "" and len(outputs) == 3 and all(outputs)
    assert read_blocks(tmp_path / "predictions.references.txt") == [["B is Thai .", "Thai: B."], ["A."], ["Mill é"]]
    assert "\r3 of 3 prompts" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"predictions.txt", "predictions.references.txt"}

    model, tokenizer = GPT.from_pretrained(folder / "model"), make_tokenizer(toy.toy_vocabulary())
    for prompt, output in zip(PROMPTS, outputs, strict=False):
        ids, end = tokenizer.encode_ordinary(prompt) + [379], {379, 380, 381, 382, 383}
        expected = sample.beam_search(model, torch.tensor([ids]), 10, 12, 0.8, 4, end)  # the paper's settings
        assert output == " ".join(tokenizer.decode(expected[0]).split())

    # One prompt at a time, from a .jsonl, whose references share words with the outputs.
    rows = [(PROMPTS[i], re.sub(r"\S+$", "word", outputs[i]) + end) for end in ("", " X") for i in range(3)]
    lines = [json.dumps({"prompt": prompt, "completion": text}) + "\n" for prompt, text in rows]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    run(folder, f"--data {tmp_path}/data.jsonl --batch-size 1 --out {out}")
    assert out.read_text(encoding="utf-8").split("\n")[:3] == outputs
    blocks = read_blocks(tmp_path / "predictions.references.txt")
    assert blocks == [[text for p, text in rows if p == prompt] for prompt in PROMPTS[:3]]
    score = sacrebleu.BLEU(lowercase=True, smooth_method="none").corpus_score(outputs, list(zip(*blocks, strict=True)))
    assert 10 < score.score < 99 and f"BLEU {score.score:.2f}\n" in capsys.readouterr().out


def test_the_command_without_sacrebleu_says_how_to_score(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    run(folder, f"--data e2e:{folder}/data.txt --beam 1 --out {tmp_path}/p.txt")
    assert f"measure_scores.py -p {tmp_path}/p.references.txt {tmp_path}/p.txt" in capsys.readouterr().out


def test_an_interrupted_command_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "beam_search", interrupted)
    with pytest.raises(SystemExit) as e:
        run(folder, f"--data e2e:{folder}/data.txt --out {tmp_path}/p.txt")
    assert e.value.code == 130 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("own", [True, False])
def test_an_output_ends_at_the_end_of_text_or_a_blank_line(own, request, monkeypatch, tmp_path):
    tokenizer = make_tokenizer(toy.toy_vocabulary()) if own else request.getfixturevalue("vocabulary")
    model = GPT(GPTConfig(block_size=8, vocab_size=tokenizer.n_vocab + 2, n_layer=1, n_head=1, n_embd=2))
    seen = []

    def search(model, idx, beam, n, length_penalty, no_repeat_ngram, ends):
        seen.append((idx.tolist(), ends))
        return [tokenizer.encode_ordinary(" Two\u2028 words \nmore\n\n \nnot this")]

    monkeypatch.setattr(sample, "beam_search", search)
    monkeypatch.setattr(train, "describe_base", lambda name: (model.config, tokenizer))
    monkeypatch.setattr(train, "load_base", lambda *args: model)
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    flags = f"--data {tmp_path}/data.jsonl --out {tmp_path}/p.txt --max-new-tokens 5"
    sample.run(sample.make_parser().parse_args(flags.split()))
    assert (tmp_path / "p.txt").read_text() == "Two words more\n"
    ids = [*tokenizer.encode("a"), tokenizer.eot_token]
    assert seen == [([ids], {379, 380, 381} if own else {50256, 50257, 50258, 628})]  # 628 is "\n\n"


# The official scorer's own number for these: 100 * BLEUScore().score() of pymteval.py, as `measure_scores.py -p` says.
# (Case-sensitively it would be 33.94.)
OUTPUTS = [
    "The Mill serves Thai food, near the park; it is cheap (1,200 yen).",
    "blue spice is a family-friendly pub for £20-25.",
    "Aromi is an Aromi Coffee shop",
]
REFERENCES = [
    ["the mill is a cheap Thai restaurant near the park .", "Near the Park, The Mill serves Thai food for 1,200 yen."],
    ["Blue Spice is a family-friendly pub with prices of £20-25.", 'A pub, Blue Spice: £20-25, "family friendly".'],
    ["Aromi is a coffee shop in the city centre .", "A coffee shop: Aromi", "Aromi has coffee & tea"],
]
OFFICIAL = 42.8837


def mteval_bleu(outputs, references):
    """BLEU as pymteval.py defines it, written anew."""
    hits, totals, length = [0] * 4, [0] * 4, 0
    for output, block in zip(outputs, references, strict=True):
        output, *block = (tokens(text) for text in (output, *block))
        length += min((abs(len(reference) - len(output)), len(reference)) for reference in block)[1]
        for n in range(4):
            most = Counter()
            for reference in block:
                most |= ngrams(reference, n + 1)
            hits[n] += (ngrams(output, n + 1) & most).total()
            totals[n] += len(output) - n
    brevity = min(1, math.exp(1 - length / totals[0]))
    return 100 * brevity * math.prod(h / t for h, t in zip(hits, totals, strict=True)) ** 0.25


def tokens(text):
    text = re.sub(r"([!-&(-+/:-@[-`{-~])", r" \1 ", f" {text.lower()} ")  # ASCII punctuation, but ' , - and .
    text = re.sub(r"(?<=[^0-9])([.,])|([.,])(?=[^0-9])", r" \1\2 ", text)
    return re.sub(r"(?<=[0-9])-", " - ", text).split()


def ngrams(words, n):
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def test_bleu_is_the_official_scorers():
    assert sample.bleu(OUTPUTS, REFERENCES) == pytest.approx(OFFICIAL, abs=0.1)
    assert mteval_bleu(OUTPUTS, REFERENCES) == pytest.approx(OFFICIAL, abs=0.1)


def test_e2e_test_set(e2e_dir):
    references, _ = sample.read_references(f"e2e:{e2e_dir / 'test.txt'}")
    assert len(references) == 630 and sum(map(len, references.values())) == 4693
    others = [block[1:] or block for block in references.values()]
    outputs = [block[0] for block in references.values()]
    assert sample.bleu(outputs, others) == pytest.approx(mteval_bleu(outputs, others), abs=0.1)


# ---- Microsoft's adapters ----------------------------------------------------------------------------------


def loralib_model(dir, r=3, **sizes):
    """A random GPT-2 of `transformers`, saved in dir, whose c_attn layers then become loralib's, as theirs are."""
    theirs = make_gpt2(dir, **sizes)
    for block in theirs.transformer.h:
        plain, C = block.attn.c_attn, block.attn.embed_dim
        layer = loralib.MergedLinear(
            C, 3 * C, r=r, lora_alpha=32, enable_lora=[True, False, True], fan_in_fan_out=True, merge_weights=False
        )
        layer.weight.data, layer.bias.data = plain.weight.data, plain.bias.data
        torch.nn.init.normal_(layer.lora_A)
        torch.nn.init.normal_(layer.lora_B)
        block.attn.c_attn = layer
    return theirs.eval()


@pytest.mark.parametrize(
    "whole, prefix, wrapped", [(False, "module.", True), (True, "module.", True), (True, "", False)]
)
def test_loads_what_loralib_writes(whole, prefix, wrapped, tmp_path):
    theirs = loralib_model(tmp_path)
    state = theirs.state_dict() if whole else loralib.lora_state_dict(theirs)
    state = {prefix + name.replace("lm_head.weight", "lm_head.decoder.weight"): w for name, w in state.items()}
    if whole:  # their masks
        state |= {f"{prefix}transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)}
    torch.save({"model_state_dict": state} if wrapped else state, tmp_path / "adapter.pt")
    model, idx = GPT.from_pretrained(tmp_path), torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected, before = theirs(idx).logits, model(idx)
        sample.load_microsoft(model, tmp_path / "adapter.pt")
        assert (before - expected).abs().max() > 0.1
        torch.testing.assert_close(model(idx), expected, atol=1e-4, rtol=1e-4)
    assert {layer.scaling for layer in lora_layers(model).values()} == {32 / 3}


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


A0, B1 = "transformer.h.0.attn.c_attn.lora_A", "transformer.h.1.attn.c_attn.lora_B"


@pytest.mark.parametrize(
    "damage, culprit",
    [
        (lambda state: state.pop(A0), "h.0.attn.c_attn.lora_A"),
        (lambda state: state.update({A0: state[A0][:5]}), "layer 0"),
        (lambda state: state.update({A0: state[A0][:0]}), "layer 0"),
        (lambda state: state.update({A0: state[A0][0, 0]}), "layer 0"),
        (lambda state: state.update({B1: state[B1][:, :2]}), "layer 1"),
        (lambda state: state.update({B1: state[B1][:32]}), "h.1.attn.c_q"),
        (lambda state: state.update({B1.replace("h.1", "h.2"): state[B1]}), "h.2.attn.c_attn.lora_B"),
        (lambda state: state.update({"transformer.h.0.mlp.c_fc.lora_A": state[A0]}), "h.0.mlp.c_fc.lora_A"),
        (lambda state: state.update({A0: state[A0] / 0}), "h.0.attn.c_q"),
        (lambda state: state.update({A0: "a text"}), "AttributeError"),
        (lambda state: state.update({1: state[A0]}), "TypeError"),
        (lambda state: state.update(trap=Trap()), "UnpicklingError"),
        (lambda state: state.clear(), "h.0.attn.c_attn.lora_A"),
        (lambda state: [1, 2], "AttributeError"),
        (lambda state: Trap(), "UnpicklingError"),
    ],
)
def test_refuses_other_pt_files(damage, culprit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = loralib.lora_state_dict(loralib_model(tmp_path))
    other = damage(state)
    torch.save({"model_state_dict": state} if other is None or torch.is_tensor(other) else other, "adapter.pt")
    model = GPT.from_pretrained(tmp_path)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=rf"adapter\.pt.*{re.escape(culprit)}"):
        sample.load_microsoft(model, "adapter.pt")
    assert list(model.state_dict()) == names and not (tmp_path / "sprung").exists()


def test_refuses_damaged_pt_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(loralib.lora_state_dict(loralib_model(tmp_path)), "adapter.pt")
    whole, model = (tmp_path / "adapter.pt").read_bytes(), GPT.from_pretrained(tmp_path)
    for content in (b"", b"\x80", whole[:100], whole[:-100], whole[100:], b"text", pickle.dumps(Trap())):
        (tmp_path / "adapter.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"adapter\.pt is damaged"):
            sample.load_microsoft(model, "adapter.pt")
    assert not (tmp_path / "sprung").exists()


# ---- Mistakes ----------------------------------------------------------------------------------------------


MISTAKES = [
    ("--data e2e:{0}/data.txt", "--data", "--out"),
    ("--out p.txt", "--data", "--out"),
    ("--data e2e:{0}/data.txt --out p.txt --prompt a", "--data", "--prompt"),
    ("--data e2e:{0}/data.txt --out absent/p.txt", "--out", "absent/p.txt"),
    ("--data e2e:{0}/data.txt --out {0}/data.txt/p.txt", "--out", "data.txt/p.txt"),
    ("--data e2e:{0}/data.txt --out {0}/model", "--out", "model"),
    ("--data e2e:{0}/absent.txt --out p.txt", "absent.txt"),
    ("--data {0}/data.txt --out p.txt", "data.txt", "e2e:FILE"),
    ("--data toy:pirate --out p.txt", "toy:pirate", "e2e:FILE"),
    ("--data {0}/empty.jsonl --out p.txt", "empty.jsonl", "'a'"),
    ("--data e2e:{0}/data.txt --out p.txt --max-new-tokens 90", "96", "do not fit"),
    ("--data e2e:{0}/data.txt --out p.txt --beam 0", "--beam"),
    ("--data e2e:{0}/data.txt --out p.txt --length-penalty -1", "--length-penalty"),
    ("--data e2e:{0}/data.txt --out p.txt --length-penalty 1000", "--length-penalty"),
    ("--data e2e:{0}/data.txt --out p.txt --no-repeat-ngram -1", "--no-repeat-ngram"),
    ("--data e2e:{0}/data.txt --out p.txt --batch-size 0", "--batch-size"),
    ("--data e2e:{0}/data.txt --out p.txt --lora {0}/absent.pt", "absent.pt"),
    ("--data e2e:{0}/data.txt --out p.txt --lora {0}/cut.pt", "cut.pt", "damaged"),
]


@pytest.mark.parametrize("line, culprits", [(line, culprits) for line, *culprits in MISTAKES])
def test_mistakes_get_one_line(line, culprits, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "beam_search", None)  # they are found before the work starts
    with pytest.raises(SystemExit) as e:
        run(folder, line.format(folder))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("sample.py: error: ") and err.count("\n") == 1
    assert all(culprit in err for culprit in culprits)
    assert not list(tmp_path.iterdir())
