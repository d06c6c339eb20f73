"""rsLoRA, LoRA+, DoRA, PiSSA, LoRA-FA, the choice of targets, and the paper's baselines."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import Tiny
from test_loralib import unmerged_output
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoints
import gpt2_ft
import loralib as lora
from common.errors import InputError
from decoding.packed import pack
from model import MODEL_CARDS, GPT2Config, GPT2LMModel
from optimizer import create_grouped_parameters
from training import setup

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
PATTERNS = [[True, False, True], [True, True, True], [False, True, False]]


def randomize(layer: nn.Module, seed: int = 0) -> None:
    """Move the trained tensors away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in layer.named_parameters():
            if "lora_" in name and not name.endswith("0"):
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)


def merged_linear(
    kind: str, enabled: list[bool], fan_in_fan_out: bool, **more
) -> lora.MergedLinear:
    torch.manual_seed(0)
    layer = lora.MergedLinear(
        12, 18, 2, 6, enable_lora=enabled, fan_in_fan_out=fan_in_fan_out, kind=kind, **more
    )
    layer.start_from_base()
    return layer


def test_plain_lora_computes_bit_for_bit_what_its_formula_says() -> None:
    layer = merged_linear("lora", [True, False, True], fan_in_fan_out=True)
    randomize(layer)
    with torch.no_grad():
        parts = list(F.linear(X, layer.weight.T, layer.bias).split(6, dim=-1))
        down = 3.0 * F.linear(X, layer.lora_A)
        for part, i in ((0, 0), (2, 1)):
            b = layer.lora_B[6 * i : 6 * i + 6].T.contiguous()
            parts[part] = parts[part] + down[:, 2 * i : 2 * i + 2] @ b
        assert torch.equal(layer(X), torch.cat(parts, dim=-1))


