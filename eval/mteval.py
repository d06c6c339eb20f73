"""BLEU and NIST as tuetschek/e2e-metrics prints them with `-p`, which no library does.

Both follow NIST's mteval-13a on lower-cased 13a tokens (Papineni et al. 2002; Doddington 2002).
sacreBLEU's BLEU differs where an output has fewer than four tokens: here the number of n-grams of
an output is its length - n + 1 even where that is negative, and an empty output is one empty token.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from eval.measure import Measure, sentence_bleu
from eval.tokens import tokenizer

BLEU_ORDER, NIST_ORDER = 4, 5
# The official program bounds hits and totals from below in place of smoothing.
LEAST_HITS, LEAST_TOTAL, LEAST_LENGTH = 1e-15, 1e-9, 1e-5
# A system of 2/3 of the reference length gets half the NIST score.
NIST_BETA = -math.log(0.5) / math.log(1.5) ** 2

Ngrams = Counter[tuple[str, ...]]  # tokens -> count


def tokens(text: str, tokenize: str = "13a") -> list[str]:
    """Tokens in lower case, mteval-13a's or those of another of `TOKENIZERS`; `[""]` for an empty
    text."""
    return tokenizer(tokenize)(text).lower().split() or [""]


def _ngrams(words: list[str], most: int) -> Ngrams:
    return Counter(
        tuple(words[start : start + n])
        for n in range(1, most + 1)
        for start in range(len(words) - n + 1)
    )


@dataclass(frozen=True)
class ReferenceCounts:
    """What BLEU and NIST need of the references, counted once for all systems.

    `largest[i]` holds each n-gram's largest count in one reference of item i, `lengths[i]` the
    references' lengths in tokens, `total` the counts over all references (`()`: all tokens), by
    the tokenizer `tokenize`.
    """

    largest: list[Ngrams]
    lengths: list[list[int]]
    total: Ngrams
    tokenize: str


def count_references(references: list[list[str]], tokenize: str = "13a") -> ReferenceCounts:
    """Count the n-grams (n <= 5) of all references, given as texts by item."""
    counts = ReferenceCounts([], [], Counter(), tokenize)
    for texts in references:
        largest: Ngrams = Counter()
        lengths = []
        for words in (tokens(text, tokenize) for text in texts):
            ngrams = _ngrams(words, NIST_ORDER)
            largest |= ngrams
            counts.total.update(ngrams)
            lengths.append(len(words))
        counts.largest.append(largest)
        counts.lengths.append(lengths)
        counts.total[()] += sum(lengths)
    return counts


def _bleu_of_sums(sums: np.ndarray) -> float:
    length, reference_length = sums[:2]
    hits, totals = sums[2 : 2 + BLEU_ORDER], sums[2 + BLEU_ORDER :]
    precisions = np.maximum(hits, LEAST_HITS) / np.maximum(totals, LEAST_TOTAL)
    log_brevity = min(0.0, 1 - reference_length / max(length, LEAST_LENGTH))
    return math.exp(log_brevity + np.log(precisions).mean())


def _closest(length: int, lengths: list[int]) -> int:
    return min(lengths, key=lambda other: (abs(other - length), other))


def bleu(references: ReferenceCounts, hypotheses: list[str]) -> Measure:
    """Corpus BLEU-4 as a fraction: case-insensitive, closest reference length (ties: shorter)."""
    rows = []
    for largest, lengths, text in zip(
        references.largest, references.lengths, hypotheses, strict=True
    ):
        words = tokens(text, references.tokenize)
        hits = [0] * BLEU_ORDER
        for ngram, count in _ngrams(words, BLEU_ORDER).items():
            hits[len(ngram) - 1] += min(count, largest[ngram])
        totals = [len(words) - n for n in range(BLEU_ORDER)]
        rows.append([len(words), _closest(len(words), lengths), *hits, *totals])
    return Measure(np.array(rows, dtype=np.float64), _bleu_of_sums, sentence_bleu)


def _nist_of_sums(sums: np.ndarray) -> float:
    reference_length, gains, totals = sums[0], sums[1 : 1 + NIST_ORDER], sums[1 + NIST_ORDER :]
    ratio = min(1.0, totals[0] / reference_length)
    counted = totals > 0
    return (gains[counted] / totals[counted]).sum() * math.exp(-NIST_BETA * math.log(ratio) ** 2)


def nist(references: ReferenceCounts, hypotheses: list[str]) -> Measure:
    """NIST-5, raw: matches weighted by log2(count(prefix) / count(n-gram)) in the references."""
    rows = []
    for largest, lengths, text in zip(
        references.largest, references.lengths, hypotheses, strict=True
    ):
        words = tokens(text, references.tokenize)
        gains = [0.0] * NIST_ORDER
        for ngram, count in _ngrams(words, NIST_ORDER).items():
            if matches := min(count, largest[ngram]):
                prefix, whole = references.total[ngram[:-1]], references.total[ngram]
                gains[len(ngram) - 1] += matches * math.log2(prefix / whole)
        totals = [len(words) - n for n in range(NIST_ORDER)]
        rows.append([sum(lengths) / len(lengths), *gains, *totals])
    return Measure(np.array(rows, dtype=np.float64), _nist_of_sums)
