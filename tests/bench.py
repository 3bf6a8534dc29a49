"""The benchmark: this code next to what you would use instead. Prints a Markdown table.

    python tests/bench.py                       # GPT-2's 124M on the CPU: one hour
    python tests/bench.py --device cuda         # the same on a GPU
    python tests/bench.py --size small          # a few minutes: tries the script, means nothing
    python tests/bench.py --only train infer    # some sections

The alternatives are `transformers` with `peft` or `loralib`, and `transformers` alone. All get
the same random weights, tokens, dtype, AdamW and attention kernel (sdpa), and no dropout. LoRA
has r = 4 and alpha = 32 on query and value. PEFT can only adapt the fused c_attn as a whole.
Its closest equivalent is r = 8, alpha = 64: the same A, and a B with rows for the key, too.

Each competitor has a process of its own, so its peak memory is its own. The processes take
turns, one step each, so other programs on the machine disturb all of them alike. Training is
repeated in three processes, because a process can be slow or fast from its start to its end.
The table shows medians, and the smallest and largest ratio of all rounds.
"""

import argparse
import collections
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np

# Only child processes import torch: on Linux, a child's peak memory starts at its parent's.
if __name__ == "__mp_main__":
    import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
os.environ["PYTHONWARNINGS"] = "ignore"

SIZES = {  # n_layer, n_embd, n_head, vocab_size
    "small": (6, 128, 4, 5000),
    "half": (6, 384, 6, 50257),
    "gpt2": (12, 768, 12, 50257),
    "gpt2-medium": (24, 1024, 16, 50257),
    "gpt2-large": (36, 1280, 20, 50257),
    "gpt2-xl": (48, 1600, 25, 50257),
}


def count_flops(size, batch, length, r=4):
    """Floating-point operations of a LoRA step.

    N weights in matrices need 2 N operations per token in the forward pass, and 2 N in the
    backward pass for the gradient of their input. (Full fine-tuning needs another 2 N, for the
    gradient of the weights.) On average, a token attends to length / 2 tokens.
    """
    L, C, _, V = SIZES[size]
    N, lora, attention = 12 * L * C * C + V * C, 4 * L * r * C, 2 * L * length * C
    return batch * length * (4 * N + 6 * lora + 3 * attention)


def count_values(size, batch, length):
    """Numbers in memory during a LoRA step: the weights, and 11 C per token and block.

    These 11 C are what the backward pass needs: the inputs of ln_1, c_q and ln_2; q, k, v and
    the output of the attention; and 4 C before the GELU.
    """
    L, C, _, V = SIZES[size]
    return (V + 1024) * C + L * (12 * C + 13) * C + 11 * L * C * batch * length


# ---- Jobs, in child processes. Each prepares something, then returns the function to time ----


def measure_seconds(device, function, *args):
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    function(*args)
    synchronize()
    return time.perf_counter() - start


def load_model(who, folder, device, dtype, r=4):
    """A model of "ours" or "transformers"; with LoRA, of "ours, LoRA", "PEFT" or "loralib"."""
    if who.startswith("ours"):
        from gpt import GPT
        from lora import add_lora

        model = GPT.from_pretrained(folder, getattr(torch, dtype), device)
        if "LoRA" in who:
            add_lora(model, r, 32)
        return model
    from transformers import GPT2LMHeadModel, logging

    logging.disable_progress_bar()
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    model = GPT2LMHeadModel.from_pretrained(folder, **options).to(device)
    if "PEFT" in who:
        import peft

        options = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
        config = peft.LoraConfig(r=2 * r, lora_alpha=64, **options)
        model = peft.get_peft_model(model, config)  # A and B are float32
    if who == "loralib":
        import loralib

        options = {"enable_lora": [True, False, True], "fan_in_fan_out": True}
        for block in model.transformer.h:
            c_attn = block.attn.c_attn
            lora = loralib.MergedLinear(*c_attn.weight.shape, r, lora_alpha=32, **options)
            block.attn.c_attn = lora.to(device)
            lora.weight.data, lora.bias.data = c_attn.weight.data, c_attn.bias.data
        loralib.mark_only_lora_as_trainable(model)
    return model


