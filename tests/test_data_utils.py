"""Rows, tokenizer, truncation, collation and sampler."""

import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, random_rows, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DistributedSampler

from common.errors import InputError
from data.convert_dart import dart_rows
from data.convert_e2e import e2e_rows
from data.convert_webnlg import webnlg_rows
from data_utils import (
    EpochSampler,
    FT_Dataset,
    default_end_ids,
    load_tokenizer,
    read_rows,
)

EOS = 50256


@pytest.fixture(scope="session")
def gpt2_tokenizer(shared: Path) -> Tokenizer:
    return load_tokenizer(shared / "data" / "gpt2_vocab")


@pytest.fixture(scope="session")
def other(shared: Path) -> Callable[[list[str]], list[list[int]]]:
    """Encodes texts as transformers' own GPT-2 tokenizer does."""
    from transformers import GPT2Tokenizer

    folder = shared / "data" / "gpt2_vocab"
    tokenizer = GPT2Tokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    return lambda texts: tokenizer(texts)["input_ids"]


def corpus_rows(shared: Path) -> list[dict]:
    data = shared / "data"
    return [
        *itertools.chain.from_iterable(
            e2e_rows(data / "e2e" / name) for name in ("train.txt.gz", "valid.txt", "test.txt")
        ),
        *itertools.chain.from_iterable(
            webnlg_rows(data / "webnlg" / f"{name}.json.gz") for name in ("train", "dev", "test")
        ),
        *itertools.chain.from_iterable(
            dart_rows(data / "dart" / f"dart-v1.1.1-full-{name}.json.gz")
            for name in ("dev", "test")
        ),
    ]


def test_ids_equal_transformers_on_every_word_and_many_texts_of_the_three_corpora(
    shared: Path, gpt2_tokenizer: Tokenizer, other: Callable
) -> None:
    rows = corpus_rows(shared)
    assert len(rows) > 95_000
    texts = sorted({r["context"] for r in rows} | {" " + r["completion"] for r in rows})
    # No token of GPT-2's spans the blank before a word, so distinct words stand for all texts ...
    words = sorted({word for text in texts for word in re.split(r"(?<=\S)(?= \S)", text)})
    assert [encoding.ids for encoding in gpt2_tokenizer.encode_batch(words)] == other(words)
    # ... and that they may stand for them is seen on some.
    some = texts[::20]
    got = [encoding.ids for encoding in gpt2_tokenizer.encode_batch(some)]
    assert got == other(some)
    assert gpt2_tokenizer.decode_batch(got) == some
    ids = dict(zip(words, (e.ids for e in gpt2_tokenizer.encode_batch(words)), strict=True))
    for text, whole in zip(some, got, strict=True):
        parts = re.split(r"(?<=\S)(?= \S)", text)
        assert whole == list(itertools.chain.from_iterable(ids[part] for part in parts))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_has_the_ids_of_transformers_and_comes_back(
    text: str, gpt2_tokenizer: Tokenizer, other: Callable
) -> None:
    ids = gpt2_tokenizer.encode(text).ids
    assert ids == other([text])[0]
    assert gpt2_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_text_and_encoded_rows_give_the_same_ids(
    shared: Path, gpt2_tokenizer: Tokenizer, other: Callable, tmp_path: Path
) -> None:
    texts = list(itertools.islice(webnlg_rows(shared / "data/webnlg/dev.json.gz"), 50))
    texts.append({"context": "é\u2028\x0b", "completion": "."})
    encoded = [
        {
            "context": other([row["context"]])[0] + [EOS],
            "completion": other([" " + row["completion"]])[0] + [EOS],
        }
        for row in texts
    ]
    mixed = texts[:25] + encoded[25:]
    read = [
        read_rows(write_rows(tmp_path / f"{i}.jsonl", rows), gpt2_tokenizer, 50257)
        for i, rows in enumerate((texts, encoded, mixed))
    ]
    for row, *others in zip(encoded, *read, strict=True):
        for other_row in others:
            assert other_row.context.tolist() == row["context"]
            assert other_row.completion.tolist() == row["completion"]


