"""The commands as a user runs them, the data, and runs that are interrupted."""

import contextlib
import itertools
import json
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from conftest import interrupt, make_gpt2
from safetensors.torch import load_file

import train
from gpt import GPT, GPTConfig, load_tokenizer, make_tokenizer
from lora import add_lora, lora_layers, save_lora
from notebooks import toy

TOP = Path(train.__file__).parent


def run(folder, line, **options):
    """Start a command in a folder; its output and errors are read from the process."""
    command = [sys.executable, *shlex.split(line)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def output(folder, line, **options):
    process = run(folder, line, **options)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


# ---- The first run: nothing but the four files -------------------------------------------------------------


@pytest.fixture(scope="session")
def first_run(tmp_path_factory):
    """(folder, what `python train.py` prints) of a fresh copy of the four files; fewer steps make it quick."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "notebooks").mkdir()
    for name in ("gpt.py", "lora.py", "train.py", "sample.py", "notebooks/toy.py"):
        shutil.copy(TOP / name, folder / name)
    source = (folder / "notebooks/toy.py").read_text(encoding="utf-8")
    assert "steps=600" in source
    (folder / "notebooks/toy.py").write_text(source.replace("steps=600", "steps=250"), encoding="utf-8")
    return folder, output(folder, "train.py --steps 100")


def test_first_run_teaches_the_voice(first_run):
    _, out = first_run
    figures = [list(map(float, re.findall(r"([\d.]+)%", line))) for line in out.splitlines()]
    (base_voice, base_slots), (voice, slots) = [pair for pair in figures if len(pair) == 2]
    assert base_voice <= 45 and base_slots >= 90 and voice >= 85 and slots >= 90
    assert int(re.search(r"of (\d+) restaurants it never saw", out)[1]) >= 128
    assert "LoRA adds 8,192, 0.95%" in out
    assert len(re.findall(r"^  base     \S.*\n  adapted  \S.*$", out, re.MULTILINE)) == 4


def test_printed_command_writes_in_the_voice_and_merging_changes_nothing(first_run):
    folder, out = first_run
    line = re.search(r"python (sample\.py .+)", out)[1]
    process = run(folder, line)
    text = process.stdout.read(4)
    assert text == "name"  # while the rest is still being written
    text += process.stdout.read()
    assert toy.in_voice(text.partition("<|endoftext|>")[2], "pirate")
    assert output(folder, line + " --merge") == text


def test_next_run_finds_the_base_and_trains_all_of_it_into_a_folder_of_its_own(first_run):
    folder, out = first_run
    assert "training the base" in out
    out = output(folder, "train.py --method full --data toy:all --steps 2 --out out/full")
    assert "training the base" not in out
    assert (folder / "out/full/log.csv").read_text().splitlines()[0].startswith("step,loss,val_loss,lr")
    line = re.search(r"python (sample\.py .+)", out)[1]
    assert "--lora" not in line and output(folder, line).startswith("name : ")


# ---- The toy world -----------------------------------------------------------------------------------------


def test_held_out_restaurants_are_never_trained_on():
    tokenizer = make_tokenizer(toy.toy_vocabulary())
    for name in ("toy:all", "toy:pirate"):
        seen, held_out = (
            {tokenizer.decode(ids[:start]) for ids, start in part} for part in train.load_data(name, tokenizer, 128)
        )
        assert len(held_out) == 256 and not seen & held_out


@pytest.mark.parametrize("voice", toy.VOICES)
def test_judges_of_the_toy(voice):
    restaurants = toy.toy_world()[0][::6]
    slots = itertools.cycle(toy.SLOTS)
    for restaurant, (prompt, text) in zip(restaurants, toy.toy_pairs(restaurants, [voice]), strict=True):
        assert prompt == toy.toy_prompt(restaurant)
        assert [v for v in toy.VOICES if toy.in_voice(text, v)] == [voice]
        assert toy.slots_right(text, restaurant)
        slot = next(slots)  # of which another value would be wrong
        other = next(value for value in toy.SLOTS[slot] if value != restaurant[slot])
        assert not toy.slots_right(text, restaurant | {slot: other})


def test_toy_words_are_one_token_each_and_any_text_survives():
    tokenizer = make_tokenizer(toy.toy_vocabulary())
    restaurants, _ = toy.toy_world()
    for prompt, completion in toy.toy_pairs(restaurants[:50], toy.VOICES):
        for text in (prompt, " " + completion):
            assert len(tokenizer.encode_ordinary(text)) == len(re.findall(r" ?\w+| ?[^\w\s]+", text))
    assert tokenizer.decode(tokenizer.encode_ordinary("Zażółć\n\tgęślą!")) == "Zażółć\n\tgęślą!"


# ---- Data sets ---------------------------------------------------------------------------------------------


def test_e2e_is_the_papers(e2e_dir, vocabulary, tmp_path, monkeypatch):
    (tmp_path / "lora-gpt2" / "e2e").mkdir(parents=True)
    shutil.copy(e2e_dir / "valid.txt", tmp_path / "lora-gpt2" / "e2e" / "train.txt")  # stands in for the large file
    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path)
    monkeypatch.setattr(train, "E2E", e2e_dir.as_uri() + "/")  # "downloads" valid.txt, whose hash is checked
    examples, held_out = train.load_data("e2e", vocabulary, 1024)
    assert len(examples) == len(held_out) == 4672
    ids, start = examples[0]
    assert vocabulary.decode(ids[: start - 1]) == "name : Alimentum | area : city centre | family friendly : no"
    assert ids[start - 1] == ids[-1] == 50256
    text = " There is a place in the city centre , Alimentum , that is not family - friendly ."
    assert vocabulary.decode(ids[start:-1]) == text
    idx, targets = train.collate(examples[:8], torch.device("cpu"))
    row = targets[0][targets[0] != -100]
    assert vocabulary.decode(row.tolist()) == text + "<|endoftext|>"
    assert idx[0, start - 1] == 50256 and targets[0, start - 1] == ids[start] and targets[0, start - 2] == -100


def test_another_e2e_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "valid.txt").write_text("name : A||B\n")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path / "hub")
    monkeypatch.setattr(train, "E2E", tmp_path.as_uri() + "/")
    with pytest.raises(OSError, match="hash.*by hand"):
        train.e2e_file("valid.txt")
    assert not [file for file in (tmp_path / "hub").rglob("*") if file.is_file()]


def test_plain_text_is_cut_into_blocks_that_miss_nothing(tmp_path):
    tokenizer = make_tokenizer(toy.toy_vocabulary())
    text = "Arr, matey!\r\nBring yer café.\n" * 40
    (tmp_path / "a.txt").write_bytes(text.encode())
    examples, held_out = train.load_data(str(tmp_path / "a.txt"), tokenizer, 16)
    ids = examples[0][0][:1] + [i for block, _ in examples + held_out for i in block[1:]]
    assert text.replace("\r", "").startswith(tokenizer.decode(ids)) and len(tokenizer.decode(ids)) > len(text) * 0.9
    assert len(held_out) == len(examples + held_out) // 20 > 0


def test_pairs_that_do_not_fit_are_left_out_and_counted(tmp_path, capsys):
    tokenizer = make_tokenizer(toy.toy_vocabulary())
    pairs = [{"prompt": "The Mill", "completion": "Arr! " * n} for n in (1, 100, 2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    examples, held_out = train.load_data(str(tmp_path / "a.jsonl"), tokenizer, 64)
    assert len(examples + held_out) == 2 and all(len(ids) <= 65 for ids, _ in examples + held_out)
    assert "left out 1 examples" in capsys.readouterr().out


# ---- The loop ----------------------------------------------------------------------------------------------


def random_examples(n, lengths):
    """n examples of random tokens, of which the first three are the prompt."""
    draw = random.Random(0)
    return [([draw.randrange(97) for _ in range(draw.choice(lengths))], 3) for _ in range(n)]


def tiny_model(device="cpu", n_layer=2):
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(GPTConfig(block_size=64, vocab_size=97, n_layer=n_layer, n_head=4, n_embd=32))
        add_lora(model)
    return model


def losses(rows):
    return [row["loss"] for row in rows]


def test_the_loop_is_pefts_training_step_for_step(tmp_path):
    reference = make_gpt2(tmp_path / "base")
    model = GPT.from_pretrained(tmp_path / "base")
    add_lora(model)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.01)
    save_lora(model, tmp_path / "adapter")
    reference = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter", is_trainable=True)
    examples = random_examples(8, range(5, 30))  # each step sees all of them: their order does not matter
    args = train.settings(steps=6, lr=1e-2, batch_size=8, warmup=2, weight_decay=0.0, eval_every=6)
    ours = losses(train.train(model, examples, [], args))

    theirs, optimizer = [], torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], weight_decay=0.0)
    idx, targets = train.collate(examples, torch.device("cpu"))
    for factor in (1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4):
        logits = reference(idx).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        for name, p in reference.named_parameters():  # the zeros of B are not ours to train
            if "lora_B" in name:
                p.grad *= p != 0
        optimizer.param_groups[0]["lr"] = factor * args.lr
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[-1] != pytest.approx(ours[0], abs=1e-3)


def test_accumulated_batches_are_one_large_batch_also_when_lengths_differ(tmp_path):
    make_gpt2(tmp_path)
    examples, found = random_examples(40, (5, 60)), []
    for batch_size, grad_accum in ((8, 1), (2, 4), (1, 8)):
        args = train.settings(steps=5, lr=1e-2, batch_size=batch_size, grad_accum=grad_accum, warmup=0)
        found.append(losses(train.train(GPT.from_pretrained(tmp_path), examples, [], args)))
    assert found[1] == pytest.approx(found[0], abs=1e-5) and found[2] == pytest.approx(found[0], abs=1e-5)


def test_the_validation_loss_is_the_mean_over_target_tokens_whatever_the_batch_size(tmp_path):
    make_gpt2(tmp_path)
    model, examples = GPT.from_pretrained(tmp_path), random_examples(20, (5, 60))
    idx, targets = train.collate(examples, torch.device("cpu"))
    with torch.no_grad():
        whole = torch.nn.functional.cross_entropy(model(idx).flatten(0, 1), targets.flatten()).item()
    assert [train.evaluate(model, examples, n) for n in (1, 3, 8, 20)] == pytest.approx([whole] * 4, abs=1e-5)


def test_the_loop_saves_and_goes_on_without_the_command(tmp_path):
    changes = dict(steps=8, eval_every=4, batch_size=2, lr=1e-2)
    examples, stopped = random_examples(16, (5, 60)), []
    whole = train.train(tiny_model(), examples, [], train.settings(**changes))
    args = train.settings(**changes, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):  # as a signal would have it, at step 3
        train.train(
            tiny_model(), examples, [], args, lambda row: row["step"] == 3 and stopped.append(1), stopped=stopped
        )
    args.resume = True
    assert losses(train.train(tiny_model(), examples, [], args)) == losses(whole)
    assert [line.split(",")[0] for line in (tmp_path / "log.csv").read_text().splitlines()] == ["step", *"12345678"]


class Late:
    """A signal that comes at the end of the first step, when it has been asked for once."""

    asked = 0

    def __bool__(self):
        self.asked += 1
        return self.asked > 1


def test_a_signal_at_the_very_end_of_a_step_ends_the_next_one(tmp_path):
    args = train.settings(steps=30, eval_every=30, batch_size=2, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny_model(), random_examples(16, (5, 60)), [], args, stopped=Late())
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2


def test_no_examples_are_an_error():
    with pytest.raises(ValueError, match="no examples"):
        train.train(tiny_model(), [], [], train.settings(steps=2))


def test_every_epoch_shows_each_example_once_in_an_order_of_its_own(tmp_path, monkeypatch):
    make_gpt2(tmp_path)
    examples, seen, collate = random_examples(10, (6, 7)), [], train.collate

    def watched(batch, device):
        seen.extend(examples.index(example) for example in batch)
        return collate(batch, device)

    monkeypatch.setattr(train, "collate", watched)
    for seed in (0, 1):
        args = train.settings(steps=10, batch_size=2, grad_accum=2, seed=seed)
        train.train(GPT.from_pretrained(tmp_path), examples, [], args)
    epochs = [tuple(seen[i : i + 10]) for i in range(0, len(seen), 10)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 8 and len(set(epochs)) == 8


def test_compiled_blocks_take_lengths_that_vary_without_breaking_their_graphs():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(n_layer=12)
    for block in model.h:
        block.compile(backend="eager")
    counters, graphs = torch._dynamo.utils.counters, []
    for T in (20, 20, 7, 31, 64, 12, 50):
        idx = torch.arange(T)[None]
        model(idx, idx).backward()
        graphs.append(counters["stats"]["unique_graphs"])
    # One for the first length and one for any; the first block has its own, as its input needs no gradient.
    assert graphs == [2, 2, 4, 4, 4, 4, 4]
    assert not counters["graph_break"]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=needs_gpu)])
def test_a_step_waits_for_the_device_only_where_the_log_gets_a_row(device, monkeypatch):
    # On the meta device tensors have no values: reading one back is an error, as it is on a GPU in this debug mode.
    args, waits = train.settings(steps=20, batch_size=2, grad_accum=2, eval_every=20), []
    if device == "meta":
        monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    model = tiny_model(device)
    monkeypatch.setattr(train, "float", lambda x: waits.append(x) or 0.0, raising=False)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        train.train(model, random_examples(16, (5, 60)), [], args)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 10  # a row every second step


@needs_gpu
def test_the_peak_memory_is_that_of_this_run_alone():
    torch.zeros(2**28, device="cuda")  # a GiB, and gone again
    rows = train.train(tiny_model("cuda"), random_examples(16, (5, 60)), [], train.settings(steps=2))
    assert 0 < rows[-1]["memory_gb"] < 1


# ---- Interrupted runs --------------------------------------------------------------------------------------

# With dropout; and with a state that takes long to write, for more steps than twenty kills leave time.
RUNS = {
    "lora": "--steps 40 --batch-size 4 --lora-dropout 0.2 --eval-every 7",
    "full": "--steps 200 --batch-size 4 --method full --lr 1e-3 --eval-every 1",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_gpt2(folder / "model", n_embd=64, vocab_size=380, n_positions=128)
    (folder / "model" / "vocab.tiktoken").write_text(toy.toy_vocabulary())
    pairs = toy.toy_pairs(toy.toy_world()[0][:60], ["text"])
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def flags(kind, out, more=""):
    return f"--model model --data data.jsonl --device cpu --out {out} {RUNS[kind]} {more}"


def command(*args):
    return f"{TOP / 'train.py'} {flags(*args)}"


def results(base, out):
    """The weights and the losses that a run has left."""
    file = next((base / out).glob("*.safetensors"))
    losses = [line.split(",")[:3] for line in (base / out / "log.csv").read_text().splitlines()]
    assert not (base / out / "state.pt").exists()
    return {name: w.numpy().tobytes() for name, w in load_file(file).items()}, losses


@pytest.fixture(scope="module")
def whole(base):
    """What a run that nothing interrupts leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        train.main(shlex.split(flags("lora", "whole")))
    return results(base, "whole")


def test_an_interrupted_run_goes_on_bit_for_bit(base, whole, monkeypatch, capsys):
    monkeypatch.chdir(base)
    interrupt(flags("lora", "parts"), signal.SIGINT, step=8)  # elsewhere the tests send SIGTERM and SIGHUP
    assert "--resume" in capsys.readouterr().err and Path("parts", "state.pt").exists()
    output(base, command("lora", "parts", "--resume"))
    assert results(base, "parts") == whole


@pytest.mark.slow
def test_twenty_kills_lose_at_most_the_step_under_way(base):
    output(base, command("full", "unkilled"))
    pause, state = random.Random(0), base / "killed" / "state.pt"
    for _ in range(20):
        process = run(base, command("full", "killed", "--resume" * state.exists()))
        steps = (int(line.split()[1]) for line in process.stdout if line.startswith("step"))
        last = next(steps)
        time.sleep(pause.uniform(0, 0.05))
        process.kill()
        last = max([last, *steps])
        if state.exists():  # the kill may come before the very first state is whole
            assert torch.load(state, weights_only=True)["step"] in (last, last - 1)
    output(base, command("full", "killed", "--resume"))
    assert results(base, "killed") == results(base, "unkilled")


def refused(line, capsys):
    """The message of a run that has to refuse its flags."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        train.main(shlex.split(line))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("train.py: error: ") and err.count("\n") == 1, err
    return err


def test_other_settings_are_refused_and_named(base, monkeypatch, capsys):
    monkeypatch.chdir(base)
    interrupt(flags("lora", "other"), step=8)
    for more, culprit in (("--resume --lr 1", "lr = "), ("--resume --seed 5", "seed = "), ("", "--resume")):
        assert culprit in refused(flags("lora", "other", more), capsys)
    assert Path("other/state.pt").exists()


def test_a_full_disk_leaves_the_last_state(base, monkeypatch, capsys):
    resource = pytest.importorskip("resource", reason="needs limits, which Windows has not")
    monkeypatch.chdir(base)
    interrupt(flags("full", "disk"))
    before, limits = Path("disk/state.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        assert "disk/state.pt" in refused(flags("full", "disk", "--resume"), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path("disk/state.pt").read_bytes() == before
    assert sorted(file.name for file in Path("disk").iterdir()) == ["log.csv", "state.pt"]


def test_full_training_keeps_the_vocabulary(base, monkeypatch):
    monkeypatch.chdir(base)
    train.main(shlex.split(flags("full", "vocabulary", "--steps 1")))
    assert load_tokenizer(base / "vocabulary").n_vocab == load_tokenizer(base / "model").n_vocab == 380
