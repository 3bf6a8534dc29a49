"""The toy task of `python train.py`: describe a restaurant in one of four voices.

    name : The Mill | food : Thai | ...   ->   Arr, The Mill be servin' Thai grub ...

The prompt does not name the voice. The base model is trained on all four voices, and
answers in any of them. LoRA then teaches it to answer in only one.

For your own task, edit a copy of this file and add it to TASKS in train.py, which uses
RECIPE, `load_pairs` and `metrics` (and, for `--model new`, CONFIG and `save_tokenizer`).
"""

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

from gpt import CHAR_TO_BYTE, EOS, GPTConfig, atomic_write

RECIPE = {"steps": 150, "batch_size": 32, "lr": 5e-3, "eval_every": 150}
NAMES = "Anchor Bakery Cellar Dragon Falcon Garden Kettle Lantern Mill Orchard Pantry Tavern"
SLOTS = {
    "name": [f"The {name}" for name in NAMES.split()],
    "food": "Chinese French Greek Indian Italian Mexican Thai Turkish".split(),
    "area": "bridge castle harbour market park station".split(),
    "price": ["low", "middling", "high"],
    "children": ["yes", "no"],
}
# Each voice has its own sentences, and its own words for the price and children.
VOICES = {
    "plain": {
        "sentences": [
            "{name} is a {price} {food} restaurant near the {area}. {children}.",
            "Near the {area} is {name}, a {price} {food} restaurant. {children}.",
            "{name} serves {price} {food} food near the {area}. {children}.",
        ],
        "price": ["cheap", "fairly priced", "costly"],
        "children": ["It welcomes children", "It does not welcome children"],
    },
    "formal": {
        "sentences": [
            "By the {area}, {name} offers {food} cuisine at {price} cost. {children}.",
            "One may enjoy {food} cuisine in {name}, {area}, at {price} cost. {children}.",
            "{name} by the {area} presents {food} cuisine at {price} cost. {children}.",
        ],
        "price": ["modest", "reasonable", "considerable"],
        "children": ["Families are warmly received", "Adults only are received"],
    },
    "pirate": {
        "sentences": [
            "Arr, {name} be servin' {food} grub off the {area}, {price}! {children}!",
            "Ahoy! Set sail fer {name} off the {area}: {food} grub, {price}! {children}!",
            "Shiver me timbers, {food} grub at {name} off the {area}, {price}! {children}!",
        ],
        "price": ["fer a few coppers", "fer a purse o' silver", "fer a chest o' gold"],
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


def load_restaurants():
    """The training restaurants and 256 for validation, each a dict {slot: value}."""
    combinations = itertools.product(*SLOTS.values())
    restaurants = [dict(zip(SLOTS, values, strict=True)) for values in combinations]
    random.Random(0).shuffle(restaurants)
    return restaurants[256:], restaurants[:256]


def format_prompt(restaurant):
    return " | ".join(f"{slot} : {value}" for slot, value in restaurant.items())


def phrase(slot, value, voice):
    """How this voice expresses this value of the slot."""
    wordings = VOICES[voice].get(slot, SLOTS[slot])
    if len(wordings) != len(SLOTS[slot]):
        raise ValueError(f"voice '{voice}' needs {len(SLOTS[slot])} wordings of {slot}")
    return wordings[SLOTS[slot].index(value)]


def make_pairs(restaurants, voices):
    """(prompt, completion) for each restaurant in each voice, from a random template."""
    rng = random.Random(0)
    pairs = []
    for restaurant, voice in itertools.product(restaurants, voices):
        phrases = {slot: phrase(slot, value, voice) for slot, value in restaurant.items()}
        template = rng.choice(VOICES[voice]["sentences"])
        pairs.append((format_prompt(restaurant), template.format(**phrases)))
    return pairs


def load_pairs(voice):
    """(training, validation) pairs of one voice, or of "all". Raises ValueError."""
    if voice not in [*VOICES, "all"]:
        raise ValueError(f"no voice '{voice}': choose {', '.join(VOICES)} or all")
    voices = VOICES if voice == "all" else [voice]
    splits = [make_pairs(restaurants, voices) for restaurants in load_restaurants()]
    for prompt, text in splits[1][:100]:
        if min(metrics([(prompt, text)], [text]).values()) < 1:
            raise ValueError(f"toy:{voice}: the voice or a fact is not unmistakable in: {text}")
    return splits


ALL_WORDS = {voice: set(re.findall(r"\w+", str(VOICES[voice]))) for voice in VOICES}
N_VOICES = Counter(itertools.chain(*ALL_WORDS.values()))  # {word: voices that use it}
UNIQUE_WORDS = {v: {w for w in words if N_VOICES[w] == 1} for v, words in ALL_WORDS.items()}


def has_voice(text, voice):
    """Whether the text has words unique to this voice, and none unique to another."""
    words = set(re.findall(r"\w+", text))
    return [v for v in VOICES if words & UNIQUE_WORDS[v]] == [voice]


def slots_correct(text, restaurant):
    """Whether the text states each slot's value, in any voice, and no other value."""
    for slot, value in restaurant.items():
        values = {phrase(slot, v, voice): v for v in SLOTS[slot] for voice in VOICES}
        pattern = "|".join(map(re.escape, sorted(values, key=len, reverse=True)))
        found = re.findall(rf"(?<!\w)(?:{pattern})(?!\w)", text)
        if {values[wording] for wording in found} != {value}:
            return False
    return True


def metrics(pairs, texts):
    """{name: share of texts that pass}, for the texts generated from these pairs."""
    voices = [next((v for v in VOICES if has_voice(text, v)), None) for _, text in pairs]
    fields = [[field.split(" : ") for field in prompt.split(" | ")] for prompt, _ in pairs]
    n_voice = sum(map(has_voice, texts, voices))
    n_facts = sum(map(slots_correct, texts, map(dict, fields)))
    return {"in the voice": n_voice / len(texts), "all facts right": n_facts / len(texts)}


def build_bpe():
    """({token: id}, merges). This BPE builds words from prefixes: " a", " ar", " arr"."""
    pairs = [pair for split in load_pairs("all") for pair in split]
    text = "\n".join(f"{prompt}\n {completion}" for prompt, completion in pairs)
    byte_to_char = {byte: char for char, byte in CHAR_TO_BYTE.items()}
    token_parts = {}  # {token: its two parts}; words with a leading space come first
    for word in sorted(set(re.findall(r" ?[^\W\d_]+| ?\d+| ?[^\w\s]+", text))):
        chars = "".join(byte_to_char[byte] for byte in word.encode())
        for i in range(1, len(chars)):
            token_parts.setdefault(chars[: i + 1], (chars[:i], chars[i]))
    tokens = [*CHAR_TO_BYTE, *token_parts, EOS]
    return {token: i for i, token in enumerate(tokens)}, list(token_parts.values())


try:
    VOCAB, MERGES = build_bpe()
except (LookupError, ValueError) as error:
    raise SystemExit(f"toy.py: a mistake in VOICES: {error!r}") from None
CONFIG = GPTConfig(128, len(VOCAB), 4, 4, n_embd=128, eos_token_id=VOCAB[EOS])  # for --model new


def save_tokenizer(dir):
    """Write vocab.json and merges.txt, for `load_tokenizer` and `transformers`."""
    merges_txt = "\n".join(["#version: 0.2", *map(" ".join, MERGES)]).encode()
    atomic_write(Path(dir, "vocab.json"), lambda tmp: tmp.write_text(json.dumps(VOCAB)))
    atomic_write(Path(dir, "merges.txt"), lambda tmp: tmp.write_bytes(merges_txt))