def peft_linear(**settings: object) -> tuple[lora.Linear, nn.Module, nn.Module]:
    """Our layer and PEFT's with one base, and the base."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 18))
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], **settings)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    kind = "dora" if settings.get("use_dora") else "lora"
    kind = "pissa" if settings.get("init_lora_weights") == "pissa" else kind
    ours = lora.Linear(12, 18, 3, 6, use_rslora=bool(settings.get("use_rslora")), kind=kind)
    ours.load_state_dict(base[0].state_dict(), strict=False)
    ours.start_from_base()
    return ours, theirs, base[0]


@pytest.mark.parametrize(
    "settings",
    [{"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}],
    ids=str,
)
def test_outputs_and_gradients_equal_pefts(settings: dict) -> None:
    ours, theirs, base = peft_linear(**settings)
    assert torch.equal(ours(X), base(X))
    randomize(ours)
    layer = theirs.base_model.model[0]
    own = {"lora_A": layer.lora_A.default.weight, "lora_B": layer.lora_B.default.weight}
    if "use_dora" in settings:
        own["lora_magnitude"] = layer.lora_magnitude_vector.default.weight
        assert torch.allclose(own["lora_magnitude"], base.weight.norm(dim=1), atol=1e-6)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(getattr(ours, name))
    for out in (ours(X), theirs(X)):
        (out**2).sum().backward()
    assert (ours(X) - theirs(X)).abs().max() < 1e-5
    for name, tensor in own.items():
        assert torch.allclose(getattr(ours, name).grad, tensor.grad, rtol=1e-4, atol=1e-4), name


TRAINED = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True},
    {"init_lora_weights": "pissa"},
]


@pytest.mark.parametrize("settings", TRAINED, ids=str)
def test_twenty_steps_of_training_end_where_pefts_do(settings: dict) -> None:
    ours, theirs, _ = peft_linear(**settings)
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        for name in ("lora_A", "lora_B"):  # a singular direction may point either way
            getattr(layer, name).default.weight.copy_(getattr(ours, name))
    model = nn.Sequential(ours)
    lora.mark_only_lora_as_trainable(model)
    first = model(X).detach()
    pairs = []
    for trained in (model, theirs):
        parameters = [p for p in trained.parameters() if p.requires_grad]
        pairs.append((trained, torch.optim.AdamW(parameters, lr=0.01)))
    for step in range(20):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        for trained, adam in pairs:
            adam.zero_grad()
            F.mse_loss(trained(x), x.sum(dim=1, keepdim=True).expand(8, 18)).backward()
            adam.step()
    assert (model(X) - first).abs().max() > 0.1
    assert (model(X) - theirs(X)).abs().max() < 1e-5


def test_pissa_starts_where_pefts_does_and_computes_the_same() -> None:
    ours, theirs, base = peft_linear(init_lora_weights="pissa")
    layer = theirs.base_model.model[0]
    theirs_a, theirs_b = layer.lora_A.default.weight, layer.lora_B.default.weight
    assert torch.allclose(ours.lora_B @ ours.lora_A, theirs_b @ theirs_a, atol=1e-5)
    assert torch.equal(ours.weight, base.weight)  # PEFT has rewritten its own
    assert (ours(X) - base(X)).abs().max() < 1e-5
    randomize(ours)
    with torch.no_grad():
        theirs_a.copy_(ours.lora_A)
        theirs_b.copy_(ours.lora_B)
    assert (ours(X) - theirs(X)).abs().max() < 1e-5
    assert torch.linalg.matrix_rank(ours.lora_B0 @ ours.lora_A0) == 3


@pytest.mark.parametrize("kind", lora.KINDS)
@pytest.mark.parametrize("enabled", PATTERNS, ids=str)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_a_fused_layer_is_one_linear_layer_of_the_kind_for_each_part(
    kind: str, enabled: list[bool], fan_in_fan_out: bool
) -> None:
    layer = merged_linear(kind, enabled, fan_in_fan_out)
    randomize(layer)
    rows = (layer.weight.T if fan_in_fan_out else layer.weight).detach()
    expected, j = [], 0
    for i, adapted in enumerate(enabled):
        single = lora.Linear(12, 6, 2 * adapted, 6, kind=kind)
        own = {"weight": rows[6 * i : 6 * i + 6], "bias": layer.bias[6 * i : 6 * i + 6]}
        for name, tensor in layer.named_parameters():
            if adapted and "lora_" in name:
                size = 2 if "lora_A" in name else 6
                own[name] = tensor[size * j : size * j + size]
        single.load_state_dict(own)
        expected.append(single(X))
        j += adapted
    out = layer(X)
    assert (out - torch.cat(expected, dim=-1)).abs().max() < 1e-5
    base = layer.weight.detach().clone()
    layer.eval()
    with torch.no_grad():
        assert (layer(X) - out).abs().max() < 1e-5
        assert (F.linear(X, layer.weight.T if fan_in_fan_out else layer.weight, layer.bias) - out
                ).abs().max() < 1e-5  # fmt: skip
    layer.train()
    assert torch.equal(layer.weight, base)


@pytest.mark.parametrize("kind", lora.KINDS)
def test_a_bf16_base_with_an_fp32_adapter_runs_and_merges(kind: str) -> None:
    layer = merged_linear(kind, [True, False, True], True).bfloat16()
    for name, tensor in layer.named_parameters():
        if "lora_" in name:
            tensor.data = tensor.data.float()
    randomize(layer)
    unmerged = layer(X.bfloat16())
    with torch.no_grad():
        merged = layer.eval()(X.bfloat16())
    assert unmerged.dtype == merged.dtype == torch.bfloat16
    assert (unmerged - merged).abs().max() < 0.05 * unmerged.abs().max()


class LargeTensors(TorchDispatchMode):
    """Collects operations that make a tensor as large as the weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        fresh = isinstance(out, Tensor) and out._base is None and not func.is_view
        if fresh and out.numel() >= self.size:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("kind", lora.KINDS)
