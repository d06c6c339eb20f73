"""AdapterL and AdapterH against loops, and against transformers' GPT-2 with hooks."""

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
from methods import Bottleneck, BottleneckConfig, is_added, train_added
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


class Reference(nn.Module):
    """A bottleneck of separate matrices, for the hooks."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.tensors = nn.ParameterDict(
            {name.replace(".", "_"): t.detach().clone() for name, t in own.named_parameters()}
        )

    def forward(self, x: Tensor) -> Tensor:
        t, inner = self.tensors, x
        if "ln_weight" in t:
            centred = x - x.mean(-1, keepdim=True)
            normal = centred / (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt()
            inner = normal * t["ln_weight"] + t["ln_bias"]
        down = inner @ t["down_weight"].T + t["down_bias"]
        tanh = torch.tanh(math.sqrt(2 / math.pi) * (down + 0.044715 * down**3))
        bent = down.clamp(min=0) if "ln_weight" in t else 0.5 * down * (1 + tanh)
        return x + bent @ t["up_weight"].T + t["up_bias"]


def hook(reference: Reference):
    def add(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
        if isinstance(output, tuple):
            return reference(output[0]), *output[1:]
        return reference(output)

    return add


def ours_and_theirs(kind: str) -> tuple[GPT2LMModel, nn.Module, dict[str, Tensor]]:
    """Our model with bottlenecks, transformers' with hooks that add the same, and the parameters of
    these by our names."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        **SHAPE, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    theirs = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    ours = GPT2LMModel(GPT2Config(**SHAPE, bottleneck=BottleneckConfig(3, kind)))
    base = random_base(TINY_CARD)
    checkpoints.load_weights(ours, base)
    missing = theirs.load_state_dict(base, strict=False)
    assert missing.missing_keys in ([], ["lm_head.weight"]) and not missing.unexpected_keys
    randomize(ours)
    train_added(ours)
    parameters = {}
    for i, block in enumerate(theirs.transformer.h):
        places = {"attn": block.attn, "mlp": block.mlp, "block": block}
        for place, module in places.items():
            name = f"transformer.h.{i}.{place}_adapter"
            own = ours.get_submodule(name)
            if isinstance(own, Bottleneck):
                reference = Reference(own)
                module.register_forward_hook(hook(reference))
                for key, tensor in reference.tensors.items():
                    parameters[f"{name}.{key.replace('_', '.')}"] = tensor
    assert parameters.keys() == {n for n, p in ours.named_parameters() if p.requires_grad}
    return ours.eval(), theirs, parameters


def batch(seed: int, rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids (B, T), the tokens that follow them, and a mask over these."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 14, (rows,), generator=draw).tolist()
    texts = [torch.randint(64, (n + 1,), generator=draw) for n in lengths]
    ids = pad_sequence([text[:-1] for text in texts], batch_first=True)
    labels = pad_sequence([text[1:] for text in texts], batch_first=True)
    mask = pad_sequence([torch.arange(n) >= n // 2 for n in lengths], batch_first=True).float()
    return ids, labels, mask


def their_loss(theirs: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    logits = theirs(ids).logits  # padding is on the right, so no position sees it
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (losses * mask).sum() / mask.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_transformers_with_hooks(kind: str) -> None:
    ours, theirs, parameters = ours_and_theirs(kind)
    ids, labels, mask = batch(0)
    with torch.no_grad():
        difference = (ours(ids)[0] - theirs(ids).logits)[mask > 0]
        assert difference.abs().max() < 1e-5
    ours(ids, labels, mask)[1].backward()
    their_loss(theirs, ids, labels, mask).backward()
    own = dict(ours.named_parameters())
    for name, tensor in parameters.items():
        assert (own[name].grad - tensor.grad).abs().max() < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_of_20_steps_are_those_of_transformers_with_hooks(kind: str) -> None:
    ours, theirs, parameters = ours_and_theirs(kind)
    own = [p for p in ours.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(ps, lr=1e-2) for ps in (own, list(parameters.values()))]
    ours.train()
    losses = []
    for step in range(20):
        ids, labels, mask = batch(step % 5)
        pair = ours(ids, labels, mask)[1], their_loss(theirs, ids, labels, mask)
        for loss, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append([loss.item() for loss in pair])
    assert max(abs(a - b) for a, b in losses) < 1e-5
    assert losses[15][0] < losses[0][0] - 0.1  # of one batch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beam", [1, 4])
def test_beam_search_gives_what_transformers_generates_with_hooks(kind: str, beam: int) -> None:
    ours, theirs, _ = ours_and_theirs(kind)
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
