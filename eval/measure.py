"""What every metric hands over: numbers per item that add up, and the score of their sum.

A corpus score, the score of a subset, of one item and of a bootstrap sample are then the same
function of other sums, and nothing is counted twice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


class Unscored(RuntimeError):
    """A metric has no score for these texts; the error's own text is the reason."""


@dataclass(frozen=True)
class Measure:
    """One metric of one system.

    `statistics` is float64 (items, k); `of_sums` maps a sum of its rows, (k,), to the score;
    `of_item` does so for a single row where the corpus formula says little about one item.
    """

    statistics: np.ndarray
    of_sums: Callable[[np.ndarray], float]
    of_item: Callable[[np.ndarray], float] | None = None

    def score(self, items: np.ndarray | list[int] | slice = slice(None)) -> float:
        """The score of all items, or of those that `items` (mask or indices) selects."""
        return float(self.of_sums(self.statistics[items].sum(axis=0)))

    def segments(self) -> list[float]:
        """The score of each item, in order."""
        of_item = self.of_item or self.of_sums
        return [float(of_item(row)) for row in self.statistics]


def mean_of(values: list[float]) -> Measure:
    """The measure whose score is the plain mean of one value per item."""
    rows = np.column_stack([np.asarray(values, dtype=np.float64), np.ones(len(values))])
    return Measure(rows, lambda sums: sums[0] / sums[1])


def sentence_bleu(row: np.ndarray) -> float:
    """sacreBLEU's smoothed BLEU of one item from (length, reference length, 4 hits, 4 totals).

    Corpus BLEU has no smoothing and is near zero for any item without a matching 4-gram.
    """
    from sacrebleu.metrics import BLEU

    hits, totals = list(row[2:6]), list(np.maximum(row[6:], 0))
    bleu = BLEU.compute_bleu(
        hits, totals, int(row[0]), int(row[1]), smooth_method="exp", effective_order=True
    )
    return bleu.score / 100
