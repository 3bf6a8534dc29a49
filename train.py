"""Fine-tune GPT-2, with LoRA or in full, on one GPU or a laptop's CPU.

python train.py                                 # make a tiny GPT-2 talk like a pirate
python train.py --model gpt2 --data my.txt      # or my.jsonl: prompts and completions
python train.py --model gpt2-medium --data e2e  # the paper's task and settings
python train.py --resume out/gpt2-my            # continue an interrupted run
"""

import argparse
import hashlib
import json
import math
import random
import re
import tempfile
import time
from functools import partial
from pathlib import Path

import sample  # sets GOMP_SPINCOUNT, so it must precede torch
import torch
from torch.nn.utils.rnn import pad_sequence

from gpt import EOS, GPT, atomic_write, encode_text, load_tokenizer
from lora import add_lora, save_lora
from notebooks import e2e, toy
from sample import TINY_MODEL

TASKS = {"toy": toy, "e2e": e2e}  # toy.py lists what a task must define
FILE_RECIPE = e2e.RECIPE | dict(epochs=3, eval_every=100, label_smoothing=0.0, lora_dropout=0.0)
RECIPES = {name: task.RECIPE for name, task in TASKS.items()} | {"files": FILE_RECIPE}


def make_parser():
    parser = argparse.ArgumentParser("train.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    recipes = [f"\n  {name:5}  {recipe}" for name, recipe in RECIPES.items()]
    parser.description, parser.epilog = __doc__, "* depends on --data:" + "".join(recipes)
    add = parser.add_argument
    add("--data", default="toy:pirate", help="toy:VOICE, e2e, X.txt or X.jsonl")
    add("--model", help="gpt2, ..., a folder, or new (gpt2; toy: out/tiny)")
    add("--out", help="folder for all results (out/MODEL-DATA)")
    add("--resume", metavar="DIR", help="continue the run in DIR, with its settings")
    add = parser.add_argument_group("LoRA").add_argument
    add("--method", choices=["lora", "full"], default="lora", help="full: all weights")
    add("--r", type=int, default=4, help="rank (4)")
    add("--alpha", type=float, default=32.0, help="alpha / r scales the update (32)")
    add("--lora-dropout", type=float, help="dropout on the input of A *")
    add("--targets", nargs="+", default=["c_q", "c_v"], help="adapted layers (c_q c_v)")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, help="optimizer steps *")
    add("--batch-size", type=int, help="examples per micro-batch *")
    add("--grad-accum", type=int, default=1, help="micro-batches per step (1)")
    add("--lr", type=float, help="peak learning rate *")
    add("--warmup", type=int, help="steps before decay (a tenth, at most 500)")
    add("--label-smoothing", type=float, help="in the training loss *")
    add("--seed", type=int, default=0, help="random seed (0)")
    add("--eval-every", type=int, help="steps between evaluations *")
    add("--save-every", type=float, default=5, help="minutes between checkpoints (5)")
    add("--device", choices=["cuda", "mps", "cpu"], help="default: the fastest")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="(by device)")
    add("--compile", action="store_true", help="slow start, then faster steps")
    return parser


