"""The predictions file: one JSON object for each row of the data, in its order."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from common.files import replacing
from decoding.beam_search import Hypothesis
from decoding.generate import text_of


def write_predictions(
    path: Path,
    contexts: Sequence[str | list[int]],
    found: Sequence[Sequence[Hypothesis]],
    tokenizer: Tokenizer | None,
    with_n_best: bool,
) -> None:
    """Write the best hypothesis of each row, and all of them if asked, with the row's context as it
    stands in the data."""
    with replacing(path) as file:
        for number, (context, hypotheses) in enumerate(zip(contexts, found, strict=True)):
            best = [describe(hypothesis, tokenizer) for hypothesis in hypotheses]
            prediction = {"id": number, "context": context} | best[0]
            if with_n_best:
                prediction["n_best"] = best
            file.write(json.dumps(prediction, ensure_ascii=False) + "\n")


def describe(hypothesis: Hypothesis, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return a hypothesis as it stands in the file; an empty one has no score."""
    tokens = hypothesis.tokens
    fields: dict[str, Any] = {"prediction": tokens}
    if tokenizer is not None:
        fields["text"] = text_of(hypothesis, tokenizer)
    score = round(hypothesis.score, 4) if tokens else None
    return fields | {"score": score, "length": len(tokens), "finished": hypothesis.finished}
