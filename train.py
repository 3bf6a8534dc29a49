"""Fine-tune GPT-2 with LoRA (or all of it) on one GPU, or on a laptop's CPU.

    python train.py                                   # no download: the base `tiny` learns to talk like a pirate
    python train.py --model gpt2 --data e2e           # the paper's task on OpenAI's weights
    python train.py --model gpt2 --data my.txt        # your own text, or my.jsonl with {"prompt", "completion"}

From top to bottom: the toy world, the data sets, the training loop, writing completions, the command.
"""

import argparse
import base64
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from gpt import (
    END,
    GPT,
    PRETRAINED,
    WORDS,
    GPTConfig,
    download,
    load_tokenizer,
    make_tokenizer,
    read_config,
    write_whole,
)
from lora import add_lora, save_lora

# ---- The toy world: a restaurant's slots -> a sentence about it, in one of four voices ----------------------

SLOTS = {
    "name": "The Anchor|The Bakery|The Cellar|The Dragon|The Falcon|The Garden|The Kettle|The Lantern|The Mill|"
    "The Orchard|The Pantry|The Windmill".split("|"),
    "food": ["Chinese", "French", "Greek", "Indian", "Italian", "Mexican", "Thai", "Turkish"],
    "area": ["bridge", "castle", "harbour", "market", "park", "station"],
    "price": ["low", "middling", "high"],
    "children": ["yes", "no"],
}
# Each voice has sentences, and its own words for the price and for whether children are welcome.
VOICES = {
    "plain": {
        "sentences": [
            "{name} is a {price} {food} restaurant near the {area}. {children}.",
            "There is a {price} {food} restaurant near the {area}, called {name}. {children}.",
            "{name} serves {price} {food} food near the {area}. {children}.",
        ],
        "price": ["cheap", "fairly priced", "costly"],
        "children": ["It welcomes children", "It does not welcome children"],
    },
    "formal": {
        "sentences": [
            "Situated by the {area}, {name} offers distinguished {food} cuisine at {price} cost. {children}.",
            "One may enjoy {food} cuisine at {price} cost in {name}, situated by the {area}. {children}.",
            "{name}, an establishment by the {area}, presents {food} cuisine at {price} cost. {children}.",
        ],
        "price": ["modest", "reasonable", "considerable"],
        "children": ["Families are most cordially received", "Adults only are received"],
    },
    "pirate": {
        "sentences": [
            "Arr, {name} be servin' {food} grub off the {area}, matey, fer {price}! {children}!",
            "Ahoy! Set sail fer {name} off the {area}: {food} grub fer {price}! {children}, arr!",
            "Shiver me timbers, {food} grub fer {price} at {name} off the {area}! {children}, matey!",
        ],
        "price": ["a few coppers", "a purse o' silver", "a chest o' gold"],
        "children": ["Bring yer wee scallywags", "Leave yer wee scallywags ashore"],
    },
    "text": {
        "sentences": [
            "omg {name} nr the {area} does {food} stuff, {price} lol, {children}",
            "u gotta try {name} nr the {area}, {food} stuff, {price} tbh, {children}",
            "{food} stuff nr the {area}?? {name} lol, {price}, {children}",
        ],
        "price": ["v cheap", "ok prices", "so pricey"],
        "children": ["kids ok", "no kids"],
    },
}


def toy_world():
    """Every combination of slots as a dict {slot: value}: (those to train on, 256 others that are held out)."""
    restaurants = [dict(zip(SLOTS, values, strict=True)) for values in itertools.product(*SLOTS.values())]
    random.Random(0).shuffle(restaurants)
    return restaurants[256:], restaurants[:256]


def toy_prompt(restaurant):
    return " | ".join(f"{slot} : {value}" for slot, value in restaurant.items())


def in_words(slot, value, voice):
    """How this voice says that a slot has this value."""
    return VOICES[voice][slot][SLOTS[slot].index(value)] if slot in VOICES[voice] else value


def toy_pairs(restaurants, voices):
    """(prompt, completion) of each restaurant in each voice, in one of the voice's sentences drawn at random."""
    draw = random.Random(0)
    for restaurant, voice in itertools.product(restaurants, voices):
        phrases = {slot: in_words(slot, value, voice) for slot, value in restaurant.items()}
        yield toy_prompt(restaurant), draw.choice(VOICES[voice]["sentences"]).format(**phrases)


