"""From JSONL to batches: the tokenizer, the rows, collation, and a sampler that can be resumed.

A row is one JSON object a line, either text, `{"context": str, "completion": str}`, encoded on the
fly as `BPE(context) + [bos]` and `BPE(" " + completion) + [eos]` with bos = eos = the id of
`<|endoftext|>`, or token ids, `{"context": [int], "completion": [int]}`, taken as they are.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import Dataset

from common.batch import Batch
from common.errors import InputError
from data.readers import DataFile, Record, Side

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def vocabulary_files(folder: str | Path) -> tuple[Path, Path]:
    """Paths of the vocabulary and of the merges in a folder, under either of their usual names."""
    for names in VOCABULARY_FILES:
        vocabulary, merges = (Path(folder) / name for name in names)
        if vocabulary.is_file() and merges.is_file():
            return vocabulary, merges
    raise InputError(
        f"--vocab {folder} holds neither vocab.json with merges.txt nor encoder.json with "
        "vocab.bpe; scripts/download_vocab.sh fetches GPT-2's"
    )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """A byte-level BPE tokenizer as GPT-2's, from the two files in `folder`."""
    vocabulary, merges = vocabulary_files(folder)
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise InputError(f"{vocabulary} or {merges.name} is not a BPE file: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise InputError(f"{vocabulary} has no entry {END_OF_TEXT}, which ends every text")
    return tokenizer


def vocabulary_fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 over the entries and their ids: equal for equal vocabularies, whatever the files."""
    entries = json.dumps(tokenizer.get_vocab(with_added_tokens=False), sort_keys=True)
    return hashlib.sha256(entries.encode()).hexdigest()


def default_end_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text: end-of-text and, where it is one token, the blank line."""
    blank_line = tokenizer.encode("\n\n").ids
    return [tokenizer.token_to_id(END_OF_TEXT), *(blank_line if len(blank_line) == 1 else [])]


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
    dtype = np.uint16 if vocab_size <= 2**16 else np.int32
    tokens, lengths, lines = [], [], []
    contexts: list[Side] = []
    others: list[dict[str, Any]] = []
    for records in _batches(source):
        for record in records:
            _check_ids(source, record, tokenizer, vocab_size)
        pairs = [
            _encode([record.context for record in records], tokenizer, space=""),
            _encode([record.completion or [] for record in records], tokenizer, space=" "),
        ]
        sides = [side for pair in zip(*pairs, strict=True) for side in pair]
        tokens.append(np.array(list(chain.from_iterable(sides)), dtype))
        lengths.append(np.array(list(map(len, sides)), np.int64).reshape(-1, 2))
        lines.append(np.array([record.line for record in records], np.int32))
        if also is not None:
            contexts += [record.context for record in records]
            others += [record.also for record in records]
    parts = (np.concatenate(part) for part in (tokens, lengths, lines))
    return Rows(source, *parts, contexts, others)


BATCH_CHARACTERS = 2**17  # texts are encoded together, which is far faster, but takes memory


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


def _encode(sides: Sequence[Side], tokenizer: Tokenizer | None, space: str) -> list[list[int]]:
    """Token ids of one side of some rows: a text with `space` before it, unless it brings one, and
    the end token after it; ids as they are."""
    texts = [side for side in sides if isinstance(side, str)]
    encoded: Iterator[list[int]] = iter(())
    if tokenizer is not None and texts:
        end = tokenizer.token_to_id(END_OF_TEXT)
        spaced = [text if text.startswith(space) else space + text for text in texts]
        encoded = (encoding.ids + [end] for encoding in tokenizer.encode_batch_fast(spaced))
    return [next(encoded) if isinstance(side, str) else side for side in sides]


def _check_ids(
    source: DataFile, record: Record, tokenizer: Tokenizer | None, vocab_size: int
) -> None:
    """Refuse ids that the vocabulary has not, and text where there is no vocabulary."""
    for column, side in (("context", record.context), ("completion", record.completion or [])):
        if isinstance(side, str):
            if tokenizer is not None:
                continue
            problem = "is text, and text needs --vocab, the folder of its vocabulary"
            raise source.error(record.line, record.number, f"{column} {problem}")
        for token in side:
            if type(token) is not int or not 0 <= token < vocab_size:
                problem = f"has {token!r:.20}, which is not a token id below {vocab_size}"
                raise source.error(record.line, record.number, f"{column} {problem}")


def repeats_ngram(tokens: Sequence[int], n: int) -> bool:
    """Whether some n tokens in a row occur twice, which `--no_repeat_ngram_size n` forbids."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) < len(grams)


class Item(TypedDict):
    """A row for training: `input`, `target` (T,) int64, and `mask` (T,) float32, 1 where the loss
    counts."""

    input: np.ndarray
    target: np.ndarray
    mask: np.ndarray


class FT_Dataset(Dataset):
    """Rows for training, cut to the window.

    A sequence is context + completion, and `target` is `input` shifted by one: this is the only
    place that shifts. With `joint_lm` every target counts, otherwise those of the completion.

    What is too long loses the head of its context, never its completion or end token. Only a
    completion that fills the window alone is cut at its tail. `contexts_cut` and `completions_cut`
    count both.
    """

    def __init__(
        self,
        ft_file: str | Path,
        max_seq_length: int,
        joint_lm: bool = False,
        tokenizer: Tokenizer | None = None,
        vocab_size: int = 50257,
        fields: str | None = None,
    ) -> None:
        self.rows = read_rows(ft_file, tokenizer, vocab_size, fields=fields)
        self.max_seq_length = max_seq_length
        self.joint_lm = joint_lm
        contexts, completions = self.rows.lengths.T
        room = max_seq_length - completions
        self.contexts_cut = int((contexts > np.maximum(room, 1)).sum())
        self.completions_cut = int((room < 1).sum())
        self.lengths = np.minimum(contexts + completions, max_seq_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        row = self.rows[index]
        completion = row.completion[: self.max_seq_length - 1]
        context = row.context[-(self.max_seq_length - len(completion)) :]
        tokens = np.concatenate((context, completion))
        mask = np.zeros(len(tokens), dtype=np.float32)
        mask[0 if self.joint_lm else len(context) - 1 : len(tokens) - 1] = 1
        return {"input": tokens, "target": np.append(tokens[1:], 0), "mask": mask}

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows of these numbers, each up to its last position that counts."""
        items = [self[index] for index in indices]
        places = [item["mask"].nonzero()[0] for item in items]
        lengths = [int(own[-1]) + 1 for own in places]
        starts = np.cumsum([0, *lengths[:-1]])
        weights = [item["mask"][own] for item, own in zip(items, places, strict=True)]
        return Batch(
            input_ids=_row(item["input"][:n] for item, n in zip(items, lengths, strict=True)),
            positions=_row(np.arange(n) for n in lengths),
            lengths=lengths,
            counted=_row(own + start for own, start in zip(places, starts, strict=True)),
            targets=_row(item["target"][own] for item, own in zip(items, places, strict=True)),
            weights=_row(weights),
            count=float(sum(own.sum() for own in weights)),
        )


def _row(arrays: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(list(arrays)))


@dataclass(frozen=True)
class EpochSampler:
    """Which rows each rank sees in each step: a pure function of seed, epoch, step and rank.

    An epoch is one permutation of the rows, the one that `DistributedSampler` draws for the same
    seed and epoch. Step s takes its s-th global batch, rank i every world_size-th row of that from
    the i-th on. The last step of an epoch may be smaller and nothing is repeated to fill it.
    """

    rows: int
    batch_size: int
    grad_acc: int = 1
    world_size: int = 1
    rank: int = 0
    seed: int = 0

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.grad_acc * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.global_batch)

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[list[int]]]:
        """This rank's micro-batches, lists of row numbers, of each step of `epoch` from `start`."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(self.rows, generator=generator).tolist()
        for step in range(start, self.steps_per_epoch):
            window = order[step * self.global_batch : (step + 1) * self.global_batch]
            mine = window[self.rank :: self.world_size]
            yield [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]
