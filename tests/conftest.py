"""What the tests share: the --slow switch, small random models, and a folder for commands."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # see sample.py
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
import transformers
from commands import make_base, toy_pairs, write_jsonl

from gpt import GPT, load_tokenizer
from lora import add_lora, save_lora

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs only with --slow")
    for library in ("transformers", "peft"):  # warnings for their own developers
        config.addinivalue_line("filterwarnings", f"ignore:::{library}")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with pytest --slow"))


def make_gpt2(dir=None, seed=0, **sizes):
    """A random GPT-2 of `transformers`, with biases that are not zero; saved to dir if given."""
    torch.manual_seed(seed)
    config = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=97, n_positions=64)
    config |= dict(bos_token_id=0, eos_token_id=0) | sizes
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    if dir is not None:
        model.save_pretrained(dir)
    return model


PADDED = dict(vocab_size=50304, eos_token_id=50256, n_embd=4)  # as nanoGPT pads


def lora_model(base_dir, dtype=torch.float32, **options):
    """A model with LoRA as after training: B is not zero."""
    model = GPT.from_pretrained(base_dir, dtype)
    torch.manual_seed(0)
    add_lora(model, **options)
    return randomize_B(model)


def randomize_B(model):
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model


def edit_config(dir, **changes):
    config = json.loads((dir / "config.json").read_text())
    (dir / "config.json").write_text(json.dumps(config | changes))


def random_tokens(B, T, vocab_size=97, seed=1):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_refused(match, call, *args, error=ValueError, **options):
    """The call raises this error, and its message matches."""
    with pytest.raises(error, match=match):
        call(*args, **options)


@pytest.fixture
def base_dir(tmp_path):
    """A folder with a small random GPT-2."""
    make_gpt2(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a base, an adapter and data for the commands."""
    monkeypatch.chdir(tmp_path)
    save_lora(lora_model(make_base("base")), "adapter")
    write_jsonl("data.jsonl", toy_pairs(40))


@pytest.fixture
def gpt2_tokenizer():
    """GPT-2's tokenizer, if tiktoken has its files or can download them."""
    try:
        return load_tokenizer("gpt2")
    except OSError as error:
        pytest.skip(f"GPT-2's tokenizer is not available: {error}")


@pytest.fixture
def e2e_dir():
    if "E2E_DIR" not in os.environ:
        pytest.skip("set E2E_DIR to a folder with E2E's train.txt, valid.txt and test.txt")
    return Path(os.environ["E2E_DIR"])
