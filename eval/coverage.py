"""What can be said of any outputs without patterns: which values of their contexts they state, how
varied their words are, and how long they are compared with the references."""

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

import numpy as np

from common.errors import InputError
from eval.measure import Measure, Unscored
from eval.slots import parse_meaning
from eval.texts import fold

UNSPOKEN = {"yes", "no", "true", "false", "none"}  # a text says these in words of its own


# Of Chinese and Japanese, which write no blanks, each character is a word.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+|£")


@lru_cache(maxsize=1 << 16)
def _words(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(fold(text)))


def values(context: str) -> list[str]:
    """The values of a context, each once: of `slot : value | ...` and `slot[value], ...` the
    values, of triples `subject : relation : object | ...` subjects and objects. Names of slots and
    relations, marks such as [TABLECONTEXT], and yes and no are left out; other contexts have no
    values."""
    found: list[str] = []
    if context.endswith("]") and " : " not in context:
        with suppress(InputError):
            found = [value for _, value in parse_meaning(context)]
    for part in context.split(" | "):
        first, *rest = (field.strip() for field in part.split(" : "))
        found += rest if len(rest) == 1 else [first, *rest[1:]] if rest else []
    return [
        value
        for value in dict.fromkeys(found)
        if _words(value) and value.lower() not in UNSPOKEN and not value.startswith("[")
    ]


def missing_values(context: str, text: str) -> list[str]:
    """Those values of the context that have a word which is not in the text; case, accents and
    punctuation do not matter."""
    said = set(_words(text))
    return [value for value in values(context) if not said.issuperset(_words(value))]


def coverage(contexts: Sequence[str], texts: Sequence[str]) -> Measure:
    """The share of the contexts' values that the texts state, 1 for an item without any.

    Raises:
        Unscored: no context has a value.
    """
    rows = []
    for context, text in zip(contexts, texts, strict=True):
        count = len(values(context))
        rows.append((count - len(missing_values(context, text)), count))
    if not any(count for _, count in rows):
        raise Unscored("no input has values to state, as name : value | ... or triples have")
    statistics = np.array(rows, dtype=np.float64)
    return Measure(statistics, lambda sums: sums[0] / sums[1] if sums[1] else 1.0)


def variety(references: Sequence[Sequence[str]], texts: Sequence[str]) -> dict[str, float]:
    """Distinct-1, distinct-2 and length ratio of the texts."""
    return {
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "length_ratio": length_ratio(references, texts),
    }


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n (Li et al. 2016): different n-grams of words / all n-grams of the texts."""
    sequences = map(_words, texts)
    grams = [words[i : i + n] for words in sequences for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def length_ratio(references: Sequence[Sequence[str]], texts: Sequence[str]) -> float:
    """Words of the texts / words of their references, the mean of an item's references each."""
    means = [np.mean([len(_words(text)) for text in of_item]) for of_item in references]
    return sum(len(_words(text)) for text in texts) / max(float(sum(means)), 1.0)
