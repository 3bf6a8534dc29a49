"""Fine-tune GPT-2 with LoRA (or all of it) on one GPU, or on a laptop's CPU.

    python train.py                                   # no download: the base `tiny` learns to talk like a pirate
    python train.py --model gpt2 --data e2e           # the paper's task on OpenAI's weights
    python train.py --model gpt2 --data my.txt        # your own text, or my.jsonl with {"prompt", "completion"}

From top to bottom: the settings, the data sets, the training loop, the base and what it writes, the command.
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time
from itertools import groupby, islice, takewhile
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # threads of torch that wait soon leave their core to other runs
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # importing torch takes seconds: Ctrl-C ends them without a traceback

import torch

from gpt import END, GPT, PRETRAINED, download, load_tokenizer, own_vocabulary, read_config, send, write_whole
from lora import add_lora, save_lora
from notebooks import toy

# ---- Settings ----------------------------------------------------------------------------------------------

DEFAULTS = {  # what depends on the data; for e2e the paper's (its table 11)
    "toy": dict(steps=200, batch_size=32, lr=5e-3, label_smoothing=0.0, lora_dropout=0.0, eval_every=50),
    "e2e": dict(epochs=5, batch_size=8, lr=2e-4, label_smoothing=0.1, lora_dropout=0.1, eval_every=500),
    "file": dict(epochs=3, batch_size=8, lr=2e-4, label_smoothing=0.0, lora_dropout=0.0, eval_every=500),
}
DTYPES = ("float32", "bfloat16", "float16")


def make_parser():
    # Without a usage line, which would be longer than a screen, argparse's errors are one line.
    about = "Fine-tune GPT-2 with LoRA, or all of it, on one GPU or a CPU."
    epilog = "* The default depends on --data; every run prints what it uses."
    parser = argparse.ArgumentParser("train.py", argparse.SUPPRESS, about, epilog)
    add = parser.add_argument
    add("--model", default="tiny", help=f"the base: tiny (made on the first run), {', '.join(PRETRAINED)}, or a folder")
    add("--data", default="toy:pirate", help="toy:VOICE, toy:all, e2e, e2e:FILE, FILE.txt or FILE.jsonl")
    add("--method", default="lora", choices=["lora", "full"], help="train adapters (the default), or all weights")
    add("--r", type=number(int, 1, 1e5), default=4, help="rank of the adapters (4)")
    add("--alpha", type=number(float, 1e-6, 1e6), default=32, help="the adapters' output is scaled by alpha / r (32)")
    add("--lora-dropout", type=number(float, 0, 0.99), help="dropout on the adapters' input *")
    add("--targets", nargs="+", default=["c_q", "c_v"], help="layers to adapt (c_q c_v, the query and the value)")
    add("--steps", type=number(int, 1, 1e9), help="how often the weights are updated *")
    add("--batch-size", type=number(int, 1, 1e6), help="examples that are computed at a time *")
    add("--grad-accum", type=number(int, 1, 1e6), default=1, help="batches of that size in one step (1)")
    add("--lr", type=number(float, 1e-12, 1e3), help="the highest learning rate *")
    add("--weight-decay", type=number(float, 0, 1e3), default=0.01, help="AdamW's (0.01)")
    add("--warmup", type=number(int, 0, 1e9), help="steps in which the learning rate rises; then it falls to zero *")
    add("--label-smoothing", type=number(float, 0, 0.99), help="part of each target that is spread over all tokens *")
    add("--eval-every", type=number(int, 1, 1e9), help="steps between looks at held-out data; each saves the state *")
    add("--seed", type=number(int, 0, 2**32), default=0, help="of A, the order of the data and the dropout (0)")
    add("--device", choices=["cuda", "mps", "cpu"], help="found by itself")
    add("--dtype", choices=DTYPES, help="of frozen weights (on a GPU the 16 bits that it computes in, else float32)")
    add("--compile", action="store_true", help="compile the model: slower to start, faster steps")
    add("--out", type=Path, help="folder for the result, log.csv and the state of an unfinished run (out/MODEL-DATA)")
    add("--resume", action="store_true", help="go on with the unfinished run in --out")
    parser.set_defaults(**DEFAULTS["toy"])
    return parser


def number(kind, low, high):
    """An argparse type: a number of this kind, from low to high."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return kind(text)

    return parse


