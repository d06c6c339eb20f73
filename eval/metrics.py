"""Which metrics a task has, and all of them on one or more systems.

    from eval.metrics import e2e_scores
    e2e_scores(references=[["a b", "a c"], ["d"]], hypotheses=["a b", "d"])

Nothing heavy is imported, and Java is not started, for a metric that is not asked for.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from common.errors import InputError
from eval import coco, coverage, mteval, slots, webnlg
from eval.measure import Measure, Unscored
from eval.texts import named

E2E = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
WEBNLG = ("BLEU", "METEOR", "TER", "chrF++")
OWN = ("BLEU", "chrF++", "METEOR")
OF_INPUTS = ("SER", "coverage")  # whether texts are true to their inputs
METRICS = {
    "e2e": (*E2E, *OF_INPUTS),
    "webnlg": (*WEBNLG, "coverage"),
    "dart": (*WEBNLG, "coverage"),
    "own": (*OWN, "coverage"),
}
ON_REQUEST = {"e2e": ("chrF++",)}  # scored where they are named
LOWER_IS_BETTER = {"TER", "SER"}

Makers = dict[str, Callable[[list[str]], Measure]]


def metrics_of(task: str) -> tuple[str, ...]:
    """Every metric that the task has, those that are scored on request last."""
    return METRICS[task] + ON_REQUEST.get(task, ())


@dataclass(frozen=True)
class Measured:
    """`systems[i]` maps a metric's name to its measure; `reasons` says why another has none."""

    systems: list[dict[str, Measure]]
    reasons: dict[str, str]


def _e2e_makers(references: list[list[str]], meteor: coco.Meteor, tokenize: str | None) -> Makers:
    counts = cache(lambda: mteval.count_references(references, tokenize or "13a"))
    words = cache(lambda: coco.ptb_tokenize_groups(references))
    own_words = cache(lambda hypotheses: coco.ptb_tokenize(list(hypotheses)))
    return {
        "BLEU": lambda texts: mteval.bleu(counts(), texts),
        "NIST": lambda texts: mteval.nist(counts(), texts),
        "METEOR": lambda texts: meteor.measure(words(), own_words(tuple(texts))),
        "ROUGE_L": lambda texts: coco.rouge_l(words(), own_words(tuple(texts))),
        "CIDEr": lambda texts: coco.cider(words(), own_words(tuple(texts))),
        "chrF++": lambda texts: webnlg.chrf(references, texts, tokenize, eps_smoothing=False),
    }


def _webnlg_makers(
    references: list[list[str]], meteor: coco.Meteor, tokenize: str | None
) -> Makers:
    spaced = cache(webnlg.word_tokens)
    words = cache(lambda: [[spaced(text) for text in texts] for texts in references])
    return {
        "BLEU": lambda texts: webnlg.bleu(references, texts, tokenize or "13a"),
        "METEOR": lambda texts: meteor.measure(words(), [spaced(text) for text in texts]),
        "TER": lambda texts: webnlg.ter(words(), [spaced(text) for text in texts]),
        "chrF++": lambda texts: webnlg.chrf(references, texts, tokenize),
    }


def _own_makers(references: list[list[str]], meteor: coco.Meteor, tokenize: str | None) -> Makers:
    """As WebNLG's, with BLEU and chrF++ as sacreBLEU has them by default."""
    return _webnlg_makers(references, meteor, tokenize) | {
        "BLEU": lambda texts: webnlg.bleu(references, texts, tokenize or "13a", smooth="exp"),
        "chrF++": lambda texts: webnlg.chrf(references, texts, tokenize, eps_smoothing=False),
    }


MAKERS = {"e2e": _e2e_makers, "webnlg": _webnlg_makers, "dart": _webnlg_makers, "own": _own_makers}


def check_meanings(contexts: Sequence[str]) -> None:
    """Refuse contexts that are no meaning representations of E2E.

    Raises:
        Unscored: names what is none, or the slots that E2E has not.
    """
    try:
        used = {slot for mr in contexts for slot, _ in slots.parse_meaning(mr)}
    except InputError as error:
        raise Unscored(f"an input is no meaning representation: {error}") from error
    if others := sorted(used - set(slots.SLOTS)):
        raise Unscored(f"the inputs have slots that E2E has not: {named(others)}")


def _slot_error_rate(contexts: Sequence[str], texts: list[str]) -> Measure:
    check_meanings(contexts)
    return slots.slot_error_rate(slots.slot_errors(contexts, texts))


def _makers_of_inputs(contexts: Sequence[str]) -> Makers:
    def given() -> Sequence[str]:
        if not any(contexts):
            raise Unscored("no inputs are known; give --inputs, or --data and --predictions")
        return contexts

    return {
        "SER": lambda texts: _slot_error_rate(given(), texts),
        "coverage": lambda texts: coverage.coverage(given(), texts),
    }


