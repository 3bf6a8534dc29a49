"""What hostile hands did to an earlier version: nothing is lost without a word, and nothing is wrong without a word."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_gpt2

import gpt
import sample
import train
from gpt import GPT, make_tokenizer, write_whole
from lora import add_lora, save_lora
from notebooks import toy

TOP = Path(train.__file__).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base that has the toy's vocabulary, an adapter of it, and data of three kinds."""
    top = tmp_path_factory.mktemp("made")
    make_gpt2(top / "model", vocab_size=384, n_positions=128)  # a vocabulary padded by 4
    (top / "model" / "vocab.tiktoken").write_text(toy.toy_vocabulary())
    model = GPT.from_pretrained(top / "model")
    add_lora(model)
    save_lora(model, top / "adapter")
    pairs = list(toy.toy_pairs(toy.toy_world()[0][:40], ["text"]))
    (top / "data.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    (top / "data.txt").write_text("".join(f"{p}||{c}\n" for p, c in pairs[:3]))
    return top


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of it, in which the test runs."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(command, line, capsys):
    """The message of a command that has to refuse its arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        command.main(shlex.split(line))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith(f"{command.__name__}.py: error: ") and err.count("\n") == 1, err
    return err


def start(line, **options):
    command = [sys.executable, *shlex.split(line)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


TRAIN = "--model model --data data.jsonl --device cpu --batch-size 4 --lora-dropout 0.2"

# ---- Lost ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["model", "./model/", "link"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_base_is_never_the_out_of_a_run(folder, capsys, out, method):
    (folder / "link").symlink_to("model")
    before = contents(folder)
    assert "name another" in refused(train, f"{TRAIN} --method {method} --steps 1 --out {out}", capsys)
    assert contents(folder) == before


def test_tiny_is_not_overwritten_even_before_it_is_there(folder, capsys, monkeypatch):
    monkeypatch.setattr(toy, "TINY", folder / "out" / "tiny")
    assert "name another" in refused(train, "--out out/tiny", capsys)
    assert not (folder / "out").exists()


OUTS = ["data.txt", "link.txt", "model/model.safetensors", "adapter/adapter_config.json", "data.jsonl", "/dev/null"]


@pytest.mark.parametrize("out", [*OUTS, "pipe.txt", "refs.txt"])
def test_what_sample_reads_is_never_what_it_writes(folder, capsys, out):
    (folder / "link.txt").symlink_to("data.txt")
    os.mkfifo("pipe.txt")
    shutil.copy("data.txt", "refs.references.txt")
    data = "refs.references.txt" if out == "refs.txt" else "data.txt"
    before = contents(folder)
    message = refused(sample, f"--model model --lora adapter --data e2e:{data} --out {out} --max-new-tokens 2", capsys)
    assert "name another" in message and contents(folder) == before


WRITER = """
import sys, time, pathlib, gpt
for i in range(200):
    gpt.write_whole({pathlib.Path("file"): sys.argv[1] * 100_000, pathlib.Path("other"): sys.argv[1]})
"""


def test_two_processes_can_write_one_file(folder):
    environment = os.environ | {"PYTHONPATH": str(TOP)}
    writers = [start(f"-c {shlex.quote(WRITER)} {letter}", env=environment) for letter in "ab"]
    assert [writer.communicate()[1] for writer in writers] == ["", ""]
    assert (folder / "file").read_text() in ("a" * 100_000, "b" * 100_000)
    assert {file.name for file in folder.iterdir()} >= {"file", "other"} and not list(folder.glob("*.tmp"))


def test_a_download_that_another_process_has_finished_is_fine(tmp_path, monkeypatch):
    file = tmp_path / "file"

    def slow(url, tmp, hash_prefix):
        file.write_text("whole")  # the other one was faster
        raise OSError("the connection broke")

    monkeypatch.setattr(torch.hub, "download_url_to_file", slow)
    assert gpt.download("http://nowhere", file).read_text() == "whole"
    assert list(tmp_path.iterdir()) == [file]


def follow(process, step):
    next(line for line in process.stdout if line.startswith("step") and int(line.split()[1]) >= step)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_laptop_loses_nothing(folder):
    line = f"{TOP / 'train.py'} {TRAIN} --steps 60 --eval-every 60 --out out"
    process = start(line)
    follow(process, 6)
    process.send_signal(signal.SIGHUP)
    assert "--resume" in process.communicate()[1] and process.returncode == 130
    assert (folder / "out" / "state.pt").exists()
    process = start(f"{line} --resume", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))  # nohup
    follow(process, 12)
    process.send_signal(signal.SIGHUP)
    assert process.communicate()[1] == "" and process.returncode == 0


def test_a_last_save_that_fails_loses_nothing_and_names_the_path(folder, capsys, monkeypatch):
    def fail(tmp):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "save_lora", lambda model, dir: write_whole({dir / "adapter_model.safetensors": fail}))
    message = refused(train, f"{TRAIN} --steps 3 --out out", capsys)
    assert "adapter_model.safetensors" in message and "No space left" in message
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    train.main(shlex.split(f"{TRAIN} --steps 3 --out out --resume"))
    assert sorted(os.listdir("out")) == ["adapter_config.json", "adapter_model.safetensors", "log.csv"]


def test_text_that_utf8_cannot_hold_is_found_when_reading(folder, capsys):
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "\\ud800"}\n')
    for command, flags in ((train, "--steps 1"), (sample, "--out out.txt")):
        assert "line 2" in refused(command, f"--model model --data bad.jsonl {flags}", capsys)


# ---- Wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["data.jsonl", "model", "dtype"])
def test_a_run_goes_on_only_from_what_it_was(folder, capsys, change):
    line = f"{TRAIN} --steps 60 --eval-every 2 --out out"
    process = start(f"{TOP / 'train.py'} {line}")
    follow(process, 4)
    process.terminate()
    process.communicate()
    assert torch.load("out/state.pt", weights_only=True)["settings"]["dtype"] == "float32"
    if change == "data.jsonl":
        (folder / "data.jsonl").write_text((folder / "data.jsonl").read_text().replace("kids ok", "kids no", 1))
    elif change == "model":
        make_gpt2(folder / "model", seed=1, vocab_size=384, n_positions=128)
    line += " --dtype bfloat16" if change == "dtype" else ""
    what = {"data.jsonl": "hash of the data", "model": "hash of the base", "dtype": "dtype"}[change]
    assert f"{what} = " in refused(train, f"{line} --resume", capsys)
    assert (folder / "out" / "state.pt").exists()


def test_a_vocabulary_is_never_another_models(folder, vocabulary, capsys):
    train.main(shlex.split(f"{TRAIN} --method full --steps 1 --out out"))
    assert Path("out/vocab.tiktoken").exists()
    (folder / "model" / "vocab.tiktoken").unlink()
    make_gpt2(folder / "model", vocab_size=50257, n_positions=128)  # with GPT-2's vocabulary
    train.main(shlex.split(f"{TRAIN} --method full --steps 1 --out out"))
    assert not Path("out/vocab.tiktoken").exists()
    shutil.copytree("out", "gpt2")
    (folder / "gpt2" / "vocab.tiktoken").write_text(toy.toy_vocabulary())
    assert gpt.load_tokenizer("gpt2").n_vocab == 50257 and gpt.own_vocabulary("gpt2") is None


@pytest.mark.parametrize("lora", ["", "absent"])
def test_an_adapter_that_is_asked_for_is_not_ignored(folder, capsys, lora):
    assert "adapter" in refused(sample, f"--model model --lora '{lora}' --prompt a", capsys)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_text_files_are_read_as_they_are_meant(folder, mark):
    tokenizer = make_tokenizer(toy.toy_vocabulary())
    (folder / "a.txt").write_text(f"{mark}Arr<|endoftext|>Ahoy", encoding="utf-8")
    ids = tokenizer.encode("Arr") + [tokenizer.eot_token] + tokenizer.encode("Ahoy")
    assert train.load_data("a.txt", tokenizer, len(ids) - 1)[0] == [(ids, 1)]
    for name, line in {"a.jsonl": '{"prompt": "Arr", "completion": "Ahoy"}', "e2e:b.txt": "Arr||Ahoy"}.items():
        Path(name.removeprefix("e2e:")).write_text(f"{mark}{line}\n", encoding="utf-8")
        assert train.load_data(name, tokenizer, 128)[0] == [train.encode_pair(tokenizer, "Arr", "Ahoy")]


def test_tiny_is_made_anew_when_the_toy_world_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "TINY", tmp_path / "tiny")
    monkeypatch.setattr(toy, "TINY_RECIPE", dict(steps=1, batch_size=2, eval_every=1))
    monkeypatch.setattr(train, "evaluate", lambda *args: 0.0)
    made, vocabulary = [], toy.toy_vocabulary()
    for _ in range(2):
        for _ in range(2):
            train.load_base("tiny")
            made.append((tmp_path / "tiny" / "model.safetensors").stat().st_mtime_ns)
        sentences = [s.replace(". {children}", ", {children}") for s in toy.VOICES["plain"]["sentences"]]
        monkeypatch.setitem(toy.VOICES["plain"], "sentences", sentences)
        assert toy.toy_vocabulary() == vocabulary
    assert made[0] == made[1] < made[2] == made[3]


def test_a_damaged_tiny_says_to_delete_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "TINY", tmp_path / "tiny")
    monkeypatch.setattr(toy, "TINY_RECIPE", dict(steps=1, batch_size=2, eval_every=1))
    monkeypatch.setattr(train, "evaluate", lambda *args: 0.0)
    train.load_base("tiny")
    os.truncate(tmp_path / "tiny" / "model.safetensors", 1000)
    for command in (train, sample):
        assert f"delete {tmp_path / 'tiny'}" in refused(command, "", capsys)


# ---- Tracebacks and wrong advice -----------------------------------------------------------------------------


def test_ids_without_a_text_are_never_written(folder, capsys):
    weights = GPT.from_pretrained("model")
    weights.wte.weight.data[379:] *= 100  # <|endoftext|> is 379; the padding becomes likely
    weights.save_pretrained("padded", toy.toy_vocabulary())
    for flags in ("--prompt a", "--data e2e:data.txt --out out.txt"):
        sample.main(shlex.split(f"--model padded --max-new-tokens 20 {flags}"))
    model, tokenizer = GPT.from_pretrained("padded"), gpt.load_tokenizer("padded")
    assert all(isinstance(text, str) for text in train.complete(model, tokenizer, ["a", "b"]))


FAILURES = {
    "GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "--batch-size"),
    "CPU": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "--batch-size"),
    "MPS": (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "--batch-size"),
    "compiler": (RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nin torch._inductor"), "--compile"),
}


@pytest.mark.parametrize("failure, advice", FAILURES.values(), ids=FAILURES)
def test_what_the_machine_lacks_is_said_in_one_line(folder, capsys, monkeypatch, failure, advice):
    def fail(*args):
        raise failure

    monkeypatch.setattr(train, "train", fail)
    assert advice in refused(train, f"{TRAIN} --steps 1 --out out", capsys)


@pytest.mark.parametrize("command", ["train.py --steps 1", "sample.py"])
def test_ctrl_c_while_torch_is_imported_prints_no_traceback(folder, command):
    for delay in (0.15, 0.4, 0.8):
        process = start(f"{TOP}/{command} --model absent")
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate()[1] or delay < 0.2  # Python itself may still be starting


@pytest.mark.parametrize("state", [[1, 2], {"settings": {}}, {"step": 3}, b"", b"PK\x03\x04"], ids=str)
def test_a_state_that_is_not_ours_is_damaged(folder, capsys, state):
    Path("out").mkdir()
    Path("out/state.pt").write_bytes(state) if isinstance(state, bytes) else torch.save(state, "out/state.pt")
    assert "state.pt is damaged" in refused(train, f"{TRAIN} --steps 1 --out out --resume", capsys)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_that_the_user_asks_for(folder, umask, mode):
    before = os.umask(umask)
    try:
        train.main(shlex.split(f"{TRAIN} --method full --steps 1 --out full"))
        train.main(shlex.split(f"{TRAIN} --steps 1 --out lora"))
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for out in ("full", "lora") for file in Path(out).iterdir()}
    assert len(modes) == 6 and set(modes.values()) == {mode}


def test_a_server_that_says_nothing_is_an_error(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(gpt, "PATIENCE", 0.2)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with pytest.raises(OSError, match="cannot download .*timed out"):
            gpt.download(f"http://127.0.0.1:{server.getsockname()[1]}/file", tmp_path / "folder" / "file")
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"] and socket.getdefaulttimeout() is None


@pytest.mark.parametrize("out", ["an out", "it's", "-x"])
def test_the_printed_command_works_when_pasted(folder, capsys, out):
    train.main(["--model=model", "--data=data.jsonl", "--steps=1", f"--out={out}"])
    line = re.search(r"^try +python (sample\.py .+)$", capsys.readouterr().out, re.MULTILINE)[1]
    process = start(line.replace("sample.py", str(TOP / "sample.py")) + " --max-new-tokens 2")
    assert process.communicate()[1] == "" and process.returncode == 0


@pytest.mark.parametrize("flags, culprit", [("--alpha 1e39", "--alpha"), (f"--seed {2**70}", "--seed")])
def test_a_number_that_is_too_large_is_that_flags_fault(folder, capsys, flags, culprit):
    assert f"argument {culprit}" in refused(train, f"{TRAIN} --steps 1 {flags}", capsys)


def test_a_home_that_does_not_exist_is_no_error(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--gpt2" / "snapshots" / "one"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: 1 / 0)
    assert gpt.find_pretrained("gpt2") == snapshot / "model.safetensors"


def test_a_context_that_is_too_short_for_the_toy_says_so(folder, capsys):
    make_gpt2(folder / "short", vocab_size=384, n_positions=16)
    shutil.copy("model/vocab.tiktoken", "short")
    assert "another base" in refused(train, "--model short --data toy:pirate", capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_cannot_show_a_text_stops_nothing(folder, encoding):
    (folder / "data.jsonl").write_text('{"prompt": "日本", "completion": "ż 🦜"}\n' * 4, encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for line in (f"train.py {TRAIN} --steps 1 --out out", "sample.py --model model --prompt 日本🦜 --max-new-tokens 9"):
        process = start(f"{TOP}/{line}", env=environment)
        assert process.communicate()[1] == "" and process.returncode == 0
