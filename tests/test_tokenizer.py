"""gpt.py: a base's own tokenizer, against `transformers`."""

import json

import pytest
import tokenizers
import transformers
from commands import make_base
from conftest import PADDED, assert_refused, edit_config, make_gpt2

from gpt import EOS, GPT, encode_text, load_tokenizer

TEXT = "  The naïve mill 日本語 🦜\n\n\tit's 12,345 '' \u2028\x85\xa0 "


def write_tokenizer(dir, special_tokens=(EOS,)):
    """vocab.json, with the special tokens first, and merges.txt, by Hugging Face's trainer."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    options = dict(vocab_size=300, special_tokens=list(special_tokens), show_progress=False)
    bpe.train_from_iterator(["The mill by the river", "naïve 日本語 🦜 it's 12,345"] * 5, **options)
    bpe.save_model(str(dir))


@pytest.fixture
def own_dir(tmp_path):
    """A base with a tokenizer of its own."""
    make_gpt2(tmp_path, vocab_size=50257, n_embd=4)  # as many tokens as GPT-2
    write_tokenizer(tmp_path)
    return tmp_path


def test_tokens_are_those_of_gpt2(gpt2_tokenizer):
    assert encode_text(gpt2_tokenizer, f"The dog{EOS}") == [464, 3290, 50256]
    assert gpt2_tokenizer.decode(gpt2_tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("special_tokens", [[], [EOS], [EOS, "<pad>", "<mask>"]], ids=len)
def test_a_bases_own_tokenizer_equals_that_of_transformers(own_dir, special_tokens):
    write_tokenizer(own_dir, special_tokens)
    theirs = transformers.GPT2Tokenizer.from_pretrained(own_dir)
    tokenizer, ids = load_tokenizer(own_dir), theirs(TEXT).input_ids
    assert encode_text(tokenizer, TEXT) == ids and tokenizer.decode(ids) == TEXT


@pytest.mark.parametrize("eos_token_id", [0, 350])
def test_eos_means_the_eos_token_id_of_the_base(own_dir, eos_token_id):
    edit_config(own_dir, eos_token_id=eos_token_id, vocab_size=400)
    tokenizer = load_tokenizer(own_dir)
    assert encode_text(tokenizer, EOS) == [tokenizer.eot_token] == [eos_token_id]
    assert len([tokenizer.decode([i]) for i in range(400)]) == 400  # of unused ids too


def test_the_tokenizer_of_the_toy_equals_that_of_transformers(tmp_path):
    make_base(tmp_path)
    theirs, text = transformers.GPT2Tokenizer.from_pretrained(tmp_path), f"name : The Mill{EOS} Arr"
    assert encode_text(load_tokenizer(tmp_path), text) == theirs(text).input_ids


def test_no_tokenizer_of_another_model_stays_beside_a_saved_one(base_dir, own_dir):
    GPT.from_pretrained(base_dir).save_pretrained(own_dir)
    assert_refused("vocab.json", load_tokenizer, own_dir)


def test_a_large_vocabulary_without_a_tokenizer_is_gpt2s(tmp_path, gpt2_tokenizer):
    make_gpt2(tmp_path, **PADDED)
    tokenizer = load_tokenizer(tmp_path)
    assert encode_text(tokenizer, TEXT + EOS) == encode_text(gpt2_tokenizer, TEXT + EOS)


def test_a_base_without_vocab_json_and_merges_txt_is_refused(base_dir):
    assert_refused("vocab.json.*merges.txt", load_tokenizer, base_dir)  # a small vocabulary
    edit_config(base_dir, vocab_size=50257)
    (base_dir / "tokenizer.json").touch()
    assert_refused("vocab.json.*merges.txt", load_tokenizer, base_dir)


def test_more_tokens_than_the_model_has_are_refused(own_dir):
    n_tokens = len(json.loads((own_dir / "vocab.json").read_text()))
    edit_config(own_dir, vocab_size=n_tokens)
    load_tokenizer(own_dir)
    edit_config(own_dir, vocab_size=n_tokens - 1)
    assert_refused(f"vocab_size {n_tokens - 1}", load_tokenizer, own_dir)


def test_merges_in_another_order_than_the_ids_are_refused(own_dir):
    first, *merges = (own_dir / "merges.txt").read_text().splitlines()
    (own_dir / "merges.txt").write_text("\n".join([first, *reversed(merges)]))
    assert_refused("vocab.json", load_tokenizer, own_dir)