def training(who, folder, device, dtype, batch, length, r=4):
    """Training steps on texts of `length` tokens.

    who: as in `load_model`; with ", compiled" at the end, the blocks are compiled.
    length: a pair means from so many to so many tokens, and the first half is the prompt.
    A round is one step; ten if steps are short: with such a pair, or on a GPU.
    """
    # Full fine-tuning keeps its weights in float32 and computes in bfloat16.
    is_full = who in ("ours", "transformers")
    model = load_model(who, folder, device, "float32" if is_full else dtype, r).train()
    if "compiled" in who:
        for block in next(m.h for m in model.modules() if hasattr(m, "h")):
            block.compile()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=2e-4, weight_decay=0.01)
    autocast = torch.autocast(device, torch.bfloat16, enabled=is_full and dtype == "bfloat16")
    torch.manual_seed(0)
    has_prompts = isinstance(length, tuple)
    shortest, longest = length if has_prompts else (length, length)
    batches, losses = [], []
    for _ in range(50 if has_prompts else 1):
        lengths = torch.randint(shortest, longest + 1, (batch, 1))
        idx = torch.randint(model.config.vocab_size, (batch, lengths.max()))
        positions = torch.arange(lengths.max())
        starts = lengths // 2 if has_prompts else 0
        labels = idx.where((positions >= starts) & (positions < lengths), -100)
        if "ours" in who:  # transformers shifts the labels by itself
            labels = torch.cat([labels[:, 1:], torch.full((batch, 1), -100)], 1)
        else:
            labels = labels.to(device)
        batches.append((idx.to(device), labels, lengths.sum().item()))
    batches = itertools.cycle(batches)
    n_steps = 10 if has_prompts or device == "cuda" else 1

    def run_steps():
        n_tokens = 0
        for idx, labels, n in itertools.islice(batches, n_steps):
            with autocast:
                if "ours" in who:
                    loss = model(idx, labels)
                else:
                    loss = model(idx, labels=labels, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            n_tokens += n
        return {"first loss": losses[0], "tokens": n_tokens / n_steps, "steps": n_steps}

    return run_steps


def matrix_product(folder, device, dtype):
    """The machine's own speed."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(getattr(torch, dtype))

    def multiply():
        seconds = median(measure_seconds(device, torch.mm, a, a) for _ in range(5))
        return {"TFLOP/s": 2e-12 * n**3 / seconds}

    return multiply


def latency(folder, device, dtype, batch, length):
    """A forward pass of our model: plain, with LoRA layers, and merged."""
    from lora import merge_lora

    whose = {"plain": "ours", "adapted": "ours, LoRA", "merged": "ours, LoRA"}
    models = {name: load_model(who, folder, device, dtype) for name, who in whose.items()}
    merge_lora(models["merged"])
    idx = torch.randint(models["plain"].config.vocab_size, (batch, length)).to(device)

    @torch.no_grad()
    def run_forward():
        order = random.sample(list(models), len(models))  # the first or last may be slower
        return {name: measure_seconds(device, models[name], idx) for name in order}

    return run_forward


def generation(who, folder, device, dtype, batch, prompt_length=32, n_new=64):
    """Greedy generation after random prompts."""
    model = load_model(who, folder, device, dtype).eval()
    idx = torch.randint(model.config.vocab_size, (batch, prompt_length)).to(device)
    if who == "ours":
        return lambda: {"tokens": batch * len(list(model.generate(idx, n_new, temperature=0)))}
    model.generation_config.eos_token_id = None  # never stop early
    options = {"max_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(idx)
    return lambda: {"tokens": batch * (model.generate(idx, **options).shape[1] - prompt_length)}


def adapters(folder, device, dtype):
    """Saving, loading, ... an adapter: {(what, 0 for ours and 1 for PEFT): seconds}."""
    from peft import PeftModel

    from lora import load_lora, lora_layers, merge_lora, save_lora, unmerge_lora

    ours = load_model("ours, LoRA", folder, device, dtype)
    theirs = load_model("PEFT", folder, device, dtype)
    for layer in lora_layers(ours).values():
        torch.nn.init.normal_(layer.lora_B)  # as if trained

    def swap(dir):
        theirs.load_adapter(dir, "other")
        theirs.set_adapter("other")

    def run_all():
        our_base = load_model("ours", folder, device, dtype)
        their_base = load_model("transformers", folder, device, dtype)
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
            calls = {
                "saving": [(save_lora, ours, a), (theirs.save_pretrained, b)],
                "loading": [(load_lora, our_base, a), (PeftModel.from_pretrained, their_base, b)],
                "swapping": [(load_lora, ours, a), (swap, b)],
                "merging": [(merge_lora, ours), (theirs.merge_adapter,)],
                "unmerging": [(unmerge_lora, ours), (theirs.unmerge_adapter,)],
            }
            seconds = {}
            for what, pair in calls.items():
                for i, call in enumerate(pair):
                    seconds[what, i] = measure_seconds(device, *call)
        theirs.set_adapter("default")
        theirs.delete_adapter("other")
        return seconds

    return run_all


def preparation(folder, device, dtype):
    """Write a random GPT-2 and a tokenizer. The name of the folder is the size."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from gpt import CHAR_TO_BYTE, EOS

    torch.manual_seed(0)
    n_layer, n_embd, n_head, vocab_size = SIZES[Path(folder).name]
    config = GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_head, vocab_size=vocab_size)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0
    config.bos_token_id = config.eos_token_id = vocab_size - 1
    GPT2LMHeadModel(config).save_pretrained(folder)
    # Any tokens will do, as many as GPT-2 has. No text contains these, except single bytes.
    chars = list(CHAR_TO_BYTE)
    pairs = itertools.islice(itertools.product(chars, chars), vocab_size - 257)
    merges = [(chars[-1] + left, right) for left, right in pairs]
    tokens = [*chars, *(left + right for left, right in merges), EOS]
    vocab = json.dumps({token: i for i, token in enumerate(tokens)})
    Path(folder, "vocab.json").write_text(vocab)
    lines = "\n".join(f"{left} {right}" for left, right in merges)
    Path(folder, "merges.txt").write_text(lines, encoding="utf-8")
    return dict


