"""Fine-tune GPT-2, with LoRA or in full, on one GPU or a laptop's CPU.

python train.py                                 # make a tiny GPT-2 talk like a pirate
python train.py --model gpt2 --data my.txt      # or .jsonl: {"prompt", "completion"}
python train.py --model gpt2-medium --data e2e  # the paper's task and settings
python train.py --resume out/gpt2-my            # continue an interrupted run
"""

import argparse
import hashlib
import json
import math
import os
import random
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # see sample.py

import torch
from torch.nn.utils.rnn import pad_sequence

import sample
from gpt import EOS, GPT, atomic_write, encode_text, load_tokenizer
from lora import add_lora, save_lora
from notebooks import e2e, toy

TASKS = {"toy": toy, "e2e": e2e}
FILE_RECIPE = e2e.RECIPE | {"epochs": 3, "label_smoothing": 0.0, "lora_dropout": 0.0}


def make_parser():
    parser = argparse.ArgumentParser("train.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.description = "Fine-tune GPT-2. Defaults are in (); * means it depends on --data."
    add = parser.add_argument
    add("--data", default="toy:pirate", help="toy:VOICE, e2e, X.txt, X.jsonl")
    add("--model", help="gpt2, gpt2-medium, ..., a folder, or new: random weights *")
    add("--method", choices=["lora", "full"], default="lora", help="full: all weights")
    add("--r", type=int, default=4, help="rank (4)")
    add("--alpha", type=float, default=32.0, help="alpha / r scales the update (32)")
    add("--lora-dropout", type=float, help="dropout on the input of A *")
    add("--targets", nargs="+", default=["c_q", "c_v"], help="layers (c_q c_v)")
    add("--steps", type=int, help="optimizer steps *")
    add("--batch-size", type=int, help="examples per micro-batch *")
    add("--grad-accum", type=int, default=1, help="micro-batches per step (1)")
    add("--lr", type=float, help="peak learning rate *")
    add("--weight-decay", type=float, default=0.01, help="of AdamW (0.01)")
    add("--warmup", type=int, help="steps of linear warmup; then linear decay *")
    add("--label-smoothing", type=float, help="in the training loss *")
    add("--seed", type=int, default=0, help="random seed (0)")
    add("--eval-every", type=int, help="steps between evaluations *")
    add("--save-every", type=float, default=5, help="minutes between checkpoints (5)")
    add("--device", choices=["cuda", "mps", "cpu"], help="default: the fastest")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="(by device)")
    add("--compile", action="store_true", help="slow start, then faster steps")
    add("--out", help="folder for all results (out/MODEL-DATA)")
    add("--resume", metavar="DIR", help="continue the run in DIR, with its settings")
    return parser


