"""The model against transformers and torch, and its weight loading."""

import math
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CARD, random_base
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoints
import loralib as lora
import loss as smoothed
import model
from checkpoints.base import canonical_name
from common.batch import Batch, Spans
from common.errors import InputError
from decoding.cache import DecodeCache
from model import MODEL_CARDS, GPT2Config, GPT2LMModel


def tiny_model(**settings) -> GPT2LMModel:
    return GPT2LMModel(GPT2Config(vocab_size=64, n_positions=32, **TINY_CARD, **settings))


def hf_model(config: GPT2Config) -> torch.nn.Module:
    from transformers import GPT2Config as HFConfig
    from transformers import GPT2LMHeadModel

    torch.manual_seed(3)
    fields = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    shape = {field: getattr(config, field) for field in fields}
    other = GPT2LMHeadModel(HFConfig(**shape)).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return other


def small_config(card: dict[str, int]) -> GPT2Config:
    """The card with its own ratio of layers, heads and head width, narrowed eightfold."""
    head_width = card["n_embd"] // card["n_head"] // 8
    return GPT2Config(
        vocab_size=97,
        n_positions=40,
        n_layer=max(2, card["n_layer"] // 12),
        n_head=card["n_head"],
        n_embd=card["n_head"] * head_width,
    )


@pytest.mark.parametrize("card", MODEL_CARDS)
def test_logits_equal_transformers(card: str) -> None:
    config = small_config(MODEL_CARDS[card])
    other = hf_model(config)
    ours = GPT2LMModel(config).eval()
    checkpoints.load_weights(ours, other.state_dict())
    ids = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = other(ids).logits, ours(ids)[0]
    assert (got - expected).abs().max() < 1e-4
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    "card, expected",
    [("gpt2.sm", 147_456), ("gpt2.md", 393_216), ("gpt2.lg", 737_280)],
)
def test_trainable_parameters_are_those_of_rank_4_on_q_and_v(card: str, expected: int) -> None:
    with torch.device("meta"):
        big = GPT2LMModel(GPT2Config(**MODEL_CARDS[card], lora_attn_dim=4))
    lora.mark_only_lora_as_trainable(big)
    assert sum(p.numel() for p in big.parameters() if p.requires_grad) == expected


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    rows=st.integers(1, 4),
    tokens=st.integers(1, 8),
    extra=st.integers(0, 5),
)
def test_loss_is_smoothed_cross_entropy_of_counted_tokens_whatever_is_masked_or_padded(
    seed: int, smoothing: float, rows: int, tokens: int, extra: int
) -> None:
    torch.manual_seed(seed)
    gpt = tiny_model()
    ids, labels = torch.randint(64, (2, rows, tokens)).unbind()
    mask = (torch.rand(rows, tokens) < 0.6).float()
    mask[0, 0] = 1
    logits, _ = gpt(ids)
    expected = F.cross_entropy(logits[mask > 0], labels[mask > 0], label_smoothing=smoothing)
    none, loss = gpt(ids, labels, mask, smoothing)
    assert none is None
    assert torch.isclose(loss, expected, rtol=1e-5, atol=1e-6)

    junk = torch.randint(64, (2, rows, extra))
    padded_mask = torch.cat((mask, torch.zeros(rows, extra)), dim=1)
    _, padded = gpt(
        torch.cat((ids, junk[0]), 1), torch.cat((labels, junk[1]), 1), padded_mask, smoothing
    )
    assert torch.isclose(padded, loss, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    smoothing=st.sampled_from([0.0, 0.1, 0.7]),
    rows=st.integers(1, 4),
    tokens=st.integers(1, 8),
    density=st.sampled_from([0.2, 0.6, 1.0]),
    weighted=st.booleans(),
    part=st.sampled_from([7, 32, smoothed.TOKENS]),
)
def test_gradients_are_autograds_of_the_smoothed_cross_entropy(
    seed: int, smoothing: float, rows: int, tokens: int, density: float, weighted: bool, part: int
) -> None:
    torch.manual_seed(seed)
    gpt = tiny_model(lora_attn_dim=2).double()
    for parameter in gpt.parameters():
        parameter.requires_grad = True
        torch.nn.init.normal_(parameter, std=0.3)
    ids, labels = torch.randint(64, (2, rows, tokens)).unbind()
    mask = (torch.rand(rows, tokens) < density).double()
    mask[-1, 0] = 1
    if weighted:
        mask *= torch.rand(rows, tokens).double() + 0.5
    losses = F.cross_entropy(
        gpt(ids)[0].flatten(0, 1), labels.flatten(), label_smoothing=smoothing, reduction="none"
    )
    expected = (losses * mask.flatten()).sum() / mask.sum()
    gpt.zero_grad()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in gpt.named_parameters()}
    gpt.zero_grad()
    with mock.patch.object(smoothed, "TOKENS", part):
        _, loss = gpt(ids, labels, mask, smoothing)
    (3 * loss).backward()
    assert torch.isclose(loss.double(), expected, rtol=1e-5)
    for name, parameter in gpt.named_parameters():
        assert torch.allclose(parameter.grad, 3 * gradients[name], rtol=1e-4, atol=1e-5), name


