"""Attention straight on the row of a batch: its plumbing here, by a reference in the place of the
kernel, which runs on CUDA alone (tests/test_cuda.py)."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import Tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gpt2_ft
import gpu
from common import packed_attention
from common.batch import Batch, Spans
from data_utils import FT_Dataset
from training.setup import prepare


@pytest.fixture(autouse=True)
def _kernel_found_anew():
    packed_attention._kernel.cache_clear()
    yield
    packed_attention._kernel.cache_clear()


def reference(query, key, value, starts_q, starts_k, longest_q, longest_k, **causal) -> Tensor:  # noqa: ANN001
    """What torch.nn.attention.varlen computes, for causal attention of sequences to themselves."""
    assert causal in ({"window_size": (-1, 0)}, {"is_causal": True})
    assert starts_q is starts_k and starts_q.dtype == torch.int32
    lengths = starts_q.diff().tolist()
    assert longest_q == longest_k >= max(lengths) and starts_q[-1] == len(query)
    parts = zip(
        *(t.transpose(0, 1).split(lengths, dim=1) for t in (query, key, value)), strict=True
    )
    mixed = [F.scaled_dot_product_attention(*part, is_causal=True) for part in parts]
    return torch.cat(mixed, dim=1).transpose(0, 1)


def use_reference(patch: pytest.MonkeyPatch, signature: str = "window_size") -> None:
    """Let the reference stand where torch has its kernel, by either release's arguments."""
    names = {
        "window_size": lambda q, k, v, a, b, m, n, *, window_size=(-1, -1): reference(
            q, k, v, a, b, m, n, window_size=window_size
        ),
        "is_causal": lambda q, k, v, a, b, m, n, is_causal=False: reference(
            q, k, v, a, b, m, n, is_causal=is_causal
        ),
    }
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = names[signature]
    patch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    patch.setattr(packed_attention, "is_possible", lambda *_: True)


@pytest.mark.parametrize("signature", ["window_size", "is_causal"])
def test_a_run_with_packed_attention_has_the_losses_of_one_without(
    signature: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for packed in (False, True):
        if packed:
            use_reference(monkeypatch, signature)
        args = gpt2_ft.parse_args(tiny.argv(f"run{packed}"))
        run = prepare(args, gpu.parse_gpu(args), tiny.folder, None)
        steps = run.sampler.steps(1)
        losses.append([gpt2_ft.optimizer_step(run, rows).loss for rows in steps])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_the_kernel_is_asked_for_halves_of_common_heads_on_new_gpus_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Row:
        is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)

    monkeypatch.setattr(packed_attention, "_capability", lambda index: capability)
    monkeypatch.setattr(packed_attention, "_kernel", lambda: reference)
    capability, row = 9, Row()
    assert packed_attention.is_possible(row, 64)
    assert not packed_attention.is_possible(row, 20) and not packed_attention.is_possible(row, 264)
    capability = 7
    assert not packed_attention.is_possible(row, 64)
    capability, row.dtype = 9, torch.float32
    assert not packed_attention.is_possible(row, 64)
    assert not packed_attention.is_possible(torch.zeros(2, 3, dtype=torch.bfloat16), 64)


def test_without_the_kernel_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert packed_attention._kernel() is None


def test_the_installed_torch_has_the_kernel_under_one_of_the_two_signatures() -> None:
    kernel = packed_attention._kernel()
    assert kernel.keywords in ({"window_size": (-1, 0)}, {"is_causal": True})


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_spans_start_where_the_lengths_before_end(lengths: list[int]) -> None:
    spans = Spans.of(lengths)
    assert spans.starts.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert spans.starts.dtype == torch.int32 and spans.lengths == lengths


def test_a_batch_made_either_way_has_its_spans_and_sends_them(tiny: Tiny) -> None:
    data = FT_Dataset(tiny.folder / "train.jsonl", 32)
    batch = data.batch([0, 1, 2])
    assert batch.spans.starts.diff().tolist() == batch.spans.lengths
    sent = batch.map(lambda tensor: tensor + 0)
    assert sent.spans.starts is not batch.spans.starts
    assert sent.spans.starts.tolist() == batch.spans.starts.tolist()
    ids, mask = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([[0, 1.0, 0, 0], [0, 0, 0, 1]])
    assert Batch.from_padded(ids, ids, mask).spans.starts.tolist() == [0, 2, 6]
