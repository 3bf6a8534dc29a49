"""The benchmark: this code beside what a user would pick instead, in one run, as a Markdown table of ratios.

    python tests/bench.py                       # GPT-2's 124M on the CPU, an hour; on a GPU with --device cuda
    python tests/bench.py --size small          # a few minutes, to try the script: too small to mean anything
    python tests/bench.py --only train infer    # some sections

The peers are `transformers` with `peft` or `loralib`, and `transformers` alone. Everybody gets the same weights, drawn
at random by transformers, the same tokens, dtype, AdamW and attention kernel (sdpa), and no dropout. LoRA is r = 4,
alpha = 32 on the query and the value. PEFT cannot adapt just these two parts of the fused c_attn: the nearest equal is
r = 8, alpha = 64 on all of it, the same A and a B that has rows for the key too.

Each competitor lives in a process of its own, so that its peak memory is its own, and computes when it is told to:
they take turns, step by step, so that whatever else the machine does meets them all. All train in three processes, one
after another, for a process may be slow or fast from its start to its end. The table has medians, and the range of the
ratio: the smallest and the largest of all rounds.
"""

import argparse
import base64
import collections
import itertools
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

if __name__ == "__mp_main__":  # in the children only: on Linux a child's peak memory starts at its parent's
    import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}

SIZES = {  # layers, width, heads, vocabulary
    "small": (6, 128, 4, 5000),
    "half": (6, 384, 6, 50257),
    "gpt2": (12, 768, 12, 50257),
    "gpt2-medium": (24, 1024, 16, 50257),
    "gpt2-large": (36, 1280, 20, 50257),
    "gpt2-xl": (48, 1600, 25, 50257),
}


def flops(size, batch, length, r=4):
    """Operations of a LoRA step. N weights in matrices cost 2N a token forward, and 2N for their input's gradient
    (full fine-tuning: 2N more, for their own). Attention looks back at length / 2 tokens on average."""
    L, C, _, V = SIZES[size]
    N, lora, attention = 12 * L * C * C + V * C, 4 * L * r * C, 2 * L * length * C
    return batch * length * (4 * N + 6 * lora + 3 * attention)


def memory(size, batch, length, r=4):
    """Numbers held: the weights, and 11 C a token and block for the backward pass (the inputs of ln_1, c_q and ln_2,
    q, k, v and the attention's output, and 4 C before the GELU)."""
    L, C, _, V = SIZES[size]
    return (V + 1024) * C + L * (12 * C + 13) * C + 11 * L * C * batch * length


# ---- The jobs, in child processes: each prepares something and returns the function that takes turns ------------


def timed(device, function, *args):
    """Seconds that function(*args) takes."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function(*args)
    wait()
    return time.perf_counter() - start


def load(who, folder, device, dtype, r=4):
    """The model of "ours" or "transformers", or with LoRA of "ours, LoRA", "PEFT" or "loralib"; "…, compiled"."""
    if who.startswith("ours"):
        from gpt import GPT
        from lora import add_lora

        model = GPT.from_pretrained(folder, getattr(torch, dtype), device)
        if "LoRA" in who:
            add_lora(model, r, 32)
        return model
    from transformers import GPT2LMHeadModel, logging

    logging.disable_progress_bar()
    settings = dict(dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model = GPT2LMHeadModel.from_pretrained(folder, **settings).to(device)
    if "PEFT" in who:
        import peft

        config = peft.LoraConfig(r=2 * r, lora_alpha=64, target_modules=["c_attn"], fan_in_fan_out=True)
        model = peft.get_peft_model(model, config)  # A and B are float32
    if who == "loralib":
        import loralib

        for block in model.transformer.h:
            fused, qv = block.attn.c_attn, dict(enable_lora=[True, False, True], fan_in_fan_out=True)
            block.attn.c_attn = loralib.MergedLinear(*fused.weight.shape, r, lora_alpha=32, **qv).to(device)
            block.attn.c_attn.weight.data, block.attn.c_attn.bias.data = fused.weight.data, fused.bias.data
        loralib.mark_only_lora_as_trainable(model)
    return model


def training(who, folder, device, dtype, batch, length, r=4, size=None):
    """Steps on texts of `length` tokens; if that is a pair, from so many to so many, and the first half is a prompt."""
    full = who in ("ours", "transformers")  # trained weights stay float32, and bfloat16 is what it computes in
    model = load(who, folder, device, "float32" if full else dtype, r).train()
    for block in next(m.h for m in model.modules() if hasattr(m, "h")) if "compiled" in who else ():
        block.compile()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.01)
    torch.manual_seed(0)
    pair, batches, losses = isinstance(length, tuple), [], []
    for _ in range(50 if pair else 1):
        n = torch.randint(length[0], length[1] + 1, (batch, 1)) if pair else torch.full((batch, 1), length)
        idx, at = torch.randint(model.config.vocab_size, (batch, n.max())), torch.arange(n.max())
        labels = idx.where((at >= n // 2 * pair) & (at < n), -100)
        targets = torch.cat([labels[:, 1:], torch.full((batch, 1), -100)], 1)  # transformers shifts by itself
        batches.append((idx.to(device), targets if "ours" in who else labels.to(device), n.sum().item()))
    batches = itertools.cycle(batches)

    def step():
        turn = list(itertools.islice(batches, 10 if pair else 1))
        for idx, labels, _ in turn:
            with torch.autocast(device, torch.bfloat16, enabled=full and dtype == "bfloat16"):
                loss = model(idx, labels) if "ours" in who else model(idx, labels=labels, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return {"first loss": losses[0], "tokens": sum(n for _, _, n in turn)}

    return step


def matrix_product(folder, device, dtype):
    """The machine's own speed."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
    return lambda: {"TFLOP/s": 2e-12 * n**3 / median(timed(device, torch.mm, a, a) for _ in range(5))}


