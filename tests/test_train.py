"""train.py as a library: settings, data, and the training loop."""

import math
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from commands import make_base, write_jsonl
from conftest import lora_model, random_tokens
from transformers import GPT2LMHeadModel

import train
from gpt import EOS, GPT, GPTConfig, encode_text, load_tokenizer
from lora import add_lora, save_lora
from notebooks import toy
from train import collate, default_args, evaluate, get_lr, load_data


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_base(tmp_path_factory.mktemp("base")))


# ---- Settings ----


def test_e2e_has_the_settings_of_the_paper():
    args = train.make_parser().parse_args(["--data", "e2e"])
    train.resolve_settings(args, n_examples=42_061)
    assert (args.r, args.alpha, args.targets) == (4, 32, ["c_q", "c_v"])
    assert (args.lora_dropout, args.label_smoothing) == (0.1, 0.1)
    assert (args.lr, args.batch_size, args.warmup) == (2e-4, 8, 500)
    assert args.steps == 26_289  # five epochs


def test_a_setting_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="setps"):
        default_args(setps=5)


# ---- Data ----


@pytest.mark.parametrize("n_tokens", [2, 16, 17, 18, 100])
def test_every_token_but_the_first_is_a_target_once(tokenizer, tmp_path, n_tokens):
    words = [f" {toy.SLOTS['food'][i % 8]}" for i in range(n_tokens)]
    Path(tmp_path, "a.txt").write_text("".join(words))
    train_data, val_data = load_data(str(tmp_path / "a.txt"), tokenizer, block_size=16)
    blocks = [ids for ids, n_prompt in train_data + val_data if n_prompt == 1]
    assert sum([ids[1:] for ids in blocks], []) == encode_text(tokenizer, "".join(words[1:]))
    assert all(len(ids) <= 17 for ids in blocks) and len(blocks) == math.ceil((n_tokens - 1) / 16)


FILES = {
    "a.txt": f"Arr{EOS}{EOS} Ahoy{EOS}",
    "a.jsonl": f'{{"prompt": "Arr{EOS}", "completion": "Ahoy"}}\n\n \n',
    "e2e:b.txt": f"\nArr{EOS}||Ahoy\n\n",
}


@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("name", FILES)
def test_files_of_all_kinds_are_read(tokenizer, tmp_path, monkeypatch, name, bom):
    monkeypatch.chdir(tmp_path)
    Path(name.removeprefix("e2e:")).write_text(bom + FILES[name], encoding="utf-8")
    arr, ahoy = map(tokenizer.encode_ordinary, ("Arr", " Ahoy"))
    eos = [tokenizer.eot_token]
    [(ids, _)], _ = load_data(name, tokenizer, 128)
    assert ids == arr + eos + eos + ahoy + eos


def test_examples_that_are_too_long_are_counted(tokenizer, tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [("Mill", "Arr! " * n) for n in (1, 100)])
    assert sum(map(len, load_data(str(path), tokenizer, block_size=64))) == 1
    assert "1 of 2" in capsys.readouterr().out


@pytest.mark.parametrize("n, n_val", [(1, 0), (19, 0), (39, 1), (8000, 256)])
def test_a_twentieth_of_a_file_is_for_validation(tokenizer, tmp_path, n, n_val):
    path = write_jsonl(tmp_path / "a.jsonl", [(str(i), "Arr") for i in range(n)])
    train_data, val_data = load_data(str(path), tokenizer, 64)
    assert len(train_data) == n - n_val and len(val_data) == n_val  # all are used
    assert not {tuple(ids) for ids, _ in train_data} & {tuple(ids) for ids, _ in val_data}


def test_validation_data_is_a_random_sample(tokenizer):
    _, val_data = load_data("toy:all", tokenizer, 128)
    texts = [tokenizer.decode(ids).split(EOS) for ids, _ in val_data]
    n_texts = {voice: sum(toy.has_voice(text[1], voice) for text in texts) for voice in toy.VOICES}
    assert sum(n_texts.values()) == len(val_data) == 256
    assert min(n_texts.values()) > 40  # about 64 for each of the four voices
    assert len({text[0] for text in texts}) > 128  # not only the first restaurants