def settings(**changes):
    """The settings of `python train.py`, but for these changes: an argparse.Namespace."""
    return argparse.Namespace(**vars(make_parser().parse_args([])) | changes)


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

    return download(E2E + name, Path(torch.hub.get_dir(), "lora-gpt2", "e2e", name), check=check)


def load_data(name, tokenizer, block_size):
    """(examples to train on, examples held out) of a data set, none longer than a context of block_size tokens.

    name is `toy:` and a voice or `all`, `e2e`, `e2e:FILE`, or a FILE.jsonl or FILE.txt. Where nothing is held out by
    the data set itself, the last twentieth is. Raises OSError or ValueError.
    """
    kind, _, rest = name.partition(":")
    if kind == "toy" and rest in [*toy.VOICES, "all"]:
        voices = toy.VOICES if rest == "all" else [rest]
        parts = [toy.toy_pairs(restaurants, voices) for restaurants in toy.toy_world()]
    elif kind == "e2e":
        parts = [read_pairs(file) for file in ([rest] if rest else [e2e_file("train.txt"), e2e_file("valid.txt")])]
    elif name.endswith(".jsonl"):
        parts = [read_pairs(name)]
    elif name.endswith(".txt"):
        return hold_out(text_blocks(name, tokenizer, block_size))
    else:
        raise ValueError(f"no data set '{name}': name toy:all, toy: and one of {', '.join(toy.VOICES)}, e2e, or a file")
    parts = [[encode_pair(tokenizer, *pair) for pair in part] for part in parts]
    fit = [[example for example in part if len(example[0]) <= block_size + 1] for part in parts]
    if left_out := sum(map(len, parts)) - sum(map(len, fit)):
        print(f"{name}: left out {left_out} examples, which are longer than the context of {block_size} tokens")
    if not fit[0]:
        raise ValueError(
            f"{name} does not fit in a context of {block_size} tokens: shorten its texts, or name another base"
        )
    return fit if len(fit) == 2 else hold_out(fit[0])


def hold_out(examples):
    n = len(examples) - len(examples) // 20
    return [examples[:n], examples[n:]]


def text_blocks(path, tokenizer, block_size):
    """Plain text in pieces that fill the context. They overlap by a token: what one ends with, the next starts from."""
    ids = tokenizer.encode(read_text(path), allowed_special={END})
    if len(ids) <= block_size:
        raise ValueError(f"{path} has {len(ids)} tokens, and one example takes {block_size + 1}: add text")
    return [(ids[i : i + block_size + 1], 1) for i in range(0, len(ids) - block_size, block_size)]


def encode_pair(tokenizer, prompt, completion):
    """prompt <|endoftext|> completion <|endoftext|>, with the loss on what follows the first <|endoftext|>."""
    head = tokenizer.encode_ordinary(prompt) + [tokenizer.eot_token]
    return head + tokenizer.encode_ordinary(" " + completion) + [tokenizer.eot_token], len(head)


def read_pairs(path):
    """[(prompt, completion)], of lines {"prompt": ..., "completion": ...} in a .jsonl, prompt||completion elsewhere."""
    pairs, as_json = [], str(path).endswith(".jsonl")
    for number, line in enumerate(read_text(path).rstrip("\n").split("\n"), 1):
        try:
            prompt, completion = map(json.loads(line).get, ("prompt", "completion")) if as_json else line.split("||", 1)
            (prompt + completion).encode()  # only text will do, and only what UTF-8 can hold
        except (ValueError, TypeError, AttributeError, RecursionError):
            form = '{"prompt": "...", "completion": "..."}' if as_json else "prompt||completion"
            raise ValueError(f"{path}, line {number}: not {form}") from None
        pairs.append((prompt, completion))
    return pairs


