"""lora.py: adapter files, which PEFT reads, and PEFT's adapters, which we read."""

import json

import peft
import pytest
import torch
import torch.nn as nn
import transformers
from conftest import (
    assert_refused,
    assert_same_weights,
    lora_model,
    make_gpt2,
    random_tokens,
    randomize_B,
)
from safetensors.torch import load_file

from gpt import GPT
from lora import add_lora, load_lora, merge_lora, save_lora

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ALL = ("c_q", "c_k", "c_v", "c_proj", "c_fc")
TARGETS = [("c_k",), ("c_q", "c_v"), ("1.attn.c_v", "c_proj"), ALL]
IDX = random_tokens(2, 16)


def load(base_dir, dir):
    model = GPT.from_pretrained(base_dir)
    load_lora(model, dir)
    return model


def peft_model(base_dir, **config):
    base = transformers.GPT2LMHeadModel.from_pretrained(base_dir)
    config = dict(target_modules=["c_attn"], r=4, fan_in_fan_out=True) | config
    return randomize_B(peft.get_peft_model(base, peft.LoraConfig(**config))).eval()


def load_in_peft(base_dir, dir):
    base = transformers.GPT2LMHeadModel.from_pretrained(base_dir)
    return peft.PeftModel.from_pretrained(base, dir).eval()


@torch.no_grad()
def assert_same_logits(ours, theirs):
    torch.testing.assert_close(ours(IDX), theirs(IDX).logits, rtol=0, atol=1e-5)


def assert_same_adapter(a, b):
    assert_same_weights(a, b)
    assert str(a) == str(b)  # with r, alpha and dropout


# ---- What we write ----


@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_peft_reads_ours_and_we_read_what_it_saves_again(base_dir, tmp_path, targets):
    model = lora_model(base_dir, r=3, targets=targets)
    save_lora(model, tmp_path)
    theirs = load_in_peft(base_dir, tmp_path)
    assert_same_logits(model, theirs)
    theirs.save_pretrained(tmp_path / "again")
    assert_same_logits(load(base_dir, tmp_path / "again"), theirs)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "untrained"])
@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_save_load_is_identity(base_dir, tmp_path, targets, trained):
    model = GPT.from_pretrained(base_dir)
    add_lora(model, r=3, alpha=20, dropout=0.1, targets=targets)
    save_lora(randomize_B(model) if trained else model, tmp_path)
    assert_same_adapter(load(base_dir, tmp_path), model)


def test_query_and_value_with_different_scales_are_refused(base_dir, tmp_path):
    model = lora_model(base_dir)
    model.h[0].attn.c_v.alpha *= 2
    assert_refused(r"h\.0\.attn\.c_attn", save_lora, model, tmp_path)


def test_a_wrapped_or_merged_model_is_refused(base_dir, tmp_path):
    model = lora_model(base_dir)
    assert_refused("wrapped", save_lora, torch.compile(model), tmp_path)
    assert_refused("wrapped", save_lora, nn.DataParallel(model), tmp_path)
    merge_lora(model)
    assert_refused("merged", save_lora, model, tmp_path)


# ---- What PEFT writes ----

PATTERNS = {
    "c_attn": dict(lora_alpha=20),
    "all": dict(target_modules="all-linear"),
    "gaussian": dict(init_lora_weights="gaussian"),
    "full name": dict(alpha_pattern={"transformer.h.1.attn.c_attn": 50}),
    "regex": dict(rank_pattern={r"h\.[01].*c_attn": 2}, alpha_pattern={r".*\.1\.attn\.c_.*": 50}),
    "first match": dict(alpha_pattern={"1.attn.c_attn": 50, "c_attn": 5}),
}


@pytest.mark.parametrize("config", PATTERNS.values(), ids=PATTERNS)
def test_we_read_pefts(base_dir, tmp_path, config):
    theirs = peft_model(base_dir, **config)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(load(base_dir, tmp_path), load_in_peft(base_dir, tmp_path))


# ---- Adapters that are refused ----

UNSUPPORTED = dict(use_dora=True, use_rslora=True, modules_to_save=["lm_head"], bias="all")
UNSUPPORTED |= dict(init_lora_weights="pissa", layers_to_transform=[0])


@pytest.mark.parametrize("key, value", UNSUPPORTED.items())
def test_what_we_do_not_support_is_refused(base_dir, tmp_path, key, value):
    save_lora(lora_model(base_dir), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {key: value}))
    assert_refused(key, load, base_dir, tmp_path)


@pytest.mark.parametrize("writer", ["ours", "PEFT"])
@pytest.mark.parametrize("sizes", [dict(n_layer=1), dict(n_layer=3), dict(n_embd=64)], ids=str)
def test_a_refused_adapter_of_another_base_changes_nothing(base_dir, tmp_path, sizes, writer):
    make_gpt2(tmp_path / "other", **sizes)
    if writer == "ours":
        save_lora(lora_model(tmp_path / "other"), tmp_path)
    else:
        peft_model(tmp_path / "other").save_pretrained(tmp_path)
    model, untouched = lora_model(base_dir), lora_model(base_dir)
    assert_refused("does not fit", load_lora, model, tmp_path)
    assert_same_adapter(model, untouched)


def test_a_file_that_is_cut_off_is_refused(base_dir, tmp_path):
    save_lora(lora_model(base_dir), tmp_path)
    (tmp_path / TENSORS).write_bytes((tmp_path / TENSORS).read_bytes()[:-1])
    assert_refused("damaged", load, base_dir, tmp_path)


def test_a_pickle_is_never_read(base_dir, tmp_path):
    peft_model(base_dir).save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / TENSORS), tmp_path / "adapter_model.bin")
    (tmp_path / TENSORS).unlink()
    assert_refused("a .bin that PEFT must save again", load, base_dir, tmp_path)


# ---- Loading on a model ----


def test_loading_on_a_base_of_another_name_warns_in_one_line(base_dir, tmp_path, capsys):
    save_lora(lora_model(base_dir), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == str(base_dir)
    load(base_dir, tmp_path)
    assert capsys.readouterr().err == ""
    make_gpt2(tmp_path / "other")
    load(tmp_path / "other", tmp_path)
    warning = capsys.readouterr().err
    assert "another model, base" in warning and warning.count("\n") == 1


@pytest.mark.parametrize("prepare", [lambda model: None, merge_lora], ids=["with LoRA", "merged"])
def test_load_lora_replaces_an_adapter(base_dir, tmp_path, prepare):
    save_lora(lora_model(base_dir, r=3, targets=("c_k", "c_proj")), tmp_path)
    model = lora_model(base_dir)
    prepare(model)
    load_lora(model, tmp_path)
    assert_same_adapter(model, load(base_dir, tmp_path))