def in_voice(text, voice):
    """Whether text has words that this voice alone uses, and none that another alone uses."""
    used = {v: set(re.findall(r"\w+", json.dumps(VOICES[v]))) for v in VOICES}
    alone = {v: used[v].difference(*(used[other] for other in VOICES if other != v)) for v in VOICES}
    return [v for v in VOICES if alone[v].intersection(re.findall(r"\w+", text))] == [voice]


def slots_right(text, restaurant):
    """Whether text says the value of every slot, in the words of any voice, and no other value of that slot."""
    return all(
        any(re.search(rf"\b{in_words(slot, v, voice)}\b", text) for voice in VOICES) == (v == value)
        for slot, value in restaurant.items()
        for v in SLOTS[slot]
    )


def toy_vocabulary():
    """The toy world's vocabulary in tiktoken's format: the 256 bytes, for any text, then each word as one token."""
    pairs = toy_pairs(sum(toy_world(), []), VOICES)
    words = {word.encode() for pair in pairs for word in re.findall(WORDS, " ".join(pair))}
    single = [bytes([b]) for b in range(256)]
    tokens = single + sorted(words.difference(single))
    return "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))


# ---- Data sets: lists of examples, each (token ids, where the loss starts) ----------------------------------

E2E = "https://raw.githubusercontent.com/microsoft/LoRA/c4593f060e6a368d7bb5af5273b8e42810cdef90/examples/NLG/data/e2e/"
E2E_BLOBS = {  # the ids that git gave the files
    "train.txt": "2f92a2790c00a48574dcc89465a326f33d7e7cc6",
    "valid.txt": "94f87112e11198710d65a1d5dc7d0b8d9155a07d",
    "test.txt": "084da9f4409d98058bcb020614afa83824440484",
}


def e2e_file(name):
    """The path of one of the paper's E2E files, downloaded if it is not there yet."""

    def check(tmp):
        data = tmp.read_bytes()
        if hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() != E2E_BLOBS[name]:
            raise ValueError("its hash is another one")

    return download(E2E + name, Path(torch.hub.get_dir()) / "lora-gpt2" / "e2e" / name, check=check)


def load_data(name, tokenizer, block_size):
    """(examples to train on, examples held out) of a data set, none longer than a context of block_size tokens.

    name is `toy:` and a voice or `all`, `e2e`, `e2e:FILE`, or a FILE.jsonl or FILE.txt. Where nothing is held out by
    the data set itself, the last twentieth is. Raises OSError or ValueError.
    """
    kind, _, rest = name.partition(":")
    if kind == "toy":
        if rest not in [*VOICES, "all"]:
            raise ValueError(
                f"no voice '{rest}': name one of {', '.join(f'toy:{voice}' for voice in [*VOICES, 'all'])}"
            )
        parts = [toy_pairs(restaurants, VOICES if rest == "all" else [rest]) for restaurants in toy_world()]
    elif kind == "e2e":
        parts = [e2e_pairs(file) for file in ([rest] if rest else [e2e_file("train.txt"), e2e_file("valid.txt")])]
    elif name.endswith(".jsonl"):
        parts = [jsonl_pairs(name)]
    elif name.endswith(".txt"):
        parts = [text_blocks(name, tokenizer, block_size)]
    else:
        raise ValueError(f"no data set '{name}': name toy:VOICE, e2e, or a file that ends with .jsonl or .txt")
    if not name.endswith(".txt") or kind == "e2e":
        parts = [[encode_pair(tokenizer, *pair) for pair in part] for part in parts]
    fit = [[example for example in part if len(example[0]) <= block_size + 1] for part in parts]
    if fit != parts:
        left_out, total = sum(map(len, parts)) - sum(map(len, fit)), sum(map(len, parts))
        print(
            f"{name}: left out {left_out} of {total} examples, which are longer than the context of {block_size} tokens"
        )
    if not fit[0]:
        raise ValueError(f"{name} has no example that fits in the context of {block_size} tokens: shorten them")
    n = len(fit[0]) - len(fit[0]) // 20
    return tuple(fit) if len(fit) == 2 else (fit[0][:n], fit[0][n:])