def resolve_settings(args, n_examples=None):
    """Fill in the settings that were not given, from the recipe for the data."""
    recipe = FILE_RECIPE | RECIPES.get(args.data.partition(":")[0], {})
    given = {key: value for key, value in vars(args).items() if value is not None}
    vars(args).update(recipe | given)
    for key in ("steps", "batch_size", "grad_accum", "eval_every"):
        if vars(args)[key] is not None and vars(args)[key] < 1:
            raise ValueError(f"{key} must be at least 1")
    if args.steps is None:
        args.steps = math.ceil(args.epochs * n_examples / (args.batch_size * args.grad_accum))
    if args.warmup is None:
        args.warmup = min(500, args.steps // 10)
    return args


def default_args(**overrides):
    """The settings of `python train.py`, with changes. E2E and files need `steps`."""
    args = make_parser().parse_args([])
    if unknown := overrides.keys() - vars(args).keys():
        raise TypeError(f"there is no setting {min(unknown)}")
    vars(args).update(overrides)
    return resolve_settings(args)


def encode_pair(tokenizer, prompt, completion):
    """An example: (ids of "prompt EOS completion EOS", length of the prompt with EOS)."""
    prompt_ids = encode_text(tokenizer, prompt + EOS)
    return prompt_ids + encode_text(tokenizer, " " + completion + EOS), len(prompt_ids)


def load_data(data, tokenizer, block_size):
    """(train_data, val_data of at most 256 examples). Raises OSError or ValueError."""
    task_name, _, subset = data.partition(":")
    task, suffix = TASKS.get(task_name), Path(data).suffix.lower()
    if task or suffix == ".jsonl":
        splits = task.load_pairs(subset) if task else [e2e.read_pairs(data)]
        splits = [[encode_pair(tokenizer, *pair) for pair in pairs] for pairs in splits]
    elif suffix == ".txt":
        ids = encode_text(tokenizer, e2e.read_text(data))
        # Chunks overlap by one token: every token but the first is a target.
        starts = range(0, len(ids) - 1, block_size)
        splits = [[(ids[start : start + block_size + 1], 1) for start in starts]]
    else:
        raise ValueError(f"--data {data}: expected toy:VOICE, e2e, .txt or .jsonl")
    n_read = sum(map(len, splits))
    splits = [[ex for ex in split if len(ex[0]) <= block_size + 1] for split in splits]
    n_kept = sum(map(len, splits))
    if n_kept < n_read:
        print(f"{data}: {n_kept} of {n_read} examples fit in {block_size} tokens")
    if n_kept < max(1, n_read) / 2:
        raise ValueError(f"{data}: too few fit in {block_size} tokens: try --model gpt2")
    if len(splits) == 1:
        n_train = n_kept - min(256, n_kept // 20)  # 5% for validation, at most 256
        splits = [splits[0][:n_train], splits[0][n_train:]]
    return splits[0], random.Random(0).sample(splits[1], min(256, len(splits[1])))


def collate(examples, device):
    """Token ids (B, T) on the device, targets (B, T) on the CPU (see GPT.forward)."""
    idx = [torch.tensor(ids[:-1]) for ids, _ in examples]
    # The target at each position is the next token; -100 means none. Padding is last.
    targets = [torch.tensor([-100] * (n_prompt - 1) + ids[n_prompt:]) for ids, n_prompt in examples]
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
        optimizer = torch.optim.AdamW(params.values(), args.lr, weight_decay=0.01, fused=True)
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    device, weight_dtype = model.wte.weight.device, model.wte.weight.dtype
    compute_dtype = getattr(torch, args.dtype) if args.dtype else weight_dtype
    # LoRA: frozen weights have compute_dtype, A and B are cast to it, autocast is off.
    # Full fine-tuning: weights are float32, and autocast casts them for each matmul.
    autocast = torch.autocast(device.type, compute_dtype, enabled=compute_dtype != weight_dtype)
    # Small float16 gradients underflow. Scaling up the loss prevents this.
    scaler = torch.amp.GradScaler(device.type, enabled=compute_dtype == torch.float16)
    log, running_loss, start_step = [], 0.0, 0
    checkpoint_path = Path(args.out or "", "checkpoint.pt")
    if args.out and checkpoint_path.exists():
        checkpoint = torch.load(checkpoint_path, map_location=device, weights_only=True)
        model.load_state_dict(checkpoint["params"], strict=False)
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        log, running_loss, start_step = (checkpoint[key] for key in ("log", "running_loss", "step"))
    examples_per_step = args.batch_size * args.grad_accum
    examples = shuffle_epochs(train_data, args.steps * examples_per_step, args.seed)
    n_tokens, last_log_time, last_save_time = 0, time.time(), time.time()
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
            # Weighted by target count, the losses add up to the mean loss per target.
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

        # Log about five times per evaluation. train_loss includes dropout and smoothing.
        should_eval = steps_done % args.eval_every == 0 or steps_done == args.steps
        if should_eval or steps_done % max(1, args.eval_every // 5) == 0:
            train_loss = float(running_loss) / (steps_done - (log[-1]["step"] if log else 0))
            if not math.isfinite(train_loss):
                raise FloatingPointError(f"step {steps_done}: loss is {train_loss}; lower --lr")
            metrics = dict(step=steps_done, train_loss=train_loss, val_loss=math.nan)
            metrics["lr"] = optimizer.param_groups[0]["lr"]
            metrics["tokens_per_sec"] = n_tokens / (time.time() - last_log_time)
            if should_eval:
                with autocast:
                    metrics["val_loss"] = evaluate(model, val_data, args.batch_size)
            log.append(metrics)
            if args.out:
                rows = [metrics.keys(), *(entry.values() for entry in log)]
                text = "".join(",".join(map(str, row)) + "\n" for row in rows)
                atomic_write(Path(args.out, "log.csv"), partial(Path.write_text, data=text))
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
    """Linear warmup to base_lr, then linear decay toward 0: the lower of two lines."""
    return base_lr * min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))


def shuffle_epochs(examples, n_draws, seed):
    """n_draws examples in training order. Each epoch is a new permutation."""
    rng, order = random.Random(seed), []
    while len(order) < n_draws:
        order += rng.sample(examples, len(examples))
    return order[:n_draws]


@torch.no_grad()
def evaluate(model, examples, batch_size):
    """The mean loss over all targets, without dropout; nan if there are no examples."""
    device, was_training = model.wte.weight.device, model.training
    model.eval()
    total_loss = n_targets = 0
    for start in range(0, len(examples), batch_size):
        idx, targets = collate(examples[start : start + batch_size], device)
        n_targets += (targets != -100).sum()
        total_loss += model(idx, targets) * (targets != -100).sum()
    model.train(was_training)
    return float(total_loss / n_targets) if examples else math.nan


def print_metrics(metrics):
    template = "step {step:5}  loss {train_loss:.4f}  val {val_loss:6.4f}  lr {lr:.1e}"
    template += "  {tokens_per_sec:7,.0f} tokens/s"
    print(template.format_map(metrics).replace("nan", "   "), flush=True)


def load_base(name_or_dir, dtype=torch.float32, device="cpu"):
    """Load a trained GPT. If it is the tiny model and is missing, train it first."""
    if str(name_or_dir) == TINY_MODEL and not Path(TINY_MODEL, "model.safetensors").exists():
        print(f"Training {TINY_MODEL}, the base model, first. This happens once.")
        argv = ["--model", "new", "--data", "toy:all", "--steps", "600", "--out", TINY_MODEL]
        main([*argv, "--device", torch.device(device).type])
    return GPT.from_pretrained(name_or_dir, dtype, device)


def claim_folder(args, train_data):
    """Write settings.json. Raises ValueError if the folder has another run's files."""
    args.data_sha256 = hashlib.sha256(repr(train_data).encode()).hexdigest()
    path = Path(args.out, "settings.json")
    # All settings, except those that may change when a run is resumed.
    keys = vars(args).keys() - {"device", "compile", "save_every", "out", "resume"}
    text = json.dumps({key: vars(args)[key] for key in sorted(keys)}, indent=2)
    if set(path.parent.glob("*")) - {path} and not (path.exists() and path.read_text() == text):
        raise ValueError(f"{args.out} has another run's files: delete it, or change --out")
    atomic_write(path, lambda tmp: tmp.write_text(text))


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with sample.cli_errors(parser):
        if args.resume:  # its settings become the defaults
            has_result = any(Path(args.resume).glob("*model.safetensors"))
            if args.out or (has_result and not Path(args.resume, "checkpoint.pt").exists()):
                raise ValueError(f"--resume {args.resume}: it is finished, or --out was given too")
            settings = json.loads(Path(args.resume, "settings.json").read_bytes())
            parser.set_defaults(**settings, out=args.resume)
            args = parser.parse_args(argv)
        args.method = "full" if args.model == "new" else args.method
        for key in ("r", "alpha", "lora_dropout", "targets") if args.method == "full" else ():
            if vars(args)[key] != parser.get_default(key):
                raise ValueError(f"{key} has no effect when all weights are trained")
        try:
            run(args)
        except KeyboardInterrupt:
            if args.out and Path(args.out, "checkpoint.pt").exists():
                parser.exit(130, f'\nNext: python train.py --resume "{args.out}"\n')
            parser.exit(130, "\nInterrupted, without a checkpoint.\n")


def run(args):
    task_name, _, subset = args.data.partition(":")
    task, is_full = TASKS.get(task_name), args.method == "full"
    args.model = args.model or (TINY_MODEL if task is toy else "gpt2")
    base_name, from_scratch = args.model, args.model == "new"
    has_metrics = hasattr(task, "metrics") and not from_scratch
    val_pairs = task.load_pairs(subset)[1][:256] if has_metrics else []
    device = sample.pick_device(args.device)
    args.dtype = args.dtype or ("float32" if task is toy else sample.pick_dtype(device))
    torch.manual_seed(args.seed)
    if from_scratch:  # save a model with random weights, then load it like any other
        if not hasattr(task, "CONFIG"):
            raise ValueError("--model new needs data with a tokenizer, like toy:all")
        tmp_dir = tempfile.TemporaryDirectory()  # deleted when `run` ends
        base_name = tmp_dir.name
        GPT(task.CONFIG).save_pretrained(base_name)
        task.save_tokenizer(base_name)
    weight_dtype = torch.float32 if is_full else getattr(torch, args.dtype)
    model, tokenizer = load_base(base_name, weight_dtype, device), load_tokenizer(base_name)
    train_data, val_data = load_data(args.data, tokenizer, model.config.block_size)
    resolve_settings(args, len(train_data))
    name = f"{Path(args.model).name}-{Path(args.data).stem}"
    args.out = args.out or "out/" + re.sub("[: ]", "-", name)
    claim_folder(args, train_data)
    n_params = sum(p.numel() for p in model.parameters())
    prompts = [prompt for prompt, _ in val_pairs]
    base_texts = sample.generate_texts(model, tokenizer, prompts)
    print(f"base   {args.model}: {n_params:,} parameters, {args.dtype} on {device}")
    print(f"data   {args.data}: {len(train_data):,} for training, {len(val_data):,} for validation")
    base_loss = evaluate(model, (val_data or train_data)[:8], args.batch_size)
    if base_loss > math.log(model.config.vocab_size) and not from_scratch:
        print(f"warning: {args.model} cannot read {args.data}. New voice? Rename out. Else: gpt2")
    if not is_full:
        torch.manual_seed(args.seed)  # the same A, whatever ran before
        add_lora(model, args.r, args.alpha, args.lora_dropout, args.targets)
        print(f"LoRA   r {args.r}, alpha {args.alpha:g} on {' '.join(args.targets)}")
    n_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"train  {n_trainable:,} parameters, {args.steps} steps, peak lr {args.lr}")
    for block in model.h if args.compile else ():
        block.compile()
    train(model, train_data, val_data, args, on_log=print_metrics)
    (GPT.save_pretrained if is_full else save_lora)(model, args.out)
    Path(args.out, "checkpoint.pt").unlink(missing_ok=True)
    with torch.compiler.set_stance("force_eager"):  # each new token changes the shapes
        trained_texts = sample.generate_texts(model, tokenizer, prompts)
    changed = [i for i in range(len(prompts)) if base_texts[i] != trained_texts[i]]
    for i in changed[:: len(changed) // 3 + 1]:  # at most three
        example = f"\n{prompts[i]}\n  base     {base_texts[i]}\n  trained  {trained_texts[i]}"
        print(example.translate(sample.ESCAPES))
    if val_pairs:
        print(f"\nOn {len(val_pairs)} prompts not seen in training:")
        base_shares = task.metrics(val_pairs, base_texts)
        for name, share in task.metrics(val_pairs, trained_texts).items():
            print(f"  {name:16}  base {base_shares[name]:6.1%}   trained {share:6.1%}")
    ids, n_prompt = train_data[0]
    prompt = tokenizer.decode(ids[: n_prompt if n_prompt > 1 else 8])
    prompt = re.sub(r"""["“”$`!%\\\s\x00-\x1f]+""", " ", prompt).lstrip("-")  # safe in a shell
    flag = f'--model "{args.out}"' if is_full else f'--lora "{args.out}"'
    print(f'\nSaved in {args.out}. Next:\n  python sample.py {flag} --prompt "{prompt}"')
    print("  jupyter lab notebooks/lora.ipynb")


if __name__ == "__main__":
    main()
