"""gpt.py: model folders and the Hub's cache, against `transformers`."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from conftest import PADDED, assert_refused, assert_same_weights, edit_config, make_gpt2
from safetensors.torch import load_file, save_file

import gpt
from gpt import GPT, load_tokenizer

# ---- Folders that are read and written ----


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_every_layout_of_the_file_loads(base_dir, prefix, old):
    expected, path = GPT.from_pretrained(base_dir), base_dir / "model.safetensors"
    tensors = {prefix + n.removeprefix("transformer."): w for n, w in load_file(path).items()}
    if old:  # with causal masks, a copy of the tied head, and the usual width of the MLP
        edit_config(base_dir, n_inner=4 * 32)
        tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"].clone()
        tensors[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"{prefix}h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path)
    assert_same_weights(GPT.from_pretrained(base_dir), expected)


@pytest.mark.parametrize("sizes", [{}, dict(eos_token_id=5), PADDED], ids=["0", "5", "padded"])
def test_transformers_reads_what_we_write(tmp_path, sizes):
    theirs = make_gpt2(tmp_path / "theirs", **sizes)
    GPT.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    assert_same_weights(again, theirs)
    assert again.config.eos_token_id == theirs.config.eos_token_id


def test_a_model_with_lora_or_a_wrapper_is_not_saved(base_dir, tmp_path):
    lora_model, compiled_model = GPT.from_pretrained(base_dir), GPT.from_pretrained(base_dir)
    lora_model.h[0].attn.c_q.lora_A = torch.nn.Parameter(torch.zeros(1))
    compiled_model.h[0] = torch.compile(compiled_model.h[0])
    assert_refused("lora_A", lora_model.save_pretrained, tmp_path / "out")
    assert_refused("_orig_mod", compiled_model.save_pretrained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_save_leaves_the_old_file_whole(base_dir, monkeypatch):
    def fill_the_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    model, before = GPT.from_pretrained(base_dir), (base_dir / "model.safetensors").read_bytes()
    monkeypatch.setattr(gpt, "save_file", fill_the_disk)
    assert_refused("disk full", model.save_pretrained, base_dir, error=OSError)
    assert (base_dir / "model.safetensors").read_bytes() == before
    assert not list(base_dir.glob("*.tmp"))


SAVE = """
import sys, gpt
model = gpt.GPT.from_pretrained(sys.argv[1])
print("ready", flush=True)
for i in range(40):
    model.save_pretrained(sys.argv[2])
"""


def test_two_processes_can_save_into_one_folder(tmp_path, monkeypatch):
    a, b, out = (tmp_path / name for name in ("a", "b", "out"))
    models = [make_gpt2(a, seed=0), make_gpt2(b, seed=1)]
    monkeypatch.setenv("PYTHONPATH", str(Path(gpt.__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", SAVE, a, out], stdout=subprocess.PIPE)
    model = GPT.from_pretrained(b)
    process.stdout.readline()  # "ready": it has imported torch
    while process.poll() is None:
        model.save_pretrained(out)
    assert process.returncode == 0
    weight = GPT.from_pretrained(out).wte.weight
    assert any(torch.equal(weight, model.transformer.wte.weight) for model in models)
    assert len(list(out.iterdir())) == 2


def test_file_permissions_follow_the_umask(base_dir, tmp_path):
    model, before = GPT.from_pretrained(base_dir), os.umask(0o027)
    model.save_pretrained(tmp_path / "out")
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


# ---- Folders that are refused ----

OTHER_MATHEMATICS = dict(model_type="llama", activation_function="relu", layer_norm_epsilon=1e-6)
OTHER_MATHEMATICS |= dict(scale_attn_weights=False, add_cross_attention=True)
OTHER_MATHEMATICS |= dict(scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False)
REFUSED = [(name, value, f"{name}.*{value}") for name, value in OTHER_MATHEMATICS.items()]
REFUSED += [("n_layer", 3, r"h\.2\."), ("n_layer", 1, r"h\.1\."), ("vocab_size", 96, "97.*96")]
REFUSED += [("eos_token_id", None, "one id"), ("eos_token_id", [1, 2], "one id")]


@pytest.mark.parametrize("setting, value, match", REFUSED)
def test_a_config_of_another_model_is_refused(base_dir, setting, value, match):
    edit_config(base_dir, **{setting: value})
    assert_refused(match, GPT.from_pretrained, base_dir)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_are_cut_off_or_missing_are_refused(base_dir, name):
    path = base_dir / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_refused(None, GPT.from_pretrained, base_dir)
    path.unlink()
    assert_refused(name, GPT.from_pretrained, base_dir, error=FileNotFoundError)


@pytest.mark.parametrize("name", ["out/typo", "./typo", "/typo", "~/typo"])
def test_a_path_is_never_looked_up_on_the_hub(monkeypatch, name):
    monkeypatch.setattr(gpt, "hf_hub_download", lambda *args: pytest.fail("asked the Hub"))
    for load in (GPT.from_pretrained, load_tokenizer):
        assert_refused("typo", load, name, error=FileNotFoundError)


# ---- The Hub ----


def test_a_model_in_the_cache_loads_by_name_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    dir = tmp_path / "models--user--model"
    make_gpt2(dir / "snapshots/1a2b3c")
    (dir / "refs").mkdir()
    (dir / "refs/main").write_text("1a2b3c")
    model = GPT.from_pretrained("user/model")
    assert_same_weights(model, GPT.from_pretrained(dir / "snapshots/1a2b3c"))


# ---- OpenAI's weights, if they are in the Hub's cache ----


@pytest.mark.slow
def test_openai_weights_continue_as_published():
    try:
        model = GPT.from_pretrained("gpt2")
    except OSError as error:
        pytest.skip(f"OpenAI's weights are not available: {error}")
    # test_lm_generate_gpt2 of huggingface/transformers
    ids = "464 3290 373 1043 287 257 2214 1474 262 16246 286 2688 290 2688 27262 13 198 198"
    ids = [int(i) for i in ids.split()]
    tokens = model.generate(torch.tensor([ids[:2]]), 16, temperature=0)
    assert [token.item() for token in tokens] == ids[2:]