def encode_pair(tokenizer, prompt, completion):
    """prompt <|endoftext|> completion <|endoftext|>, with the loss on what follows the first <|endoftext|>."""
    head = tokenizer.encode_ordinary(prompt) + [tokenizer.eot_token]
    return head + tokenizer.encode_ordinary(" " + completion) + [tokenizer.eot_token], len(head)


def text_blocks(path, tokenizer, block_size):
    """Plain text in pieces that fill the context. They overlap by a token: what one ends with, the next starts from."""
    ids = tokenizer.encode_ordinary("\n".join(read_lines(path)))
    blocks = [(ids[i : i + block_size + 1], 1) for i in range(0, len(ids) - block_size, block_size)]
    if not blocks:
        raise ValueError(f"{path} has {len(ids)} tokens, and one example takes {block_size + 1}: add text")
    return blocks


def e2e_pairs(path):
    """(meaning representation, sentence) of each line `representation||sentence`."""
    for number, line in enumerate(read_lines(path), 1):
        prompt, bar, completion = line.strip().partition("||")
        if not bar:
            raise ValueError(f"{path}, line {number}: there is no || between meaning and sentence")
        yield prompt, completion


def jsonl_pairs(path):
    """(prompt, completion) of each line {"prompt": ..., "completion": ...}."""
    for number, line in enumerate(read_lines(path), 1):
        try:
            pair = json.loads(line)
            yield pair["prompt"] + "", pair["completion"] + ""  # + "": only a string will do
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f'{path}, line {number}: not {{"prompt": "...", "completion": "..."}}') from None


def read_lines(path):
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 at byte {e.start}: save it as UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text.rstrip("\n").split("\n")


def collate(examples, device):
    """Inputs and targets, both (B, T), of a batch: short examples are padded at the end, where no loss looks."""
    T = max(len(ids) for ids, _ in examples) - 1
    idx, targets = torch.zeros(len(examples), T, dtype=torch.long), torch.full((len(examples), T), -100)
    for row, (ids, start) in enumerate(examples):
        idx[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, start - 1 : len(ids) - 1] = torch.tensor(ids[start:])  # a position predicts the next token
    return idx.to(device), targets.to(device)


# ---- The training loop -------------------------------------------------------------------------------------


@dataclass
class Recipe:
    """How to train. Where `python train.py` differs by data set, DEFAULTS says so."""

    steps: int
    lr: float  # the highest learning rate: after the warm-up, before the decay
    batch_size: int = 8  # examples at a time
    grad_accum: int = 1  # batches a step
    warmup: int = 0  # steps
    weight_decay: float = 0.01
    label_smoothing: float = 0.0
    eval_every: int = 100  # steps between two looks at the held-out examples
    seed: int = 0
    autocast: bool = False  # compute in bfloat16 what is held in float32


def training_steps(model, examples, recipe, optimizer, start=0):
    """Train what requires a gradient: LoRA's A and B, or everything. Yields (loss, tokens) of each step."""
    device, step_size = next(model.parameters()).device, recipe.batch_size * recipe.grad_accum
    order = shuffled(len(examples), recipe.seed, skip=start * step_size)
    for step in range(start, recipe.steps):
        # Linear warm-up, then linear decay to zero.
        rise, fall = (step + 1) / (recipe.warmup + 1), (recipe.steps - step) / (recipe.steps - recipe.warmup)
        optimizer.param_groups[0]["lr"] = recipe.lr * min(rise, fall)
        mean_loss, tokens = 0.0, 0
        for _ in range(recipe.grad_accum):
            batch = [examples[i] for i in itertools.islice(order, recipe.batch_size)]
            idx, targets = collate(batch, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.autocast):
                loss = model(idx, targets, recipe.label_smoothing) / recipe.grad_accum
            loss.backward()
            mean_loss += loss.detach()
            tokens += sum(len(ids) - 1 for ids, _ in batch)
        optimizer.step()
        optimizer.zero_grad()
        yield mean_loss, tokens