def serve(pipe, job, options):
    """What a child does: prepare the job, then run it once for each message."""
    sys.stderr = open(os.devnull, "w")  # hides progress bars
    device = options["device"]
    try:
        function = job(**options)
        pipe.send({})
        while pipe.recv():
            results = []
            seconds = measure_seconds(device, lambda to=results: to.append(function()))
            if device == "cuda":
                peak = torch.cuda.max_memory_allocated() / 2**30
            else:
                unit = 2**30 if sys.platform == "darwin" else 2**20
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
            seconds /= results[0].get("steps", 1)
            pipe.send({"seconds": seconds, "GiB": peak} | results[0])
    except EOFError:  # the parent has closed the pipe
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")


# ---- The parent: runs jobs in turns, and prints the tables ----


def take_turns(args, n_rounds, jobs, n_processes=1):
    """Run the jobs in turns: a warm-up round, then n_rounds. Repeat it in new processes.

    jobs: {name: (job, options)}
    Returns {name: {metric: array of all rounds}}. A job that failed has NaN, and a line of the
    table says why. Without rounds, the warm-up counts.
    """
    results = {name: collections.defaultdict(lambda: np.array([math.nan])) for name in jobs}
    for _ in range(n_processes):
        children, replies = {}, {name: [] for name in jobs}
        for name, (job, options) in jobs.items():
            defaults = {"device": args.device, "dtype": args.dtypes[0], "folder": args.folder}
            options = defaults | options
            print(time.strftime("%H:%M:%S"), job.__name__, name, options, file=sys.stderr)
            pipe, child_pipe = SPAWN.Pipe()
            child = SPAWN.Process(target=serve, args=(child_pipe, job, options))
            child.start()
            child_pipe.close()
            children[name] = pipe, child
        for round in range(n_rounds + 2):
            for name, (pipe, _) in list(children.items()):
                try:
                    if round > 0:  # the first message says that the child is ready
                        pipe.send(True)
                    reply = pipe.recv()
                except (EOFError, OSError):
                    reply = "its process died, perhaps for lack of memory"
                if isinstance(reply, str):
                    print(f"| {name} | failed: {reply} |", flush=True)
                    results[name].clear()
                    del children[name]
                else:
                    replies[name].append(reply)
        for pipe, child in children.values():
            pipe.close()
            child.join()
        jobs = {name: jobs[name] for name in children}  # a job that failed is not tried again
        for name in jobs:
            counted = replies[name][2:] or replies[name][1:]
            for metric in counted[0]:
                values = [reply[metric] for reply in counted]
                if metric == "GiB":  # a peak only grows: the last one counts
                    values = values[-1:] * len(values)
                results[name][metric] = np.append(results[name].get(metric, []), values)
    return results


