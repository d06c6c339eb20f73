"""The scores of what a model writes at a validation: of the texts that gpt2_beam.py would write, as
eval.evaluate would score them.

Decoding draws no random number, and leaves every tensor and module of the model as it was.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

from tokenizers import Tokenizer

import checkpoints
from common.errors import InputError
from data_utils import Rows, default_end_ids
from decoding import Hypothesis, SearchSettings, text_of
from decoding.batches import Context, gather_batches, make_batches, search_batch
from decoding.journal import Found
from decoding.packed import lent_to_decoding
from eval import texts
from eval.choice import LOSS, SCORES
from eval.measure import Unscored
from eval.metrics import check_meanings, metrics_of, scores
from gpu import Runtime
from model import GPT2LMModel

BATCH_SIZE = 16  # contexts decoded at once, as many as gpt2_beam.py decodes
SEARCH_FLAGS = {
    f"valid_{name}": name for name in ("beam", "eval_len", "length_penalty", "no_repeat_ngram_size")
}
FLAGS = ("valid_task", "valid_texts", *SEARCH_FLAGS)
OF_E2E_ALONE = {"nist", "ser"}


@dataclass(frozen=True)
class Scoring:
    """What a validation measures. Of `metrics`, by the names of `eval.choice`, the first decides;
    the scores among them follow the rules of `task` and are of the texts that `search` finds for
    the first `contexts` contexts, for all where that is None."""

    metrics: tuple[str, ...] = (LOSS,)
    task: str = "own"
    contexts: int | None = None
    search: SearchSettings = SearchSettings()

    @classmethod
    def of_flags(cls, valid_metric: str, given: Mapping[str, Any]) -> "Scoring":
        """Return what the flags say: `given` are those of `FLAGS` that have a value.

        Raises:
            InputError: one is out of its range, or does not go with another.
        """
        metrics = tuple(dict.fromkeys(valid_metric.lower().split(",")))
        if unknown := [name for name in metrics if name not in (LOSS, *SCORES)]:
            raise InputError(
                f"--valid_metric {unknown[0]!r} is none of {', '.join((LOSS, *SCORES))}"
            )
        search = {own: given[flag] for flag, own in SEARCH_FLAGS.items() if flag in given}
        try:
            settings = SearchSettings(**search)
        except ValueError as error:
            raise InputError(f"--valid_{error}") from error
        task = given.get("valid_task") or ("e2e" if OF_E2E_ALONE & {*metrics} else "own")
        scoring = cls(metrics, task, given.get("valid_texts"), settings)
        if given and not scoring.scores:
            raise InputError(
                f"--{next(iter(given))} is for scores of texts; name some by --valid_metric, or "
                "leave it out"
            )
        return scoring

    def check(self, valid_data: str | None, vocab: str | None) -> None:
        """Refuse scores without what they need, or that the task does not have."""
        if not self.scores:
            return
        named = f"--valid_metric {','.join(self.scores)}"
        if not valid_data:
            raise InputError(f"{named} is of validation texts; give --valid_data, or leave it out")
        if not vocab:
            raise InputError(
                f"{named} is of texts, which need --vocab, the folder of their vocabulary; give "
                "it, or choose by loss"
            )
        known = [name for name, official in SCORES.items() if official in metrics_of(self.task)]
        if foreign := [name for name in self.scores if name not in known]:
            raise InputError(
                f"--valid_metric {foreign[0]} is no score of --valid_task {self.task}, which has "
                f"{', '.join(known)}"
            )

    @property
    def scores(self) -> tuple[str, ...]:
        """The metrics that are scores of texts."""
        return tuple(name for name in self.metrics if name != LOSS)

    @property
    def decider(self) -> str:
        """The metric by which the best adapter is chosen and patience counted."""
        return self.metrics[0]

    def flags(self) -> dict[str, object]:
        """Return the flags of the scores as they came to be; of a loss the metric alone."""
        flags: dict[str, object] = {"valid_metric": ",".join(self.metrics)}
        if self.scores:
            flags |= {"valid_task": self.task, "valid_texts": self.contexts}
            flags |= {flag: getattr(self.search, name) for flag, name in SEARCH_FLAGS.items()}
        return flags

    @property
    def choice(self) -> dict[str, object]:
        """The flags on which the values that decide depend; none where they are losses."""
        return {} if self.decider == LOSS else self.flags() | {"valid_metric": self.decider}


@dataclass(frozen=True)
class ValidTexts:
    """Validation rows as items to score: item i has the context `contexts[i]`, in token ids as it
    is decoded, and all its references."""

    scoring: Scoring
    tokenizer: Tokenizer
    items: list[texts.Item]
    contexts: list[Context]

    @classmethod
    def of_rows(
        cls, scoring: Scoring, rows: Rows, tokenizer: Tokenizer, window: int
    ) -> "ValidTexts":
        """Return the items of the rows whose contexts are scored, in a model's window of tokens.

        Raises:
            InputError: there is nothing to score, or a score does not fit the contexts.
        """
        checkpoints.check_room("valid_eval_len", scoring.search.eval_len, window)
        room = window - scoring.search.eval_len
        keys = [tuple(row.context.tolist()) for row in rows]
        chosen = set(islice(dict.fromkeys(keys), scoring.contexts))
        numbers = [number for number, key in enumerate(keys) if key in chosen]

        def decode(sides: list) -> list[str]:
            return tokenizer.decode_batch(sides, skip_special_tokens=False)

        own = [keys[number] for number in numbers]
        references = decode([rows[number].completion.tolist() for number in numbers])
        as_texts = map(texts.Row, decode(own), references, own)
        items = texts.group(list(as_texts), scoring.task)
        if not items:
            raise InputError(
                f"--valid_data {rows.source.path} has no text to score; choose by loss"
            )
        if "ser" in scoring.scores:
            _check_e2e([item.context for item in items], str(rows.source.path))
        contexts = [own[item.row][-room:] for item in items]
        items = [replace(item, row=number) for number, item in enumerate(items)]
        return cls(scoring, tokenizer, items, contexts)

    def score(
        self, model: GPT2LMModel, runtime: Runtime, between: Callable[[], object]
    ) -> dict[str, float]:
        """Return the scores of what the model writes, the same on all ranks; NaN where its logits
        are. The ranks share the batches and call `between` together before each."""
        settings = replace(self.scoring.search, end_ids=tuple(default_end_ids(self.tokenizer)))
        batches = make_batches([None] * len(self.contexts), self.contexts, BATCH_SIZE)
        own: dict[int, Found] = {}
        are_nan = False
        with lent_to_decoding(model, runtime.precision):
            for turn in range(0, len(batches), runtime.world_size):
                between()
                for batch in batches[turn + runtime.rank : turn + runtime.rank + 1]:
                    try:
                        own[batch.number] = search_batch(runtime, model, batch, settings)
                    except ValueError:
                        are_nan = True
        if any(runtime.sum(are_nan)):
            return dict.fromkeys(self.scoring.scores, math.nan)
        found = gather_batches(runtime, batches, own)
        return runtime.from_first(lambda: self._score([found[None, c][0] for c in self.contexts]))

    def _score(self, best: list[Hypothesis]) -> dict[str, float]:
        """The scores of the best hypothesis of each item."""
        scoring = self.scoring
        predictions = [texts.Prediction(text_of(hypothesis, self.tokenizer)) for hypothesis in best]
        official = scores(
            scoring.task,
            [item.references for item in self.items],
            texts.outputs(self.items, predictions, scoring.task),
            [SCORES[name] for name in scoring.scores],
            [item.context for item in self.items],
        )
        return {name: cast(float, official[SCORES[name]]) for name in scoring.scores}


def _check_e2e(contexts: list[str], source: str) -> None:
    try:
        check_meanings(contexts)
    except Unscored as error:
        raise InputError(
            f"--valid_metric ser: {source} is not of E2E: {error}; leave ser out"
        ) from error