def read_text(path):
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # -sig: without the mark that Windows puts in front
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 at byte {e.start}: save it as UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def collate(examples, device):
    """(B, T) inputs on the device, and targets on the CPU. Short examples are padded at the end, without targets."""
    T = max(len(ids) for ids, _ in examples) - 1
    idx, targets = torch.zeros(len(examples), T, dtype=torch.long), torch.full((len(examples), T), -100)
    for row, (ids, start) in enumerate(examples):
        idx[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, start - 1 : len(ids) - 1] = torch.tensor(ids[start:])  # a position predicts the next token
    return send(idx, device), targets


def count_targets(examples):
    return sum(len(ids) - start for ids, start in examples)


# ---- The training loop -------------------------------------------------------------------------------------


def train(model, examples, held_out, args, report=None, optimizer=None):
    """Train what requires a gradient, LoRA's A and B or everything, on examples from `load_data`.

    args is what `settings` returns. With args.out, that folder gets log.csv and, at every look and when a signal ends
    the run, state.pt, from which args.resume goes on. report(row) gets each new row of the log. An optimizer of your
    own takes AdamW's place: the rates of its groups are the highest ones.
    Returns the log, a list of dicts of numbers. Raises FloatingPointError if the loss is not finite.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(params, lr=args.lr, weight_decay=args.weight_decay)
    highest = [group["lr"] for group in optimizer.param_groups]
    device, held = params[0].device, model.wte.weight.dtype
    dtype = getattr(torch, args.dtype) if args.dtype else held
    autocast = torch.autocast(device.type, dtype, enabled=dtype != held)
    # In float16, small gradients would vanish: they are scaled up, as far as the largest allow.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    first, log, losses = 0, [], 0.0
    if args.resume:
        state = load_state(args)
        first, log, losses = state["step"], state["log"], state["losses"]
        for p, saved in zip(params, state["params"], strict=True):
            p.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    model.train()
    stopped = catch_signals() if args.out else ()
    steps, warmup, size = args.steps, args.warmup or 0, args.batch_size * args.grad_accum
    # Epoch after epoch, the examples in a new order.
    draw, epochs = torch.Generator().manual_seed(args.seed), math.ceil(steps * size / len(examples))
    order = torch.cat([torch.randperm(len(examples), generator=draw) for _ in range(epochs)])
    tokens, began, last = 0, time.time(), time.time()
    for step in range(first, steps):
        for group, lr in zip(optimizer.param_groups, highest, strict=True):  # a linear rise, then a linear fall
            group["lr"] = lr * min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))
        torch.manual_seed(args.seed + step)  # for dropout: a run that goes on from here draws the same
        batch = [examples[i] for i in order[step * size : (step + 1) * size]]
        for part in (batch[i : i + args.batch_size] for i in range(0, size, args.batch_size)):
            with autocast:
                loss = model(*collate(part, device), args.label_smoothing)
            loss = loss * (count_targets(part) / count_targets(batch))  # the parts add up to the batch's mean
            scaler.scale(loss).backward()
            losses = losses + loss.detach()
        scaler.step(optimizer)  # not if a gradient has overflowed: update() then lowers the scale
        scaler.update()
        optimizer.zero_grad()
        tokens += sum(len(ids) - 1 for ids, _ in batch)

        done = step + 1
        look = done % args.eval_every == 0 or done == steps
        logging = look or done % max(1, min(steps // 10, 100)) == 0
        if logging or stopped:
            loss = float(losses) / (done - (log[-1]["step"] if log else 0))  # waits for the GPU
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {done}: start again with a --lr below {args.lr}")
        if logging:
            row = dict(step=done, loss=loss, val_loss=math.nan, lr=optimizer.param_groups[0]["lr"])
            row["tokens_per_s"] = tokens / (time.time() - last)
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else math.nan
            row["seconds_left"] = (time.time() - began) / (done - first) * (steps - done)
            if look and held_out:
                with autocast:
                    row["val_loss"] = evaluate(model, held_out, args.batch_size)
            log.append(row)
            losses, tokens, last = 0.0, 0, time.time()
            if report:
                report(row)
        if args.out and (look or stopped):
            state = dict(step=done, log=log, losses=losses, params=[p.detach() for p in params], settings=args.settings)
            state |= dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            lines = [",".join(map(str, line)) for line in (log[:1] + [row.values() for row in log])]
            save = {args.out / "state.pt": lambda tmp, state=state: torch.save(state, tmp)}
            write_whole(save | {args.out / "log.csv": "\n".join(lines) + "\n"})
        if stopped:
            raise KeyboardInterrupt(f"stopped; the same command with --resume goes on from {args.out / 'state.pt'}")
    model.eval()
    return log


@torch.no_grad()
def evaluate(model, examples, batch_size):
    """The mean loss over the targets of at most 256 of the examples, spread evenly."""
    examples, total = examples[:: -(-len(examples) // 256)], 0.0
    model.eval()
    for batch in (examples[i : i + batch_size] for i in range(0, len(examples), batch_size)):
        total += model(*collate(batch, model.wte.weight.device)) * count_targets(batch)
    model.train()
    return float(total) / count_targets(examples)


def print_row(row):
    minutes, seconds = divmod(round(row["seconds_left"]), 60)
    line = f"step {row['step']:5}  loss {row['loss']:.4f}  lr {row['lr']:.1e}  {row['tokens_per_s']:6,.0f} tokens/s"
    line += "" if math.isnan(row["memory_gb"]) else f"  {row['memory_gb']:.2f} GB"
    line += "" if math.isnan(row["val_loss"]) else f"  val loss {row['val_loss']:.4f}"
    print(f"{line}  {minutes}:{seconds:02} left", flush=True)


def load_state(args):
    """What an interrupted run has saved. Raises OSError, or ValueError if it is damaged or of another run."""
    file = args.out / "state.pt"
    file.open("rb").close()  # can it be read?
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        other = [key for key, value in args.settings.items() if state["settings"][key] != value]
        [state[key] for key in ("step", "log", "losses", "params", "optimizer", "scaler")]
    except Exception as e:  # torch raises many things for a damaged file
        raise ValueError(f"{file} is damaged ({type(e).__name__}): delete it and start again") from None
    if other:
        then = ", ".join(f"{key} = {state['settings'][key]}" for key in other)
        raise ValueError(f"{file} is of a run with {then}: go on with what it had")
    return state


# ---- The base model, and what it writes --------------------------------------------------------------------


def describe_base(name):
    """(GPTConfig, tokenizer) of a base, before its weights are loaded or made. Raises OSError or ValueError."""
    if name == "tiny":
        return toy.toy_base()
    config, tokenizer = read_config(name), load_tokenizer(name)
    if (n := tokenizer.n_vocab) > config.vocab_size:
        raise ValueError(
            f"{name} has {config.vocab_size} tokens, its tokenizer {n}: put its own vocab.tiktoken beside it"
        )
    return config, tokenizer


def load_base(name, dtype=torch.float32, device="cpu", report=None):
    """The GPT called `tiny`, which is trained first if it is not there yet, or one that GPT.from_pretrained knows."""
    if name != "tiny":
        return GPT.from_pretrained(name, dtype, device)
    config, tokenizer = toy.toy_base()
    data = load_data("toy:all", tokenizer, config.block_size)
    recipe, made_by = fingerprint(config, toy.TINY_RECIPE, data), toy.TINY / "made-by"
    if not made_by.exists() or made_by.read_text() != recipe:  # somebody may have changed the toy world
        print("training the base `tiny` from nothing, once")
        torch.manual_seed(0)
        model = GPT(config)
        train(model, *data, settings(**toy.TINY_RECIPE), report)
        model.save_pretrained(toy.TINY, toy.toy_vocabulary())
        write_whole({made_by: recipe})
    try:
        return GPT.from_pretrained(toy.TINY, dtype, device)
    except (OSError, ValueError) as e:
        raise ValueError(f"{e}; or delete {toy.TINY}: it is made anew") from None


def fingerprint(*things):
    return hashlib.sha256(repr(things).encode()).hexdigest()[:16]


def complete(model, tokenizer, prompts, max_new_tokens=64, temperature=0.7, seed=0, search=None, batch_size=256):
    """What the model writes after each `prompt <|endoftext|>`, up to its own <|endoftext|>: a list of texts.

    It is drawn at the temperature, or found by search(idx): token ids for each of the prompts idx (B, T).
    """
    device, end, texts, began = model.wte.weight.device, tokenizer.eot_token, {}, time.time()
    generator = torch.Generator(device).manual_seed(seed)

    def draw(idx):
        columns, ended = [], False
        for tokens in model.generate(idx, max_new_tokens, temperature, generator=generator):
            columns.append(tokens)
            ended |= tokens >= end  # what is beyond <|endoftext|>, in a padded vocabulary, has no text either
            if ended.all():
                break
        return torch.stack(columns, dim=1).tolist()

    ids = {prompt: tokenizer.encode_ordinary(prompt) + [end] for prompt in prompts}
    # Prompts of one length need no padding. The longest come first: if memory is short, it shows at once.
    for _, group in groupby(sorted(ids, key=lambda p: -len(ids[p])), lambda p: len(ids[p])):
        while batch := list(islice(group, batch_size)):
            found = (search or draw)(torch.tensor([ids[prompt] for prompt in batch], device=device))
            for prompt, tokens in zip(batch, found, strict=True):
                texts[prompt] = tokenizer.decode(list(takewhile(lambda t: t < end, tokens))).strip()
            if search:
                left = round((time.time() - began) / len(texts) * (len(ids) - len(texts)))
                print(f"\r{len(texts)}/{len(ids)} prompts  {left // 60}:{left % 60:02} left ", end="", flush=True)
    return [texts[prompt] for prompt in prompts]


# ---- The command -------------------------------------------------------------------------------------------


def command(parser, run, args):
    """Run a command: the one place that turns what its user can do something about into a message of one line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for what the terminal cannot show
    try:
        run(args)
    except KeyboardInterrupt as e:
        parser.exit(130, f"\n{parser.prog}: {e if e.args else 'stopped'}\n")
    except (OSError, ValueError, FloatingPointError, RuntimeError) as e:
        message = " ".join(str(e).split())
        if isinstance(e, RuntimeError):
            if "memory" in message:  # a GPU's or the machine's
                message = "the memory is full: lower --batch-size, or take a smaller --model"
            elif "compile" in f"{type(e)} {message}".lower():
                message = f"--compile does not work on this machine, leave it out: {message[:200]}"
            else:
                raise
        parser.error(message)