def format_value(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def print_row(what, ours, other, unit, goal=""):
    low, high = min(ours / other), max(ours / other)
    ratio = format_value(round(median(ours) / median(other), 2))
    ours, other = format_value(median(ours)), format_value(median(other))
    line = f"| {what} | {ours} {unit} | {other} {unit} | {ratio} | {low:.2f} to {high:.2f} |"
    print(f"{line} {goal} |".replace("nan", "–"), flush=True)


def train(args):
    """Speed and memory of training."""
    rates = {}
    for dtype in args.dtypes:
        result = take_turns(args, 0, {"": (matrix_product, {"dtype": dtype})})[""]
        rates[dtype] = result["TFLOP/s"][0]
    for dtype in args.dtypes:
        if rates[dtype] < rates[args.dtypes[0]] / 3:
            print(f"| training, {dtype}: left out, its matrix product is slow on this machine |")
        else:
            train_in_dtype(args, dtype)


def train_in_dtype(args, dtype):
    is_gpu, is_float32 = args.device == "cuda", dtype == "float32"
    shape = {"batch": args.batch, "length": args.length}
    large_shape = {"batch": 2 * args.batch, "length": min(2 * args.length, 1024)}
    e2e_shape = {"batch": 8, "length": (20, 60)}  # about as long as E2E's texts

    def jobs(*names, shape=shape):
        return {who: (training, {"who": who, "dtype": dtype, **shape}) for who in names}

    # Run.
    eager, compiled = "ours, LoRA", "ours, LoRA, compiled"
    others = ["PEFT"] + ["PEFT, compiled"] * is_gpu
    others += ["loralib"] * is_float32  # loralib's A and B have the base's dtype
    product = {"product": (matrix_product, {"dtype": dtype})}  # again, in turn with the others
    lora = take_turns(args, args.steps, jobs(eager, compiled, *others) | product, 3)
    e2e = take_turns(args, args.steps, jobs(eager, compiled, "PEFT", shape=e2e_shape), 3)
    full = take_turns(args, min(args.steps, 3), jobs(eager, "ours", "transformers"), 3)
    large = take_turns(args, 0, jobs(eager, "PEFT", shape=large_shape))
    for results in (lora | full, e2e):
        losses = [loss for result in results.values() for loss in result.get("first loss", [])]
        if max(losses) - min(losses) > (1e-3 if is_float32 else 0.05):
            problem = f"not the same model and tokens: the first losses are {losses}"
            sys.exit(f"bench.py: error: {problem}")

    # Speed.
    goals = ("≥ 1.15", "")
    if is_gpu:
        goals = ("≥ 1.3", "≥ 1.3")
    elif is_float32:
        goals = ("≥ 1.10", "≥ 1.2")
    rows = [(lora, eager, "PEFT", goals[0]), (lora, compiled, "PEFT", goals[1])]
    for other in others[1:]:
        rows.append((lora, compiled if "compiled" in other else eager, other, ""))
    rows += [(e2e, eager, "PEFT", ""), (e2e, compiled, "PEFT", "")]
    rows += [(full, eager, "transformers", ""), (full, "ours", "transformers", "")]
    for results, ours, other, goal in rows:
        texts = ", 20 to 60 tokens" if results is e2e else ""
        speeds = (results[who]["tokens"] / results[who]["seconds"] for who in (ours, other))
        print_row(f"training, {dtype}{texts}: {ours} / {other}", *speeds, "tok/s", goal)
    seconds = full[eager]["seconds"], full["ours"]["seconds"]
    print_row(f"a step, {dtype}: {eager} / ours", *seconds, "s", "≤ 0.65")
    for who, goal in ((eager, ""), (compiled, "≥ 0.50" if is_gpu else "")):
        speed = count_flops(args.size, **shape) / lora[who]["seconds"] / 1e12
        peak_speed = lora["product"]["TFLOP/s"]
        what = f"speed, {dtype}: {who} / matrix product"
        print_row(what, speed, peak_speed, "TFLOP/s", goal)

    # Memory.
    full_goal = "≤ 0.50" if is_float32 else "≤ 0.33"
    for results, of_shape, other, goal in (
        (lora, shape, "PEFT", "≤ 0.60"),
        (large, large_shape, "PEFT", "≤ 0.45"),
        (full, shape, "ours", full_goal),
    ):
        what = f"memory, {dtype}, {of_shape['batch']} x {of_shape['length']}: {eager} / {other}"
        print_row(what, results[eager]["GiB"], results[other]["GiB"], "GiB", goal)


def infer(args):
    """Forward passes, generation, and handling of adapters."""
    for batch, length, n_rounds in ((1, 64, 5 * args.steps), (8, 256, args.steps)):
        job = {"latency": (latency, {"batch": batch, "length": length})}
        result = take_turns(args, n_rounds, job)["latency"]
        for name, goal in (("merged", "1.00 ± 0.02"), ("adapted", "")):
            what = f"forward, {batch} x {length}: {name} / plain"
            print_row(what, 1e3 * result[name], 1e3 * result["plain"], "ms", goal)
    for batch, goal in ((1, "≥ 1.0"), (16, "≥ 1.2")):
        names = ("ours", "transformers")
        jobs = {who: (generation, {"who": who, "batch": batch}) for who in names}
        results = take_turns(args, min(args.steps, 3), jobs).values()
        speeds = (result["tokens"] / result["seconds"] for result in results)
        print_row(f"generation, batch {batch}: ours / transformers", *speeds, "tok/s", goal)
    result = take_turns(args, min(args.steps, 3), {"adapters": (adapters, {})})["adapters"]
    for what in ("saving", "loading", "swapping", "merging", "unmerging"):
        ours, other = 1e3 * result[what, 0], 1e3 * result[what, 1]
        print_row(f"an adapter, {what}: ours / PEFT", ours, other, "ms")


FIRST_TOKEN = """
import sys, torch, transformers
folder, device, dtype = sys.argv[1:]
dtype = getattr(torch, dtype)
model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).to(device)
idx = torch.tensor([[68, 111, 103]], device=device)
options = dict(attention_mask=torch.ones_like(idx), do_sample=False, pad_token_id=0)
print(model.generate(idx, max_new_tokens=1, **options))
"""


def command(args):
    """From the command to the first token. Only ours loads a tokenizer, too."""
    ours = [ROOT / "sample.py", *"--prompt Dog --max-new-tokens 1 --temperature 0".split()]
    ours += ["--model", args.folder, "--device", args.device, "--dtype", args.dtypes[0]]
    other = ["-c", FIRST_TOKEN, args.folder, args.device, args.dtypes[0]]
    seconds = [], []
    for _ in range(4):
        for i, arguments in enumerate((ours, other)):
            start = time.perf_counter()
            process = subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL)
            passed = time.perf_counter() - start
            seconds[i].append(math.nan if process.returncode else passed)
    ours, other = np.array(seconds)[:, 1:]  # the first fills the system's file cache
    what = "from the command to the first token: ours / transformers"
    print_row(what, ours, other, "s", "≤ 0.5")


