"""From JSONL to batches: the tokenizer, the rows, collation, and a sampler that can be resumed.

A row is one JSON object a line, either text, `{"context": str, "completion": str}`, encoded on the
fly as `BPE(context) + [bos]` and `BPE(" " + completion) + [eos]` with bos = eos = the id of
`<|endoftext|>`, or token ids, `{"context": [int], "completion": [int]}`, taken as they are.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import InputError
from common.files import read_json_lines

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


def read_rows(
    path: str | Path,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    need_completion: bool = True,
) -> list[Row]:
    """The rows of a text or encoded JSONL file as token ids.

    Args:
        tokenizer: needed for text rows only.
        need_completion: rows for decoding may lack the field.

    Raises:
        InputError: names file, line, field and reason.
    """
    objects = read_json_lines(path)
    fields = ["context", "completion"]
    columns = {}
    for field in fields:
        values = [row.get(field) for row in objects]
        if field == "completion" and not need_completion:
            values = [[] if value is None else value for value in values]
        columns[field] = _encode(values, field, path, tokenizer, vocab_size)
    return [Row(*ids) for ids in zip(*(columns[field] for field in fields), strict=True)]


def _encode(
    values: list, field: str, path: str | Path, tokenizer: Tokenizer | None, vocab_size: int
) -> list[np.ndarray]:
    """Token ids of one field of every row; texts are encoded together, which is far faster."""
    for number, value in enumerate(values, start=1):
        problem = _problem(value, field, tokenizer, vocab_size)
        if problem:
            raise InputError(f"{path}, line {number}: {field} {problem}")
    texts = [value for value in values if isinstance(value, str)]
    encoded: Iterator[list[int]] = iter(())
    if tokenizer is not None and texts:
        space = " " if field == "completion" else ""
        end = tokenizer.token_to_id(END_OF_TEXT)
        batch = tokenizer.encode_batch([space + text for text in texts])
        encoded = (encoding.ids + [end] for encoding in batch)
    return [
        np.array(next(encoded) if isinstance(value, str) else value, dtype=np.int64)
        for value in values
    ]


def _problem(value: object, field: str, tokenizer: Tokenizer | None, vocab_size: int) -> str | None:
    """What is wrong with one field, or None."""
    if value is None:
        return "is missing"
    if isinstance(value, str):
        if tokenizer is None:
            return "is text, and text needs --vocab, the folder of its vocabulary"
        return None if value.isascii() or _is_utf8(value) else "holds a lone surrogate, not text"
    if not isinstance(value, list):
        return f"must be text or a list of token ids, not {value!r:.40}"
    for token in value:
        if type(token) is not int or not 0 <= token < vocab_size:
            return f"has {token!r:.20}, which is not a token id below {vocab_size}"
    if not value and field == "context":
        return "is an empty list; it needs the begin token at least"
    return None


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class FT_Dataset(Dataset):
    """Rows cut to the window, as `input`, `target`, `mask` for training and `query` for decoding.

    A sequence is context + completion, and `target` is `input` shifted by one: this is the only
    place that shifts. With `joint_lm` every target counts, otherwise those of the completion.

    What is too long loses the head of its context, never its completion or end token. Only a
    completion that fills the window alone is cut at its tail. Decoding cuts its queries likewise,
    to `max_seq_length - max_eval_length`. `contexts_cut` and `completions_cut` count both.
    """

    def __init__(
        self,
        ft_file: str | Path,
        batch_size: int,
        max_seq_length: int,
        max_eval_length: int = 0,
        joint_lm: bool = False,
        tokenizer: Tokenizer | None = None,
        vocab_size: int = 50257,
        need_completion: bool = True,
    ) -> None:
        self.rows = read_rows(ft_file, tokenizer, vocab_size, need_completion)
        if need_completion:
            for number, row in enumerate(self.rows, start=1):
                if not row.completion.size:
                    raise InputError(f"{ft_file}, line {number}: completion is an empty list")
        self.num_batches = math.ceil(len(self.rows) / batch_size)
        self.max_seq_length = max_seq_length
        self.max_query_length = max_seq_length - max_eval_length
        self.joint_lm = joint_lm
        room = [max_seq_length - len(row.completion) for row in self.rows]
        pairs = list(zip(self.rows, room, strict=True))
        self.contexts_cut = sum(len(row.context) > max(space, 1) for row, space in pairs)
        self.completions_cut = sum(space < 1 for space in room)
        whole = [len(row.context) + len(row.completion) for row in self.rows]
        self.lengths = np.minimum(whole, max_seq_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        """`input`, `target` (T,) int64, `mask` (T,) float32, `query` (P,) int64 and the `id`."""
        row = self.rows[index]
        completion = row.completion[: self.max_seq_length - 1]
        context = row.context[-(self.max_seq_length - len(completion)) :]
        tokens = np.concatenate((context, completion))
        mask = np.zeros(len(tokens), dtype=np.float32)
        mask[0 if self.joint_lm else len(context) - 1 : len(tokens) - 1] = 1
        target = np.append(tokens[1:], 0)
        query = row.context[-self.max_query_length :]
        return {"id": index, "input": tokens, "target": target, "mask": mask, "query": query}

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`input`, `target` (B, T) int64 and `mask` (B, T) float32, padded with zeros to the last
        position that counts in any of the rows."""
        items = [self[index] for index in indices]
        longest = max(int(item["mask"].nonzero()[0][-1]) + 1 for item in items)
        return {key: _pad([item[key] for item in items], longest) for key in BATCH_KEYS}


BATCH_KEYS = ("input", "target", "mask")


def _pad(arrays: list[np.ndarray], length: int) -> Tensor:
    padded = np.zeros((len(arrays), length), dtype=arrays[0].dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array[:length]
    return torch.from_numpy(padded)


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
