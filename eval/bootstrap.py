"""How far a score would move with other test items (Koehn 2004), as sacreBLEU computes it.

Items are drawn with replacement, the same ones for both systems of a pair. Seed, interval and
p-value are those of `sacrebleu.significance`, so BLEU gets the numbers that sacreBLEU prints,
the p-value of equal scores excepted.
"""

import numpy as np

from eval.measure import Measure

SEED = 12345


def resampled_scores(measure: Measure, samples: int) -> np.ndarray:
    """The scores, float64 (samples,), of `samples` draws of as many items as there are."""
    rng = np.random.default_rng(SEED)
    items = len(measure.statistics)
    draws = (rng.choice(items, size=items, replace=True) for _ in range(samples))
    return np.array([measure.score(draw) for draw in draws])


def interval(scores: np.ndarray) -> dict[str, float]:
    """Mean of the resampled scores, bounds of the middle 95 % of them, half their distance."""
    scores = np.sort(scores)
    outside = len(scores) // 40
    low, high = float(scores[outside]), float(scores[-1 - outside])
    return {"mean": float(scores.mean()), "low": low, "high": high, "ci": (high - low) / 2}


def p_value(ours: np.ndarray, theirs: np.ndarray, difference: float) -> float:
    """How often resampled scores differ by more than `difference` if the two systems are equally
    good: their differences less the mean difference stand for what chance alone does.

    Equal scores give 1, where sacreBLEU gives a system that is compared with itself the smallest
    p-value there is.
    """
    if difference == 0:
        return 1.0
    differences = np.abs(ours - theirs)
    larger = int((differences - differences.mean() > abs(difference)).sum())
    return (larger + 1) / (len(differences) + 1)