def test_a_completion_that_brings_its_blank_gets_no_second_one(
    gpt2_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [{"prompt": " a b", "completion": text} for text in ("c d", " c d", "  c d", "\tc")]
    read = read_rows(write_rows(tmp_path / "rows.jsonl", rows), gpt2_tokenizer, 50257)
    texts = [gpt2_tokenizer.decode(row.completion[:-1].tolist()) for row in read]
    assert texts == [" c d", " c d", "  c d", " \tc"]
    assert {gpt2_tokenizer.decode(row.context[:-1].tolist()) for row in read} == {" a b"}


def test_a_row_is_kept_in_two_bytes_a_token(gpt2_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", random_rows(50))
    rows = read_rows(path, gpt2_tokenizer, 50257)
    assert rows.tokens.dtype == np.uint16 and rows.lengths.sum() == rows.tokens.size
    assert read_rows(path, None, 2**16 + 1).tokens.dtype == np.int32
    assert rows[3].context.dtype == np.int64
    assert [rows[-1].context.tolist()] == [row.context.tolist() for row in rows][-1:]
    with pytest.raises(IndexError):
        rows[50]


def test_default_end_ids_are_end_of_text_and_the_blank_line(gpt2_tokenizer: Tokenizer) -> None:
    assert default_end_ids(gpt2_tokenizer) == [EOS, 628]


def dataset(folder: Path, rows: list[dict], seq_len: int, **options: object) -> FT_Dataset:
    path = write_rows(folder / "rows.jsonl", rows)
    return FT_Dataset(path, seq_len, vocab_size=VOCABULARY, **options)


def reference_item(row: dict, seq_len: int, joint: bool) -> list[tuple[int, int]]:
    """(position's token, token to be predicted) of all counted positions, one by one."""
    completion = row["completion"][: seq_len - 1]
    context = row["context"]
    while len(context) + len(completion) > seq_len:
        context = context[1:]
    sequence = context + completion
    first = 1 if joint else len(context)
    return [(sequence[i - 1], sequence[i]) for i in range(first, len(sequence))]


@settings(max_examples=100, deadline=None)
@given(
    context=st.lists(st.integers(1, 63), min_size=1, max_size=20),
    completion=st.lists(st.integers(1, 63), min_size=1, max_size=20),
    seq_len=st.integers(2, 24),
    joint=st.booleans(),
)
def test_targets_are_inputs_shifted_once_and_counted_on_the_completion_or_on_all(
    context: list, completion: list, seq_len: int, joint: bool, tmp_path_factory: object
) -> None:
    row = {"context": context, "completion": completion}
    folder = tmp_path_factory.mktemp("rows")
    item = dataset(folder, [row], seq_len, joint_lm=joint)[0]
    counted = [
        (int(token), int(target))
        for token, target, weight in zip(item["input"], item["target"], item["mask"], strict=True)
        if weight
    ]
    assert counted == reference_item(row, seq_len, joint)
    assert len(item["input"]) == min(len(context) + len(completion), seq_len)


def test_long_contexts_lose_their_head_and_completions_keep_their_end(tmp_path: Path) -> None:
    long = {"context": [*range(1, 61)], "completion": [1, 2, 3, 63]}
    tight = {"context": [*range(1, 30)], "completion": [1, 2, 3, 4, 63]}
    short = {"context": [1, 2], "completion": [63]}
    endless = {"context": [1, 2], "completion": [3] * 40}
    data = dataset(tmp_path, [long, tight, short, endless], 32)
    assert (data.contexts_cut, data.completions_cut) == (3, 1)
    assert [int(data[i]["mask"].sum()) for i in range(4)] == [4, 5, 1, 31]
    for i, row in enumerate((long, tight)):
        item = data[i]
        assert item["target"][item["mask"] > 0].tolist() == row["completion"]
        assert item["input"][0] == row["context"][0] + len(row["context"]) - (
            32 - len(row["completion"])
        )


@pytest.mark.parametrize("joint", [False, True])
def test_a_batch_is_its_rows_one_after_the_other_up_to_what_counts(
    tmp_path: Path, joint: bool
) -> None:
    rows = random_rows(9)
    data = dataset(tmp_path, rows, 32, joint_lm=joint)
    batch = data.batch([4, 0, 8])
    dtypes = {key: value.dtype for key, value in vars(batch).items() if isinstance(value, Tensor)}
    assert dtypes.pop("weights") == torch.float32 and set(dtypes.values()) == {torch.int64}
    whole = [rows[i]["context"] + rows[i]["completion"] for i in (4, 0, 8)]
    ends = [rows[i]["completion"] for i in (4, 0, 8)] if not joint else [row[1:] for row in whole]
    assert batch.input_ids.tolist() == [token for row in whole for token in row[:-1]]
    assert batch.spans.lengths == [len(row) - 1 for row in whole]
    assert batch.positions.tolist() == [i for row in whole for i in range(len(row) - 1)]
    assert batch.targets.tolist() == [token for end in ends for token in end]
    before = [row[-len(end) - 1 : -1] for row, end in zip(whole, ends, strict=True)]
    assert batch.input_ids[batch.counted].tolist() == [token for part in before for token in part]
    assert batch.weights.tolist() == [1.0] * len(batch.targets) and batch.count == len(
        batch.targets
    )
    assert data.lengths.tolist() == [len(r["context"]) + len(r["completion"]) for r in rows]


def test_rows_for_decoding_need_no_completion(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"context": [1, 2]}, {"context": [3]}])
    rows = read_rows(path, None, VOCABULARY, need_completion=False)
    assert [row.context.tolist() for row in rows] == [[1, 2], [3]]
    with pytest.raises(InputError, match="line 1: completion is missing"):
        FT_Dataset(path, 8, vocab_size=VOCABULARY)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 60),
    batch_size=st.integers(1, 5),
    grad_acc=st.integers(1, 3),
    world_size=st.integers(1, 4),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 20),
)
def test_windows_of_all_ranks_partition_the_epoch_in_the_order_of_torchs_sampler(
    rows: int, batch_size: int, grad_acc: int, world_size: int, seed: int, epoch: int
) -> None:
    ranks = [
        list(EpochSampler(rows, batch_size, grad_acc, world_size, rank, seed).steps(epoch))
        for rank in range(world_size)
    ]
    sampler = EpochSampler(rows, batch_size, grad_acc, world_size, 0, seed)
    assert {len(steps) for steps in ranks} == {sampler.steps_per_epoch}
    order = []
    for windows in zip(*ranks, strict=True):
        shares = [list(itertools.chain.from_iterable(window)) for window in windows]
        assert all(len(micro) <= batch_size for window in windows for micro in window)
        assert all(len(window) <= grad_acc for window in windows)
        for i in itertools.count():
            dealt = [share[i] for share in shares if i < len(share)]
            order += dealt
            if not dealt:
                break
    torchs = DistributedSampler(range(rows), num_replicas=1, rank=0, seed=seed)
    torchs.set_epoch(epoch)
    assert order == list(torchs)
    # DistributedSampler repeats rows to fill the last round; up to there its ranks see the same.
    for rank, steps in enumerate(ranks):
        theirs = DistributedSampler(range(rows), num_replicas=world_size, rank=rank, seed=seed)
        theirs.set_epoch(epoch)
        mine = list(itertools.chain.from_iterable(itertools.chain.from_iterable(steps)))
        if sampler.global_batch % world_size == 0:
            assert mine == list(theirs)[: len(mine)]


def test_an_epoch_that_starts_late_is_the_rest_of_the_whole() -> None:
    sampler = EpochSampler(23, 2, 2, seed=random.Random(0).randrange(100))
    whole = list(sampler.steps(3))
    assert [list(sampler.steps(3, start)) for start in range(7)] == [
        whole[start:] for start in range(7)
    ]
    assert len(whole) == 6 and sum(map(len, whole[-1])) == 3
