"""sample.py: texts for many prompts, and the command."""

import shutil

import pytest
import torch
from commands import error_message, run

import sample
from gpt import EOS, GPT, encode_text, load_tokenizer
from notebooks import toy
from sample import generate_texts

PROMPTS = ["name : The Mill", "", "food : Thai | area : park", "price : low", "area : castle"]


@pytest.fixture
def base(folder):
    return GPT.from_pretrained("base"), load_tokenizer("base")


def output(line, capsys):
    """What sample.py prints."""
    capsys.readouterr()
    run(sample, f"{line} --max-new-tokens 20")
    return capsys.readouterr().out


# ---- Many prompts ----


def test_greedy_texts_equal_those_of_one_prompt_at_a_time(base):
    model, tokenizer = base
    texts = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=10, temperature=0)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        idx = torch.tensor([encode_text(tokenizer, prompt + EOS)])
        tokens = [token.item() for token in model.generate(idx, 10, temperature=0)]
        assert text == tokenizer.decode(tokens).partition(EOS)[0].strip()
    assert len(set(texts)) > 1


def test_texts_end_at_eos(base, monkeypatch):
    model, tokenizer = base
    rows = [(" Arr", " Mill"), (EOS, " Arr"), (" Thai", EOS), (" Thai", " Thai")]
    steps = iter([torch.tensor([encode_text(tokenizer, text)[0] for text in row]) for row in rows])
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: steps)
    assert generate_texts(model, tokenizer, ["a", "b"]) == ["Arr", "Mill Arr"]
    assert len(list(steps)) == 1  # no step after both sequences have ended


# ---- The command ----


def test_command_prints_the_prompt_and_its_continuation(base, capsys):
    model, tokenizer = base
    ids = encode_text(tokenizer, "name : The")
    tokens = [t.item() for t in model.generate(torch.tensor([ids]), 20, temperature=0)]
    text = output("--model base --prompt 'name : The' --temperature 0", capsys)
    assert text == tokenizer.decode(ids + tokens).partition(EOS)[0] + "\n"


def test_base_is_the_one_that_the_adapter_names(folder, capsys):
    plain = output("--model base --prompt Arr --temperature 0", capsys)
    text = output("--lora adapter --prompt Arr --temperature 0", capsys)
    assert text == output("--model base --lora adapter --prompt Arr --temperature 0", capsys)
    assert text != plain


def test_without_a_base_it_says_to_train_first(folder, capsys):
    assert "python train.py" in error_message(sample, "--prompt Arr", capsys)
    shutil.copytree("base", "out/tiny")
    assert output("--prompt Arr", capsys).startswith("Arr")


@pytest.mark.parametrize("text, printed", [("\u00e9", "\u00e9"), ("\x1b\x07", r"\x1b\x07")])
def test_characters_are_printed_whole_and_controls_escaped(
    base, monkeypatch, capsys, text, printed
):
    ids = encode_text(base[1], text)
    assert len(ids) == 2
    monkeypatch.setattr(
        GPT, "generate", lambda *args, **kwargs: map(torch.tensor, [[i] for i in ids])
    )
    assert output("--model base --prompt 'caf\x1b'", capsys) == rf"caf\x1b{printed}" + "\n"


def test_default_length_fits_the_context(folder, capsys):
    n = toy.CONFIG.block_size
    run(sample, f"--model base --prompt '{' Thai' * (n - 5)}'")
    message = error_message(sample, f"--model base --prompt '{' Thai' * (n + 1)}'", capsys)
    assert str(n) in message