# What `python train.py` does. It prints its steps per second, and then reads for how many
# seconds it should go on.
TRAIN_TOY = """
import tempfile, time

import train  # before torch, since it sets GOMP_SPINCOUNT
from gpt import GPT, load_tokenizer
from lora import add_lora
from notebooks import toy

model = GPT(toy.CONFIG)
with tempfile.TemporaryDirectory() as dir:
    model.save_pretrained(dir)
    toy.save_tokenizer(dir)
    tokenizer = load_tokenizer(dir)
train_data, _ = train.load_data("toy:pirate", tokenizer, model.config.block_size)
add_lora(model)
n_steps, start, seconds = 0, time.monotonic(), 0.0

def on_log(metrics):
    global n_steps, start, seconds
    n_steps += 1
    passed = time.monotonic() - start
    if passed > seconds:
        print(n_steps / passed, flush=True)
        seconds = float(input())
        n_steps, start = 0, time.monotonic()

args = train.default_args(steps=10**5, eval_every=1)
train.train(model, train_data, [], args, on_log)
"""


def two(args):
    """Two runs of `python train.py` at the same time. They share the machine's cores.

    The first row has the GOMP_SPINCOUNT that train.py sets, the second one OpenMP's default.
    """
    alone = {}
    for name, setting, goal in (
        ("train.py's GOMP_SPINCOUNT", {}, "≥ 0.25"),
        ("OpenMP's default GOMP_SPINCOUNT", {"GOMP_SPINCOUNT": "300000"}, ""),
    ):
        alone[name], together = time_two_runs(5, setting)
        what = f"{name}: one of two runs at the same time / one alone"
        print_row(what, together, alone[name], "steps/s", goal)
    print_row(f"alone: {' / '.join(alone)}", *alone.values(), "steps/s", "≥ 0.85")