def pick_device(name):
    """The torch.device of this name; without one, the best that is here. Raises ValueError."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name and not here[name]:
        raise ValueError(f"--device {name}: this machine has none; leave --device out to take what there is")
    return torch.device(name or next(device for device in here if here[device]))


def pick_dtype(name, device):
    """The name, or if there is none that of the 16 bits which a GPU computes in natively, and float32 elsewhere."""
    if name or device.type != "cuda":
        return name or "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def refuse_overwriting(out, *read):
    """What is read is never what is written. Raises ValueError."""
    for path in read:
        if out.resolve() == Path(path).resolve():
            raise ValueError(f"--out {out} is what is read: name another")


def catch_signals():
    """A list that Ctrl-C, SIGTERM and SIGHUP go into, so that the step under way can end. A second one ends the run."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # which is what nohup asks for
            signal.signal(number, catch)
    return caught


def main(argv=None):
    parser = make_parser()
    kind = parser.parse_args(argv).data.partition(":")[0]
    parser.set_defaults(**dict(steps=None) | DEFAULTS.get(kind, DEFAULTS["file"]))
    command(parser, run, parser.parse_args(argv))


def run(args):
    full, (kind, _, voice) = args.method == "full", args.data.partition(":")
    device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, device)

    # Whatever can be wrong with the arguments is found here, before anything takes long.
    config, tokenizer = describe_base(args.model)
    if not full:
        with torch.device("meta"):  # a model of shapes only, to try the rank and the targets on
            add_lora(GPT(config), args.r, args.alpha, targets=args.targets)
    data = load_data(args.data, tokenizer, config.block_size)
    args.steps = args.steps or math.ceil(args.epochs * len(data[0]) / (args.batch_size * args.grad_accum))
    args.warmup = min(500, args.steps // 10) if args.warmup is None else args.warmup
    if args.warmup >= args.steps:
        raise ValueError(f"--warmup {args.warmup} takes all of the {args.steps} steps: lower it, or raise --steps")
    base = toy.TINY if args.model == "tiny" else Path(args.model)
    name = f"{base.name}-{Path(args.data).stem.replace(':', '-')}" + "-full" * full
    out = args.out = args.out or Path("out", name)
    refuse_overwriting(out, base)
    state = out / "state.pt"
    if state.exists() != args.resume:
        what = "not there: leave --resume out" if args.resume else "of an unfinished run: add --resume, or delete it"
        raise ValueError(f"{state} is {what}")

    model = load_base(args.model, torch.float32 if full else getattr(torch, args.dtype), device, print_row)
    out.mkdir(parents=True, exist_ok=True)
    # A run that goes on must have these in common with the one that was interrupted.
    elsewhere = ("out", "resume", "device", "compile")
    args.settings = {key: value for key, value in vars(args).items() if key not in elsewhere}
    args.settings["hash of the data"] = fingerprint(data)
    args.settings["hash of the base"] = fingerprint([p.flatten()[:8].tolist() for p in model.parameters()])
    comparing = kind == "toy" and voice != "all"
    prompts = [toy.toy_prompt(restaurant) for restaurant in toy.toy_world()[1]]
    before = complete(model, tokenizer, prompts, seed=3) if comparing else None  # other draws than afterwards
    size = sum(p.numel() for p in model.parameters())
    torch.manual_seed(args.seed)
    if not full:
        add_lora(model, args.r, args.alpha, args.lora_dropout, args.targets)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{len(data[0]):,} examples to train on, {len(data[1]):,} held out; {size:,} parameters, on {device}")
    print(
        f"{trained:,} of them are trained" if full else f"LoRA adds {trained:,}, {trained / size:.2%}, and trains them"
    )
    print(", ".join(f"{key} {value}" for key, value in args.settings.items()), end="\n\n")
    for block in model.h if args.compile else ():
        block.compile()

    train(model, *data, args, print_row)
    if full:
        model.save_pretrained(out, toy.toy_vocabulary() if args.model == "tiny" else own_vocabulary(args.model))
    else:
        save_lora(model, out)
    state.unlink(missing_ok=True)
    if comparing:
        with torch.compiler.set_stance("force_eager"):  # in writing, each new token has other shapes
            toy.print_comparison(voice, before, complete(model, tokenizer, prompts))
    of_base = f", where the base has {megabytes(base)}" if base.is_dir() else ""
    print(f"\nsaved     {out}: {megabytes(out)}{of_base}")
    ids, start = (data[1] or data[0])[0]
    flags = {"model": out} if full else {"model": args.model, "lora": out}
    flags["prompt"] = tokenizer.decode(ids[:start])
    print("try       " + shlex.join(["python", "sample.py", *(f"--{key}={value}" for key, value in flags.items())]))


def megabytes(dir):
    return f"{sum(file.stat().st_size for file in dir.glob('*.safetensors')) / 1e6:.2f} MB"


if __name__ == "__main__":
    main()