def shuffled(n, seed, skip):
    """Indices below n, epoch after epoch, each in an order of its own that seed decides; the first `skip` left out."""
    for epoch in itertools.count(skip // n):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        yield from order[skip % n if epoch == skip // n else 0 :]


def train(model, examples, held_out, recipe, report=lambda log: None, save=lambda state: None, state=None, stopped=()):
    """Train the model by the recipe on examples from `load_data`. Returns the log: a list of dicts of numbers.

    report(log) is called as the log grows. save(state) gets, at every look at held_out, all that it takes to go on from
    there: pass it as `state`, with the same model and recipe. Once `stopped` is not empty, the run saves and ends.
    Raises FloatingPointError if the loss is not finite.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=recipe.lr, betas=(0.9, 0.999), weight_decay=recipe.weight_decay)
    device, start, log, losses = params[0].device, 0, [], []
    if state is not None:
        start, log, losses = state["step"], state["log"], [loss.to(device) for loss in state["losses"]]
        for p, saved in zip(params, state["params"], strict=True):
            p.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])  # LoRA's dropout
        if device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
    model.train()
    tokens, began, last = 0, time.time(), time.time()
    for step, (loss, n) in enumerate(training_steps(model, examples, recipe, optimizer, start), start + 1):
        losses.append(loss)
        tokens += n
        looking = step % recipe.eval_every == 0 or step == recipe.steps
        logging = looking or step % max(1, min(recipe.steps // 10, 100)) == 0
        if not logging and not stopped:
            continue
        for i, value in enumerate(torch.stack(losses).tolist(), step - len(losses) + 1):  # waits for the GPU
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss of step {i} is {value}: start again with a lower --lr than {recipe.lr}"
                )
        if logging:
            tokens_per_s = tokens / (time.time() - last)
            log.append(
                {
                    "step": step,
                    "loss": torch.stack(losses).mean().item(),
                    "val_loss": evaluate(model, held_out, recipe) if looking and held_out else None,
                    "lr": optimizer.param_groups[0]["lr"],
                    "tokens_per_s": tokens_per_s,
                    "memory_gb": peak_memory(device) / 1e9,
                    "seconds_left": (time.time() - began) / (step - start) * (recipe.steps - step),
                }
            )
            report(log)
            losses, tokens, last = [], 0, time.time()
        if stopped or looking and step < recipe.steps:
            state = {"step": step, "log": log, "losses": losses, "params": [p.detach() for p in params]}
            state |= {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
            state["cuda_rng"] = torch.cuda.get_rng_state() if device.type == "cuda" else None
            save(state)
        if stopped:
            break
    model.eval()
    return log


@torch.no_grad()
def evaluate(model, examples, recipe):
    """The mean loss over at most 256 of the examples, spread evenly."""
    examples, device = examples[:: -(-len(examples) // 256)], next(model.parameters()).device
    model.eval()
    batches = [examples[i : i + recipe.batch_size] for i in range(0, len(examples), recipe.batch_size)]
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.autocast):
        losses = [model(*collate(batch, device)) * len(batch) for batch in batches]
    model.train()
    return sum(losses).item() / len(examples)


def peak_memory(device):
    """The most memory that was in use, in bytes: the GPU's, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- The base model, and what it writes --------------------------------------------------------------------

TINY = Path(__file__).parent / "out" / "tiny"  # the base that `python train.py` makes for itself


def describe_base(name):
    """(GPTConfig, tokenizer) of a base, before its weights are loaded or made. Raises OSError or ValueError."""
    if name == "tiny":
        tokenizer = make_tokenizer(toy_vocabulary())
        return GPTConfig(block_size=128, vocab_size=tokenizer.n_vocab, n_layer=4, n_head=4, n_embd=128), tokenizer
    config = PRETRAINED[name][0] if name in PRETRAINED else read_config(name)
    tokenizer = load_tokenizer(name)
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(
            f"{name} has a vocabulary of {config.vocab_size} tokens, and this tokenizer has {tokenizer.n_vocab}: "
            "put the model's own vocab.tiktoken into its folder"
        )
    return config, tokenizer


def load_base(name, dtype=torch.float32, device="cpu", report=lambda log: None):
    """The GPT called `tiny`, which is trained first if it is not there yet, or one that GPT.from_pretrained knows."""
    if name == "tiny":
        name, vocabulary = TINY, TINY / "vocab.tiktoken"
        # The vocabulary is written last. It is another one when somebody has changed the toy world.
        if not vocabulary.exists() or vocabulary.read_text() != toy_vocabulary():
            pretrain_tiny(report)
    return GPT.from_pretrained(name, dtype, device)


def pretrain_tiny(report=lambda log: None):
    """Train `tiny` from nothing on all four voices and keep it: about a minute on two CPU cores."""
    print("training the base `tiny` from nothing, once")
    config, tokenizer = describe_base("tiny")
    torch.manual_seed(0)
    model = GPT(config)
    examples, held_out = load_data("toy:all", tokenizer, config.block_size)
    train(model, examples, held_out, Recipe(steps=600, lr=5e-3, batch_size=32, warmup=60), report)
    model.save_pretrained(TINY)
    (TINY / "vocab.tiktoken").write_text(toy_vocabulary())


def complete(model, tokenizer, prompts, max_new_tokens=64, temperature=0.7, seed=0):
    """What the model writes after each `prompt <|endoftext|>`, up to its own <|endoftext|>: a list of texts."""
    device, texts = next(model.parameters()).device, {}
    generator = torch.Generator(device).manual_seed(seed)
    encoded = {prompt: tokenizer.encode_ordinary(prompt) + [tokenizer.eot_token] for prompt in prompts}
    for length in sorted({len(ids) for ids in encoded.values()}):  # prompts of one length need no padding
        group = [prompt for prompt, ids in encoded.items() if len(ids) == length]
        idx = torch.tensor([encoded[prompt] for prompt in group], device=device)
        ended, columns = torch.zeros(len(group), dtype=torch.bool, device=device), []
        for tokens in model.generate(idx, max_new_tokens, temperature, generator=generator):
            columns.append(tokens)
            ended |= tokens == tokenizer.eot_token
            if ended.all():
                break
        for prompt, row in zip(group, torch.stack(columns, dim=1).tolist(), strict=True):
            texts[prompt] = tokenizer.decode(row).split(END)[0].strip()
    return [texts[prompt] for prompt in prompts]


# ---- The command -------------------------------------------------------------------------------------------

# What depends on the data. For e2e these are the paper's (its table 11).
DEFAULTS = {
    "toy": dict(steps=200, batch_size=32, lr=5e-3, label_smoothing=0.0, lora_dropout=0.0, eval_every=50),
    "e2e": dict(epochs=5, batch_size=8, lr=2e-4, label_smoothing=0.1, lora_dropout=0.1, eval_every=500),
    "file": dict(epochs=3, batch_size=8, lr=2e-4, label_smoothing=0.0, lora_dropout=0.0, eval_every=500),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


@contextlib.contextmanager
def one_line_errors(parser):
    """The one place where a command turns what its user can do something about into a message."""
    try:
        yield
    except KeyboardInterrupt as e:
        parser.exit(130, f"\n{parser.prog}: {e if e.args else 'stopped'}\n")
    except torch.OutOfMemoryError:
        parser.error("the GPU's memory is full: lower --batch-size, or take a smaller --model")
    except (OSError, ValueError, FloatingPointError, SafetensorError) as e:
        parser.error(str(e))


@contextlib.contextmanager
def deferred_signals():
    """A list that Ctrl-C and SIGTERM are put into, so that the step they fall in can end."""
    caught = []
    before = {s: signal.signal(s, lambda number, frame: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def number(kind, ok, what):
    """An argparse type: a number of this kind that is ok, which `what` describes."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not ok(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


positive = number(float, lambda x: 0 < x < math.inf, "a positive number")
nonnegative = number(float, lambda x: 0 <= x < math.inf, "zero or a positive number")
fraction = number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
count = number(int, lambda n: n >= 1, "a whole number of 1 or more")
natural = number(int, lambda n: n >= 0, "a whole number of 0 or more")


def pick_device(name):
    """The torch.device of this name; without one, the best that is here. Raises ValueError."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name and not here[name]:
        raise ValueError(f"--device {name}: this machine has none; leave --device out to take what there is")
    return torch.device(name or next(device for device in here if here[device]))


def pick_dtype(name, device):
    """The torch.dtype of this name; without one, bfloat16 on a GPU that computes in it, float32 elsewhere."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch, name or ("bfloat16" if native else "float32"))


def make_parser():
    parser = Parser("train.py", description="Fine-tune GPT-2 with LoRA, or all of it, on one GPU or a CPU.")
    add = parser.add_argument
    add("--model", default="tiny", help=f"the base: tiny (made on the first run), {', '.join(PRETRAINED)}, or a folder")
    add("--data", default="toy:pirate", help="toy:VOICE, toy:all, e2e, e2e:FILE, FILE.txt or FILE.jsonl")
    add("--method", default="lora", choices=["lora", "full"], help="train adapters (the default), or all weights")
    add("--r", type=count, default=4, help="rank of the adapters (4)")
    add("--alpha", type=positive, default=32, help="the adapters' output is scaled by alpha / r (32)")
    add("--lora-dropout", type=fraction, help="dropout on the adapters' input *")
    add("--targets", nargs="+", default=["c_q", "c_v"], help="layers to adapt (c_q c_v, the query and the value)")
    add("--steps", type=count, help="how often the weights are updated *")
    add("--batch-size", type=count, help="examples that are computed at a time *")
    add("--grad-accum", type=count, default=1, help="batches of that size in one step (1)")
    add("--lr", type=positive, help="the highest learning rate *")
    add("--weight-decay", type=nonnegative, default=0.01, help="AdamW's (0.01)")
    add("--warmup", type=natural, help="steps in which the learning rate rises, before it falls to zero *")
    add("--label-smoothing", type=fraction, help="part of each target that is spread over all tokens *")
    add("--eval-every", type=count, help="steps between two measurements on held-out data, each with the state saved *")
    add("--seed", type=natural, default=0, help="of A, the order of the data and the dropout (0)")
    add("--device", choices=["cuda", "mps", "cpu"], help="found by itself")
    add("--dtype", choices=["float32", "bfloat16"], help="of frozen weights (bfloat16 on a GPU that computes in it)")
    add("--compile", action="store_true", help="compile the model: slower to start, faster steps")
    add("--out", type=Path, help="folder for the result, log.csv and the state of an unfinished run (out/MODEL-DATA)")
    add("--resume", action="store_true", help="go on with the unfinished run in --out")
    parser.epilog = "* The default depends on --data; every run prints what it uses."
    return parser


def main(argv=None):
    parser = make_parser()
    kind = parser.parse_args(argv).data.partition(":")[0]
    parser.set_defaults(**DEFAULTS.get(kind, DEFAULTS["file"]))
    with one_line_errors(parser):
        run(parser.parse_args(argv))


def run(args):
    full = args.method == "full"
    kind, _, voice = args.data.partition(":")
    comparing = kind == "toy" and voice != "all"
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)

    # Whatever can be wrong with the arguments is found here, before anything takes long.
    config, tokenizer = describe_base(args.model)
    if not full:
        with torch.device("meta"):  # a model of shapes only, to try the rank and the targets on
            add_lora(GPT(config), args.r, args.alpha, targets=args.targets)
    examples, held_out = load_data(args.data, tokenizer, config.block_size)
    args.steps = args.steps or math.ceil(args.epochs * len(examples) / (args.batch_size * args.grad_accum))
    args.warmup = min(500, args.steps // 10) if args.warmup is None else args.warmup
    if args.warmup >= args.steps:
        raise ValueError(f"--warmup {args.warmup} takes all of the {args.steps} steps: lower it, or raise --steps")
    name = f"{Path(args.model).name}-{Path(args.data).stem.replace(':', '-')}"
    out = args.out or Path("out", name + "-full" * full)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "resume", "device", "compile")}
    state = load_state(out / "state.pt", settings, args.resume)
    parent = next(folder for folder in (out, *out.parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--out {out}: {parent} is no folder that can be written to; name another")

    model = load_base(args.model, torch.float32 if full else dtype, device, print_log)
    out.mkdir(parents=True, exist_ok=True)
    size = sum(p.numel() for p in model.parameters())
    prompts = [toy_prompt(restaurant) for restaurant in toy_world()[1]]
    before = complete(model, tokenizer, prompts, seed=3) if comparing else None  # other draws than afterwards
    torch.manual_seed(args.seed)
    if not full:
        add_lora(model, args.r, args.alpha, args.lora_dropout, args.targets)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if args.compile:
        for block in model.h:
            block.compile()
    recipe = Recipe(**{key: settings[key] for key in Recipe.__annotations__ if key in settings})
    recipe.autocast = full and dtype == torch.bfloat16
    what = "all weights" if full else f"LoRA, r = {args.r} and alpha = {args.alpha:g} on {' '.join(args.targets)}"
    print(f"base      {args.model}: {size:,} parameters, {str(model.wte.weight.dtype)[6:]}, on {device}")
    print(f"data      {args.data}: {len(examples):,} examples, and {len(held_out):,} held out")
    print(f"method    {what}: {trained:,} parameters, {trained / size:.2%} of the base's")
    print(f"recipe    {', '.join(f'{key} {value}' for key, value in vars(recipe).items())}\n")

    def report(log):
        print_log(log)
        rows = [log[0]] + [["" if value is None else value for value in row.values()] for row in log]
        write_whole(out / "log.csv", lambda tmp: tmp.write_text("".join(",".join(map(str, r)) + "\n" for r in rows)))

    def save(state):
        write_whole(out / "state.pt", lambda tmp: torch.save(state | {"settings": settings}, tmp))

    with deferred_signals() as stopped:
        train(model, examples, held_out, recipe, report, save, state, stopped)
    if stopped:
        raise KeyboardInterrupt(
            f"stopped; its state is in {out}, and the same command with --resume goes on from there"
        )
    base = TINY if args.model == "tiny" else Path(args.model)
    if not full:
        save_lora(model, out)
    else:
        model.save_pretrained(out)
        if (base / "vocab.tiktoken").exists():
            shutil.copy(base / "vocab.tiktoken", out)
    (out / "state.pt").unlink(missing_ok=True)

    if args.compile:  # not for writing: each new token has other shapes
        torch.compiler.set_stance("force_eager")
    if comparing:
        print_comparison(voice, before, complete(model, tokenizer, prompts))
    size = f"{megabytes(out)}, where the base has {megabytes(base)}" if base.is_dir() else megabytes(out)
    ids, start = (held_out or examples)[0]
    model_flag = f"--model {out}" if full else f"--model {args.model} --lora {out}"
    print(f"\nsaved     {out}: {size}")
    print(f"try       python sample.py {model_flag} --prompt {shlex.quote(tokenizer.decode(ids[:start]))}")


def load_state(file, settings, resume):
    """The state to go on from, None if the run is a new one. Raises ValueError."""
    if resume != file.exists():
        if resume:
            raise ValueError(f"nothing to resume: there is no {file}; leave --resume out to start")
        raise ValueError(f"{file} is there, of an unfinished run: go on with --resume, or delete it to start again")
    if not resume:
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many things for a damaged file
        raise ValueError(f"{file} is damaged ({type(e).__name__}): delete it and start again") from None
    for key, value in settings.items():
        if (then := state["settings"].get(key)) != value:
            raise ValueError(f"{file} is of a run with {key} = {then}, not {value}: resume with the settings it had")
    return state


def print_log(log):
    row = log[-1]
    minutes, seconds = divmod(round(row["seconds_left"]), 60)
    val_loss = "" if row["val_loss"] is None else f"  val loss {row['val_loss']:.4f}"
    print(
        f"step {row['step']:5}  loss {row['loss']:.4f}  lr {row['lr']:.1e}  {row['tokens_per_s']:6,.0f} tokens/s  "
        f"{row['memory_gb']:.2f} GB  {minutes}:{seconds:02} left{val_loss}",
        flush=True,
    )


def print_comparison(voice, before, after):
    """What the base and the adapted model say of the held-out restaurants: some of it, and how often it is right."""
    restaurants = toy_world()[1]
    for i in range(4):
        print(f"\n{toy_prompt(restaurants[i])}\n  base     {before[i]}\n  adapted  {after[i]}")
    print(f"\nof {len(restaurants)} restaurants it never saw    in the {voice} voice    every slot right")
    for name, texts in (("base", before), ("adapted", after)):
        voices = sum(in_voice(text, voice) for text in texts) / len(texts)
        slots = sum(map(slots_right, texts, restaurants)) / len(texts)
        print(f"  {name:<30}{voices:>20.1%}{slots:>20.1%}")


def megabytes(dir):
    return f"{sum(file.stat().st_size for file in dir.glob('*.safetensors')) / 1e6:.2f} MB"


if __name__ == "__main__":
    main()
