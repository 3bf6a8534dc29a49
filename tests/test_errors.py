"""A user's mistake gets one line that names it and says what to do, exit code 2, and leaves nothing behind."""

import json
import math
import os
import shutil

import pytest
import torch
from conftest import make_gpt2
from safetensors.torch import load_file, save_file

import sample
import train
from gpt import GPT
from lora import add_lora, save_lora
from notebooks import toy

TEXTS = {
    "empty.txt": b"",
    "short.txt": b"A few words.",
    "latin.txt": "Arr, caf\u00e9".encode("latin-1"),
    "bars.txt": b"name : A | food : B||A has B.\nname : C\n",
    "bad.jsonl": b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n',
    "fields.jsonl": b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "text": "b"}\n',
    "numbers.jsonl": b'{"prompt": 1, "completion": 2}\n',
    "nested.jsonl": b"[" * 100_000,
    "long.jsonl": json.dumps({"prompt": "a " * 200, "completion": "b"}).encode(),
    "good.jsonl": b'{"prompt": "a", "completion": "b"}\n' * 3,
}


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with mistakes of every kind: texts, models, adapters."""
    top = tmp_path_factory.mktemp("files")
    for name, content in TEXTS.items():
        (top / name).write_bytes(content)
    (top / "a-file").touch()

    make_gpt2(top / "model", vocab_size=380, n_positions=128)
    (top / "model" / "vocab.tiktoken").write_text(toy.toy_vocabulary())
    for name, change in {
        "no-config": lambda dir: (dir / "config.json").unlink(),
        "llama": lambda dir: edit_json(dir / "config.json", model_type="llama"),
        "cut-off": lambda dir: os.truncate(dir / "model.safetensors", 1000),
        "misshapen": lambda dir: edit_json(dir / "config.json", n_positions=64),
        "missing": lambda dir: edit_tensors(dir / "model.safetensors", lambda t: t.pop("transformer.ln_f.bias")),
        "vocabulary": lambda dir: (dir / "vocab.tiktoken").write_text("not a vocabulary"),
        "small-vocabulary": lambda dir: edit_json(dir / "config.json", vocab_size=300),
        "nan": lambda dir: edit_tensors(
            dir / "model.safetensors", lambda t: t["transformer.ln_f.bias"].fill_(math.nan)
        ),
    }.items():
        change(shutil.copytree(top / "model", top / name))

    model = GPT.from_pretrained(top / "model")
    add_lora(model)
    save_lora(model, top / "adapter")
    for name, change in {
        "no-tensors": lambda dir: (dir / "adapter_model.safetensors").unlink(),
        "half": lambda dir: os.truncate(dir / "adapter_model.safetensors", 2000),
        "dora": lambda dir: edit_json(dir / "adapter_config.json", use_dora=True),
    }.items():
        change(shutil.copytree(top / "adapter", top / f"adapter-{name}"))
    make_gpt2(top / "wide", n_embd=64, vocab_size=380, n_positions=128)
    (top / "wide" / "vocab.tiktoken").write_text(toy.toy_vocabulary())
    return top


# The command line, what the message must name. {} is the folder `files`.
TRAIN = [
    ("--model gpt3", "gpt3", "gpt2-medium"),
    ("--model {}", "config.json"),
    ("--model {}/no-config", "no-config", "config.json"),
    ("--model {}/llama", "llama", "GPT-2"),
    ("--model {}/cut-off", "model.safetensors", "again"),
    ("--model {}/misshapen", "wpe.weight", "[128, 32]", "[64, 32]"),
    ("--model {}/missing", "ln_f.bias"),
    ("--model {}/vocabulary", "vocab.tiktoken"),
    ("--model {}/small-vocabulary", "300", "380"),
    ("--data toy:parrot", "parrot", "pirate"),
    ("--data toy", "pirate"),
    ("--data poems", "poems", "e2e"),
    ("--data {}/absent.txt", "absent.txt"),
    ("--data {}/absent.jsonl", "absent.jsonl"),
    ("--data e2e:{}/absent.txt", "absent.txt"),
    ("--data {}", "no data set"),
    ("--data {}/empty.txt", "empty"),
    ("--data {}/short.txt", "short.txt", "129"),
    ("--data {}/latin.txt", "latin.txt", "UTF-8"),
    ("--data e2e:{}/bars.txt", "line 2", "||"),
    ("--data {}/bad.jsonl", "line 2", "prompt"),
    ("--data {}/fields.jsonl", "line 2", "completion"),
    ("--data {}/numbers.jsonl", "line 1", "prompt"),
    ("--data {}/nested.jsonl", "line 1", "prompt"),
    ("--data {}/long.jsonl", "long.jsonl", "128"),
    ("--method dora", "dora", "full"),
    ("--targets c_x", "c_x", "c_q"),
    ("--targets c_q q_proj", "q_proj", "attn.c_proj"),
    ("--r 0", "--r", "0"),
    ("--r -4", "--r", "-4"),
    ("--r 129", "129", "128"),
    ("--r four", "--r", "'four'"),
    ("--alpha 0", "--alpha"),
    ("--alpha nan", "--alpha"),
    ("--lora-dropout 1", "--lora-dropout"),
    ("--lora-dropout -0.1", "--lora-dropout"),
    ("--label-smoothing 1.5", "--label-smoothing"),
    ("--steps 0", "--steps"),
    ("--steps -1", "--steps"),
    ("--steps 10 --warmup 10", "--warmup", "--steps"),
    ("--batch-size 0", "--batch-size"),
    ("--grad-accum 0", "--grad-accum"),
    ("--eval-every 0", "--eval-every"),
    ("--lr 0", "--lr"),
    ("--lr -1", "--lr"),
    ("--lr nan", "--lr"),
    ("--lr inf", "--lr"),
    ("--weight-decay -1", "--weight-decay"),
    ("--seed -1", "--seed"),
    ("--device tpu", "tpu", "cuda"),
    ("--dtype int8", "int8", "bfloat16"),
    ("--model {}/model --out {}/a-file", "a-file"),
    ("--model {}/model --out {}/a-file/out", "a-file"),
    ("--resume", "--resume"),
    ("--rank 4", "--rank"),
]
SAMPLE = [
    ("--model gpt3", "gpt3", "gpt2-medium"),
    ("--model {}/model --lora {}/absent", "absent"),
    ("--model {}/model --lora {}/adapter-no-tensors", "adapter_model.safetensors"),
    ("--model {}/model --lora {}/adapter-half", "adapter-half", "again"),
    ("--model {}/model --lora {}/adapter-dora", "use_dora"),
    ("--model {}/wide --lora {}/adapter", "(32, 32)", "(64, 64)"),
    ("--model {}/model --merge", "--lora"),
    ("--model {}/model --max-new-tokens 128", "129 tokens", "128"),
    ("--model {}/model --max-new-tokens 0", "--max-new-tokens"),
    ("--model {}/model --prompt " + "a" * 200, "201 tokens", "128"),
    ("--model {}/model --temperature -1", "--temperature"),
    ("--model {}/model --top-k 0", "--top-k"),
]


@pytest.mark.parametrize(
    "command, line, culprits",
    [(train, line, culprits) for line, *culprits in TRAIN] + [(sample, line, culprits) for line, *culprits in SAMPLE],
)
def test_mistakes_get_one_line(command, line, culprits, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "TINY", tmp_path / "out" / "tiny")
    with pytest.raises(SystemExit) as e:
        command.main(line.format(*[files] * line.count("{}")).split())
    err = capsys.readouterr().err
    assert e.value.code == 2
    assert err.startswith(f"{command.__name__}.py: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert all(culprit in err for culprit in culprits)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", [train, sample])
def test_a_gpu_that_is_not_there(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda"])
    assert capsys.readouterr().err.startswith(f"{command.__name__}.py: error: --device cuda")


def test_a_loss_that_is_not_finite_stops_the_run(files, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        train.main(f"--model {files}/nan --data {files}/good.jsonl --steps 4 --out {tmp_path}/out".split())
    assert e.value.code == 2
    assert (
        capsys.readouterr().err == "train.py: error: the loss is nan at step 1: start again with a --lr below 0.0002\n"
    )
