"""The toy world of the lessons and of `python train.py`: a restaurant's slots -> a sentence, in one of four voices.

It has the shape of the paper's E2E task (section 5.4), and is small enough to be learned in a minute. Two judges read
what a model writes: `in_voice` asks how it is said, `slots_right` what is said.
"""

import base64
import itertools
import random
import re
from pathlib import Path

from gpt import WORDS, GPTConfig, make_tokenizer

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


def words_of(text):
    return set(re.findall(r"\w+", text))


USED = {voice: words_of(str(phrases)) for voice, phrases in VOICES.items()}
# The words that one voice alone uses.
OWN = {voice: USED[voice].difference(*(USED[other] for other in VOICES if other != voice)) for voice in VOICES}


def in_voice(text, voice):
    """Whether text has words that this voice alone uses, and none that another alone uses."""
    return [v for v in VOICES if OWN[v] & words_of(text)] == [voice]


def slots_right(text, restaurant):
    """Whether text says the value of every slot, in the words of any voice, and no other value of that slot."""

    def says(slot, value):
        return any(re.search(rf"\b{in_words(slot, value, voice)}\b", text) for voice in VOICES)

    return all([v for v in SLOTS[slot] if says(slot, v)] == [value] for slot, value in restaurant.items())


def toy_vocabulary():
    """The toy world's vocabulary in tiktoken's format: the 256 bytes, for any text, then each word as one token."""
    pairs = toy_pairs(sum(toy_world(), []), VOICES)
    words = {word.encode() for pair in pairs for word in re.findall(WORDS, " ".join(pair))}
    single = [bytes([b]) for b in range(256)]
    tokens = single + sorted(words.difference(single))
    return "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))


# The base that knows all four voices: where it is, and how it is trained.
TINY = Path(__file__).parent.parent / "out" / "tiny"
TINY_RECIPE = dict(steps=600, lr=5e-3, batch_size=32, warmup=60, eval_every=100)


def toy_base():
    """(GPTConfig, tokenizer) of `tiny`."""
    tokenizer = make_tokenizer(toy_vocabulary())
    return GPTConfig(block_size=128, vocab_size=tokenizer.n_vocab, n_layer=4, n_head=4, n_embd=128), tokenizer


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