def test_no_kind_makes_a_tensor_of_the_weights_size_in_training(kind: str) -> None:
    layer = lora.MergedLinear(64, 192, 2, enable_lora=[True, False, True], kind=kind)
    layer.start_from_base()
    with LargeTensors(64 * 192 // 3) as watch:
        layer(torch.randn(2, 64)).sum().backward()
    assert watch.found == []
    layer.eval()
    with LargeTensors(64 * 192 // 3) as watch:
        layer.merge()
    assert watch.found


@pytest.mark.parametrize("kind", lora.KINDS)
@pytest.mark.parametrize("enabled", PATTERNS, ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_the_update_norm_is_that_of_the_difference_of_the_dense_weights(
    kind: str, enabled: list[bool], rslora: bool
) -> None:
    for fan_in_fan_out in (False, True):
        layer = merged_linear(kind, enabled, fan_in_fan_out, use_rslora=rslora).double()
        layer.start_from_base()
        assert layer.update_norm() == pytest.approx(0, abs=1e-6)
        randomize(layer)
        expected = torch.linalg.norm(layer.merged_weight() - layer.base_weight)
        assert layer.update_norm() == pytest.approx(float(expected), rel=1e-9)
        assert layer.float().update_norm() == pytest.approx(float(expected), rel=1e-5)


def test_the_update_norm_of_embeddings_and_convolutions_is_that_of_the_dense_difference() -> None:
    for layer in (lora.Embedding(9, 6, 2, 8), lora.Conv2d(4, 6, (2, 3), 1, 8, groups=2)):
        randomize(layer.double())
        expected = torch.linalg.norm(layer.merged_weight() - layer.base_weight)
        assert layer.update_norm() == pytest.approx(float(expected), rel=1e-9)
    assert lora.Linear(4, 4).update_norm() == 0


@pytest.mark.parametrize("kind", lora.KINDS)
def test_the_update_norm_makes_no_tensor_of_the_weights_size(kind: str) -> None:
    layer = lora.MergedLinear(64, 192, 2, enable_lora=[True, False, True], kind=kind)
    layer.start_from_base()
    with LargeTensors(64 * 192 // 3) as watch:
        layer.update_norm()
    assert watch.found == []


def test_lora_fa_trains_b_alone_and_saves_both() -> None:
    model = nn.Sequential(merged_linear("lora_fa", [True, False, True], True))
    lora.mark_only_lora_as_trainable(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["0.lora_B"]
    assert set(lora.lora_state_dict(model)) == {"0.lora_A", "0.lora_B"}


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of.*'vera'"):
        lora.Linear(4, 4, 2, kind="vera")


def test_scaling_of_every_layer_type_is_alpha_over_the_root_of_r_with_rslora() -> None:
    layers = [
        lora.Linear(8, 8, 4, 6, use_rslora=True),
        lora.MergedLinear(8, 24, 4, 6, enable_lora=[True] * 3, use_rslora=True),
        lora.Embedding(8, 8, 4, 6, use_rslora=True),
        lora.Conv2d(8, 8, 3, 4, 6, use_rslora=True),
    ]
    assert [layer.scaling for layer in layers] == [3.0] * 4


def test_lora_plus_gives_every_b_its_multiple_of_the_rate() -> None:
    peft_optimizers = pytest.importorskip("peft.optimizers")
    torch.manual_seed(0)
    model = GPT2LMModel(
        GPT2Config(64, 32, 16, 2, 2, lora=lora.LoraConfig(2, targets=("q", "v", "fc")))
    )
    lora.mark_only_lora_as_trainable(model)
    theirs = peft_optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=16
    )
    wanted = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    groups = create_grouped_parameters(model, 0.01, False, 0.1, 16)
    given = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert given == {key: pytest.approx(rate) for key, rate in wanted.items() if key in given}
    assert sorted(group["lr"] for group in groups) == pytest.approx([0.1, 1.6])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert given.keys() == {id(p) for p in trained}


C, R, V, N = 1024, 4, 50257, 24
COUNTS = {
    "q,v": 393_216,
    "q": N * R * 2 * C,
    "q,k,v": N * 3 * R * 2 * C,
    "c_attn": N * R * (C + 3 * C),
    "o": N * R * 2 * C,
    "fc": N * R * 5 * C,
    "proj": N * R * 5 * C,
    "all": N * R * (8 + 5 + 5) * C,
    "q,v,wte": 393_216 + R * (V + C),
}


@pytest.mark.parametrize("targets", COUNTS)
def test_trained_parameters_of_gpt2_medium_by_target(targets: str) -> None:
    with torch.device("meta"):
        names = checkpoints.parse_targets(targets)
        model = GPT2LMModel(
            GPT2Config(**MODEL_CARDS["gpt2.md"], lora=lora.LoraConfig(R, targets=names))
        )
    lora.mark_only_lora_as_trainable(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == COUNTS[targets]


@pytest.mark.parametrize(
    "argv, count",
    [
        (["--lora_dim", "0", "--train_top", "2"], 25_192_448),  # the paper's 25.19 M
        (["--lora_dim", "0", "--train_bias", "all"], 24 * 11 * 1024 + 1024),
        (["--train_bias", "lora_only"], 393_216 + 24 * 3 * 1024),
        (["--train_bias", "all"], 393_216 + 24 * 11 * 1024 + 1024),
        (
            ["--lora_dim", "0"],
            354_823_168,
        ),
        (["--lora_kind", "dora"], 393_216 + 24 * 2 * 1024),
        (["--lora_kind", "pissa"], 393_216),
        (["--lora_kind", "lora_fa"], 393_216 // 2),
    ],
    ids=str,
)
def test_trained_parameters_of_gpt2_medium_by_kind(argv: list[str], count: int) -> None:
    args = gpt2_ft.parse_args(["--train_data", "x", "--init_checkpoint", "none", *argv])
    with torch.device("meta"):
        config = GPT2Config(**MODEL_CARDS["gpt2.md"], **setup.adapter_settings(args))
        model = GPT2LMModel(config)
    setup.choose_trained(args, model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_all_is_the_six_linear_targets_and_unknown_or_doubled_ones_are_refused() -> None:
    assert checkpoints.parse_targets("all") == ("q", "k", "v", "o", "fc", "proj")
    assert checkpoints.parse_targets("v, q,v") == ("q", "v")
    for text in ("q,x", "", "Q", "q,,v"):
        with pytest.raises(InputError, match="--lora_targets '.*' is none of"):
            checkpoints.parse_targets(text)
    for targets, kind in (("c_attn,q", "lora"), ("wte", "dora")):
        with pytest.raises(InputError, match="c_attn is q, k and v|wte is an embedding"):
            checkpoints.model_config(
                "gpt2.nano",
                None,
                lora=lora.LoraConfig(targets=checkpoints.parse_targets(targets), kind=kind),
            )


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_subset_of_targets_adapts_what_it_names_and_nothing_else(size: int) -> None:
    modules = {"q": "c_attn", "k": "c_attn", "v": "c_attn", "o": "attn.c_proj", "fc": "mlp.c_fc",
               "proj": "mlp.c_proj"}  # fmt: skip
    for targets in itertools.combinations(modules, size):
        model = GPT2LMModel(GPT2Config(8, 8, 4, 1, 1, lora=lora.LoraConfig(1, targets=targets)))
        adapted = {name for name, m in model.named_modules() if getattr(m, "adapted", False)}
        assert len(adapted) == len({modules[t] for t in targets})
        assert all(name.endswith(tuple(modules[t] for t in targets)) for name in adapted)
        enabled = [part in targets for part in "qkv"]
        assert model.transformer.h[0].attn.c_attn.enable_lora == enabled


RUNS = {
    "lora": [],
    "rslora": ["--use_rslora"],
    "dora": ["--lora_kind", "dora", "--lora_targets", "all"],
    "pissa": ["--lora_kind", "pissa"],
    "lora_fa": ["--lora_kind", "lora_fa", "--lora_targets", "q,v,proj"],
    "wte": ["--lora_targets", "q,v,wte"],
    "c_attn": ["--lora_targets", "c_attn,fc"],
    "lora+": ["--lora_plus_ratio", "4"],
    "biases": ["--train_bias", "lora_only"],
    "bias": ["--lora_dim", "0", "--train_bias", "all"],
    "top": ["--lora_dim", "0", "--train_top", "1"],
}


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_trains_stops_goes_on_to_equal_bytes_and_decodes_by_its_file_alone(
    name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*RUNS[name], "--max_step", 5, "--eval_interval", 100]
    runs, real = [], gpt2_ft.prepare
    monkeypatch.setattr(gpt2_ft, "prepare", lambda *a: runs.append(real(*a)) or runs[-1])
    gpt2_ft.main(tiny.argv("whole", *more))
    whole = tiny.folder / "whole" / "model.5.safetensors"

    step, calls = gpt2_ft.optimizer_step, itertools.count()

    def dies(*args: object) -> tuple:
        if next(calls) == 4:
            raise ConnectionError
        return step(*args)

    monkeypatch.setattr(gpt2_ft, "optimizer_step", dies)
    with pytest.raises(ConnectionError):
        gpt2_ft.main(tiny.argv("cut", *more))
    gpt2_ft.main(tiny.argv("cut", *more, "--resume", "auto"))
    assert (tiny.folder / "cut" / "model.5.safetensors").read_bytes() == whole.read_bytes()

    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = runs[0].model.eval()(ids)[0]
        model, header = checkpoints.load(tiny.base, whole)
        assert (model(ids)[0] - expected).abs().max() < 1e-5
        assert (pack(model)(ids)[0] - expected).abs().max() < 1e-5
    plain, _ = checkpoints.load(tiny.base)
    with torch.no_grad():
        assert (plain(ids)[0] - expected).abs().max() > 1e-4
    assert header.kind == (name if name in (*lora.KINDS, "bias", "top") else "lora")


def test_a_run_is_not_gone_on_with_under_another_kind_or_other_targets(tiny: Tiny) -> None:
    argv = tiny.argv("run", "--max_step", 3)
    gpt2_ft.main(argv)
    for flags in (["--lora_kind", "dora"], ["--lora_targets", "all"], ["--train_bias", "all"]):
        for anyway in ([], ["--resume_anyway"]):
            with pytest.raises(InputError, match=flags[0].strip("-")):
                gpt2_ft.main([*argv, *flags, "--resume", "auto", *anyway])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora_targets", "qv"], "lora_targets 'qv'"),
        (["--train_top", "2"], "train_top goes with --lora_dim 0"),
        (["--lora_dim", "0", "--train_top", "9"], "train_top 9 is more than 2"),
        (["--lora_dim", "0", "--train_bias", "lora_only"], "would train nothing"),
        (["--lora_plus_ratio", "0"], "lora_plus_ratio 0.0 must be above 0"),
    ],
)
def test_choices_that_make_no_sense_are_refused(flags: list, message: str, tiny: Tiny) -> None:
    with pytest.raises(InputError, match=message):
        gpt2_ft.main(tiny.argv("run", *flags))


def test_the_header_says_kind_targets_and_settings(tiny: Tiny) -> None:
    gpt2_ft.main(tiny.argv("run", "--max_step", 3, "--lora_kind", "dora", "--use_rslora",
                           "--lora_targets", "v,o"))  # fmt: skip
    header, _ = checkpoints.read_adapter(tiny.folder / "run")
    wanted = {"kind": "dora", "rslora": True, "targets": ["v", "o"], "r": 2, "alpha": 8.0}
    assert {key: header.to_fields()[key] for key in wanted} == wanted
    assert header.settings["lora_plus_ratio"] == 1


@pytest.mark.filterwarnings("ignore:state_dict of a merged layer")
@pytest.mark.parametrize("kind", lora.KINDS)
@torch.no_grad()
def test_a_merged_layer_of_any_kind_keeps_its_base_and_follows_every_change(kind: str) -> None:
    layer = merged_linear(kind, [True, False, True], True)
    randomize(layer)
    base = layer.weight.detach().clone()
    wanted = {"lora": 2, "lora_fa": 2, "dora": 3, "pissa": 4}[kind]
    names = [name for name, _ in layer.named_parameters() if "lora_" in name]
    assert len(names) == wanted
    layer.eval()
    for name in names:  # whichever of its tensors changes, the next output is the new one
        before = layer(X)
        getattr(layer, name).mul_(1.5)
        after = layer(X)
        assert (after - before).abs().max() > 1e-3
        assert (after - unmerged_output(layer, X)).abs().max() < 1e-5, name
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.merged and torch.equal(twin(X), layer(X))
        assert torch.equal(twin.train().weight, base)
    fresh = merged_linear(kind, [True, False, True], True).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(X), layer(X))
    assert torch.equal(layer.state_dict()["weight"], base)
    assert torch.equal(layer.train().weight, base)


@pytest.mark.parametrize("kind", lora.KINDS)
def test_a_training_step_in_eval_mode_and_through_checkpointing_has_the_same_gradients(
    kind: str,
) -> None:
    gradients = []
    for mode in ("train", "eval", "checkpoint"):
        layer = merged_linear(kind, [True, False, True], True).train(mode != "eval")
        randomize(layer)
        model = nn.Sequential(layer)
        lora.mark_only_lora_as_trainable(model)
        if mode == "checkpoint":
            out = torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False)
        else:
            out = model(X)
        out.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert gradient is not None and torch.allclose(gradient, other[name], atol=1e-5), name


def test_an_adapter_file_with_all_biases_holds_parameters_only_and_is_small() -> None:
    with torch.device("meta"):
        model = GPT2LMModel(GPT2Config(**MODEL_CARDS["gpt2.md"], lora_attn_dim=4))
    state = lora.lora_state_dict(model, bias="all")
    assert not any(name.endswith(".attn.bias") for name in state)
    assert sum(t.numel() * 4 for t in state.values()) < 3e6
    buffers = {name for name, _ in model.named_buffers()}
    assert not buffers & state.keys()


def test_a_wide_rank_of_every_kind_warns() -> None:
    for kind in lora.KINDS:
        with pytest.warns(UserWarning, match="r=9 is above 8"):
            lora.Linear(8, 8, 9, kind=kind)