def _check(references: list[list[str]], systems: list[list[str]]) -> None:
    if not references:
        raise InputError("there is no item to score; give at least one reference and one output")
    for item, texts in enumerate(references, start=1):
        if not texts:
            raise InputError(f"item {item} has no reference; give it one or leave it out")
    for hypotheses in systems:
        if len(hypotheses) != len(references):
            raise InputError(
                f"there are {len(hypotheses)} outputs for {len(references)} items with references; "
                "give one output per item"
            )


def measure(
    task: str,
    references: list[list[str]],
    systems: list[list[str]],
    names: Iterable[str],
    meteor: coco.Meteor,
    contexts: Sequence[str] | None = None,
    tokenize: str | None = None,
) -> Measured:
    """Measure each system (one text per item) against the references (texts by item).

    `names` are some of `metrics_of(task)`; a metric that cannot score these texts, or that the
    contexts (one per item) do not fit, gets a reason in place of measures; without contexts the
    metrics `OF_INPUTS` are left out. `meteor` must stay open while METEOR's measures are in use.
    `tokenize` names the tokens of BLEU and NIST and the words of chrF++, if not those of the task.

    Raises:
        InputError: the numbers of texts do not fit.
    """
    _check(references, systems)
    makers = MAKERS[task](references, meteor, tokenize)
    if contexts is None:
        names = [name for name in names if name not in OF_INPUTS]
    else:
        makers |= _makers_of_inputs(contexts)
    measures: dict[str, list[Measure]] = {}
    reasons: dict[str, str] = {}
    if "METEOR" in names:
        # Loads its tables while the other metrics are computed; a failure shows on its first use.
        with suppress(coco.JavaError):
            meteor.start()
    for name in sorted(names, key=lambda name: name == "METEOR"):
        try:
            measures[name] = [makers[name](hypotheses) for hypotheses in systems]
        except Unscored as error:
            reasons[name] = str(error)
    in_order = [name for name in metrics_of(task) if name in measures]
    return Measured(
        [{name: measures[name][i] for name in in_order} for i in range(len(systems))], reasons
    )


def scores(
    task: str,
    references: list[list[str]],
    hypotheses: list[str],
    metrics: Sequence[str],
    contexts: Sequence[str] | None = None,
) -> dict[str, float | None]:
    """The scores of texts that `texts.prepare` has made ready for the task, None where one cannot
    be computed; NIST and CIDEr raw, others fractions."""
    with coco.Meteor() as meteor:
        measured = measure(task, references, [hypotheses], metrics, meteor, contexts).systems[0]
        return {name: measured[name].score() if name in measured else None for name in metrics}


def e2e_scores(
    references: list[list[str]],
    hypotheses: list[str],
    metrics: Iterable[str] = E2E,
    contexts: Sequence[str] | None = None,
) -> dict[str, float | None]:
    """The scores that tuetschek/e2e-metrics prints with `-p`, and SER and coverage of the contexts
    (or MRs) if asked for; None where Java is missing. NIST and CIDEr are raw, others fractions."""
    return scores("e2e", references, hypotheses, tuple(metrics), contexts)


def webnlg_scores(
    references: list[list[str]],
    hypotheses: list[str],
    metrics: Iterable[str] = WEBNLG,
    contexts: Sequence[str] | None = None,
) -> dict[str, float | None]:
    """The scores of WebNLG/GenerationEval as fractions, for texts that are already lower-cased and
    spaced as the task needs them (`texts.prepare`), and coverage if asked for with the contexts;
    None where Java is missing."""
    return scores("webnlg", references, hypotheses, tuple(metrics), contexts)


def segment_scores(
    task: str, references: list[list[str]], hypotheses: list[str], metrics: Iterable[str]
) -> dict[str, list[float]]:
    """Each metric's score of each item; a metric that Java could not give is left out."""
    with coco.Meteor() as meteor:
        measured = measure(task, references, [hypotheses], tuple(metrics), meteor).systems[0]
        return {name: of_system.segments() for name, of_system in measured.items()}


def sacrebleu_scores(
    references: list[list[str]],
    hypotheses: list[str],
    names: Iterable[str],
    tokenize: str | None = None,
) -> dict[str, dict[str, float | str]]:
    """sacreBLEU's own BLEU and chrF++ with its default settings, BLEU by the tokens of `tokenize`,
    as fractions, each with the signature under which it can be cited, where they are among the
    `names` (its TER takes minutes)."""
    from sacrebleu.metrics import BLEU, CHRF

    classes = {
        "BLEU": lambda: BLEU(force=True, tokenize=tokenize),
        "chrF++": lambda: CHRF(word_order=2),
    }
    scores = {}
    for name in [name for name in names if name in classes]:
        metric = classes[name]()
        score = metric.corpus_score(hypotheses, webnlg.by_position(references)).score / 100
        scores[name] = {"score": score, "signature": str(metric.get_signature())}
    return scores
