"""AdapterL and AdapterH against loops, and every method against transformers' GPT-2."""

import copy
import math
from pathlib import Path

import pytest
import torch
from conftest import METHODS, TINY_CARD, Tiny, random_base, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import checkpoints
import convert_adapter
import gpt2_ft
import loralib as lora
from checkpoints.card import Origin, model_card
from decoding import SearchSettings, beam_search
from decoding.packed import pack
from experiments import measure_methods
from methods import Bottleneck, BottleneckConfig, PrefixConfig, is_added
from model import GPT2Config, GPT2LMModel

KINDS = ("adapter_l", "adapter_h")
SHAPE = {"vocab_size": 64, "n_positions": 32, **TINY_CARD}
EPSILON = 1e-5


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Move the tensors of the adapter away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if is_added(name) or isinstance(module, Bottleneck):
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)


def gelu(z: float) -> float:
    return 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def by_loops(x: list[float], tensors: dict[str, list], kind: str) -> list[float]:
    """One token's numbers through a bottleneck, sum by sum."""
    inner = x
    if kind == "adapter_l":
        mean = sum(x) / len(x)
        variance = sum((v - mean) ** 2 for v in x) / len(x)
        normal = [(v - mean) / math.sqrt(variance + EPSILON) for v in x]
        gains = zip(normal, tensors["ln.weight"], tensors["ln.bias"], strict=True)
        inner = [v * weight + bias for v, weight, bias in gains]
    down = [
        bias + sum(w * v for w, v in zip(row, inner, strict=True))
        for row, bias in zip(tensors["down.weight"], tensors["down.bias"], strict=True)
    ]
    bent = [max(z, 0.0) if kind == "adapter_l" else gelu(z) for z in down]
    return [
        value + bias + sum(w * z for w, z in zip(row, bent, strict=True))
        for value, row, bias in zip(x, tensors["up.weight"], tensors["up.bias"], strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(1, 5), st.integers(0, 10**6))
def test_a_bottleneck_computes_what_loops_over_its_formula_do(
    kind: str, width: int, dim: int, seed: int
) -> None:
    module = Bottleneck(BottleneckConfig(dim, kind), width, EPSILON).double()
    randomize(module, seed)
    x = torch.randn(3, 2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    tensors = {name: tensor.tolist() for name, tensor in module.state_dict().items()}
    expected = [[by_loops(token, tensors, kind) for token in row] for row in x.tolist()]
    assert (module(x) - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-12
    torch.autograd.gradcheck(module, x.requires_grad_(), atol=1e-4)


def of_method(method: str) -> GPT2Config:
    settings = {"bottleneck": BottleneckConfig(3, method)} if method in KINDS else {}
    if method == "prefix":
        settings = {"prefix": PrefixConfig(3, 8)}
    return GPT2Config(**SHAPE, **settings)


def random_batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids (B, T), the tokens that follow them, and a mask over these."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 14, (4,), generator=draw).tolist()
    texts = [torch.randint(64, (n + 1,), generator=draw) for n in lengths]
    masks = [torch.arange(n) >= n // 2 for n in lengths]
    rows = [text[:-1] for text in texts], [text[1:] for text in texts], masks
    ids, labels, mask = (pad_sequence(own, batch_first=True) for own in rows)
    return ids, labels, mask.float()


@pytest.mark.parametrize("method", measure_methods.METHODS)
def test_logits_gradients_and_losses_of_20_steps_are_those_of_transformers(method: str) -> None:
    batches = [random_batch(step % 5) for step in range(20)]
    found = measure_methods.differences(method, random_base(TINY_CARD), of_method(method), batches)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beam", [1, 4])
def test_beam_search_gives_what_transformers_generates_with_hooks(kind: str, beam: int) -> None:
    ours, theirs, _ = measure_methods.pair(kind, random_base(TINY_CARD), of_method(kind))
    ours.eval()
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(64, (n,), generator=draw) for n in (1, 3, 8, 5, 13, 2)]
    chosen = SearchSettings(search="hf", beam=beam, eval_len=12, end_ids=(0,), length_penalty=0.8,
                            no_repeat_ngram_size=0)  # fmt: skip
    plain = beam_search(ours, prompts, chosen, 4)
    packed = beam_search(pack(copy.deepcopy(ours)), prompts, chosen, 4)
    for prompt, *found in zip(prompts, plain, packed, strict=True):
        generated = theirs.generate(
            prompt[None], attention_mask=torch.ones_like(prompt)[None], num_beams=beam,
            do_sample=False, max_new_tokens=12, eos_token_id=0, pad_token_id=0, length_penalty=0.8,
        )  # fmt: skip
        expected = generated[0, len(prompt) :].tolist()
        expected = expected[: expected.index(0) + 1] if 0 in expected else expected
        assert [hypotheses[0].tokens for hypotheses in found] == [expected, expected]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 16), st.integers(0, 10**6))
def test_a_bottleneck_whose_up_is_zero_is_the_base_bit_for_bit(
    kind: str, dim: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = GPT2LMModel(GPT2Config(**SHAPE, bottleneck=BottleneckConfig(dim, kind)))
    base = GPT2LMModel(GPT2Config(**SHAPE))
    checkpoints.load_weights(model, random_base(TINY_CARD))
    base.load_state_dict(random_base(TINY_CARD))
    ids = torch.randint(64, (2, 9))
    with torch.no_grad():
        expected = base(ids)[0]
        start = (model(ids)[0] - expected).abs().max()
        assert start == 0 if kind == "adapter_l" else 0 < start < 0.02
        for name, tensor in model.named_parameters():
            if name.endswith("_adapter.up.weight"):
                assert kind == "adapter_l" or 0 < tensor.abs().max() <= 0.02
                tensor.zero_()
        assert torch.equal(model(ids)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_and_mixed_precision_train_bottlenecks(
    tiny: Tiny, kind: str
) -> None:
    written = []
    for name, flags in (("plain", []), ("less", ["--gradient_checkpointing"]), ("b", ["--bf16"])):
        gpt2_ft.main(tiny.argv_of(METHODS[kind], name, "--max_step", 3, *flags))
        written.append(checkpoints.read_adapter(tiny.folder / f"{name}:last")[1])
    plain, less, bf16 = written
    assert all(torch.equal(less[name], tensor) for name, tensor in plain.items())
    assert all((bf16[name] - tensor).abs().max() < 0.05 for name, tensor in plain.items())


ROWS = [["l", "h", None, "l"], ["lora", "l", "h", "lora"], ["h"] * 4, [None] * 4]


@pytest.mark.parametrize("names", ROWS, ids=str)
@torch.no_grad()
def test_rows_of_a_batch_go_through_bottlenecks_of_their_own(names: list) -> None:
    base = GPT2LMModel(GPT2Config(**SHAPE)).eval()
    base.load_state_dict(random_base(TINY_CARD))
    settings = {
        "l": {"bottleneck": BottleneckConfig(3, "adapter_l")},
        "h": {"bottleneck": BottleneckConfig(2, "adapter_h")},
        "lora": {"lora": lora.LoraConfig(2, 8)},
    }
    models: dict[str | None, GPT2LMModel] = {None: base}
    for name, own in settings.items():
        models[name] = GPT2LMModel(GPT2Config(**SHAPE, **own)).eval()
        models[name].load_state_dict(base.state_dict(), strict=False)
        randomize(models[name], seed=3)
    ids = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(0))
    alone = {name: model(ids)[0] for name, model in models.items()}
    adapted = {name: model for name, model in models.items() if name}
    with lora.adapters_by_row(base, adapted, names) as mixed:
        logits = mixed(ids)[0]
    for i, name in enumerate(names):
        assert (logits[i] - alone[name][i]).abs().max() < 1e-5
        assert all((alone[name][i] - alone[o][i]).abs().max() > 1e-3 for o in alone if o != name)
    assert torch.equal(base(ids)[0], alone[None])


def test_an_adapter_that_cannot_have_rows_of_its_own_is_refused() -> None:
    base, other = (GPT2LMModel(GPT2Config(**SHAPE)) for _ in range(2))
    other.load_state_dict(base.state_dict())
    other.transformer.prompt = nn.Parameter(torch.zeros(1))
    with (
        pytest.raises(ValueError, match="adapter 'a' has transformer.prompt, which no row can"),
        lora.adapters_by_row(base, {"a": other}, ["a"]),
    ):
        pass


def converted(tiny: Tiny, adapter: str | Path, to: str, name: str) -> list[str]:
    argv = ["--adapter", adapter, "--init_checkpoint", tiny.base, "--to", to]
    return [str(part) for part in [*argv, "--output", tiny.folder / name]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bottleneck_is_exported_as_it_is_and_no_other_way(
    tiny: Tiny, kind: str, capsys: pytest.CaptureFixture
) -> None:
    gpt2_ft.main(tiny.argv_of(METHODS[kind], "run", "--max_step", 3))
    run = tiny.folder / "run" / "model.3.safetensors"
    for to in ("merged", "peft", "pt"):
        message = refusal(converted(tiny, run, to, to), capsys, convert_adapter.main)
        assert f"--to {to}: a bottleneck ({kind}) cannot be merged" in message
        assert not (tiny.folder / to).exists()
    convert_adapter.main(converted(tiny, run, "safetensors", "out.safetensors"))
    assert (tiny.folder / "out.safetensors").read_bytes() == run.read_bytes()
    card = (tiny.folder / "out.md").read_text(encoding="utf-8")
    assert f"- {kind}" in card and "3 wide" in card and "--to" not in card.split("## Training")[0]
    argv = converted(tiny, run, "safetensors", "mean.safetensors")
    mean = ["--average", str(run), *argv[1:]]
    assert "only plain LoRA" in refusal(mean, capsys, convert_adapter.main)


@pytest.mark.parametrize("method", ["full", "top", "top2", "bias"])
def test_the_card_of_a_subset_names_it(method: str) -> None:
    header = checkpoints.AdapterHeader(None, checkpoints.Base("gpt2"), method=method)
    assert "of `gpt2` were fine-tuned." in model_card(header, "merged", "mine", Origin())
