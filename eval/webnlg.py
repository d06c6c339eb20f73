"""The scores of WebNLG and DART as WebNLG/GenerationEval computes them."""

from collections import Counter
from collections.abc import Callable
from itertools import zip_longest

import numpy as np

from eval.measure import Measure, mean_of, sentence_bleu


def word_tokens(text: str) -> str:
    """The text with spaces between its words and punctuation marks (NLTK, Penn Treebank rules)."""
    from nltk.tokenize import word_tokenize

    return " ".join(word_tokenize(text, preserve_line=True))


def by_position(references: list[list[str]]) -> list[tuple[str | None, ...]]:
    """References by item -> by position, as sacreBLEU takes them; None where an item has fewer."""
    return list(zip_longest(*references))


def _from_sacrebleu(metric, references: list[list[str]], hypotheses: list[str], of_item=None):
    rows = metric._extract_corpus_statistics(hypotheses, by_position(references))
    return Measure(
        np.array(rows, dtype=np.float64),
        lambda sums: metric._compute_score_from_stats(list(sums)).score / 100,
        of_item,
    )


def bleu(references: list[list[str]], hypotheses: list[str]) -> Measure:
    """BLEU-4 of multi-bleu-detok as a fraction: case-sensitive, 13a tokens, no smoothing."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize="13a", smooth_method="none", force=True)
    return _from_sacrebleu(metric, references, hypotheses, sentence_bleu)


def chrf(references: list[list[str]], hypotheses: list[str]) -> Measure:
    """chrF++ as a fraction: characters to 6, words to 2, beta 2."""
    from sacrebleu.metrics import CHRF

    return _from_sacrebleu(CHRF(word_order=2, eps_smoothing=True), references, hypotheses)


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
    """The smallest TER by pyter's search for shifts, to which we give a faster edit distance."""
    from pyter import _ter

    bounds = sorted((_least_ter(hypothesis, words), words) for words in references)
    best = float("inf")
    for bound, words in bounds:
        if bound >= best:
            break
        best = min(best, _ter(hypothesis, words, edit_distance_to(words)))
    return best


def ter(references: list[list[str]], hypotheses: list[str]) -> Measure:
    """TER of word-tokenized texts: the smallest over an item's references, mean over items."""
    return mean_of(
        [
            _best_ter(text.split(), [words.split() for words in dict.fromkeys(texts)])
            for texts, text in zip(references, hypotheses, strict=True)
        ]
    )
