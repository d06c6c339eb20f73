"""--cuda_graphs: what is recorded does the same for every batch of its size.

CUDA's graphs need a GPU (tests/test_cuda.py). Here a tape takes their place: it runs the recorded
operations again, in the memory and with the numbers of the recording, as they do.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import METHODS, TINY_CARD, Tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gpt2_ft
import gpu
from common import packed_attention
from common.batch import Batch, Spans
from common.errors import InputError
from model import GPT2Config, GPT2LMModel
from training import graphs, setup
from training.run import Run

VOCABULARY = 50
Three = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("tests::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
    """Causal attention of sequences (N, H, D) to themselves: one operation, as the kernel is."""
    weights = attention_weights(query, key, starts)
    return torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype)


@torch.library.custom_op("tests::attend_backward", mutates_args=())
def attend_backward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, by_output: Tensor
) -> Three:
    weights, by_output = attention_weights(query, key, starts), by_output.float()
    by_value = torch.einsum("hqk,qhd->khd", weights, by_output)
    by_weights = torch.einsum("qhd,khd->hqk", by_output, value.float())
    mean = (by_weights * weights).sum(-1, keepdim=True)
    by_scores = weights * (by_weights - mean) / math.sqrt(query.size(-1))
    by_query = torch.einsum("hqk,khd->qhd", by_scores, key.float())
    by_key = torch.einsum("hqk,qhd->khd", by_scores, query.float())
    return by_query.to(query.dtype), by_key.to(query.dtype), by_value.to(query.dtype)


def attention_weights(query: Tensor, key: Tensor, starts: Tensor) -> Tensor:
    """(H, N, N), in fp32."""
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) / math.sqrt(query.size(-1))
    places = torch.arange(len(query))
    of = torch.bucketize(places, starts, right=True)
    seen = (of[:, None] == of) & (places[:, None] >= places)
    return scores.masked_fill(~seen, -math.inf).softmax(-1)


def save_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, by_output: Tensor) -> tuple:
    return *attend_backward(*ctx.saved_tensors, by_output), None


attend.register_autograd(backward, setup_context=save_inputs)


class Tape(TorchDispatchMode):
    """Records the operations of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def play(self) -> None:
        """Do them again, with the same arguments, into the memory of their results."""
        with torch.no_grad():
            for func, args, kwargs, result in self.operations:
                found = tree_leaves(func(*args, **kwargs))
                for own, new in zip(tree_leaves(result), found, strict=True):
                    if isinstance(own, Tensor) and own.data_ptr() != new.data_ptr():
                        own.copy_(new)


def use_tapes(patch: pytest.MonkeyPatch) -> list[Tape]:
    """Let tapes stand where graphs are recorded, and attention on the row where its kernel does."""
    tapes = []

    def record(work: Callable, pool: object) -> Callable:
        gradients = [p.grad for p in parameters]
        before, random = [g.clone() for g in gradients], torch.get_rng_state()
        with Tape() as tape:
            losses = work()
        # A recording computes nothing, and a tape must not have, either.
        for gradient, value in zip(gradients, before, strict=True):
            gradient.copy_(value)
        torch.set_rng_state(random)
        tapes.append(tape)
        return lambda: (tape.play(), losses)[1]

    parameters: list[Tensor] = []

    def make(runtime: gpu.Runtime, trained: Any, longest: int) -> graphs.Graphs:
        parameters[:] = trained
        return graphs.Graphs(runtime, parameters, longest)

    patch.setattr(setup, "check_recordable", lambda *_: None)
    patch.setattr(setup, "Graphs", make)
    patch.setattr(graphs, "new_pool", lambda: None)
    patch.setattr(graphs, "record", record)
    patch.setattr(packed_attention, "is_possible", lambda *_: True)
    patch.setattr(packed_attention, "attend", lambda q, k, v, starts, n: attend(q, k, v, starts))
    return tapes


def make_run(tiny: Tiny, method: list[str], *more: object) -> Run:
    flags = ("--bf16", "--train_batch_size", 3, "--grad_acc", 2, *more)
    args = gpt2_ft.parse_args(tiny.argv_of(method, "run", *flags))
    return setup.prepare(args, gpu.parse_gpu(args), tiny.folder / "run", None)


def train(run: Run) -> list[float]:
    """The losses of four epochs."""
    losses = []
    for epoch in range(1, 5):
        for rows in run.sampler.steps(epoch):
            result = gpt2_ft.optimizer_step(run, rows)
            losses += [result.loss, result.smoothed_loss, result.norm]
    return losses


WITHOUT_DROPOUT = ["--lora_dim=2", "--lora_dropout=0"]
WITH_DROPOUT = ["--lora_dim=2", "--lora_dropout=0.5", "--lora_targets=all"]


