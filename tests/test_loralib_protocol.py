"""What is trained, what is saved, under which names; and the tutorial's way of using it all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_loralib import LAYERS, build, each_layer, randomize, trained
from torch import nn

import loralib as lora

# These tests look at what state_dict() of a merged layer holds, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:state_dict of a merged layer")

ADAPTER = {"lora_A", "lora_B"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


class Net(nn.Module):
    """Adapted and plain layers, names and buffers that look like something else."""

    def __init__(self) -> None:
        super().__init__()
        self.x = lora.Linear(4, 4, r=1)
        self.conv = lora.Conv1d(4, 4, 1, r=1)
        self.plain = lora.Linear(4, 4)
        self.lora_encoder = nn.Linear(4, 4)
        self.bias_net = nn.Linear(4, 4, bias=False)
        self.register_buffer("bias", torch.ones(2, 2))
        self.register_buffer("lora_mask", torch.ones(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.x(x)


ADAPTERS = {f"{layer}.{tensor}" for layer in ("x", "conv") for tensor in ADAPTER}
CHOSEN = {
    "none": ADAPTERS,
    "lora_only": ADAPTERS | {"x.bias", "conv.bias"},
    "all": ADAPTERS | {"x.bias", "conv.bias", "plain.bias", "lora_encoder.bias"},
}


@pytest.mark.parametrize("bias", CHOSEN)
@pytest.mark.parametrize("frozen_before", [False, True])
def test_trained_set_is_the_saved_set(bias, frozen_before):
    model = Net().requires_grad_(not frozen_before)
    lora.mark_only_lora_as_trainable(model, bias=bias)
    assert trainable(model) == CHOSEN[bias]
    saved = lora.lora_state_dict(model, bias=bias)
    assert set(saved) == CHOSEN[bias]
    assert all(saved[key].data_ptr() == model.get_parameter(key).data_ptr() for key in saved)
    assert not any(tensor.requires_grad for tensor in saved.values())


@each_layer
@pytest.mark.parametrize("merged", [False, True])
def test_bias_of_every_adapted_layer_trains_and_is_saved_once(name, merged):
    model = nn.Sequential(trained(name)).train(not merged)
    lora.mark_only_lora_as_trainable(model, bias="lora_only")
    expected = ADAPTER if name == "embedding" else ADAPTER | {"bias"}
    assert trainable(model) == {f"0.{key}" for key in expected}
    assert set(lora.lora_state_dict(model, bias="lora_only")) == trainable(model)


def test_unknown_bias_mode_is_refused_before_anything_changes():
    model = Net()
    before = trainable(model)
    for function in (lora.mark_only_lora_as_trainable, lora.lora_state_dict):
        with pytest.raises(ValueError, match="'some'"):
            function(model, bias="some")
    assert trainable(model) == before


@each_layer
def test_marked_step_changes_the_adapter_alone(name):
    model = nn.Sequential(trained(name))
    lora.mark_only_lora_as_trainable(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(LAYERS[name][-1]).pow(2).sum().backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    assert changed == {"0.lora_A", "0.lora_B"}


# --- names and files -----------------------------------------------------------------------------


@each_layer
@pytest.mark.parametrize("merged", [False, True])
def test_each_tensor_is_stored_once_and_contiguous(name, merged):
    layer = trained(name).train(not merged)
    state = layer.state_dict()
    assert set(state) == set(dict(layer.named_parameters()))
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in layer.parameters())
    loaded = safetensors.torch.load(safetensors.torch.save(state))
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@each_layer
def test_plain_torch_checkpoint_loads_with_only_the_adapter_missing(name):
    _, sizes, options, plain_class, _ = LAYERS[name]
    if options.get("fan_in_fan_out"):
        plain = build(name, r=0)
    else:
        plain = plain_class(*sizes, **{k: v for k, v in options.items() if k != "enable_lora"})
    layer = build(name)
    result = layer.load_state_dict(plain.state_dict(), strict=False)
    assert set(result.missing_keys) == ADAPTER
    assert result.unexpected_keys == []
    assert torch.equal(layer.weight, plain.weight)


def test_unknown_keys_are_still_reported():
    layer = lora.Conv2d(4, 6, 3, r=1)
    result = layer.load_state_dict({"conv.weight": layer.weight, "conv.gain": 0}, strict=False)
    assert result.unexpected_keys == ["conv.gain"]


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_wrapped_models_save_the_bare_models_names(one_process_group):
    def compiled(model: nn.Module) -> nn.Module:
        return torch.compile(model, backend="eager")

    def data_parallel(model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model)

    model = Net()
    model.conv.requires_grad_(False)
    expected = lora.lora_state_dict(model, bias="all")
    inner = Net()
    inner.x = compiled(inner.x)
    wrapped = (
        compiled(model),
        data_parallel(model),
        compiled(data_parallel(model)),
        data_parallel(compiled(model)),
        nn.DataParallel(model),
        inner,
    )
    for wrapper in wrapped:
        saved = lora.lora_state_dict(wrapper, bias="all")
        assert list(saved) == list(expected)
        assert Net().load_state_dict(saved, strict=False).unexpected_keys == []


def test_user_module_called_module_keeps_its_name():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = Net(), nn.Linear(4, 4)

    assert set(lora.lora_state_dict(Pair())) == {f"module.{key}" for key in ADAPTERS}


def test_package_needs_torch_alone():
    """Every module that importing it adds to a process that has torch is its own."""
    code = (
        "import sys, torch; before = set(sys.modules); import loralib;"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] != 'loralib'])"
    )
    root = Path(lora.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
        check=True,
    )
    assert run.stdout.strip() == "[]"


# --- the tutorial --------------------------------------------------------------------------------


class Attention(nn.Module):
    """A base model as before LoRA, or the same with adapted layers: the keys fit each other."""

    def __init__(self, adapted: bool, vocabulary: int = 11, width: int = 8) -> None:
        super().__init__()
        if adapted:
            self.tokens = lora.Embedding(vocabulary, width, r=2)
            self.qkv = lora.MergedLinear(width, 3 * width, r=2, enable_lora=[True, False, True])
            self.out = lora.Linear(width, width, r=2, lora_alpha=4, lora_dropout=0.1)
        else:
            self.tokens = nn.Embedding(vocabulary, width)
            self.qkv = nn.Linear(width, 3 * width)
            self.out = nn.Linear(width, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.tokens(ids)).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_tutorial_trains_saves_and_loads(tmp_path, bias):
    ids = torch.randint(11, (2, 5))
    base = Attention(adapted=False)
    torch.save(base.state_dict(), tmp_path / "ckpt_pretrained.pt")

    model = Attention(adapted=True)
    model.load_state_dict(torch.load(tmp_path / "ckpt_pretrained.pt"), strict=False)
    torch.testing.assert_close(model.eval()(ids), base(ids))
    lora.mark_only_lora_as_trainable(model, bias=bias)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(30):
        loss = (model(ids) - 1).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    torch.save(lora.lora_state_dict(model, bias=bias), tmp_path / "ckpt_lora.pt")

    again = Attention(adapted=True)
    again.load_state_dict(torch.load(tmp_path / "ckpt_pretrained.pt"), strict=False)
    again.load_state_dict(torch.load(tmp_path / "ckpt_lora.pt"), strict=False)
    model.eval(), again.eval()
    with torch.no_grad():
        assert torch.equal(model(ids), again(ids))
        assert not torch.allclose(model(ids), base(ids), atol=0.1)
    for name, parameter in again.train().named_parameters():
        if name not in trainable(model):
            assert torch.equal(parameter, base.get_parameter(name))


def test_fused_projection_takes_separate_weights_of_a_checkpoint():
    """A load hook that joins q, k and v works with MergedLinear as with nn.Linear."""
    parts = [nn.Linear(8, 8) for _ in range(3)]
    fused = randomize(lora.MergedLinear(8, 24, r=2, enable_lora=[True, False, True])).eval()

    def join(module: nn.Module, state: dict, prefix: str, *_: object) -> None:
        for tensor in ("weight", "bias"):
            names = [f"{prefix}{part}.{tensor}" for part in "qkv"]
            state[prefix + tensor] = torch.cat([state.pop(name) for name in names])

    fused.register_load_state_dict_pre_hook(join)
    names = zip("qkv", parts, strict=True)
    state = {f"{p}.{k}": v for p, part in names for k, v in part.state_dict().items()}
    result = fused.load_state_dict(state, strict=False)
    assert set(result.missing_keys) == ADAPTER
    x = torch.randn(3, 8)
    assert fused.merged
    key = fused.train()(x).chunk(3, -1)[1]
    torch.testing.assert_close(key, parts[1](x))
