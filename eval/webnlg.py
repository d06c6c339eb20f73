"""The scores of WebNLG and DART as WebNLG/GenerationEval computes them."""

from collections import Counter
from collections.abc import Callable
from itertools import zip_longest
from typing import TYPE_CHECKING, cast

import numpy as np

from eval.measure import Measure, Unscored, mean_of, sentence_bleu
from eval.tokens import tokenizer

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU, CHRF

# An item of 30 words takes a few thousand steps; the limits let about ten seconds pass.
MOST_TER_PAIRS, MOST_TER_STEPS = 4_000_000, 10_000_000


def word_tokens(text: str) -> str:
    """The text with spaces between its words and punctuation marks (NLTK, Penn Treebank rules)."""
    from nltk.tokenize import word_tokenize

    return " ".join(word_tokenize(text, preserve_line=True))


def by_position(references: list[list[str]]) -> list[list[str]]:
    """References by item -> by position, as sacreBLEU takes them; None where an item has fewer,
    which it understands, though its types do not say so."""
    return [list(cast(tuple[str, ...], texts)) for texts in zip_longest(*references)]


def _from_sacrebleu(
    metric: "BLEU | CHRF",
    references: list[list[str]],
    hypotheses: list[str],
    of_item: Callable[[np.ndarray], float] | None = None,
) -> Measure:
    rows = metric._extract_corpus_statistics(hypotheses, by_position(references))
    return Measure(
        np.array(rows, dtype=np.float64),
        lambda sums: metric._compute_score_from_stats(list(sums)).score / 100,
        of_item,
    )


def bleu(
    references: list[list[str]], hypotheses: list[str], tokenize: str = "13a", smooth: str = "none"
) -> Measure:
    """BLEU-4 of multi-bleu-detok as a fraction: case-sensitive, 13a tokens, no smoothing; with
    `smooth` "exp", sacreBLEU's own."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=tokenize, smooth_method=smooth, force=True)
    return _from_sacrebleu(metric, references, hypotheses, sentence_bleu)


def chrf(
    references: list[list[str]],
    hypotheses: list[str],
    tokenize: str | None = None,
    eps_smoothing: bool = True,
) -> Measure:
    """chrF++ as a fraction: characters to 6, words to 2, beta 2. The words are set apart by blanks,
    or are the tokens of `tokenize`."""
    from sacrebleu.metrics import CHRF

    if tokenize:
        spaced = tokenizer(tokenize)
        references = [[spaced(text) for text in texts] for texts in references]
        hypotheses = [spaced(text) for text in hypotheses]
    metric = CHRF(word_order=2, eps_smoothing=eps_smoothing)
    return _from_sacrebleu(metric, references, hypotheses)


def _least_ter(hypothesis: list[str], reference: list[str]) -> float:
    """No less than the words to add or to remove: shifts change neither."""
    ours, theirs = Counter(hypothesis), Counter(reference)
    return max((ours - theirs).total(), (theirs - ours).total()) / len(reference)


def edit_distance_to(reference: list[str]) -> Callable[[list[str]], int]:
    """A function giving the Levenshtein distance of word lists to the reference (not empty).

    Bit-parallel (Myers 1999, as in Hyyro 2003): bit i of `plus` and `minus` says whether the
    distance to the first i + 1 reference words is one more or one less than to the first i.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(reference):
        places[word] = places.get(word, 0) | 1 << i
    every, last = (1 << len(reference)) - 1, 1 << (len(reference) - 1)

    def distance(words: list[str]) -> int:
        plus, minus, result = every, 0, len(reference)
        for word in words:
            match = places.get(word, 0)
            diagonal = (((match & plus) + plus) ^ plus) | match
            up, down = minus | ~(diagonal | plus), plus & diagonal
            result += bool(up & last) - bool(down & last)
            up, down, match = up << 1 | 1, down << 1, match | minus
            plus, minus = (down | ~(match | up)) & every, up & match & every
        return result

    return distance


def _best_ter(hypothesis: list[str], references: list[list[str]]) -> float:
    """The smallest TER by pyter's search for shifts, to which we give a faster edit distance.

    Raises:
        Unscored: the search would take minutes: its time grows with the fourth power of the length.
    """
    from pyter import _ter

    bounds = sorted((_least_ter(hypothesis, words), words) for words in references)
    best = float("inf")
    for bound, words in bounds:
        if bound >= best:
            break
        if len(hypothesis) * len(words) > MOST_TER_PAIRS:
            raise Unscored(f"its search compares at most {MOST_TER_PAIRS:,} pairs of words")
        best = min(best, _ter(hypothesis, words, _bounded(edit_distance_to(words))))
    return best


def _bounded(distance: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """The distance, up to `MOST_TER_STEPS` words in all its calls."""
    left = MOST_TER_STEPS

    def counted(words: list[str]) -> int:
        nonlocal left
        left -= len(words)
        if left < 0:
            raise Unscored(f"its search for shifts takes more than {MOST_TER_STEPS:,} steps")
        return distance(words)

    return counted


def ter(references: list[list[str]], hypotheses: list[str]) -> Measure:
    """TER of word-tokenized texts: the smallest over an item's references, mean over items.

    Raises:
        Unscored: names the item whose texts are too long for it.
    """
    values = []
    for number, (texts, text) in enumerate(zip(references, hypotheses, strict=True), start=1):
        try:
            words = [reference.split() for reference in dict.fromkeys(texts)]
            values.append(_best_ter(text.split(), words))
        except Unscored as error:
            length = len(text.split())
            raise Unscored(f"item {number} has an output of {length} words, and {error}") from error
    return mean_of(values)