def latency(folder, device, dtype, batch, length):
    from lora import merge_lora

    whose = {"plain": "ours", "adapted": "ours, LoRA", "merged": "ours, LoRA"}
    models = {name: load(who, folder, device, dtype) for name, who in whose.items()}
    merge_lora(models["merged"])
    idx = torch.randint(models["plain"].config.vocab_size, (batch, length)).to(device)

    @torch.no_grad()
    def step():
        order = random.sample(list(models), len(models))  # whoever comes first or last may be slower
        return {name: timed(device, models[name], idx) for name in order}

    return step


def generation(who, folder, device, dtype, batch, prompt=32, new=64):
    model = load(who, folder, device, dtype).eval()
    idx = torch.randint(model.config.vocab_size, (batch, prompt)).to(device)
    if who == "ours":
        return lambda: {"tokens": batch * len(list(model.generate(idx, new, temperature=0)))}
    model.generation_config.eos_token_id = None  # never stop early
    settings = dict(attention_mask=torch.ones_like(idx), max_new_tokens=new, do_sample=False, pad_token_id=0)
    return lambda: {"tokens": batch * (model.generate(idx, **settings).shape[1] - prompt)}


def adapters(folder, device, dtype):
    """What one does with a trained adapter: {(what, 0 for ours and 1 for PEFT): seconds}."""
    from peft import PeftModel

    from lora import load_lora, lora_layers, merge_lora, save_lora, unmerge_lora

    ours, theirs = load("ours, LoRA", folder, device, dtype), load("PEFT", folder, device, dtype)
    for layer in lora_layers(ours).values():  # as if trained: with B = 0 nobody can tell which part a column is of
        torch.nn.init.normal_(layer.lora_B)

    def swap(dir):
        theirs.load_adapter(dir, "other")
        theirs.set_adapter("other")

    def step():
        plain = load("ours", folder, device, dtype), load("transformers", folder, device, dtype)
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
            pairs = {
                "saving": ((save_lora, ours, a), (theirs.save_pretrained, b)),
                "loading": ((load_lora, plain[0], a), (PeftModel.from_pretrained, plain[1], b)),
                "swapping": ((load_lora, ours, a), (swap, b)),
                "merging": ((merge_lora, ours), (theirs.merge_adapter,)),
                "unmerging": ((unmerge_lora, ours), (theirs.unmerge_adapter,)),
            }
            seconds = {(what, i): timed(device, *calls[i]) for what, calls in pairs.items() for i in (0, 1)}
        theirs.set_adapter("default")
        theirs.delete_adapter("other")
        return seconds

    return step