def time_two_runs(seconds, setting, n_rounds=3):
    """Steps per second in each round: (of one run alone, of the slower of two runs)."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    env |= {"PYTHONPATH": str(ROOT)} | setting
    command = [sys.executable, "-c", TRAIN_TOY]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    runs = [subprocess.Popen(command, env=env, text=True, **pipes) for _ in range(2)]

    def slowest(runs):
        for run in runs:
            print(seconds, file=run.stdin, flush=True)
        return min(float(run.stdout.readline() or "nan") for run in runs)

    try:
        for run in runs:
            run.stdout.readline()  # the first step is done, and the run waits
        return np.array([(slowest(runs[:1]), slowest(runs)) for _ in range(n_rounds)]).T
    finally:
        for run in runs:
            run.kill()
            run.communicate()


def growth(args):
    """How the cost of our LoRA step grows, next to what theory says."""
    B, T = args.batch, args.length
    sizes = ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    if args.size == "small":
        sizes = ["small", "half"]
    # What fits on a card of 8, 16 or 24 GB.
    size_shape = {"batch": 1, "length": 1024 if args.device == "cuda" else T}
    tables = {
        "batch": [{"batch": batch} for batch in (1, B, 2 * B)],
        "length": [{"batch": 1, "length": t} for t in (T // 2, T, 2 * T, 4 * T) if t <= 1024],
        "r": [{"batch": B // 2 or 1, "r": r} for r in (1, 4, 16, 64)],
        "size": [{"size": size} | size_shape for size in sizes],
    }
    defaults = {"size": args.size, "batch": B, "length": T, "r": 4}
    for what, points in tables.items():
        points = [defaults | point for point in points]
        fixed = ", ".join(f"{key} {value}" for key, value in points[0].items() if key != what)
        columns = "step | × first | operations × first | memory | weights and activations"
        print(f"\n| {what} ({fixed}) | {columns} |\n{'|---' * 6}|")
        jobs = {}
        for point in points:
            options = point | {"who": "ours, LoRA", "folder": prepare(args, point["size"])}
            del options["size"]
            jobs[point[what]] = training, options
        # The sizes do not take turns: together they would not fit.
        groups = [{name: jobs[name]} for name in jobs] if what == "size" else [jobs]
        results = {}
        for group in groups:
            results |= take_turns(args, min(args.steps, 3), group)
        first_seconds = median(results[points[0][what]]["seconds"])
        first_flops = count_flops(**points[0])
        for point in points:
            result = results[point[what]]
            seconds = median(result["seconds"])
            times, flops = seconds / first_seconds, count_flops(**point) / first_flops
            shape = {key: point[key] for key in ("size", "batch", "length")}
            expected = args.bytes * count_values(**shape) / 2**30
            line = f"| {point[what]} | {seconds:.3g} s | {times:.2f} | {flops:.2f} "
            print(f"{line}| {result['GiB'][-1]:.2f} GiB | {expected:.2f} GiB |", flush=True)


def prepare(args, size):
    """The folder with random weights of this size, written when it is first needed."""
    folder = os.path.join(args.root, size)
    if not os.path.exists(folder):
        take_turns(args, 0, {"preparation": (preparation, {"folder": folder})})
    return folder


def describe_machine(args):
    name = platform.processor()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    if args.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        output = subprocess.run(query, capture_output=True, text=True).stdout
        name += ", " + output.splitlines()[0]
    libraries = ("torch", "transformers", "peft", "loralib")
    versions = ", ".join(f"{library} {version(library)}" for library in libraries)
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def main():
    sections = {"train": train, "infer": infer, "command": command, "two": two, "growth": growth}
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    names = ", ".join(sections)
    add("--only", nargs="+", choices=sections, default=list(sections), help=names, metavar="NAME")
    add("--size", choices=SIZES, default="gpt2", help=f"of the model: {', '.join(SIZES)} (gpt2)")
    add("--batch", type=int, help="sequences per step (4; 8 on a GPU, 2 for small)")
    add("--length", type=int, help="tokens per sequence (256; 512 on a GPU, 64 for small)")
    add("--steps", type=int, default=5, help="rounds that count (5; at most 3 for slow jobs)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    batch, length = 4, 256
    if args.size == "small":
        batch, length = 2, 64
    elif args.device == "cuda":
        batch, length = 8, 512
    args.batch, args.length = args.batch or batch, args.length or length
    args.dtypes, args.bytes = ["float32", "bfloat16"], 4
    if args.device == "cuda":
        args.dtypes, args.bytes = ["bfloat16"], 2
    with tempfile.TemporaryDirectory() as args.root:
        args.folder = os.path.join(args.root, args.size)
        shape = f"{args.size}, {args.batch} x {args.length} tokens"
        print(f"{shape}, {describe_machine(args)}, {time.strftime('%Y-%m-%d')}\n")
        print(f"| what | ours | the other | ratio | range | goal |\n{'|---' * 6}|")
        prepare(args, args.size)
        for name in sections:
            if name in args.only:
                sections[name](args)


SPAWN = multiprocessing.get_context("spawn")
if __name__ == "__main__":
    main()
