"""Fine-tune GPT-2 with LoRA (or all of it) on one GPU, or on a laptop's CPU.

    python train.py                                # no download: the base `tiny` learns to talk like a pirate
    python train.py --model gpt2 --data e2e        # the paper's task on OpenAI's weights
    python train.py --model gpt2 --data my.txt     # your own text, or my.jsonl with {"prompt", "completion"}

From top to bottom: the settings, the data sets, the training loop, the base, the command.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from itertools import count, islice, takewhile
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # idle threads soon leave their core to other runs
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import torch
from torch.nn.utils.rnn import pad_sequence

from gpt import END, GPT, PRETRAINED, download, load_tokenizer, own_vocabulary, read_config, send, write_whole
from lora import add_lora, save_lora
from notebooks import toy

# ---- Settings ----

DEFAULTS = {  # what depends on the data; for e2e the paper's (its table 11)
    "toy": dict(steps=200, batch_size=32, lr=5e-3, label_smoothing=0.0, lora_dropout=0.0, eval_every=50),
    "e2e": dict(steps=None, epochs=5, batch_size=8, lr=2e-4, label_smoothing=0.1, lora_dropout=0.1, eval_every=500),
    "file": dict(steps=None, epochs=3, batch_size=8, lr=2e-4, label_smoothing=0.0, lora_dropout=0.0, eval_every=500),
}
DTYPES = ("float32", "bfloat16", "float16")


def make_parser(kind="toy"):
    # Without a usage line, longer than a screen, argparse's errors are one line.
    about = "Fine-tune GPT-2. What has a * depends on --data: each run prints what it uses."
    parser = argparse.ArgumentParser("train.py", usage=argparse.SUPPRESS, description=about)
    add, positive, fraction = parser.add_argument, number(int, 1), number(float, 0, 0.99)
    add("--model", default="tiny", help=f"the base: tiny, {', '.join(PRETRAINED)}, or a folder (tiny)")
    add("--data", default="toy:pirate", help="toy:VOICE, toy:all, e2e, e2e:FILE, FILE.txt or FILE.jsonl")
    add("--method", default="lora", choices=["lora", "full"], help="train adapters, or all weights")
    add("--r", type=positive, default=4, help="rank of the adapters (4)")
    add("--alpha", type=number(float, 1e-6), default=32, help="alpha / r scales what the adapters add (32)")
    add("--lora-dropout", type=fraction, help="dropout on the adapters' input *")
    add("--targets", nargs="+", default=["c_q", "c_v"], help="layers to adapt (c_q c_v: query and value)")
    add("--steps", type=positive, help="how often the weights are updated *")
    add("--batch-size", type=positive, help="examples that are computed at a time *")
    add("--grad-accum", type=positive, default=1, help="batches of that size in one step (1)")
    add("--lr", type=number(float, 1e-12), help="the highest learning rate *")
    add("--weight-decay", type=number(float, 0), default=0.01, help="AdamW's (0.01)")
    add("--warmup", type=number(int, 0), help="steps in which the rate rises, before it falls to zero *")
    add("--label-smoothing", type=fraction, help="part of a target spread over all tokens *")
    add("--eval-every", type=positive, help="steps between looks at held-out data *")
    add("--seed", type=number(int, 0), default=0, help="of A, the order of the data and the dropout (0)")
    add("--device", choices=["cuda", "mps", "cpu"], help="found by itself")
    add("--dtype", choices=DTYPES, help="of frozen weights (16 bits if the GPU computes in them)")
    add("--compile", action="store_true", help="slower to start, faster steps")
    add("--out", type=Path, help="folder for all that a run writes (out/MODEL-DATA)")
    add("--resume", action="store_true", help="go on with the unfinished run in --out")
    parser.set_defaults(**DEFAULTS.get(kind, DEFAULTS["file"]))
    return parser


def number(kind, low, high=10**9):
    """An argparse type: a number from low to high."""

    def parse(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")

    return parse


def settings(**changes):
    """The settings of `python train.py`, but for these changes: an argparse.Namespace."""
    return argparse.Namespace(**vars(make_parser().parse_args([])) | changes)


# ---- Data sets: lists of examples, each (token ids, where the loss starts) ----

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

    return download(E2E + name, Path(torch.hub.get_dir(), "lora-gpt2", "e2e", name), check=check)


def load_data(name, tokenizer, block_size):
    """(examples to train on, examples held out), all of which fit in a context of block_size tokens.

    name is what --data can be. Of a single file the last twentieth is held out. Raises OSError or ValueError.
    """

    def encode(pairs):
        return [encode_pair(tokenizer, *pair) for pair in pairs]

    kind, _, rest = name.partition(":")
    if kind == "toy" and rest in [*toy.VOICES, "all"]:
        voices = toy.VOICES if rest == "all" else [rest]
        parts = [encode(toy.toy_pairs(restaurants, voices)) for restaurants in toy.toy_world()]
    elif name == "e2e":
        parts = [encode(read_pairs(e2e_file(file))) for file in ("train.txt", "valid.txt")]
    elif kind == "e2e" or name.endswith(".jsonl"):
        parts = [encode(read_pairs(name.removeprefix("e2e:")))]
    elif name.endswith(".txt"):
        ids = tokenizer.encode(read_text(name), allowed_special={END})
        # Pieces that fill the context: what one ends with, the next starts from.
        parts = [[(ids[i : i + block_size + 1], 1) for i in range(0, len(ids) - block_size, block_size)]]
    else:
        raise ValueError(f"no data set '{name}': name toy:all, toy: and one of {', '.join(toy.VOICES)}, e2e, or a file")

    fit = [[example for example in part if len(example[0]) <= block_size + 1] for part in parts]
    if left_out := sum(map(len, parts)) - sum(map(len, fit)):
        print(f"{name}: left out {left_out} examples, longer than the context of {block_size} tokens")
    if not fit[0]:
        what = f"{name} has no example for a context of {block_size} tokens"
        raise ValueError(f"{what}: take {block_size + 1} tokens of text, shorter pairs, or another base")
    n = len(fit[0]) - len(fit[0]) // 20
    return fit if len(fit) == 2 else [fit[0][:n], fit[0][n:]]


def encode_pair(tokenizer, prompt, completion):
    """prompt <|endoftext|> completion <|endoftext|>, with the loss on what follows the first <|endoftext|>."""
    head = tokenizer.encode_ordinary(prompt) + [tokenizer.eot_token]
    return head + tokenizer.encode_ordinary(" " + completion) + [tokenizer.eot_token], len(head)


def read_pairs(path):
    """[(prompt, completion)] of a .jsonl, or of lines prompt||completion. Raises OSError or ValueError."""
    pairs, as_json = [], str(path).endswith(".jsonl")
    for n, line in enumerate(read_text(path).rstrip("\n").split("\n"), 1):
        line = line.strip()
        try:
            pair = map(json.loads(line).get, ("prompt", "completion")) if as_json else line.split("||", 1)
            prompt, completion = pair
            (prompt + completion).encode()  # only text will do, and only what UTF-8 can hold
        except (ValueError, TypeError, AttributeError, RecursionError):
            form = '{"prompt": "...", "completion": "..."}' if as_json else "prompt||completion"
            raise ValueError(f"{path}, line {n}: not {form}") from None
        pairs.append((prompt, completion))
    return pairs


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # -sig: without the mark that Windows puts in front
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 at byte {e.start}: save it as UTF-8") from None


def collate(examples, device):
    """(B, T) inputs on the device, and targets on the CPU. Padding, at the end, has no targets."""
    inputs = [torch.tensor(ids[:-1]) for ids, _ in examples]
    targets = [torch.tensor([-100] * (start - 1) + ids[start:]) for ids, start in examples]  # each the next token
    inputs = pad_sequence(inputs, batch_first=True)
    return send(inputs, device), pad_sequence(targets, batch_first=True, padding_value=-100)


# ---- The training loop ----


def train(model, examples, held_out, args, report=None, optimizer=None, stopped=()):
    """Train what requires a gradient, LoRA's A and B or everything, on examples from `load_data`.

    args is what `settings` returns. Every args.eval_every steps, and at the last, there is a look at held_out. At each,
    the folder args.out, if there is one, gets log.csv and state.pt; also once stopped is not empty, which ends the run.
    args.resume goes on from there. An optimizer of your own takes AdamW's place. Returns the log, a list of dicts of
    numbers; report(row) gets each when it is new. Raises FloatingPointError if the loss is not finite, or ValueError.
    """
    if not examples:
        raise ValueError("there are no examples to train on")
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optimizer or torch.optim.AdamW(params.values(), lr=args.lr, weight_decay=args.weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    device, weight_dtype = model.wte.weight.device, model.wte.weight.dtype
    dtype = getattr(torch, args.dtype) if args.dtype else weight_dtype
    # LoRA's frozen weights are held in dtype. Where all weights are trained they are float32, cast for each product.
    autocast = torch.autocast(device.type, dtype, enabled=dtype != weight_dtype)
    # In float16, small gradients would vanish: they are scaled up.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    # What a run that is interrupted and the one that goes on must have in common.
    recipe = {key: value for key, value in vars(args).items() if key not in ("out", "resume", "device", "compile")}
    first_step, log, loss_sum = 0, [], 0.0
    if args.resume:
        first_step, log, loss_sum = load_state(args.out / "state.pt", recipe, model, params, optimizer, scaler)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    model.train()
    steps, warmup, per_step = args.steps, args.warmup or 0, args.batch_size * args.grad_accum
    log_every = max(1, min(steps // 10, 100))

    def shuffled():  # the examples again and again, each epoch in another order
        for epoch in count():
            draw = torch.Generator().manual_seed(args.seed * 10**9 + epoch)
            yield from (examples[i] for i in torch.randperm(len(examples), generator=draw).tolist())

    stream = islice(shuffled(), first_step * per_step, None)
    tokens, began, last_row = 0, time.time(), time.time()
    for step in range(first_step, steps):
        rise, fall = (step + 1) / (warmup + 1), (steps - step) / (steps - warmup)  # both linear
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(rise, fall)
        torch.manual_seed(args.seed * 10**9 + step)  # for dropout: a run that goes on from here draws the same
        batch = list(islice(stream, per_step))
        parts = [collate(batch[i : i + args.batch_size], device) for i in range(0, per_step, args.batch_size)]
        n_targets = sum((targets >= 0).sum() for _, targets in parts)
        for idx, targets in parts:
            with autocast:
                loss = model(idx, targets, args.label_smoothing)
            loss = loss * ((targets >= 0).sum() / n_targets)  # the parts add up to the batch's mean
            scaler.scale(loss).backward()
            loss_sum = loss_sum + loss.detach()
        scaler.step(optimizer)  # not if a gradient has overflowed: update() then lowers the scale
        scaler.update()
        optimizer.zero_grad()
        tokens += sum(len(ids) - 1 for ids, _ in batch)

        done = step + 1
        look = done % args.eval_every == 0 or done == steps  # at held-out data
        if look or done % log_every == 0:
            last_done = log[-1]["step"] if log else 0
            mean = float(loss_sum) / (done - last_done)  # waits for the GPU
            if not math.isfinite(mean):
                raise FloatingPointError(f"the loss is {mean} at step {done}: start again with a --lr below {args.lr}")
            row = dict(step=done, loss=mean, val_loss=math.nan, lr=optimizer.param_groups[0]["lr"])
            row["tokens_per_s"] = tokens / (time.time() - last_row)
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else math.nan
            row["seconds_left"] = (time.time() - began) / (done - first_step) * (steps - done)
            if look and held_out:
                with autocast:
                    row["val_loss"] = evaluate(model, held_out, args.batch_size)
            log.append(row)
            loss_sum, tokens, last_row = 0.0, 0, time.time()
            if report:
                report(row)
        stop = bool(stopped)  # asked once: a signal that comes after this ends the next step
        if args.out and (look or stop):
            state = dict(recipe=recipe, step=done, log=log, loss_sum=loss_sum, params=params)
            state |= dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            header = [row.keys() for row in log[:1]]
            text = "".join(",".join(map(str, line)) + "\n" for line in header + [row.values() for row in log])
            write_whole({args.out / "state.pt": partial(torch.save, state), args.out / "log.csv": text})
        if stop:
            raise KeyboardInterrupt(f"stopped; add --resume to go on from {args.out / 'state.pt'}")
    model.eval()
    return log


@torch.no_grad()
def evaluate(model, examples, batch_size):
    """The mean loss over the targets of at most 256 of the examples, spread evenly."""
    examples, total, n = examples[:: math.ceil(len(examples) / 256)], 0.0, 0
    model.eval()
    for i in range(0, len(examples), batch_size):
        idx, targets = collate(examples[i : i + batch_size], model.wte.weight.device)
        total += model(idx, targets) * (targets >= 0).sum()
        n += (targets >= 0).sum()
    model.train()
    return float(total) / float(n)


def print_row(row):
    line = f"step {row['step']:5}  loss {row['loss']:.4f}  lr {row['lr']:.1e}  {row['tokens_per_s']:6,.0f} tokens/s"
    line += "" if math.isnan(row["memory_gb"]) else f"  {row['memory_gb']:.2f} GB"
    line += "" if math.isnan(row["val_loss"]) else f"  val loss {row['val_loss']:.4f}"
    print(f"{line}  {timedelta(seconds=round(row['seconds_left']))} left", flush=True)


def load_state(file, recipe, model, params, optimizer, scaler):
    """Put back what an interrupted run has saved: (its step, log, sum of losses). Raises OSError or ValueError."""
    file.open("rb").close()  # can it be read?
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        then = state["recipe"]
        other = [f"{key} = {then.get(key)}" for key in recipe | then if then.get(key) != recipe.get(key)]
        if not other:
            model.load_state_dict({name: state["params"][name] for name in params}, strict=False)
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            return int(state["step"]), list(state["log"]), state["loss_sum"]
    except Exception as e:  # torch raises many things for a damaged file
        raise ValueError(f"{file} is damaged ({type(e).__name__}), or of another version: delete it first") from None
    raise ValueError(f"{file} is of a run with {', '.join(other)}: go on with what it had")


# ---- The base ----


def describe_base(name):
    """(GPTConfig, tokenizer) of a base, which need not be made yet. Raises OSError or ValueError."""
    config, tokenizer = toy.toy_base() if name == "tiny" else (read_config(name), load_tokenizer(name))
    if (n := tokenizer.n_vocab) > config.vocab_size:
        what = f"{name} has {config.vocab_size} tokens, its tokenizer {n}"
        raise ValueError(f"{what}: put its own vocab.tiktoken beside it")
    return config, tokenizer


def load_base(name, dtype=torch.float32, device="cpu", report=None):
    """The GPT of this name, in eval mode. `tiny` is trained first if it is not there yet."""
    if name != "tiny":
        return GPT.from_pretrained(name, dtype, device)
    config, tokenizer = toy.toy_base()
    data = load_data("toy:all", tokenizer, config.block_size)
    made_by, now = toy.TINY / "made-by", fingerprint(config, toy.TINY_RECIPE, data)
    if not made_by.exists() or made_by.read_text() != now:  # somebody may have changed the toy world
        print("training the base `tiny` from nothing, once")
        torch.manual_seed(0)
        model = GPT(config)
        train(model, *data, settings(**toy.TINY_RECIPE), report)
        model.save_pretrained(toy.TINY, toy.toy_vocabulary())
        write_whole({made_by: now})
    try:
        return GPT.from_pretrained(toy.TINY, dtype, device)
    except (OSError, ValueError) as e:
        raise ValueError(f"{e}; or delete {toy.TINY}: it is made anew") from None


def fingerprint(*things):
    return hashlib.sha256(repr(things).encode()).hexdigest()[:16]


def complete(model, tokenizer, prompts, max_new_tokens=64, temperature=0.7, seed=0, search=None, batch_size=256):
    """What the model writes after each `prompt <|endoftext|>`, up to its own <|endoftext|>: a list of texts.

    They are drawn, or found by search(idx): token ids for each of the prompts idx (B, T).
    """
    device, end, text_of = model.wte.weight.device, tokenizer.eot_token, {}
    generator = torch.Generator(device).manual_seed(seed)

    def draw(idx):
        columns, ended = [], False
        for tokens in model.generate(idx, max_new_tokens, temperature, generator=generator):
            columns.append(tokens)
            ended |= tokens >= end  # beyond <|endoftext|> a padded vocabulary has no texts
            if ended.all():
                break
        return torch.stack(columns, dim=1).tolist()

    ids_of = {prompt: tokenizer.encode_ordinary(prompt) + [end] for prompt in prompts}
    # Prompts of one length need no padding. The longest come first: short memory shows at once.
    for length in sorted({len(ids) for ids in ids_of.values()}, reverse=True):
        same = [prompt for prompt in ids_of if len(ids_of[prompt]) == length]
        for i in range(0, len(same), batch_size):
            batch = same[i : i + batch_size]
            found = (search or draw)(torch.tensor([ids_of[prompt] for prompt in batch], device=device))
            for prompt, tokens in zip(batch, found, strict=True):
                text_of[prompt] = tokenizer.decode(list(takewhile(lambda t: t < end, tokens))).strip()
            if search:
                print(f"\r{len(text_of)} of {len(ids_of)} prompts ", end="", flush=True)
    return [text_of[prompt] for prompt in prompts]


# ---- The command ----


@contextlib.contextmanager
def one_line_errors(parser):
    """What the user of a command can do something about becomes a message of one line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for what the terminal cannot show
    try:
        yield
    except KeyboardInterrupt as e:
        parser.exit(130, f"\n{parser.prog}: {str(e) or 'stopped'}\n")
    except (OSError, ValueError, FloatingPointError) as e:
        parser.error(" ".join(str(e).split()))
    except RuntimeError as e:
        message = " ".join(f"{type(e).__name__}: {e}".split())
        if re.search("out of memory|allocate memory|not enough memory", message):
            parser.error(f"{message[:200]}: lower --batch-size, or take a smaller --model")
        if re.search("compiler|torch.compile|triton", message, re.IGNORECASE):
            parser.error(f"{message[:200]}: leave --compile out")
        raise


