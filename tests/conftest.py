"""What the tests share: the --slow switch, small models that `transformers` makes, and what may not be here."""

import contextlib
import os
import shlex
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and peft are imported: no test may need a network
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # before torch is: see train.py
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too: full-size models, notebooks")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run it with pytest --slow"))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs only with --slow")
    for library in ("transformers", "peft"):  # what they say to their own developers
        config.addinivalue_line("filterwarnings", f"ignore:::{library}")


def make_gpt2(dir=None, seed=0, **sizes):
    """A GPT-2 of `transformers` with random weights, biases included; saved in the folder dir if there is one."""
    torch.manual_seed(seed)
    sizes = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=97, n_positions=64) | sizes
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    if dir is not None:
        model.save_pretrained(dir)
    return model


@contextlib.contextmanager
def sent(number, step, handler=None):
    """While this lasts, this process gets a signal when a run reports the step. handler: what it had for it before."""
    import train

    def print_row(row):
        if row["step"] == step:
            os.kill(os.getpid(), number)

    before = signal.signal(number, signal.getsignal(number) if handler is None else handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "print_row", print_row)
        try:
            yield
        finally:
            signal.signal(number, before)


def interrupt(line, number=signal.SIGTERM, step=4):
    """Run train.py with these flags until this signal comes, at a step that it reports."""
    import train

    with sent(number, step), pytest.raises(SystemExit) as e:
        train.main(shlex.split(line))
    assert e.value.code == 130


@pytest.fixture
def vocabulary():
    """GPT-2's tokenizer, where tiktoken has its files or can download them."""
    import gpt

    try:
        return gpt.load_tokenizer("gpt2")
    except OSError as e:
        pytest.skip(str(e))


@pytest.fixture
def e2e_dir():
    """The folder with the E2E files."""
    if "E2E_DIR" not in os.environ:
        pytest.skip("needs the E2E files: set E2E_DIR to the folder that has train.txt, valid.txt or test.txt")
    return Path(os.environ["E2E_DIR"])
