"""Rows of text or token ids as token ids.

A text row becomes `BPE(context) + [end]` and `BPE(" " + completion) + [end]`, `end` the id of
`<|endoftext|>`; a completion that brings its blank gets no second one. Ids are taken as they are.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from common.errors import InputError
from data.readers import DataFile, Record, Side
from data.vocabulary import bytes_without_entry, end_of_text_id

BATCH_CHARACTERS = 2**17  # texts are encoded together, which is far faster, but takes memory


@dataclass(frozen=True)
class Row:
    """One example as token ids, (length,) int64 each; `completion` is empty where none is given."""

    context: np.ndarray
    completion: np.ndarray


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """The rows of a data file as token ids, all in one array of two or four bytes a token.

    `tokens` (tokens,) uint16 or int32 has context and completion of row after row, `lengths`
    (rows, 2) int64 how long each is, `lines` (rows,) int32 where it stands in the file. `source`
    knows the file's hash and columns. `contexts` and `also`, where asked for, hold each context as
    it stands in the file, and other columns.
    """

    source: DataFile
    tokens: np.ndarray
    lengths: np.ndarray
    lines: np.ndarray
    contexts: list[Side]
    also: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        context, completion = self.lengths[index]
        middle = self._ends[index] - completion
        return Row(
            self.tokens[middle - context : middle].astype(np.int64),
            self.tokens[middle : middle + completion].astype(np.int64),
        )

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.lengths.sum(1))

    def error(self, index: int, problem: str) -> InputError:
        """What is wrong with a row, with its place in the file."""
        return self.source.error(int(self.lines[index]), index + 1, problem)


def read_rows(
    path: str | Path,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    need_completion: bool = True,
    fields: str | None = None,
    also: Sequence[str] | None = None,
) -> Rows:
    """The rows of a data file as token ids; the file is read once.

    Args:
        tokenizer: needed for text only.
        need_completion: rows for decoding may lack it.
        fields: what `--fields` says.
        also: for decoding; keeps the contexts as they stand in the file, and these columns.

    Raises:
        InputError: names file, line, column and reason.
    """
    source = DataFile(path, fields, need_completion, also or ())
    encoder = _Encoder(tokenizer, vocab_size)
    tokens, lengths, lines = [], [], []
    contexts: list[Side] = []
    others: list[dict[str, Any]] = []
    for records in _batches(source):
        for record in records:
            if problem := encoder.problem(record):
                raise source.error(record.line, record.number, problem)
        sides = encoder.sides(records)
        tokens.append(np.array(list(chain.from_iterable(sides)), encoder.dtype))
        lengths.append(np.array(list(map(len, sides)), np.int64).reshape(-1, 2))
        lines.append(np.array([record.line for record in records], np.int32))
        if also is not None:
            contexts += [record.context for record in records]
            others += [record.also for record in records]
    return Rows(
        source,
        np.concatenate(tokens),
        np.concatenate(lengths),
        np.concatenate(lines),
        contexts,
        others,
    )


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """The records in lists whose texts hold about as many characters."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.context) + len(record.completion or ())
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Encoder:
    """Sides of rows → token ids below `vocab_size`."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.dtype = np.uint16 if vocab_size <= 2**16 else np.int32
        self._unknown = set() if tokenizer is None else bytes_without_entry(tokenizer)

    def problem(self, record: Record) -> str | None:
        """What keeps a row from being encoded."""
        for column, side in (("context", record.context), ("completion", record.completion or [])):
            if isinstance(side, list):
                for token in side:
                    if type(token) is not int or not 0 <= token < self.vocab_size:
                        known = f"a token id below {self.vocab_size}"
                        return f"{column} has {token!r:.20}, which is not {known}"
            elif self.tokenizer is None:
                return f"{column} is text, and text needs --vocab, the folder of its vocabulary"
            elif self._unknown and (lost := self._unknown.intersection(side.encode())):
                return f"{column} has the byte {min(lost)}, which --vocab has no entry for"
        return None

    def sides(self, records: Sequence[Record]) -> list[list[int]]:
        """Context and completion of one record after the other."""
        contexts = self._encode([record.context for record in records], space="")
        completions = self._encode([record.completion or [] for record in records], space=" ")
        return [side for pair in zip(contexts, completions, strict=True) for side in pair]

    def _encode(self, sides: Sequence[Side], space: str) -> list[list[int]]:
        """A text with `space` before it, unless it brings one, and the end token after it."""
        texts = [side for side in sides if isinstance(side, str)]
        encoded: Iterator[list[int]] = iter(())
        if self.tokenizer is not None and texts:
            end = end_of_text_id(self.tokenizer)
            spaced = [text if text.startswith(space) else space + text for text in texts]
            encodings = self.tokenizer.encode_batch_fast(spaced)
            encoded = (encoding.ids + [end] for encoding in encodings)
        return [next(encoded) if isinstance(side, str) else side for side in sides]


def repeats_ngram(tokens: Sequence[int], n: int) -> bool:
    """Whether some n tokens in a row occur twice, which `--no_repeat_ngram_size n` forbids."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) < len(grams)