def test_loss_without_mask_counts_every_token_and_without_counted_tokens_is_zero() -> None:
    torch.manual_seed(0)
    gpt = tiny_model()
    ids, labels = torch.randint(64, (2, 3, 6)).unbind()
    expected = F.cross_entropy(gpt(ids)[0].flatten(0, 1), labels.flatten())
    assert torch.isclose(gpt(ids, labels)[1], expected)
    loss = gpt(ids, labels, torch.zeros(3, 6))[1]
    loss.backward()
    assert loss == 0
    assert not any(parameter.grad.any() for parameter in gpt.parameters())


def test_every_layer_has_its_own_random_start_and_the_seed_decides_it() -> None:
    def build(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        shape = TINY_CARD | {"n_layer": 4}
        return GPT2LMModel(GPT2Config(64, 32, **shape, lora_attn_dim=2)).state_dict()

    first, again, other = build(1), build(1), build(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for kind in ("attn.c_attn.lora_A", "attn.c_attn.weight", "mlp.c_fc.weight"):
        starts = [first[f"transformer.h.{layer}.{kind}"] for layer in range(4)]
        assert not any(torch.equal(starts[0], start) for start in starts[1:])
        assert not torch.equal(starts[0], other[f"transformer.h.0.{kind}"])


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """LayerNorm as .g/.b and the linear maps as .w/.b, as the first GPT-2 conversions had them."""
    renamed = {}
    for name, tensor in state.items():
        head, _, suffix = name.rpartition(".")
        short = {"weight": "g" if ".ln_" in f".{head}" else "w", "bias": "b"}.get(suffix, suffix)
        keeps = head.endswith(("wte", "wpe")) or suffix.startswith("lora_")
        renamed[name if keeps else f"{head}.{short}"] = tensor
    return renamed


LAYOUTS = {
    "own": lambda s: s,
    "hf": lambda s: {k.removeprefix("transformer."): t for k, t in s.items()},
    "ddp": lambda s: {f"module.{k}": t for k, t in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": t for k, t in s.items()},
    "ddp of compiled": lambda s: {f"module._orig_mod.{k}": t for k, t in s.items()},
    "compiled ddp": lambda s: {f"_orig_mod.module.{k}": t for k, t in s.items()},
    "original": lambda s: {"model_state_dict": {f"module.{k}": t for k, t in s.items()}},
    "old suffixes": old_names,
    "masks": lambda s: s | {f"transformer.h.{i}.attn.bias": torch.ones(1) for i in (0, 1)},
    "more masks": lambda s: s | {f"h.{i}.attn.masked_bias": torch.ones(1) for i in (0, 1)},
    "tied head": lambda s: s | {"lm_head.weight": s["transformer.wte.weight"].clone()},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [0, 2])
def test_every_known_layout_loads_to_the_same_weights(layout: str, rank: int) -> None:
    torch.manual_seed(5)
    source = tiny_model(lora_attn_dim=rank)
    for tensor in source.state_dict().values():
        tensor.normal_()
    given_state = LAYOUTS[layout](source.state_dict())
    names_before = list(given_state)
    target = tiny_model(lora_attn_dim=rank)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoints.load_weights(target, given_state)
    assert list(given_state) == names_before
    own = source.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in target.state_dict().items())


def test_a_base_without_adapter_loads_and_leaves_the_adapters_start() -> None:
    target = tiny_model(lora_attn_dim=2)
    start = target.state_dict()["transformer.h.1.attn.c_attn.lora_A"].clone()
    checkpoints.load_weights(target, random_base(TINY_CARD))
    assert torch.equal(target.state_dict()["transformer.h.1.attn.c_attn.lora_A"], start)


LN = "transformer.ln_f.weight"
WRONG_STATES = {
    "untied head": (lambda s: s | {"lm_head.weight": s["transformer.wte.weight"] + 1}, "lm_head"),
    "unknown": (lambda s: s | {"foo": torch.zeros(1)}, "foo"),
    "missing": (lambda s: {k: t for k, t in s.items() if k != LN}, LN),
    "useless": (lambda s: {"foo": torch.zeros(1)}, "foo"),
    "empty": (lambda s: {}, "missing"),
    "shape": (lambda s: s | {LN: torch.zeros(3)}, rf"{LN} has shape \[3\]"),
    "integers": (lambda s: s | {LN: torch.ones(16, dtype=torch.int64)}, f"{LN}.*int64"),
    "twice": (lambda s: s | {"ln_f.weight": torch.zeros(16)}, "twice"),
    "another rank": (
        lambda s: s | {"transformer.h.0.attn.c_attn.lora_A": torch.zeros(8, 16)},
        "lora_A|missing",
    ),
    "half an adapter": (
        lambda s: s | {"transformer.h.0.attn.c_attn.lora_A": torch.zeros(4, 16)},
        "missing.*lora_",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_a_state_that_does_not_fit_is_refused_by_name_and_loads_nothing(wrong: str) -> None:
    spoil, message = WRONG_STATES[wrong]
    target = tiny_model(lora_attn_dim=2)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    state = spoil(random_base(TINY_CARD))
    names = list(state)
    with pytest.raises(InputError, match=message):
        checkpoints.load_weights(target, state)
    assert list(state) == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="15.*2"):
        GPT2Config(n_embd=15, n_head=2)


def test_smoothed_loss_of_uniform_logits_is_log_v() -> None:
    gpt = tiny_model()
    with torch.no_grad():
        gpt.transformer.wte.weight.zero_()
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with torch.no_grad():
        loss = float(gpt(ids, ids, None, 0.3)[1])
    assert math.isclose(loss, math.log(64), rel_tol=1e-6)


def test_canonical_name_leaves_canonical_names_alone() -> None:
    for name in tiny_model(lora_attn_dim=2).state_dict():
        assert canonical_name(name) == name


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_attention_of_padded_sequences_is_that_of_each_by_itself(lengths: list[int]) -> None:
    """GPUs take the first way in fp32, CPUs the second."""
    torch.manual_seed(0)
    attention = model.Attention(GPT2Config(n_embd=16, n_head=4))
    fused = torch.randn(sum(lengths), 48, requires_grad=True)
    found = attention.attend_padded(fused, Spans.of(lengths))
    expected = torch.cat([attention.attend(part[None])[0] for part in fused.split(lengths)])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(out.square().sum(), fused)[0] for out in (found, expected))
    )


class Counting(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_padding_takes_no_more_kernels_for_more_sequences() -> None:
    attention, counts = model.Attention(GPT2Config(n_embd=16, n_head=4)), []
    for sequences in (2, 40):
        lengths = [5, 7] * (sequences // 2)
        fused = torch.randn(sum(lengths), 48, requires_grad=True)
        with Counting() as counting:
            attention.attend_padded(fused, Spans.of(lengths)).sum().backward()
        counts.append(counting.count)
    assert counts[0] == counts[1]


def small_batch(seed: int = 0) -> tuple[tuple[Tensor, Tensor, Tensor], Batch]:
    """Three rows of unequal lengths as a user gives them, and as the collation does."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(64, (2, 3, 9), generator=generator).unbind()
    mask = torch.zeros(3, 9)
    mask[0, 2:5] = mask[1, 8] = mask[2, 0] = 1
    return (ids, labels, mask), Batch.from_padded(ids, labels, mask)


def test_a_batch_and_the_padded_rows_it_stands_for_have_one_loss_and_one_gradient() -> None:
    padded, batch = small_batch()
    assert batch.spans.lengths == [5, 9, 1] and batch.count == 5
    assert batch.counted.tolist() == [2, 3, 4, 13, 14]
    torch.manual_seed(0)
    gpt = tiny_model(lora_attn_dim=2)
    results = []
    for arguments in (padded, (batch,)):
        gpt.zero_grad()
        _, loss = gpt(*arguments, label_smooth=0.1)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in gpt.parameters() if p.grad is not None)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_every_module_is_called_so_that_hooks_and_profilers_see_it() -> None:
    gpt, (_, batch) = tiny_model(lora=lora.LoraConfig(2, targets=model.ALL_TARGETS)), small_batch()
    expected, called = set(), set()
    for name, module in gpt.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        if type(module) is not nn.ModuleList:
            expected.add(name)
    gpt(batch)
    assert called == expected
    called.clear()
    with torch.no_grad():
        gpt.prefill([torch.zeros(n, dtype=torch.int64) for n in (9, 2)], DecodeCache([9, 2]))
    assert called == expected - {""}


class NoWaiting(TorchFunctionMode):
    """Fails on whatever makes a host wait for a device, or a result depend on what is in one."""

    FORBIDDEN = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "nonzero"}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        assert func.__name__ not in self.FORBIDDEN, func
        if func is Tensor.__getitem__:
            keys = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(k, Tensor) and k.dtype == torch.bool for k in keys)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", lora.KINDS)
def test_nothing_in_a_packed_step_waits_for_the_device(kind: str) -> None:
    config = lora.LoraConfig(2, dropout=0.1, targets=("q", "v", "fc"), kind=kind)
    gpt, (padded, batch) = tiny_model(lora=config), small_batch()
    with NoWaiting():
        gpt(batch, label_smooth=0.1)[1].backward()
    with pytest.raises(AssertionError), NoWaiting():
        gpt(*padded)
