"""What hostile hands did to an earlier version: nothing is lost without a word, and nothing is wrong without a word."""

import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from conftest import interrupt, make_gpt2, sent

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


@pytest.mark.parametrize("flags", ["", TRAIN, f"{TRAIN} --method full"], ids=["tiny", "another", "all of another"])
def test_tiny_is_not_overwritten_even_before_it_is_there(folder, capsys, monkeypatch, flags):
    monkeypatch.setattr(toy, "TINY", folder / "out" / "tiny")
    assert "name another" in refused(train, f"{flags} --steps 1 --out out/tiny", capsys)
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


def test_the_papers_test_set_is_not_overwritten(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: folder / "hub")
    test_set = folder / "hub" / "lora-gpt2" / "e2e" / "test.txt"
    test_set.parent.mkdir(parents=True)
    shutil.copy("data.txt", test_set)
    before = contents(folder)
    assert "name another" in refused(sample, f"--model model --data e2e --out {test_set} --max-new-tokens 2", capsys)
    assert contents(folder) == before


WRITER = """
import sys, time, pathlib, gpt
for i in range(100):
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


def test_a_path_that_cannot_be_is_named_with_advice(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write .*inside.*: make room, or choose another folder"):
        write_whole({tmp_path / "file" / "inside": "text"})


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("steps", [8, 4], ids=["midway", "in the last step"])
def test_a_closed_laptop_loses_nothing(folder, steps, capsys):
    interrupt(f"{TRAIN} --steps {steps} --eval-every 50 --out out", signal.SIGHUP)
    assert "--resume" in capsys.readouterr().err and Path("out/state.pt").exists()
    train.main(shlex.split(f"{TRAIN} --steps {steps} --eval-every 50 --out out --resume"))
    assert Path("out/adapter_model.safetensors").exists() and not Path("out/state.pt").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_what_nohup_ignores_stays_ignored(folder):
    with sent(signal.SIGHUP, 4, signal.SIG_IGN):
        train.main(shlex.split(f"{TRAIN} --steps 8 --out out"))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert Path("out/adapter_model.safetensors").exists()


def test_signals_are_given_back_after_training(folder, monkeypatch):
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before, after = handlers(), []
    monkeypatch.setattr(train, "save_lora", lambda *args: after.extend(handlers()))
    train.main(shlex.split(f"{TRAIN} --steps 2 --out out"))
    assert after == before


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


@pytest.mark.parametrize("change", ["data_hash", "base_hash", "dtype", "data"])
def test_a_run_goes_on_only_from_what_it_was(folder, capsys, change):
    line = f"{TRAIN} --steps 8 --out out"
    interrupt(f"{line} --data toy:text" if change == "data" else line)  # which has fewer settings than a file
    assert torch.load("out/state.pt", weights_only=True)["recipe"]["dtype"] == "float32"
    if change == "data_hash":
        (folder / "data.jsonl").write_text((folder / "data.jsonl").read_text().replace("kids ok", "kids no", 1))
    elif change == "base_hash":
        make_gpt2(folder / "model", seed=1, vocab_size=384, n_positions=128)
    line += " --dtype bfloat16" if change == "dtype" else ""
    before = contents(folder)
    assert f"{change} = " in refused(train, f"{line} --resume", capsys)
    assert contents(folder) == before


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


@pytest.fixture
def small_tiny(tmp_path, monkeypatch):
    """The folder of a `tiny` that is made in no time, of a small toy world."""
    world = toy.toy_world()
    monkeypatch.setattr(toy, "toy_world", lambda: tuple(part[:20] for part in world))
    monkeypatch.setattr(toy, "TINY_RECIPE", dict(steps=1, batch_size=2, eval_every=1))
    monkeypatch.setattr(toy, "TINY", tmp_path / "tiny")
    return tmp_path / "tiny"


def test_tiny_is_made_anew_when_the_toy_world_has_changed(small_tiny, monkeypatch):
    made, vocabulary = [], toy.toy_vocabulary()
    for _ in range(2):
        for _ in range(2):
            train.load_base("tiny")
            made.append((small_tiny / "model.safetensors").stat().st_mtime_ns)
        sentences = [s.replace(". {children}", ", {children}") for s in toy.VOICES["plain"]["sentences"]]
        monkeypatch.setitem(toy.VOICES["plain"], "sentences", sentences)
        assert toy.toy_vocabulary() == vocabulary
    assert made[0] == made[1] < made[2] == made[3]


def test_a_damaged_tiny_says_to_delete_it(small_tiny, capsys):
    train.load_base("tiny")
    os.truncate(small_tiny / "model.safetensors", 1000)
    for command in (train, sample):
        assert f"delete {small_tiny}" in refused(command, "", capsys)


# ---- Tracebacks and wrong advice -----------------------------------------------------------------------------


def test_ids_without_a_text_are_never_written(folder, capsys):
    model, tokenizer = GPT.from_pretrained("model"), gpt.load_tokenizer("model")
    model.ln_f.weight.data.zero_()
    model.wte.weight.data[381] = 1000 * model.ln_f.bias  # the likeliest token by far, and the tokenizer has 380
    model.save_pretrained("padded", toy.toy_vocabulary())
    capsys.readouterr()
    sample.main(shlex.split("--model padded --prompt a --max-new-tokens 20"))
    assert capsys.readouterr().out == "a\n"
    sample.main(shlex.split("--model padded --max-new-tokens 20 --data e2e:data.txt --out out.txt"))
    assert Path("out.txt").read_text() == "\n" * 3
    assert train.complete(model, tokenizer, ["a", "b"]) == ["", ""]


def fill_the_memory():
    torch.empty(2**50)  # four million GB


def text(message, kind=RuntimeError):
    def fail():
        raise kind(message)

    return fail


LOST = "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."  # how torch ends each error of CUDA
NO_COMPILER = "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')"
NO_TRITON = "TritonMissing: Cannot find a working triton installation. Either the package is not installed or it is old"
FAILURES = {
    "GPU": (text("CUDA out of memory. Tried to allocate 2 GiB", torch.OutOfMemoryError), "--batch-size"),
    "older GPU": (text(f"CUDA error: out of memory\n{LOST}"), "--batch-size"),
    "CPU": (fill_the_memory, "--batch-size"),
    "CPU of Windows": (text("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to"), "--batch-size"),
    "MPS": (text("MPS backend out of memory (MPS allocated: 9 GB)"), "--batch-size"),
    "compiler": (text(f"{NO_COMPILER}\nSet TORCHDYNAMO_VERBOSE=1"), "--compile"),
    "Triton": (text(f"{NO_TRITON}\nSet TORCHDYNAMO_VERBOSE=1"), "--compile"),
    "Python too new": (text("torch.compile is not supported on Python 3.19+"), "--compile"),
}


@pytest.mark.parametrize("fail, advice", FAILURES.values(), ids=FAILURES)
def test_what_the_machine_lacks_is_said_in_one_line(folder, capsys, monkeypatch, fail, advice):
    monkeypatch.setattr(train, "train", lambda *args, **options: fail())
    assert advice in refused(train, f"{TRAIN} --steps 1 --out out", capsys)


@pytest.mark.parametrize("what", ["an illegal memory access was encountered", "device-side assert triggered"])
def test_an_error_of_the_gpu_is_not_called_by_another_name(folder, capsys, monkeypatch, what):
    monkeypatch.setattr(train, "train", lambda *args, **options: text(f"CUDA error: {what}\n{LOST}")())
    with pytest.raises((RuntimeError, SystemExit)):
        train.main(shlex.split(f"{TRAIN} --steps 1 --out out"))
    err = capsys.readouterr().err
    assert "--batch-size" not in err and "--compile" not in err


@pytest.mark.slow
def test_a_compiler_that_is_missing_is_said_in_one_line(folder):
    environment = os.environ | {"CXX": "absent", "CC": "absent", "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    process = start(f"{TOP / 'train.py'} {TRAIN} --steps 1 --compile --out out", env=environment)
    err = process.communicate()[1]
    assert process.returncode == 2 and "--compile" in err and err.count("\n") == 1, err


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize("during", ["torch._utils", "tiktoken"])
@pytest.mark.parametrize("command", ["train.py --steps 1", "sample.py"])
def test_ctrl_c_while_torch_is_imported_prints_no_traceback(folder, command, during):
    process = start(f"-X importtime {TOP}/{command} --model absent")  # prints each module once it is imported
    next(line for line in process.stderr if line.rpartition("|")[2].strip() == during)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[1] and process.returncode == -signal.SIGINT


FOREIGN = [[1, 2], {"recipe": []}, {"step": 3}, b"", b"PK\x03\x04"]


@pytest.mark.parametrize("state", FOREIGN, ids=["list", "no settings", "no anything", "empty", "cut off"])
def test_a_state_that_is_not_ours_is_damaged(folder, capsys, state):
    Path("out").mkdir()
    Path("out/state.pt").write_bytes(state) if isinstance(state, bytes) else torch.save(state, "out/state.pt")
    assert "state.pt is damaged" in refused(train, f"{TRAIN} --steps 1 --out out --resume", capsys)


@pytest.mark.parametrize("key", ["step", "log", "loss_sum", "params", "optimizer", "scaler"])
def test_a_state_of_which_a_part_is_missing_is_damaged(folder, capsys, key):
    interrupt(f"{TRAIN} --steps 8 --out out")
    state = torch.load("out/state.pt", weights_only=True)
    del state[key]
    torch.save(state, "out/state.pt")
    assert "state.pt is damaged" in refused(train, f"{TRAIN} --steps 8 --out out --resume", capsys)


def test_a_state_of_other_shapes_is_damaged(folder, capsys):
    interrupt(f"{TRAIN} --steps 8 --out out")
    state = torch.load("out/state.pt", weights_only=True)
    params = state["params"]
    for i in params if isinstance(params, dict) else range(len(params)):
        params[i] = params[i][:, :1].clone()  # of which copy_ would make the right shape
    torch.save(state, "out/state.pt")
    assert "state.pt is damaged" in refused(train, f"{TRAIN} --steps 8 --out out --resume", capsys)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_that_the_user_asks_for(folder, umask, mode):
    before = os.umask(umask)
    try:
        train.main(shlex.split(f"{TRAIN} --method full --steps 1 --out full"))
        train.main(shlex.split(f"{TRAIN} --steps 1 --out lora"))
        sample.main(shlex.split("--model model --data e2e:data.txt --out lora/out.txt --max-new-tokens 1"))
        gpt.download((folder / "data.txt").as_uri(), folder / "lora" / "downloaded")
        write_whole({Path("lora/state.pt"): lambda tmp: torch.save([], tmp)})
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for out in ("full", "lora") for file in Path(out).iterdir()}
    assert len(modes) == 10 and set(modes.values()) == {mode}


@contextlib.contextmanager
def unreadable(file):
    """While this lasts, this process may not read the file: root, who may read all, is somebody else."""
    file.chmod(0)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(me)
        file.chmod(0o600)


MODEL_FILES = ["model/config.json", "model/model.safetensors", "model/vocab.tiktoken"]
ADAPTER_FILES = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "data.txt"]


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="Windows has other permissions")
@pytest.mark.parametrize("name", MODEL_FILES + ADAPTER_FILES)
def test_a_file_that_may_not_be_read_is_reported_as_that(made, capsys, monkeypatch, name):
    with tempfile.TemporaryDirectory() as place:  # not below pytest's own folder, which nobody else may enter
        shutil.copytree(made, place, dirs_exist_ok=True)
        for path in (Path(place), *Path(place).rglob("*")):
            path.chmod(0o777)
        monkeypatch.chdir(place)
        with unreadable(Path(place, name)):
            message = refused(sample, "--model model --lora adapter --data e2e:data.txt --out out.txt", capsys)
        monkeypatch.undo()
    assert Path(name).name in message and "ermission denied" in message, message


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"], ids=["nothing", "half"])
def test_a_server_that_falls_silent_is_an_error(tmp_path, monkeypatch, answer):
    monkeypatch.setattr(gpt, "PATIENCE", 0.3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with server.accept()[0] as connection:
                connection.sendall(answer)
                given_up.wait(5)  # who waits longer gets another error than "timed out"

        given_up = threading.Event()
        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(OSError, match="cannot download .*timed out"):
            gpt.download(f"http://127.0.0.1:{server.getsockname()[1]}/file", tmp_path / "folder" / "file")
        given_up.set()
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"] and socket.getdefaulttimeout() is None


@pytest.mark.parametrize("name", ["a name", "it's", "-x", '"$HOME"'])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_printed_command_works_when_pasted(folder, capsys, name, method):
    os.rename("model", f"{name} model")
    row = {"prompt": f"{name} `ls` \\ !", "completion": "b"}
    (folder / "data.jsonl").write_text(f"{json.dumps(row)}\n")
    train.main([f"--model={name} model", "--data=data.jsonl", "--steps=1", f"--out={name}", f"--method={method}"])
    line = re.search(r"^try +python sample\.py (.+)$", capsys.readouterr().out, re.MULTILINE)[1]
    words = ["sh", "-c", f'for word in {line}; do printf "%s\\n" "$word"; done']  # what a shell makes of it
    sample.main([*subprocess.check_output(words, text=True).splitlines(), "--max-new-tokens", "1"])
    assert capsys.readouterr().out.startswith(f"{row['prompt']}<|endoftext|>")


@pytest.mark.parametrize("flags, culprit", [("--alpha 1e39", "--alpha"), (f"--seed {2**70}", "--seed")])
def test_a_number_that_is_too_large_is_that_flags_fault(folder, capsys, flags, culprit):
    assert f"argument {culprit}" in refused(train, f"{TRAIN} --steps 1 {flags}", capsys)


def test_a_seed_that_is_too_large_is_refused_by_sample_too(folder, capsys):
    assert "argument --seed" in refused(sample, f"--model model --prompt a --seed {2**70}", capsys)


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


ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SHOWN = [(f"train.py {TRAIN} --steps 1", ASCII), ("sample.py --model model --prompt 日本🦜 --max-new-tokens 9", C)]


@pytest.mark.parametrize("line, terminal", SHOWN, ids=["ascii", "C"])
def test_a_terminal_that_cannot_show_a_text_stops_nothing(folder, line, terminal):
    (folder / "data.jsonl").write_text('{"prompt": "日本", "completion": "ż 🦜"}\n' * 4, encoding="utf-8")
    process = start(f"{TOP}/{line}", env=os.environ | terminal)
    assert process.communicate()[1] == "" and process.returncode == 0


# ---- Other systems -------------------------------------------------------------------------------------------

SOURCES = [*TOP.glob("*.py"), *TOP.glob("notebooks/*.py"), *TOP.glob("tests/*test*.py")]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_what_windows_has_not_is_imported_only_where_it_is_used(file):
    imports = [
        s for s in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(s, (ast.Import, ast.ImportFrom))
    ]
    names = {alias.name for s in imports for alias in s.names} | {getattr(s, "module", None) for s in imports}
    assert not names & {"fcntl", "grp", "pwd", "resource", "termios"}