def resolve_settings(args, n_examples=None):
    """Set what the command line left open, from the recipe for the data."""
    task = TASKS.get(args.data.partition(":")[0])
    for key, value in (FILE_RECIPE | (task.RECIPE if task else {})).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if args.steps is None:
        args.steps = math.ceil(args.epochs * n_examples / (args.batch_size * args.grad_accum))
    if args.warmup is None:
        args.warmup = min(500, args.steps // 10)
    return args


def default_args(**overrides):
    """The settings of `python train.py` with these changes, for `train`."""
    args = make_parser().parse_args([])
    if unknown := overrides.keys() - vars(args).keys():
        raise TypeError(f"there is no setting {min(unknown)}")
    vars(args).update(overrides)
    return resolve_settings(args)


def load_data(data, tokenizer, block_size):
    """(train_data, val_data: at most 256) for any --data. Raises OSError or ValueError."""
    (task_name, _, subset), suffix = data.partition(":"), Path(data).suffix.lower()
    task = TASKS.get(task_name)
    if task or suffix == ".jsonl":
        splits = task.load_pairs(subset) if task else [e2e.read_pairs(data)]
        splits = [[encode_pair(tokenizer, *pair) for pair in pairs] for pairs in splits]
    elif suffix == ".txt":
        ids = encode_text(tokenizer, e2e.read_text(data))
        # Blocks overlap by one token: every token but the first is a target.
        starts = range(0, len(ids) - 1, block_size)
        splits = [[(ids[start : start + block_size + 1], 1) for start in starts]]
    else:
        raise ValueError(f"--data {data}: expected toy:VOICE, e2e, .txt or .jsonl")
    n_read = sum(map(len, splits))
    splits = [[ex for ex in split if len(ex[0]) <= block_size + 1] for split in splits]
    n_kept = sum(map(len, splits))
    if n_kept < n_read:
        print(f"{data}: {n_kept} of {n_read} examples fit in {block_size} tokens")
    if n_kept <= n_read / 2:
        raise ValueError(f"{data} is empty, or half its examples exceed the context")
    if len(splits) == 1:
        n_train = math.ceil(0.95 * n_kept)  # the last twentieth is for validation
        splits = [splits[0][:n_train], splits[0][n_train:]]
    return splits[0], random.Random(0).sample(splits[1], min(256, len(splits[1])))


def encode_pair(tokenizer, prompt, completion):
    """An example: the ids of "prompt EOS completion EOS", and how many are not targets."""
    prompt_ids = encode_text(tokenizer, prompt + EOS)
    completion_ids = encode_text(tokenizer, " " + completion + EOS)
    return prompt_ids + completion_ids, len(prompt_ids)


def collate(examples, device):
    """Token ids (B, T) on the device, targets (B, T) on the CPU; -100 means no target.

    Padding comes last and has no targets. It needs no mask, since attention is causal.
    """
    idx = [torch.tensor(ids[:-1]) for ids, _ in examples]
    targets = [torch.tensor([-100] * (n - 1) + ids[n:]) for ids, n in examples]
    targets = pad_sequence(targets, batch_first=True, padding_value=-100)
    return pad_sequence(idx, batch_first=True).to(device), targets


def train(model, train_data, val_data, args, on_log=None, optimizer=None):
    """Train all parameters that require gradients. Returns the log, a list of metrics.

    args: from `default_args`. Training resumes from a checkpoint in args.out, if any.
    on_log: called with each new dict of metrics.
    optimizer: used instead of AdamW. Each group's lr is its peak learning rate.
    Raises FloatingPointError if the loss is not finite.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if optimizer is None:
        optimizer = torch.optim.AdamW(params.values(), args.lr, weight_decay=args.weight_decay)
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    device, weight_dtype = model.wte.weight.device, model.wte.weight.dtype
    dtype = getattr(torch, args.dtype) if args.dtype else weight_dtype
    # LoRA: frozen weights have this dtype, LoRALinear casts A and B, autocast is off.
    # Full fine-tuning: weights are float32; autocast casts them for each product.
    autocast = torch.autocast(device.type, dtype, enabled=dtype != weight_dtype)
    # Small float16 gradients underflow. Scaling up the loss prevents this.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    log, running_loss, start_step = [], 0.0, 0
    checkpoint_path = Path(args.out or "", "checkpoint.pt")
    if args.out and checkpoint_path.exists():
        checkpoint = torch.load(checkpoint_path, map_location=device, weights_only=True)
        model.load_state_dict(checkpoint["params"], strict=False)
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        log, running_loss, start_step = (checkpoint[k] for k in ("log", "running_loss", "step"))
    examples_per_step = args.batch_size * args.grad_accum
    examples = shuffle_epochs(train_data, args.steps * examples_per_step, args.seed)
    n_tokens, last_log_time, last_save_time = 0, time.time(), time.time()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model.train()
    for step in range(start_step, args.steps):
        # Batch. It may straddle two epochs.
        batch = examples[step * examples_per_step : (step + 1) * examples_per_step]
        starts = range(0, examples_per_step, args.batch_size)
        micro_batches = [collate(batch[i : i + args.batch_size], device) for i in starts]
        n_targets = sum((targets != -100).sum() for _, targets in micro_batches)

        # Forward and backward.
        torch.manual_seed(args.seed * 10**9 + step)  # the same dropout in a resumed run
        for idx, targets in micro_batches:
            with autocast:
                loss = model(idx, targets, args.label_smoothing)
            # Weighted by target count, the losses add up to the mean of the batch.
            loss = loss * ((targets != -100).sum() / n_targets)
            scaler.scale(loss).backward()
            running_loss = running_loss + loss.detach()
            n_tokens += idx.numel()  # including padding

        # Step. As in the authors' code, gradients are not clipped.
        for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = get_lr(step, base_lr, args.warmup, args.steps)
        scaler.step(optimizer)  # skipped if a float16 gradient overflowed
        scaler.update()
        optimizer.zero_grad()
        steps_done = step + 1

        # Log and evaluate. Only train_loss includes dropout and label smoothing.
        should_eval = steps_done % (args.eval_every or args.steps) == 0 or step + 1 == args.steps
        if should_eval or steps_done % max(1, args.eval_every // 5) == 0:
            train_loss = float(running_loss) / (steps_done - (log[-1]["step"] if log else 0))
            if not math.isfinite(train_loss):
                raise FloatingPointError(f"loss is {train_loss} at step {steps_done}: lower --lr")
            metrics = dict(step=steps_done, train_loss=train_loss, val_loss=math.nan)
            metrics["lr"] = optimizer.param_groups[0]["lr"]
            metrics["tokens_per_sec"] = n_tokens / (time.time() - last_log_time)
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9  # 0 on a CPU
            if should_eval:
                with autocast:
                    metrics["val_loss"] = evaluate(model, val_data, args.batch_size)
            log.append(metrics)
            if args.out:
                write_log(args.out, log)
            running_loss, n_tokens, last_log_time = 0.0, 0, time.time()
            if on_log:
                on_log(metrics)

        # Checkpoint.
        if args.out and time.time() - last_save_time >= 60 * args.save_every:
            checkpoint = dict(step=steps_done, log=log, running_loss=running_loss, params=params)
            checkpoint |= dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            atomic_write(checkpoint_path, partial(torch.save, checkpoint))
            last_save_time = time.time()
    model.eval()
    return log


def get_lr(step, base_lr, warmup, steps):
    """Linear warmup to base_lr, then linear decay toward 0."""
    return base_lr * min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))


def shuffle_epochs(data, n_draws, seed):
    """n_draws examples in training order; each epoch is a new permutation of the data."""
    generator = torch.Generator().manual_seed(seed)
    n_epochs = math.ceil(n_draws / len(data))
    epochs = [torch.randperm(len(data), generator=generator) for _ in range(n_epochs)]
    return [data[i] for i in torch.cat(epochs)[:n_draws]]


@torch.no_grad()
def evaluate(model, data, batch_size):
    """The mean loss over all targets, without dropout. It is nan without examples."""
    was_training = model.training
    model.eval()
    total_loss = n_targets = 0
    for start in range(0, len(data), batch_size):
        idx, targets = collate(data[start : start + batch_size], model.wte.weight.device)
        n_targets += (targets != -100).sum()
        total_loss += model(idx, targets) * (targets != -100).sum()
    model.train(was_training)
    return float(total_loss / n_targets) if data else math.nan


def write_log(out, log):
    rows = [log[0].keys(), *(metrics.values() for metrics in log)]
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    atomic_write(Path(out, "log.csv"), lambda tmp: tmp.write_text(text))


def print_metrics(metrics):
    val_text = "" if math.isnan(metrics["val_loss"]) else f"{metrics['val_loss']:.4f}"
    print(f"step {metrics['step']:5}  loss {metrics['train_loss']:.4f}  val {val_text:6}", end="")
    print(f"  lr {metrics['lr']:.1e}  {metrics['tokens_per_sec']:,.0f} tokens/s", flush=True)


def load_base(name, dtype=torch.float32, device="cpu"):
    """Load a trained GPT. If the tiny base model is missing, train it first."""
    if str(name) == sample.TINY and not Path(name, "model.safetensors").exists():
        print(f"Training the base model, {name}, first. This happens only once.")
        main(["--model", "new", "--data", "toy:all", "--steps", "600", "--out", name])
    if str(name) == sample.TINY and toy.VOCAB != json.loads(Path(name, "vocab.json").read_bytes()):
        print(f"warning: toy.py has new words; delete {name} to train it again with them")
    return GPT.from_pretrained(name, dtype, device)


def claim_folder(args):
    """One run per folder: write settings.json, unless the folder is already taken."""
    path = Path(args.out, "settings.json")
    keys = vars(args).keys() - {"device", "compile", "save_every", "out", "resume"}
    settings = json.dumps({key: vars(args)[key] for key in sorted(keys)}, indent=2)
    has_others = any(other != path for other in path.parent.glob("*"))
    if has_others and not (path.exists() and path.read_text() == settings):
        raise ValueError(f"{args.out} holds other files or a different run: change --out")
    atomic_write(path, lambda tmp: tmp.write_text(settings))


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with sample.cli_errors(parser):
        if args.resume:  # its settings become the defaults
            folder = Path(args.resume)
            is_finished = any(folder.glob("*model.safetensors")) and not any(folder.glob("*.pt"))
            if is_finished or args.out:
                raise ValueError(f"--resume {folder}: the run is finished, or --out is given")
            settings = json.loads((folder / "settings.json").read_bytes())
            parser.set_defaults(**settings, out=args.resume)
            args = parser.parse_args(argv)
        try:
            run(args)
        except KeyboardInterrupt:
            has_checkpoint = args.out and Path(args.out, "checkpoint.pt").exists()
            advice = f"use --resume {args.out}" if has_checkpoint else "nothing was saved yet"
            parser.exit(130, f"\ninterrupted: {advice}\n")


def run(args):
    task_name, _, subset = args.data.partition(":")
    task, from_scratch = TASKS.get(task_name), args.model == "new"
    is_full = from_scratch or args.method == "full"
    args.method = "full" if is_full else "lora"
    args.model = args.model or (sample.TINY if task is toy else "gpt2")
    device = sample.pick_device(args.device)
    args.dtype = args.dtype or sample.pick_dtype(device)
    torch.manual_seed(args.seed)
    if from_scratch:  # saved, then loaded like any base model
        if not hasattr(task, "CONFIG"):
            raise ValueError("--model new needs data with a tokenizer, like toy:all")
        with tempfile.TemporaryDirectory() as tmp_dir:
            GPT(task.CONFIG).save_pretrained(tmp_dir)
            task.save_tokenizer(tmp_dir)
            model, tokenizer = GPT.from_pretrained(tmp_dir, device=device), load_tokenizer(tmp_dir)
    else:
        dtype = torch.float32 if is_full else getattr(torch, args.dtype)
        model, tokenizer = load_base(args.model, dtype, device), load_tokenizer(args.model)
    train_data, val_data = load_data(args.data, tokenizer, model.config.block_size)
    args.data_sha256 = hashlib.sha256(repr(train_data).encode()).hexdigest()
    resolve_settings(args, len(train_data))
    run_name = f"{Path(args.model).name}-{Path(args.data).stem}"
    args.out = args.out or f"out/{run_name.replace(':', '-')}"
    claim_folder(args)
    n_params = sum(p.numel() for p in model.parameters())
    pairs = task.load_pairs(subset)[1][:256] if hasattr(task, "metrics") else []
    prompts = [prompt for prompt, _ in pairs]
    base_texts = sample.generate_texts(model, tokenizer, prompts)
    if not is_full:
        torch.manual_seed(args.seed)
        add_lora(model, args.r, args.alpha, args.lora_dropout, args.targets)
    n_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"model  {args.model}: {n_params:,} parameters, {args.dtype} on {device}")
    print(f"{args.method}   {n_trainable:,} trainable parameters, {args.steps} steps, lr {args.lr}")
    print(f"data   {args.data}: {len(train_data):,} for training, {len(val_data):,} for validation")
    if args.compile:
        for block in model.h:
            block.compile()
    train(model, train_data, val_data, args, on_log=print_metrics)
    if is_full:
        model.save_pretrained(args.out)
    else:
        save_lora(model, args.out)
    if from_scratch:
        task.save_tokenizer(args.out)
    Path(args.out, "checkpoint.pt").unlink(missing_ok=True)
    with torch.compiler.set_stance("force_eager"):  # each new token changes the shapes
        texts = sample.generate_texts(model, tokenizer, prompts)
    for prompt, base_text, text in list(zip(prompts, base_texts, texts, strict=True))[:3]:
        print(f"\n{prompt}\n  base     {base_text}\n  trained  {text}")
    if pairs:
        for label, each in (("base", base_texts), ("trained", texts)):
            shares = [f"{name} {x:.1%}" for name, x in task.metrics(pairs, each).items()]
            print(f"{label:8}", *shares, sep="   ")
    (ids, n_prompt), flag = train_data[0], "--model" if is_full else "--lora"
    prompt = tokenizer.decode(ids[: n_prompt if n_prompt > 1 else 8])
    print(f'\nSaved. Try: python sample.py {flag} {args.out} --prompt "{prompt}"')


if __name__ == "__main__":
    main()
