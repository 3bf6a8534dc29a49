"""Files that a stranger could have made: whatever is in them, loading ends soon, in our own error or in a model."""

import json
import random
import struct
import time
from pathlib import Path

import pytest
from conftest import make_gpt2

from gpt import GPT, make_tokenizer
from lora import add_lora, load_lora, save_lora

N = 200  # mutations of each file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with config.json, model.safetensors, adapter_config.json and adapter_model.safetensors."""
    folder = tmp_path_factory.mktemp("folder")
    make_gpt2(folder)
    model = GPT.from_pretrained(folder)
    add_lora(model)
    save_lora(model, folder)
    return folder


def mutate(content, draw):
    """A random mistake or trick: cut off, bits flipped, bytes changed, a piece repeated, a number made huge."""
    content, i = bytearray(content), draw.randrange(min(len(content), 4000))
    kind = draw.randrange(6)
    if kind == 0:
        return content[:i]
    if kind == 1:
        content[i] ^= 1 << draw.randrange(8)
    elif kind == 2:
        content[i : i + 8] = draw.randbytes(8)
    elif kind == 3:
        content[i:i] = content[i : i + draw.randrange(100)]
    elif kind == 4:
        digits = [j for j in range(min(len(content), 4000)) if chr(content[j]).isdigit()] or [0]
        content[draw.choice(digits)] = ord("9")
    else:
        digits = [j for j in range(min(len(content), 4000)) if chr(content[j]).isdigit()] or [0]
        j = draw.choice(digits)
        content[j:j] = b"9" * draw.randrange(1, 30)
    return bytes(content)


def memory():
    """Bytes that this process has had in use at most, where Linux tells."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else ["VmHWM 0"]
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def load_base(folder, model):
    GPT.from_pretrained(folder)


def load_adapter(folder, model):
    load_lora(model, folder)


FILES = {
    "config.json": load_base,
    "model.safetensors": load_base,
    "adapter_config.json": load_adapter,
    "adapter_model.safetensors": load_adapter,
}


@pytest.mark.parametrize("name, load", FILES.items(), ids=FILES)
def test_mutated_files_end_in_our_errors(folder, tmp_path, name, load):
    model, draw = GPT.from_pretrained(folder), random.Random(0)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content, refused, began, before = (folder / name).read_bytes(), 0, time.time(), memory()
    for _ in range(N):
        (tmp_path / name).write_bytes(mutate(content, draw))
        try:
            load(tmp_path, model)
        except (ValueError, OSError) as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > N / 3
    assert time.time() - began < 60 and memory() - before < 300e6


HEADERS = {
    "no header": b"",
    "header longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "header of 2**64 bytes": b"\xff" * 8,
    "huge tensor": {"wte.weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}},
    "offsets overflow": {"wte.weight": {"dtype": "F32", "shape": [2**63, 4], "data_offsets": [0, 16]}},
    "negative": {"wte.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
    "deep": b"[" * 50_000,
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_headers_that_lie_are_refused(folder, tmp_path, name, header):
    model = GPT.from_pretrained(folder)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if isinstance(header, dict):
        header = json.dumps(header).encode()
        header = struct.pack("<Q", len(header)) + header
    (tmp_path / name).write_bytes(header)
    with pytest.raises(ValueError, match=str(tmp_path)):
        FILES[name](tmp_path, model)


@pytest.mark.parametrize("content", [b"", b"\xff", b"YQ==", b"YQ== 0\n" * 300, b"YQ== x\n", b"????? 0\n", b"YQ== -1\n"])
def test_broken_vocabularies_are_refused(content):
    with pytest.raises(ValueError):
        make_tokenizer(content.decode())
