"""Adapters put into any model, several on one base, one for each row, and their weighted sum."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import METHODS, TINY_CARD, Tiny, finish, random_base, random_rows, start, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import checkpoints
import gpt2_beam
import gpt2_ft
import loralib as lora
from common.errors import InputError
from decoding.sources import name_adapters
from model import GPT2Config, GPT2LMModel

SHAPE = {"vocab_size": 64, "n_positions": 32, **TINY_CARD}
IDS = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(0))


class ConvNet(nn.Module):
    """Every layer that can be adapted, the last two tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6, padding_idx=0)
        self.conv1 = nn.Conv1d(6, 8, 3, padding=1, padding_mode="reflect")
        self.conv2 = nn.Conv2d(1, 4, (1, 3), stride=2, bias=False)
        self.conv3 = nn.Conv3d(2, 4, 1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList([nn.Linear(3, 6), nn.Linear(6, 6, bias=False)])
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(self.embed(x).transpose(1, 2))  # (B, 8, T)
        h = F.relu(self.norm(self.conv2(h[:, None])))  # (B, 4, 4, T')
        h = self.conv3(h.reshape(len(x), 2, 2, 4, -1)).flatten(1, 3)
        h = self.blocks[0](h[..., :3])
        return self.head(self.blocks[1](torch.tanh(h)))


TARGETS = ["embed", "conv1", "conv2", "conv3", "blocks.0", "blocks.1", "head"]
TOKENS = torch.randint(10, (3, 9), generator=torch.Generator().manual_seed(1))


def randomize(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in lora.lora_state_dict(model).items():
            if not name.endswith("0"):
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)


@pytest.mark.filterwarnings("ignore:r=2 is above")
def test_injected_layers_share_the_weights_and_remove_adapters_gives_the_first_model_back() -> None:
    torch.manual_seed(0)
    model = ConvNet()
    model.conv1.weight.requires_grad = False
    before = dict(model.named_parameters())
    modules, flags = dict(model.named_modules()), {n: p.requires_grad for n, p in before.items()}
    state = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model)(TOKENS)

    assert lora.inject(model, TARGETS, r=2, lora_alpha=4) is model
    after = dict(model.named_parameters())
    assert all(after[name] is tensor for name, tensor in before.items())
    assert model.head.weight is model.embed.weight
    adapted = {n for n, m in model.named_modules() if isinstance(m, lora.LoRALayer)}
    assert adapted == set(TARGETS)
    assert torch.equal(copy.deepcopy(model)(TOKENS), expected)
    lora.mark_only_lora_as_trainable(model)
    model(TOKENS).square().sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == set(lora.lora_state_dict(model))
    assert len(trained) == 2 * len(TARGETS)

    randomize(model)
    changed = pickle.loads(pickle.dumps(model.eval()))
    assert (changed(TOKENS) - model(TOKENS)).abs().max() < 1e-5
    assert lora.remove_adapters(model) is model
    assert list(dict(model.named_modules())) == list(modules)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(tensor is before[name] for name, tensor in model.named_parameters())
    assert flags["conv1.weight"] is model.conv1.weight.requires_grad is False
    assert model.conv2.weight.requires_grad
    weights = {n: t for n, t in model.state_dict().items() if "norm" not in n}
    assert all(torch.equal(t, state[name]) for name, t in weights.items())