@pytest.mark.parametrize("name", ["toy:all", "toy:pirate"])
def test_validation_restaurants_are_not_trained_on(tokenizer, name):
    train_data, val_data = load_data(name, tokenizer, 128)
    train_prompts, val_prompts = ({tuple(ids[:n]) for ids, n in d} for d in (train_data, val_data))
    assert val_prompts and not train_prompts & val_prompts


@pytest.mark.parametrize("prices", [["£", "££", "£££"], ["steep?", "steep", "very steep"]])
def test_the_toys_metrics_fit_any_voice(monkeypatch, prices):
    sentence = "Nom nom {name}, {food}, {area}: {price} {children}"
    menu = {"sentences": [sentence], "price": prices, "children": ["bambini? yes!", ":)"]}
    monkeypatch.setitem(toy.VOICES, "menu", menu)
    monkeypatch.setitem(toy.UNIQUE_WORDS, "menu", {"Nom"})
    pairs = toy.load_pairs("menu")[1]
    assert set(toy.metrics(pairs, [text for _, text in pairs]).values()) == {1}
    menu["price"] = prices[:2]
    with pytest.raises(ValueError, match="'menu' needs 3 wordings of price"):
        toy.load_pairs("menu")


def test_only_the_completion_is_a_target():
    idx, targets = collate([([1, 2, 3, 4, 5], 3), ([6, 7], 1)], "cpu")
    assert idx.tolist() == [[1, 2, 3, 4], [6, 0, 0, 0]]
    assert targets.tolist() == [[-100, -100, 4, 5], [7, -100, -100, -100]]


# ---- The training loop ----


def random_examples(n, lengths=(5, 60), n_prompt=3):
    """Examples of random tokens, with these lengths in turn."""
    rows = random_tokens(n, max(lengths)).tolist()
    return [(row[: lengths[i % len(lengths)]], n_prompt) for i, row in enumerate(rows)]


def small_model(method="lora", dtype="float32", dropout=0.0, n_layer=2):
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 97, n_layer=n_layer, n_head=4, n_embd=32))
    if method == "lora":
        add_lora(model.to(getattr(torch, dtype)), dropout=dropout)
    return model


def fit(method="lora", dtype="float32", dropout=0.0, **kwargs):
    """Train a small model. Returns its trained parameters and its log."""
    model, data = small_model(method, dtype, dropout), random_examples(30)
    kwargs = dict(steps=10, batch_size=4, warmup=2, eval_every=1, lr=5e-3) | kwargs
    log = train.train(model, data[:24], data[24:], default_args(dtype=dtype, **kwargs))
    return [p for p in model.parameters() if p.requires_grad], log


def losses(log, name="train_loss"):
    return [metrics[name] for metrics in log]


def test_learning_rate_warms_up_and_decays():
    lrs = [get_lr(step, 1.0, warmup=4, steps=10) for step in range(10)]
    assert lrs == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert get_lr(0, 1.0, warmup=0, steps=1) == 1
    assert [get_lr(step, 1.0, warmup=3, steps=2) for step in range(2)] == [1 / 4, 2 / 4]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_losses_equal_peft(base_dir, tmp_path, label_smoothing):
    model = lora_model(base_dir)
    save_lora(model, tmp_path)
    reference = GPT2LMHeadModel.from_pretrained(base_dir)
    reference = peft.PeftModel.from_pretrained(reference, tmp_path, is_trainable=True)
    data = random_examples(8, range(5, 30))  # each step sees all of them
    args = default_args(steps=6, batch_size=8, warmup=2, lr=1e-2, eval_every=5)
    args.label_smoothing = label_smoothing
    ours = losses(train.train(model, data, [], args))

    optimizer = torch.optim.AdamW(reference.parameters(), weight_decay=0.01)
    (idx, targets), theirs = collate(data, "cpu"), []
    for warmup_or_decay in (1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4):
        logits = reference(idx).logits.flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), label_smoothing=label_smoothing)
        loss.backward()
        for name, p in reference.named_parameters():
            if "lora_B" in name:
                p.grad *= p != 0  # PEFT would train the zeros of the fused B, too
        optimizer.param_groups[0]["lr"] = warmup_or_decay * args.lr
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, abs=1e-5) and ours[-1] < ours[0] - 1e-3