def preparation(folder, device, dtype):
    """Writes a GPT-2 with random weights, of the size that the folder is called, and a tokenizer for our command."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(zip(("n_layer", "n_embd", "n_head", "vocab_size"), SIZES[Path(folder).name], strict=True))
    no_dropout = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    tokens = [bytes([i]) if i < 256 else i.to_bytes(3, "big") for i in range(sizes["vocab_size"] - 1)]
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]
    Path(folder, "vocab.tiktoken").write_text("".join(lines))
    return dict


def serve(pipe, job, options):
    """What a child process does: prepare the job, then take a turn for each message from the parent."""
    sys.stderr = open(os.devnull, "w")  # progress bars
    try:
        step, cuda = job(**options), options["device"] == "cuda"
        pipe.send({})
        while pipe.recv():
            results = []
            seconds = timed(options["device"], lambda results=results: results.append(step()))
            unit = 2**30 if cuda or sys.platform == "darwin" else 2**20
            peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            pipe.send({"seconds": seconds, "GiB": peak / unit} | results[0])
    except EOFError:  # the parent wants no more
        pass
    except Exception as e:
        pipe.send(f"{type(e).__name__}: {' '.join(str(e).split())[:150]}")


# ---- The parent: who takes turns with whom, and the tables ------------------------------------------------------


def race(args, rounds, jobs, processes=1):
    """Let {name: (job, options)} take turns, one to warm up and then `rounds`; then the same in fresh processes.
    Returns {name: {what: array of all rounds}}, with NaN for a job that could not run; the table says why."""
    results = {name: collections.defaultdict(lambda: np.array([math.nan])) for name in jobs}
    for _ in range(processes):
        children, replies = {}, {name: [] for name in jobs}
        for name, (job, options) in jobs.items():
            options = {"device": args.device, "dtype": args.dtypes[0], "folder": args.folder} | options
            print(time.strftime("%H:%M:%S"), job.__name__, name, options, file=sys.stderr)
            pipe, theirs = SPAWN.Pipe()
            child = SPAWN.Process(target=serve, args=(theirs, job, options))
            child.start()
            theirs.close()
            children[name] = pipe, child
        for turn in range(rounds + 2):
            for name, (pipe, _) in list(children.items()):
                try:
                    if turn > 0:  # the first message says that it is prepared
                        pipe.send(True)
                    reply = pipe.recv()
                except (EOFError, OSError):
                    reply = "its process died, perhaps for lack of memory"
                if isinstance(reply, str):
                    print(f"| {name} | could not run: {reply} |", flush=True)
                    results[name].clear()
                    del children[name]
                else:
                    replies[name].append(reply)
        for pipe, child in children.values():
            pipe.close()
            child.join()
        jobs = {name: jobs[name] for name in children}  # what failed once is not tried again
        for name in jobs:
            counted = replies[name][2:] or replies[name][1:]
            for what in counted[0]:
                values = [counted[-1 if what == "GiB" else i][what] for i in range(len(counted))]  # a peak only grows
                results[name][what] = np.append(results[name].get(what, []), values)
    return results


def row(what, ours, peer, unit, goal=""):
    low, high = min(ours / peer), max(ours / peer)
    ours, peer = median(ours), median(peer)
    ours_, peer_, ratio = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (ours, peer, round(ours / peer, 2)))
    line = f"| {what} | {ours_} {unit} | {peer_} {unit} | {ratio} | {low:.2f} to {high:.2f} | {goal} |"
    print(line.replace("nan", "–"), flush=True)


def train(args):
    """Speed and memory of training."""
    gpu, shape = args.device == "cuda", dict(batch=args.batch, length=args.length)
    larger = dict(batch=2 * args.batch, length=min(2 * args.length, 1024))
    e2e = dict(batch=8, length=(20, 60))  # about as long as E2E's texts are
    rates = {dtype: race(args, 0, {"": (matrix_product, dict(dtype=dtype))})[""]["TFLOP/s"][0] for dtype in args.dtypes}
    for dtype in args.dtypes:
        if rates[dtype] < rates[args.dtypes[0]] / 3:
            print(f"| training, {dtype}: left out, as this machine's matrix product in it is slow |")
            continue

        def jobs(*names, shape=shape, dtype=dtype):
            return {who: (training, dict(who=who, dtype=dtype, **shape)) for who in names}

        f32 = dtype == "float32"
        peers = ["PEFT"] + ["PEFT, compiled"] * gpu + ["loralib"] * f32  # loralib's A and B have the base's dtype
        product = {"product": (matrix_product, dict(dtype=dtype))}  # once more, in turn with the others
        lora = race(args, args.steps, jobs("ours, LoRA", "ours, LoRA, compiled", *peers) | product, processes=3)
        vary = race(args, args.steps, jobs("ours, LoRA", "ours, LoRA, compiled", *peers[:1], shape=e2e), processes=3)
        full = race(args, min(args.steps, 3), jobs("ours, LoRA", "ours", "transformers"), processes=3)
        large = race(args, 0, jobs("ours, LoRA", "PEFT", shape=larger))
        for results in (lora | full, vary):
            losses = [loss for result in results.values() for loss in result.get("first loss", [])]
            if max(losses) - min(losses) > (1e-3 if f32 else 0.05):
                sys.exit(f"bench.py: error: not the same model and tokens: the first losses are {losses}")

        eager, compiled = "ours, LoRA", "ours, LoRA, compiled"
        goals = ("≥ 1.3", "≥ 1.3", "≥ 0.50") if gpu else ("≥ 1.10", "≥ 1.2", "") if f32 else ("≥ 1.15", "", "")
        pairs = [(lora, eager, "PEFT", goals[0]), (lora, compiled, "PEFT", goals[1])]
        pairs += [(lora, compiled if "compiled" in peer else eager, peer, "") for peer in peers[1:]]
        pairs += [(vary, eager, "PEFT", ""), (vary, compiled, "PEFT", "")]
        pairs += [(full, eager, "transformers", ""), (full, "ours", "transformers", "")]
        for results, ours, peer, goal in pairs:
            speed = (results[who]["tokens"] / results[who]["seconds"] for who in (ours, peer))
            row(f"training, {dtype}{', 20 to 60 tokens' * (results is vary)}: {ours} / {peer}", *speed, "tok/s", goal)
        row(f"a step, {dtype}: {eager} / ours", full[eager]["seconds"], full["ours"]["seconds"], "s", "≤ 0.65")
        for who, goal in ((eager, ""), (compiled, goals[2])):
            speed = flops(args.size, **shape) / lora[who]["seconds"] / 1e12
            row(f"speed, {dtype}: {who} / matrix product", speed, lora["product"]["TFLOP/s"], "TFLOP/s", goal)
        for results, at, peer, goal in (
            (lora, shape, "PEFT", "≤ 0.60"),
            (large, larger, "PEFT", "≤ 0.45"),
            (full, shape, "ours", "≤ 0.50" if f32 else "≤ 0.33"),
        ):
            what = f"memory, {dtype}, {at['batch']} x {at['length']}: {eager} / {peer}"
            row(what, results[eager]["GiB"], results[peer]["GiB"], "GiB", goal)


def infer(args):
    """Forward passes, generation, and what one does with an adapter."""
    for batch, length, rounds in ((1, 64, 5 * args.steps), (8, 256, args.steps)):
        result = race(args, rounds, {"latency": (latency, dict(batch=batch, length=length))})["latency"]
        for name, goal in (("merged", "1.00 ± 0.02"), ("adapted", "")):
            row(f"forward, {batch} x {length}: {name} / plain", 1e3 * result[name], 1e3 * result["plain"], "ms", goal)
    for batch, goal in ((1, "≥ 1.0"), (16, "≥ 1.2")):
        jobs = {who: (generation, dict(who=who, batch=batch)) for who in ("ours", "transformers")}
        results = race(args, min(args.steps, 3), jobs).values()
        speed = (result["tokens"] / result["seconds"] for result in results)
        row(f"generation, batch {batch}: ours / transformers", *speed, "tok/s", goal)
    result = race(args, min(args.steps, 3), {"adapters": (adapters, {})})["adapters"]
    for what in ("saving", "loading", "swapping", "merging", "unmerging"):
        row(f"an adapter, {what}: ours / PEFT", 1e3 * result[what, 0], 1e3 * result[what, 1], "ms")


FIRST_TOKEN = """import sys, torch, transformers
folder, device, dtype = sys.argv[1:]
model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
idx = torch.tensor([[68, 111, 103]], device=device)
print(model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=1, do_sample=False, pad_token_id=0))"""


def command(args):
    """From the command to the first token. We read a tokenizer too; transformers is given the ids."""
    ours = [ROOT / "sample.py", *"--prompt Dog --max-new-tokens 1 --temperature 0".split()]
    ours += ["--model", args.folder, "--device", args.device, "--dtype", args.dtypes[0]]
    seconds = [], []
    for _ in range(4):
        for i, arguments in enumerate((ours, ["-c", FIRST_TOKEN, args.folder, args.device, args.dtypes[0]])):
            start = time.perf_counter()
            failed = subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL).returncode
            seconds[i].append(math.nan if failed else time.perf_counter() - start)
    ours, peer = np.array(seconds)[:, 1:]  # the first fills the system's cache of files
    row("from the command to the first token: ours / transformers", ours, peer, "s", "≤ 0.5")


def two(args):
    """Two runs of `python train.py` at once, with the GOMP_SPINCOUNT that it sets, and with OpenMP's own."""
    from test_two_runs import two_runs

    alone = {}
    for spins, goal in (({}, "≥ 0.25"), ({"GOMP_SPINCOUNT": "300000"}, "")):
        name = "OpenMP's own GOMP_SPINCOUNT" if spins else "train.py's GOMP_SPINCOUNT"
        alone[name], together = np.array(two_runs(5, **spins)).T
        row(f"{name}: one of two runs at once / one alone", together, alone[name], "steps/s", goal)
    row(f"alone: {' / '.join(alone)}", *alone.values(), "steps/s", "≥ 0.85")