@contextlib.contextmanager
def deferred_signals():
    """A list that Ctrl-C, SIGTERM and SIGHUP go into, so that the step under way can end. A second one ends it."""
    caught, names = [], ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    before = {signum: signal.getsignal(signum) for signum in signal.Signals if signum.name in names}

    def defer(signum, frame):
        caught.append(signum)
        signal.signal(signum, before[signum])

    for signum, handler in before.items():
        if handler != signal.SIG_IGN:  # which is what nohup asks for
            signal.signal(signum, defer)
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def pick_device(name):
    """The torch.device of this name; without one, the best that is here. Raises ValueError."""
    found = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    here = [kind for kind in found if found[kind]]
    if name and name not in here:
        raise ValueError(f"--device {name}: this machine has {' and '.join(here)}")
    return torch.device(name or here[0])


def pick_dtype(name, device):
    """The name, or without one that of the 16 bits which a GPU computes in, and float32 elsewhere."""
    if name or device.type != "cuda":
        return name or "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def main(argv=None):
    data = make_parser().parse_args(argv).data
    parser = make_parser(data.partition(":")[0])
    with one_line_errors(parser):
        run(parser.parse_args(argv))


def run(args):
    # Whatever can be wrong with the arguments is found here, before anything takes long.
    full, device = args.method == "full", pick_device(args.device)
    args.device, args.dtype = device.type, pick_dtype(args.dtype, device)
    config, tokenizer = describe_base(args.model)
    if not full:
        with torch.device("meta"):  # a model of shapes only, to try the rank and the targets on
            add_lora(GPT(config), args.r, targets=args.targets)
    data = load_data(args.data, tokenizer, config.block_size)
    if args.steps is None:
        args.steps = math.ceil(args.epochs * len(data[0]) / (args.batch_size * args.grad_accum))
    args.warmup = min(500, args.steps // 10) if args.warmup is None else args.warmup
    if args.warmup >= args.steps:
        raise ValueError(f"--warmup {args.warmup} is not below --steps {args.steps}: change one")
    base = toy.TINY if args.model == "tiny" else args.model
    name = f"{Path(base).name}-{Path(args.data).stem.replace(':', '-')}{'-full' if full else ''}"
    out = args.out = args.out or Path("out", name)
    if out.resolve() in (Path(base).resolve(), toy.TINY.resolve()):
        raise ValueError(f"--out {out} is the base: name another")
    state = out / "state.pt"
    if args.resume and not state.exists():
        raise ValueError(f"{state} is not there: leave --resume out")
    if state.exists() and not args.resume:
        raise ValueError(f"{state} is of an unfinished run: add --resume, or delete it")
    parent = next(folder for folder in (out, *out.parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--out {out}: {parent} is no folder that can be written to; name another")

    model = load_base(args.model, torch.float32 if full else getattr(torch, args.dtype), device, print_row)
    # A run that goes on knows by these whether data and base are still what they were.
    args.data_hash = fingerprint(data)
    args.base_hash = fingerprint([p.flatten()[:8].tolist() for p in model.parameters()])
    voice = args.data.removeprefix("toy:")
    prompts = [toy.toy_prompt(restaurant) for restaurant in toy.toy_world()[1]] if voice in toy.VOICES else []
    before = complete(model, tokenizer, prompts, seed=3)  # other draws than afterwards
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(data[0]):,} examples to train on, {len(data[1]):,} held out; {size:,} parameters, on {device}")
    torch.manual_seed(args.seed)
    if not full:
        add_lora(model, args.r, args.alpha, args.lora_dropout, args.targets)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"LoRA adds {trained:,}, {trained / size:.2%}, and trains them")
    print(", ".join(f"{key} {value}" for key, value in vars(args).items()), end="\n\n")
    if args.compile:
        for block in model.h:
            block.compile()

    with deferred_signals() as stopped:
        train(model, *data, args, print_row, stopped=stopped)
    if full:
        model.save_pretrained(out, own_vocabulary(base))
    else:
        save_lora(model, out)
    state.unlink(missing_ok=True)
    if prompts:
        with torch.compiler.set_stance("force_eager"):  # in writing, each new token has other shapes
            toy.print_comparison(voice, before, complete(model, tokenizer, prompts))
    saved = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"\nsaved     {out}: {saved / 1e6:.2f} MB, where the base has {4 * size / 1e6:.2f} MB")
    ids, start = (data[1] or data[0])[0]
    where = [f"--model={out}"] if full else [f"--model={args.model}", f"--lora={out}"]
    prompt = f"--prompt={tokenizer.decode(ids[:start])}"
    print("try       " + shlex.join(["python", "sample.py", *where, prompt]))


if __name__ == "__main__":
    main()
