"""Ordinary sentences, and facts to hide in them, from a seeded generator: no data file."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

__all__ = ["NOUNS", "TOKENS_A_WORD", "hide", "names", "passcode", "sentences"]

#: Roughly, of these sentences, punctuation included: 1.13 by Qwen2.5's tokeniser, 1.11 by SmolLM2's.
TOKENS_A_WORD = 1.15


def _split(text: str, by: str | None = None) -> list[str]:
    return text.split(by)


ADJECTIVES = _split("old young quiet tired careful cheerful patient curious stubborn gentle clever nervous")
PEOPLE = _split(
    "gardener baker teacher sailor farmer nurse painter driver tailor neighbour fisherman librarian postman "
    "carpenter student cook shepherd musician doctor mason"
)
VERBS = _split(
    "carried left found cleaned repaired sold bought borrowed painted moved hid washed wrapped lost dropped "
    "counted measured weighed described forgot"
)
NOUNS = _split(
    "basket lantern ladder kettle blanket bicycle barrel clock mirror violin hammer umbrella saddle carpet "
    "bucket candle pillow wagon trumpet bottle needle shovel curtain drum ribbon anchor compass helmet "
    "feather cushion pencil marble button saucer thimble whistle hinge spoon jacket paddle"
)
PLACES = _split(
    "river bridge market church orchard station harbour mill school barn well meadow garden workshop square "
    "lighthouse forest tavern library stable"
)
TIMES = _split(
    "before noon,after supper,in the early morning,late in the evening,during the storm,on the first day of spring,"
    "when the bells rang,while the others slept,as usual,without a word,for the second time,at the end of the week",
    ",",
)
FIRST = _split(
    "Ada Bruno Clara Dario Edith Felix Greta Hugo Ines Jonas Klara Leon Mira Nils Olga Pavel Rosa Simon Tilda Viktor"
)
LAST = _split(
    "Brook Carver Dale Ember Frost Grove Hale Ivory Joyce Keller "
    "Lund Marsh North Oakley Pike Quill Reed Stone Thorne Wells"
)


def sentences(random: Random, length: int) -> list[str]:
    """Return sentences of about ``length`` tokens together, at 1.15 tokens a word; at least one."""
    made: list[str] = []
    words = 0
    while words * TOKENS_A_WORD < length or not made:
        adjective, person, verb, noun, place, time = (
            random.choice(kind) for kind in (ADJECTIVES, PEOPLE, VERBS, NOUNS, PLACES, TIMES)
        )
        made.append(f"The {adjective} {person} {verb} the {noun} near the {place} {time}.")
        words += made[-1].count(" ") + 1
    return made


def names(random: Random, count: int) -> list[str]:
    """Return ``count`` different names of people, of the 400 that there are."""
    every = [f"{first} {last}" for first in FIRST for last in LAST]
    return random.sample(every, count)


def passcode(random: Random, digits: int) -> str:
    """Return a number of so many digits, the first not 0."""
    return str(random.randrange(10 ** (digits - 1), 10**digits))


def hide(hay: Sequence[str], facts: Sequence[tuple[float, str]]) -> list[str]:
    """Return the sentences with each fact at its relative depth: 0 before all, 1 after all.

    >>> hide(["a", "b"], [(0.5, "fact")])
    ['a', 'fact', 'b']
    """
    made = list(hay)
    for depth, fact in sorted(facts, key=lambda one: one[0])[::-1]:  # the last one first: places stay right
        made.insert(round(depth * len(hay)), fact)
    return made