def growth(args):
    """How the cost of our LoRA step grows, beside what theory says."""
    B, T, gpu = args.batch, args.length, args.device == "cuda"
    sizes = ["small", "half"] if args.size == "small" else ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    long = dict(batch=1, length=1024 if gpu else T)  # what a card of 8, 16 or 24 GB has room for
    tables = {
        "batch": [dict(batch=b) for b in (1, B, 2 * B)],
        "length": [dict(batch=1, length=t) for t in (T // 2, T, 2 * T, 4 * T) if t <= 1024],
        "r": [dict(batch=B // 2 or 1, r=r) for r in (1, 4, 16, 64)],
        "size": [dict(size=s) | long for s in sizes],
    }
    for what, points in tables.items():
        points = [dict(size=args.size, batch=B, length=T, r=4) | point for point in points]
        fixed = ", ".join(f"{key} {value}" for key, value in points[0].items() if key != what)
        print(f"\n| {what} ({fixed}) | step | × first | operations × first | memory | weights and kept activations |")
        print("|---" * 6 + "|")
        folders, results = [prepare(args, point["size"]) for point in points], {}
        jobs = [
            (p[what], (training, dict(p, who="ours, LoRA", folder=f))) for p, f in zip(points, folders, strict=True)
        ]
        # They take turns, too, but for the sizes: together those would not fit.
        for group in [[job] for job in jobs] if what == "size" else [jobs]:
            results |= race(args, min(args.steps, 3), dict(group))
        for point, result in zip(points, results.values(), strict=True):
            seconds, first = median(result["seconds"]), median(results[points[0][what]]["seconds"])
            times = f"{seconds / first:.2f} | {flops(**point) / flops(**points[0]):.2f}"
            GiB = f"{result['GiB'][-1]:.2f} GiB | {args.bytes * memory(**point) / 2**30:.2f} GiB"
            print(f"| {point[what]} | {seconds:.3g} s | {times} | {GiB} |", flush=True)


def prepare(args, size):
    """The folder with random weights of this size, written when it is first asked for."""
    folder = os.path.join(args.root, size)
    if not os.path.exists(folder):
        race(args, 0, {"preparation": (preparation, dict(folder=folder))})
    return folder


def machine(args):
    """What this runs on, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")] or [platform.processor()]
    if args.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names[0] += ", " + subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "loralib"))
    return f"{names[0]}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}"


def main():
    sections = dict(train=train, infer=infer, command=command, two=two, growth=growth)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=sections, default=list(sections), metavar="SECTION", help=", ".join(sections))
    add("--size", choices=SIZES, default="gpt2", help=f"of the model: {', '.join(SIZES)} (gpt2, which is 124M)")
    add("--batch", type=int, help="sequences a step (4; 8 on a GPU, 2 for small)")
    add("--length", type=int, help="tokens a sequence (256; 512 on a GPU, 64 for small)")
    add("--steps", type=int, default=5, help="rounds that count (5; what is slow takes 3 or 2)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    batch, length = (2, 64) if args.size == "small" else (8, 512) if args.device == "cuda" else (4, 256)
    args.batch, args.length = args.batch or batch, args.length or length
    args.dtypes, args.bytes = (["bfloat16"], 2) if args.device == "cuda" else (["float32", "bfloat16"], 4)
    with tempfile.TemporaryDirectory() as args.root:
        args.folder = os.path.join(args.root, args.size)
        print(f"{args.size}, {args.batch} x {args.length} tokens, {machine(args)}, {time.strftime('%Y-%m-%d')}\n")
        print(f"| what | ours | the other | ratio | range | goal |\n{'|---' * 6}|")
        prepare(args, args.size)
        for name in sections:
            if name in args.only:
                sections[name](args)


SPAWN = multiprocessing.get_context("spawn")
if __name__ == "__main__":
    main()
