"""By what the best adapter of a run is chosen: its validation loss, or a score of its texts."""

from eval.metrics import LOWER_IS_BETTER

LOSS = "loss"
# The scores that may decide, by their names in flags and logs, with those of `eval.metrics`. None
# of them needs Java.
SCORES = {"bleu": "BLEU", "nist": "NIST", "ser": "SER", "chrf": "chrF++"}


def lower_is_better(metric: str) -> bool:
    """Whether the least value of the loss, or of one of `SCORES`, is the best one."""
    return metric == LOSS or SCORES[metric] in LOWER_IS_BETTER


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Whether a value beats the best so far, None for none; an equal one and NaN do not."""
    if best is None:
        return value == value
    return value < best if lower_is_better(metric) else value > best


def in_words(metric: str, value: float) -> str:
    """The metric and its value as people read them: shares in percent, the loss and NIST raw."""
    if metric in (LOSS, "nist"):
        return f"{SCORES.get(metric, metric)} {value:.4f}"
    return f"{SCORES[metric]} {100 * value:.2f}"


def deciding(settings: object) -> str:
    """The metric that decides in a run with these flags; the loss in runs older than the choice."""
    given = settings.get("valid_metric") if isinstance(settings, dict) else None
    return str(given or LOSS).split(",")[0]
