"""From files to batches: the tokenizer, rows cut to the window, collation, a resumable sampler."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from common.batch import Batch, Spans
from data.encoding import Row, Rows, read_rows, repeats_ngram
from data.vocabulary import END_OF_TEXT, end_of_text_id, load_tokenizer, vocabulary_files

__all__ = [
    "END_OF_TEXT",
    "EpochSampler",
    "FT_Dataset",
    "Row",
    "Rows",
    "default_end_ids",
    "load_tokenizer",
    "read_rows",
    "repeats_ngram",
    "vocabulary_files",
    "vocabulary_fingerprint",
]


GPT2_VOCABULARY = 50257
GPT2_END_IDS = (50256, 628)  # end of text, blank line


def vocabulary_fingerprint(tokenizer: Tokenizer, with_merges: bool = True) -> str:
    """sha256 over the entries, their ids and the merges: equal for equal vocabularies, whatever the
    files. Older headers hold that of the entries alone."""
    content: object = tokenizer.get_vocab()
    if with_merges:
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        pairs = [m if isinstance(m, str) else " ".join(m) for m in merges]
        content = {"entries": content, "merges": pairs}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def default_end_ids(tokenizer: Tokenizer | None, vocab_size: int = 0) -> list[int]:
    """The ids that end a text: end-of-text and, where it is one token, the blank line. Without a
    tokenizer they are known of GPT-2's vocabulary, by its size, and of no other."""
    if tokenizer is None:
        return list(GPT2_END_IDS) if vocab_size == GPT2_VOCABULARY else []
    blank_line = tokenizer.encode("\n\n").ids
    return [end_of_text_id(tokenizer), *(blank_line if len(blank_line) == 1 else [])]


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
        vocab_size: int = GPT2_VOCABULARY,
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
            spans=Spans.of(lengths),
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