@pytest.mark.parametrize("kind", lora.KINDS)
def test_a_transformers_gpt2_takes_every_kind(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    gpt = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        expected = gpt(IDS).logits
        lora.inject(gpt, ["c_attn", "c_proj", "c_fc"], r=2, lora_alpha=8, kind=kind)
        assert len([m for m in gpt.modules() if isinstance(m, lora.Linear)]) == 8
        gpt.eval()
        difference = (gpt(IDS).logits - expected).abs().max()
        assert difference < 1e-5 if kind == "pissa" else difference == 0
        randomize(gpt)
        assert (gpt(IDS).logits - expected).abs().max() > 1e-3
        assert torch.equal(lora.remove_adapters(gpt)(IDS).logits, expected)
    assert not any("lora" in name for name in gpt.state_dict())


@pytest.mark.parametrize(
    "targets, more, message",
    [
        (["conv9"], {}, "target 'conv9' names no module of the ConvNet"),
        (["onv1"], {}, "target 'onv1' names no module"),
        (["norm"], {}, "norm is a BatchNorm2d, which cannot be adapted"),
        (["blocks"], {}, "blocks is a ModuleList"),
        (["head"], {"r": 0}, "needs a rank r above 0, got 0"),
        (["head"], {"r": -1}, "r=-1"),
    ],
)
def test_inject_refuses_what_it_cannot_do_and_changes_nothing(
    targets: list[str], more: dict, message: str
) -> None:
    model = ConvNet()
    with pytest.raises(ValueError, match=message):
        lora.inject(model, ["conv1", *targets], **{"r": 1} | more)
    assert not any(isinstance(m, lora.LoRALayer) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def adapted(seed: int, base: nn.Module, **more: object) -> GPT2LMModel:
    """A model on the weights of `base`, with a random adapter."""
    config = lora.LoraConfig(**{"r": 2, "alpha": 8} | more)
    model = GPT2LMModel(GPT2Config(**SHAPE, lora=config))
    model.load_state_dict(base.state_dict(), strict=False)
    lora.start_from_base(model)
    randomize(model, seed)
    return model.eval()


def plain() -> GPT2LMModel:
    base = GPT2LMModel(GPT2Config(**SHAPE))
    base.load_state_dict(random_base(TINY_CARD))
    return base.eval()


ROWS = [["a", "b", None, "a"], ["c", "c", "c", "c"], [None] * 4, ["b", "a", "c", "d"]]


@pytest.mark.parametrize("names", ROWS, ids=str)
@torch.no_grad()
def test_each_row_of_a_batch_goes_through_its_own_adapter(names: list) -> None:
    base = plain()
    models = {
        "a": adapted(1, base),
        "b": adapted(2, base, r=3, rslora=True, targets=("q", "k", "o", "fc")),
        "c": adapted(3, base, targets=("c_attn", "wte"), alpha=2),
        "d": adapted(4, base, kind="dora"),
    }
    modules = dict(base.named_modules())
    alone = {None: base(IDS)[0]} | {name: model(IDS)[0] for name, model in models.items()}
    with lora.adapters_by_row(base, models, names) as mixed:
        logits = mixed(IDS)[0]
    for i, name in enumerate(names):
        assert (logits[i] - alone[name][i]).abs().max() < 1e-5
        assert all((alone[name][i] - alone[o][i]).abs().max() > 1e-3 for o in alone if o != name)
    assert torch.equal(base(IDS)[0], alone[None])  # none: the base exactly, and its own layers back
    assert all(module is modules[name] for name, module in base.named_modules())


def test_rows_of_unknown_adapters_and_of_another_base_are_refused() -> None:
    base, other = plain(), plain()
    with torch.no_grad():
        other.transformer.wpe.weight[0] += 1
    for model, names, message in (
        (adapted(1, base), ["x"], "no adapter is called 'x'; there are a"),
        (adapted(1, other), ["a"], "adapter 'a' has another transformer.wpe.weight"),
        (adapted(1, base), ["a"] * 5, "36 inputs are not 5 rows"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            lora.adapters_by_row(base, {"a": model}, names) as mixed,
        ):
            mixed(IDS)
    assert not any(m._forward_hooks for m in base.modules())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.floats(-2, 2), st.booleans()), min_size=1, max_size=3),
    st.sampled_from([[True, False, True], [True, True, True], [False, True, False]]),
)
def test_merged_adapters_are_the_weighted_sum_of_their_updates(
    adapters: list[tuple[int, float, bool]], enabled: list[bool]
) -> None:
    torch.manual_seed(0)
    layers = [
        lora.MergedLinear(6, 18, r, 5, enable_lora=enabled, use_rslora=rslora)
        for r, _, rslora in adapters
    ]
    for i, layer in enumerate(layers):
        randomize(layer, i)
    weights = [weight for _, weight, _ in adapters]
    states = [lora.lora_state_dict(layer) for layer in layers]
    r = sum(rank for rank, _, _ in adapters)
    with torch.no_grad():
        expected = sum(
            w * layer.delta_weight(layer.lora_A, layer.lora_B)
            for w, layer in zip(weights, layers, strict=True)
        )
        merged = lora.merge_adapters(states, [layer.scaling for layer in layers], weights)
        one = lora.MergedLinear(6, 18, 1, enable_lora=enabled)
        one.r, one.scaling = r, 1.0
        assert merged["lora_A"].shape == (r * sum(enabled), 6)
        assert (one.delta_weight(merged["lora_A"], merged["lora_B"]) - expected).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_merged_adapters_compute_what_pefts_weighted_concatenation_does() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"]), "a"
    )
    theirs.add_adapter("b", peft.LoraConfig(r=3, lora_alpha=4, target_modules=["0", "2"]))
    states = []
    for name, r, alpha, seed in (("a", 2, 6, 1), ("b", 3, 4, 2)):
        ours = lora.inject(copy.deepcopy(base), ["0", "2"], r=r, lora_alpha=alpha)
        randomize(ours, seed)
        states.append(lora.lora_state_dict(ours))
        for key, tensor in states[-1].items():
            number, which = key.split(".")
            layer = theirs.base_model.model.get_submodule(number)
            getattr(layer, which)[name].weight.copy_(tensor)
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.4], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    merged = lora.merge_adapters(states, [3.0, 4 / 3], [0.7, 0.4])
    ours = lora.inject(base, ["0", "2"], r=5, lora_alpha=5)
    ours.load_state_dict(merged, strict=False)
    x = torch.randn(5, 6)
    assert (ours(x) - theirs(x)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "adapters, scalings, message",
    [
        ([], [], "as many adapters"),
        ([{}], [1, 2], "as many adapters"),
        ([{"x.lora_A": torch.ones(1, 2)}, {}], [1, 1], "adapters differ in x.lora_A"),
        ([{"x.lora_magnitude": torch.ones(2)}], [1], "x.lora_magnitude is no lora_A or lora_B"),
        (
            [{"lora_A": torch.ones(2, 2), "lora_B": torch.ones(2, n)} for n in (1, 2)],
            [1, 1],
            "differ in the parts",
        ),
    ],
)
def test_adapters_that_cannot_be_added_are_refused(
    adapters: list, scalings: list, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lora.merge_adapters(adapters, scalings, [1.0] * len(adapters))


@pytest.fixture
def two_runs(tiny: Tiny) -> dict[str, Path]:
    gpt2_ft.main(tiny.argv("e2e", "--max_step", 4, "--lora_alpha", 64))
    gpt2_ft.main(tiny.argv("webnlg", "--max_step", 4, "--lora_targets", "all", "--random_seed", 7))
    return {name: tiny.folder / name for name in ("e2e", "webnlg")}


@torch.no_grad()
def test_several_adapters_are_loaded_on_one_copy_of_the_base(
    tiny: Tiny, two_runs: dict[str, Path]
) -> None:
    base, models = checkpoints.load_adapters(tiny.base, two_runs)
    wanted = dict(base.named_parameters())
    for name, model in models.items():
        alone, _ = checkpoints.load(tiny.base, two_runs[name])
        assert torch.equal(model(IDS)[0], alone(IDS)[0])
        for key, parameter in model.named_parameters():
            assert "lora_" in key or parameter.data_ptr() == wanted[key].data_ptr()
    untouched, _ = checkpoints.load(tiny.base)
    assert torch.equal(base(IDS)[0], untouched(IDS)[0])


def test_rows_of_one_file_are_decoded_by_adapters_of_every_method(tiny: Tiny) -> None:
    methods = {"lora": ["--method", "lora"], **METHODS}
    runs = {}
    for name, flags in methods.items():
        gpt2_ft.main(tiny.argv_of(flags, name, "--max_step", 3, "--lr", 0.1))
        runs[name] = tiny.folder / name / "model.3.safetensors"
    rows = random_rows(2 * len(runs) + 2, seed=3)
    tasks = 2 * [*runs, None]
    named = [part for name, path in runs.items() for part in ("--adapter", f"{name}={path}")]
    mixed = beam(tiny, [r | {"task": t} for r, t in zip(rows, tasks, strict=True)], "mixed", *named)
    alone = {n: beam(tiny, rows, f"{n}-alone", "--adapter", str(path)) for n, path in runs.items()}
    alone[None] = beam(tiny, rows, "none")
    assert mixed == [alone[task][i] for i, task in enumerate(tasks)]
    assert len({json.dumps(found) for found in alone.values()}) == len(tasks) / 2


def beam(tiny: Tiny, rows: list[dict], name: str, *adapters: str) -> list[dict]:
    data = write_rows(tiny.folder / f"{name}.jsonl", rows)
    out = tiny.folder / f"{name}.out"
    argv = ["--data", data, "--init_checkpoint", tiny.base, "--output_file", out, "--device", "cpu"]
    argv += ["--model_card", tiny.card, "--beam", 3, "--eval_len", 8, "--eos_token_id", 5]
    gpt2_beam.main([str(x) for x in [*argv, *adapters]])
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_each_rows_task_chooses_the_adapter_and_results_are_those_of_separate_runs(
    tiny: Tiny, two_runs: dict[str, Path]
) -> None:
    rows = random_rows(9, seed=3)
    tasks = ["e2e", "webnlg", None] * 3
    rows[3] = rows[1]  # one context, two adapters
    named = [part for n, path in two_runs.items() for part in ("--adapter", f"{n}={path}")]
    mixed = beam(tiny, [r | {"task": t} for r, t in zip(rows, tasks, strict=True)], "mixed", *named)
    alone = {n: beam(tiny, rows, n, "--adapter", str(path)) for n, path in two_runs.items()}
    alone[None] = beam(tiny, rows, "none")
    assert mixed == [alone[task][i] for i, task in enumerate(tasks)]
    assert mixed[1]["prediction"] != mixed[3]["prediction"]


@pytest.mark.parametrize(
    "row, message",
    [({}, "line 2: task is missing"), ({"task": "x"}, "line 2: task 'x'.*e2e, webnlg")],
)
def test_rows_without_a_known_task_are_named(
    row: dict, message: str, tiny: Tiny, two_runs: dict[str, Path]
) -> None:
    first, second = random_rows(2)
    named = [part for n, path in two_runs.items() for part in ("--adapter", f"{n}={path}")]
    with pytest.raises(InputError, match=message):
        beam(tiny, [first | {"task": "e2e"}, second | row], "bad", *named)


def test_two_adapters_without_names_are_refused() -> None:
    with pytest.raises(InputError, match="more than once; each needs a name"):
        name_adapters(["a", "b=c"])


def test_loralib_needs_torch_alone() -> None:
    code = "import sys, loralib, loralib.peft; print([m for m in ('peft', 'transformers', "
    code += "'safetensors', 'model', 'errors') if m in sys.modules])"
    assert finish(start(["-c", code]))[1] == "[]\n"