def test_dropout_and_label_smoothing_are_in_the_training_loss_only():
    _, [log] = fit(dropout=0.5, label_smoothing=0.1, steps=1, lr=0.0)
    _, [plain_log] = fit(steps=1, lr=0.0)
    assert log["val_loss"] == plain_log["val_loss"] and log["train_loss"] != plain_log["train_loss"]


def test_accumulated_micro_batches_equal_one_batch():
    (_, log), (_, accumulated_log) = fit(batch_size=8), fit(batch_size=2, grad_accum=4)
    assert losses(accumulated_log) == pytest.approx(losses(log), abs=1e-5)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_evaluate_is_the_mean_over_all_targets(batch_size):
    model, data = small_model(dropout=0.5), random_examples(20)
    idx, targets = collate(data, "cpu")
    with torch.no_grad():
        expected = F.cross_entropy(model.eval()(idx).flatten(0, 1), targets.flatten()).item()
    assert evaluate(model.train(), data, batch_size) == pytest.approx(expected, abs=1e-5)
    assert model.training


def test_every_epoch_has_each_example_once():
    order = train.shuffle_epochs(list(range(10)), n_draws=25, seed=0)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and len(order) == 25
    assert order[:10] != order[10:20]


def test_only_a_and_b_are_trained():
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train.train(model, random_examples(8), [], default_args(steps=3, batch_size=4))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora_" in name), name


def test_each_group_of_an_optimizer_keeps_its_own_rate():
    model = small_model()
    A, B = ([p for n, p in model.named_parameters() if part in n] for part in ("lora_A", "lora_B"))
    optimizer = torch.optim.AdamW([{"params": A, "lr": 1e-3}, {"params": B, "lr": 1e-2}])
    args = default_args(steps=6, warmup=2, eval_every=5)
    log = train.train(model, random_examples(32), [], args, optimizer=optimizer)
    assert losses(log, "lr") == [get_lr(step, 1e-3, 2, 6) for step in range(6)]
    assert optimizer.param_groups[1]["lr"] == get_lr(5, 1e-2, 2, 6)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_losses_in_16_bits_are_near_those_of_float32(method, dtype):
    (params, log), (_, expected) = fit(method, dtype), fit(method)
    for name in ("train_loss", "val_loss"):
        assert losses(log, name) == pytest.approx(losses(expected, name), abs=0.02)
        assert losses(log, name) != losses(expected, name)
    assert all(p.dtype == torch.float32 for p in params)


def test_log_has_mean_losses_and_a_validation_loss_after_each_evaluation():
    _, log = fit(steps=12)
    _, sparse_log = fit(steps=12, eval_every=10)
    assert losses(sparse_log, "step") == [2, 4, 6, 8, 10, 12]
    pairs = [sum(losses(log)[i : i + 2]) / 2 for i in range(0, 12, 2)]
    assert losses(sparse_log) == pytest.approx(pairs, abs=1e-6)
    evaluated = [m["step"] for m in sparse_log if not math.isnan(m["val_loss"])]
    assert evaluated == [10, 12]


def test_compiled_blocks_are_whole_graphs_for_any_length():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counters, model, n_graphs = torch._dynamo.utils.counters, small_model(n_layer=12), []
    for block in model.h:
        block.compile(backend="eager")
    for T in (20, 20, 7, 31, 64, 12):
        model(torch.arange(T)[None], torch.arange(T)[None]).backward()
        n_graphs.append(counters["stats"]["unique_graphs"])
    # One graph for the first length, one for any. The first block's input needs no gradient.
    assert n_graphs == [2, 2, 4, 4, 4, 4] and not counters["graph_break"]