@pytest.mark.parametrize("method", ["lora", *(name for name in METHODS if name != "prefix")])
def test_a_run_of_graphs_has_the_losses_of_one_without(
    method: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = METHODS.get(method, WITHOUT_DROPOUT)
    expected = train(make_run(tiny, flags))
    tapes = use_tapes(monkeypatch)
    found = train(make_run(tiny, flags, "--cuda_graphs"))
    assert found == pytest.approx(expected, rel=2e-2, abs=2e-2)
    assert tapes


def test_what_is_replayed_is_what_was_computed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with dropout, whose numbers are others each time."""
    tapes = use_tapes(monkeypatch)
    runs = []
    for most in (0, 128):
        monkeypatch.setattr(graphs, "MOST", most)
        run = make_run(tiny, WITH_DROPOUT, "--cuda_graphs")
        with Tape():  # as products under a tape round otherwise than without one
            losses = train(run)
        runs.append((losses, [p.tolist() for p in run.trained.values()]))
        assert len(tapes) == len(run.graphs.recorded)
    assert runs[0] == runs[1] and len(set(runs[0][0])) > 20
    assert run.graphs.seen.total() > 2 * len(run.graphs.seen) > 0


def test_a_tape_sees_what_only_one_batch_has(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above could not fail."""
    use_tapes(monkeypatch)
    plain = train(make_run(tiny, WITHOUT_DROPOUT, "--cuda_graphs"))
    monkeypatch.setattr(
        packed_attention, "attend", lambda q, k, v, starts, n: attend(q, k, v, starts.clone() * 1)
    )
    assert train(make_run(tiny, WITHOUT_DROPOUT, "--cuda_graphs")) == plain
    monkeypatch.setattr(
        packed_attention,
        "attend",
        lambda q, k, v, starts, n: attend(
            q, k, v, torch.tensor(starts.tolist(), dtype=torch.int32)
        ),
    )
    assert train(make_run(tiny, WITHOUT_DROPOUT, "--cuda_graphs")) != plain


@settings(max_examples=40, deadline=None)
@given(data=st.data(), multiple=st.integers(1, 40))
def test_a_batch_that_is_filled_up_has_the_same_loss_and_gradients(
    data: st.DataObject, multiple: int
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 99))
    torch.manual_seed(seed)
    model = GPT2LMModel(GPT2Config(**TINY_CARD, vocab_size=VOCABULARY, lora_attn_dim=2))
    total = sum(lengths)
    counted = torch.randperm(total)[: data.draw(st.integers(1, total))].sort().values
    batch = Batch(
        input_ids=torch.randint(VOCABULARY, (total,)),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        spans=Spans.of(lengths),
        counted=counted,
        targets=torch.randint(VOCABULARY, (len(counted),)),
        weights=torch.rand(len(counted)) + 0.1,
        count=1.0,
    )
    filled = batch.filled(multiple)
    assert len(filled.input_ids) % multiple == len(filled.counted) % multiple == 0
    assert filled.spans.lengths[:-1] == lengths and 1 <= filled.spans.lengths[-1] <= multiple
    assert filled.spans.starts[-1] == len(filled.input_ids)
    outcomes = []
    for each in (batch, filled):
        model.zero_grad()
        plain, loss = model(each, label_smooth=0.1)
        loss.backward()
        outcomes.append([plain, loss, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=1e-5)


def accumulator(parameter: Tensor) -> torch.autograd.graph.Node:
    """What adds up the parameter's gradient: the one that is there, or a new one."""
    with torch.enable_grad():
        return parameter.view_as(parameter).grad_fn.next_functions[0][0]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_nothing_that_adds_up_gradients_outlives_its_passes(
    method: str, compiled: bool, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is left of passes that are not recorded would launch its work on their stream, which
    a recording does not see."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    run = make_run(tiny, METHODS.get(method, WITH_DROPOUT), *["--compile"] * compiled)
    parameters, batch = list(run.trained.values()), run.train.batch([0, 1])

    def mark(*_: object) -> None:
        for parameter in parameters:
            accumulator(parameter).metadata["seen"] = True

    run.model.register_forward_hook(mark)
    gpt2_ft.forward_backward(run, batch, torch.ones(()))
    assert not [p for p in parameters if "seen" in accumulator(p).metadata]
    node = accumulator(parameters[0])  # otherwise this test could not fail
    mark()
    assert node.metadata["seen"] and "seen" in accumulator(parameters[0]).metadata


class Of:
    """A runtime in so far as it is asked about."""

    def __init__(self, device: str, precision: str, world_size: int = 1) -> None:
        self.device, self.precision, self.world_size = torch.device(device), precision, world_size


@pytest.mark.parametrize(
    ("runtime", "more", "message"),
    [
        (Of("cpu", "bf16"), [], "is for CUDA devices"),
        (Of("cuda", "fp32"), [], "goes with --bf16 or --fp16"),
        (Of("cuda", "bf16", 2), [], "is for one process"),
        (Of("cuda", "bf16"), ["--gradient_checkpointing"], "exclude each other"),
        (Of("cuda", "fp16"), ["--method=prefix"], "cannot record --method prefix"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    runtime: Of, more: list[str], message: str, tiny: Tiny
) -> None:
    args = gpt2_ft.parse_args(tiny.argv_of(more, "run", "--cuda_graphs"))
    with pytest.raises(InputError, match=message):
        setup.check_early(args, runtime)


def test_where_attention_needs_padding_nothing_is_recorded(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "check_recordable", lambda *_: None)
    with pytest.raises(InputError, match="needs attention without padding"):
        make_run(tiny, WITHOUT_DROPOUT, "--cuda_graphs")
