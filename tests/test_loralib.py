"""The layers' maths: against torch's functions, PyPI's loralib 0.1.2 and PEFT."""

import copy
import importlib.metadata
import importlib.util
import math
import sys
import warnings

import hypothesis.strategies as st
import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

import loralib as lora

# Some of these tests load the state of merged layers, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:state_dict of a merged layer")

torch.set_num_threads(1)
torch.manual_seed(0)

IDS = torch.tensor([[0, 3, 10], [5, 3, 1]])
# name → (class, arguments, plain torch class and arguments, input)
LAYERS = {
    "linear": (lora.Linear, (6, 10), {}, nn.Linear, torch.randn(2, 3, 6)),
    "linear_fan_in_fan_out": (
        lora.Linear,
        (6, 10),
        {"fan_in_fan_out": True},
        nn.Linear,
        torch.randn(2, 3, 6),
    ),
    "merged_linear": (
        lora.MergedLinear,
        (6, 12),
        {"enable_lora": [True, False, True]},
        nn.Linear,
        torch.randn(2, 3, 6),
    ),
    "merged_linear_fan_in_fan_out": (
        lora.MergedLinear,
        (6, 12),
        {"enable_lora": [False, True], "fan_in_fan_out": True},
        nn.Linear,
        torch.randn(2, 3, 6),
    ),
    "embedding": (lora.Embedding, (11, 7), {}, nn.Embedding, IDS),
    "conv1d": (lora.Conv1d, (4, 6, 3), {"padding": 1}, nn.Conv1d, torch.randn(2, 4, 9)),
    "conv2d": (lora.Conv2d, (4, 6, (2, 3)), {"groups": 2}, nn.Conv2d, torch.randn(2, 4, 5, 6)),
    "conv3d": (lora.Conv3d, (4, 6, (1, 1, 3)), {}, nn.Conv3d, torch.randn(2, 4, 3, 4, 5)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def build(name: str, r: int = 1, **settings_: object) -> nn.Module:
    """The layer as its constructor leaves it."""
    layer, sizes, options, _, _ = LAYERS[name]
    return layer(*sizes, r=r, lora_alpha=3, **options, **settings_)


def trained(name: str, **settings_: object) -> nn.Module:
    """The layer with an A and a B that training could have left."""
    return randomize(build(name, **settings_))


def randomize(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.lora_A.normal_(std=0.5)
        layer.lora_B.normal_(std=0.5)
    return layer


def unmerged_output(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output as where gradients are asked for, which never uses the merged weight."""
    with torch.enable_grad():
        return layer(x).detach()


def frozen_output(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of the layer without its adapter."""
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        plain.lora_A.zero_()
        plain.lora_B.zero_()
    return unmerged_output(plain, x)


def input_of(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = LAYERS[name][-1]
    return x.to(dtype) if x.is_floating_point() else x


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def pypi():
    """PyPI's loralib, under another name: the local package hides it."""
    try:
        root = importlib.metadata.distribution("loralib").locate_file("loralib")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("loralib==0.1.2 (requirements-dev.txt) is not installed")
    spec = importlib.util.spec_from_file_location(
        "pypi_loralib", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["pypi_loralib"] = module
    spec.loader.exec_module(module)
    return module


# --- against PyPI's loralib --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sizes", "options", "x"),
    [
        ("Linear", (6, 10), {"lora_dropout": 0.0}, torch.randn(2, 3, 6)),
        ("Linear", (6, 10), {"fan_in_fan_out": True, "bias": False}, torch.randn(6)),
        ("Embedding", (11, 7), {"padding_idx": 3}, IDS),
        ("MergedLinear", (6, 12), {"enable_lora": [True, False, True]}, torch.randn(5, 6)),
        (
            "MergedLinear",
            (6, 12),
            {"enable_lora": [False, True], "fan_in_fan_out": True},
            torch.randn(2, 2, 3, 6),
        ),
    ],
)
def test_outputs_and_gradients_equal_pypi_loralib(pypi, kind, sizes, options, x):
    theirs = randomize(getattr(pypi, kind)(*sizes, r=2, lora_alpha=3, **options))
    ours = getattr(lora, kind)(*sizes, r=2, lora_alpha=3, **options)
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    for layer in (ours, theirs):
        layer(x).pow(2).sum().backward()
    for tensor in ("lora_A", "lora_B"):
        torch.testing.assert_close(getattr(ours, tensor).grad, getattr(theirs, tensor).grad)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.weight, theirs.weight.data, atol=1e-6, rtol=1e-5)


def test_the_grouped_convolution_of_pypi_loralib_is_a_block_diagonal_product(pypi):
    """What B is in its MergedLinear: a 1-d convolution over the tokens, one group a part."""
    r, width, tokens, enable = 2, 4, 5, [True, False, True]
    theirs = randomize(pypi.MergedLinear(6, 3 * width, r=r, lora_alpha=3, enable_lora=enable))
    ours = lora.MergedLinear(6, 3 * width, r=r, lora_alpha=3, enable_lora=enable)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(tokens, 6)
    a, b = theirs.lora_A, theirs.lora_B
    h = F.linear(x, a)
    convolved = F.conv1d(h.T[None], b[..., None], groups=2)[0].T
    blocks = torch.block_diag(*b.chunk(2))
    assert blocks.shape == (2 * width, 2 * r) and not blocks[:width, r:].any()
    torch.testing.assert_close(convolved, h @ blocks.T)
    for layer in (theirs, ours):
        added = layer(x) - F.linear(x, layer.weight, layer.bias)
        query, key, value = (added / layer.scaling).split(width, dim=-1)
        assert not key.any()
        torch.testing.assert_close(torch.cat((query, value), dim=-1), convolved)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_old_conv_checkpoint_with_its_child_keys_loads(pypi, groups):
    theirs = randomize(pypi.Conv2d(4, 8, 3, r=1, lora_alpha=3, groups=groups, padding=1))
    ours = nn.Sequential(lora.Conv2d(4, 8, 3, r=1, lora_alpha=3, groups=groups, padding=1))
    old = {f"0.{key}": value for key, value in theirs.state_dict().items()}
    assert "0.conv.weight" in old
    keys = list(old)
    ours.load_state_dict(old)
    assert list(old) == keys
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_constructors_take_pypi_arguments_in_their_order(pypi):
    for kind, arguments in {
        "Linear": (4, 6, 2, 8, 0.1, True, False),
        "MergedLinear": (4, 6, 2, 8, 0.1, [True, False], True, False),
        "Embedding": (9, 6, 2, 8, False),
        "Conv2d": (4, 6, 3, 1, 8, 0.1, False),
    }.items():
        ours, theirs = getattr(lora, kind)(*arguments), getattr(pypi, kind)(*arguments)
        for setting in ("r", "lora_alpha", "scaling", "merge_weights", "merged"):
            assert getattr(ours, setting) == getattr(theirs, setting)
        for tensor in ("lora_A", "lora_B"):
            assert getattr(ours, tensor).shape == getattr(theirs, tensor).shape
        assert getattr(ours, "fan_in_fan_out", None) == getattr(theirs, "fan_in_fan_out", None)


# --- against PEFT ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "plain", "x"),
    [
        (lora.Linear(6, 10, r=2, lora_alpha=3), nn.Linear(6, 10), torch.randn(2, 3, 6)),
        (lora.Embedding(11, 7, r=2, lora_alpha=3), nn.Embedding(11, 7), IDS),
        (lora.Conv2d(4, 6, 1, r=2, lora_alpha=3), nn.Conv2d(4, 6, 1), torch.randn(2, 4, 5, 5)),
        (lora.Conv1d(4, 6, 1, r=2, lora_alpha=3), nn.Conv1d(4, 6, 1), torch.randn(2, 4, 5)),
    ],
)
def test_outputs_equal_peft_before_and_after_merging(ours, plain, x):
    randomize(ours)
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"]), nn.Sequential(plain)
    )
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.items():
            own = "lora_A" if "lora_" in name and "_A" in name else "lora_B"
            own = own if "lora_" in name else name.rpartition(".")[2]
            parameter.copy_(ours.get_parameter(own).view(parameter.shape))
    torch.testing.assert_close(ours(x), model(x), atol=1e-5, rtol=1e-5)
    ours.eval()
    model[0].merge()
    torch.testing.assert_close(ours.weight, model[0].base_layer.weight.data, atol=1e-6, rtol=1e-5)


# --- against torch's functions -----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    enable=st.lists(st.booleans(), min_size=1, max_size=5),
    r=st.integers(1, 3),
    fan_in_fan_out=st.booleans(),
    bias=st.booleans(),
    batch=st.lists(st.integers(1, 3), max_size=3),
    number=st.integers(0, 99),
)
def test_merged_linear_is_one_linear_per_part(enable, r, fan_in_fan_out, bias, batch, number):
    torch.manual_seed(number)
    with warnings.catch_warnings(action="ignore"):  # ranks near the layer's size
        layer = lora.MergedLinear(
            6, 4 * len(enable), r, 5, 0.0, enable, fan_in_fan_out, bias=bias, dtype=torch.float64
        )
    if any(enable):
        randomize(layer)
    x = torch.randn(*batch, 6, dtype=torch.float64)
    weight = layer.weight.T if fan_in_fan_out else layer.weight
    expected, j = [], 0
    for i, on in enumerate(enable):
        rows = slice(4 * i, 4 * i + 4)
        part = F.linear(x, weight[rows], layer.bias[rows] if bias else None)
        if on:
            a, b = layer.lora_A[r * j : r * j + r], layer.lora_B[4 * j : 4 * j + 4]
            part, j = part + 5 / r * F.linear(F.linear(x, a), b), j + 1
        expected.append(part)
    expected = torch.cat(expected, -1)
    torch.testing.assert_close(layer(x), expected)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    assert layer.merged is any(enable)
    assert layer.weight.is_contiguous()


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    sides = st.lists(st.integers(1, 3), min_size=dims, max_size=dims)
    groups = draw(st.sampled_from([1, 2, 4]))
    kernel = draw(st.one_of(st.integers(1, 3), sides.map(tuple)))
    options = {
        "stride": draw(st.integers(1, 2)),
        "dilation": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    return dims, 4 * draw(st.integers(1, 2)), kernel, options


@settings(max_examples=60, deadline=None)
@given(
    case=convolutions(),
    r=st.integers(1, 2),
    dropout=st.sampled_from([0.0, 0.3]),
    number=st.integers(0, 99),
)
def test_any_convolution_equals_torch_with_the_summed_kernel(case, r, dropout, number):
    torch.manual_seed(number)
    dims, out, kernel, options = case
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    with warnings.catch_warnings(action="ignore"):  # ranks near the layer's size
        layer = (lora.Conv1d, lora.Conv2d, lora.Conv3d)[dims - 1](
            4, out, kernel, r, 3, dropout, dtype=torch.float64, **options
        )
    randomize(layer)
    layer.merge_weights = False
    layer.eval()  # dropout off
    x = torch.randn(2, 4, *[6] * dims, dtype=torch.float64)
    summed = layer.weight + 3 / r * (layer.lora_B @ layer.lora_A).view_as(layer.weight)
    spread = {key: options[key] for key in ("stride", "padding", "dilation", "groups")}
    expected = conv(x, summed, layer.bias, **spread)
    torch.testing.assert_close(layer(x), expected)
    layer.merge()
    torch.testing.assert_close(layer.weight, summed.detach())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


def test_square_kernel_as_number_and_as_tuple_are_the_same_layer():
    layers = []
    for kernel in (3, (3, 3)):
        torch.manual_seed(0)
        layers.append(lora.Conv2d(4, 6, kernel, r=1, padding="same", padding_mode="circular"))
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(layers[0](x), layers[1](x))
    assert layers[0](x).shape == (1, 6, 5, 5)


# --- the start ---------------------------------------------------------------------------------


@each_layer
@pytest.mark.parametrize("r", [0, 1])
def test_fresh_layer_equals_the_plain_one_bit_for_bit(name, r):
    _, sizes, options, plain_class, x = LAYERS[name]
    own = {"enable_lora", "fan_in_fan_out"}
    torch.manual_seed(7)
    layer = build(name, r=r)
    torch.manual_seed(7)
    plain = plain_class(*sizes, **{k: v for k, v in options.items() if k not in own})
    if options.get("fan_in_fan_out"):
        # The same numbers in the same memory, which the other shape reads in another order.
        assert torch.equal(layer.weight.flatten(), plain.weight.flatten())
        expected = F.linear(x, layer.weight.T, plain.bias)
    else:
        assert torch.equal(layer.weight, plain.weight)
        expected = plain(x)
    assert torch.equal(layer(x), expected)


@each_layer
def test_rank_zero_has_plain_keys_and_trains(name):
    layer = build(name, r=0)
    plain = {"weight"} if name == "embedding" else {"weight", "bias"}
    assert set(layer.state_dict()) == plain
    assert layer.weight.requires_grad
    before = layer.weight
    assert layer.eval().weight is before
    assert not layer.merged


@pytest.mark.parametrize("enable", [{}, {"enable_lora": [False] * 3}])
def test_merged_linear_with_no_part_enabled_is_a_plain_linear(enable):
    layer = lora.MergedLinear(8, 24, r=2, **enable)
    x = torch.randn(2, 8)
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x), F.linear(x, layer.weight, layer.bias))
    assert set(layer.state_dict()) == {"weight", "bias"}


@each_layer
def test_start_is_zero_product_and_both_get_a_gradient(name):
    layer = build(name)
    zero, drawn = layer.lora_B, layer.lora_A
    if name == "embedding":
        zero, drawn = drawn, zero
    else:
        bound = 1 / math.sqrt(drawn[0].numel())  # kaiming_uniform with a = sqrt(5)
        assert drawn.abs().max() <= bound
    assert not zero.any()
    assert drawn.any()
    assert drawn.std() > 0
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(input_of(name)).pow(2).sum().backward()
        optimizer.step()
    assert layer.lora_A.grad.any()
    assert layer.lora_B.grad.any()
    assert layer.weight.grad is None


@each_layer
def test_layers_start_apart_and_the_seed_decides(name):
    torch.manual_seed(0)
    first, second = build(name), build(name)
    torch.manual_seed(0)
    again = build(name)
    drawn = "lora_B" if name == "embedding" else "lora_A"
    assert not torch.equal(getattr(first, drawn), getattr(second, drawn))
    assert torch.equal(getattr(first, drawn), getattr(again, drawn))


@each_layer
@pytest.mark.parametrize("merged", [False, True])
def test_reset_starts_afresh(name, merged):
    layer = trained(name).train(not merged)
    base = layer.base_weight
    before = base.clone()
    layer.reset_parameters()
    assert layer.base_weight is base
    assert not torch.equal(base, before)
    with torch.no_grad():
        torch.testing.assert_close(layer(input_of(name)), frozen_output(layer, input_of(name)))


@pytest.mark.parametrize("kind", [lora.Linear, lora.MergedLinear])
def test_reset_of_fan_in_first_weights_uses_the_fan_in(kind):
    layer = kind(4, 400, r=2, fan_in_fan_out=True)
    layer.reset_parameters()
    for parameter in (layer.weight, layer.bias):
        assert 0.45 < parameter.abs().max() <= 0.5  # 1 / sqrt(4)


def test_given_embedding_table_is_kept():
    table = torch.randn(5, 3)
    assert torch.equal(lora.Embedding(5, 3, r=1, _weight=table.clone()).weight, table)
    assert torch.equal(lora.Embedding.from_pretrained(table).weight, table)


# --- settings that make no sense ---------------------------------------------------------------


@each_layer
@pytest.mark.parametrize("r", [-1, 1.5, "4"])
def test_bad_rank_is_refused_with_its_value(name, r):
    with pytest.raises(ValueError, match=f"{r}"):
        build(name, r=r)


@pytest.mark.parametrize("alpha", [0, -1, math.inf, math.nan])
def test_bad_alpha_is_refused_with_its_value(alpha):
    with pytest.raises(ValueError, match=str(alpha)):
        lora.Linear(4, 4, r=1, lora_alpha=alpha)


@pytest.mark.parametrize("p", [-0.1, 1.0, 2, math.nan])
def test_bad_dropout_is_refused_with_its_value(p):
    with pytest.raises(ValueError, match=str(p)):
        lora.Conv1d(4, 4, 1, r=1, lora_dropout=p)


@pytest.mark.parametrize(("out", "enable"), [(10, [True, False, True]), (6, [])])
def test_parts_that_do_not_divide_the_output_are_refused(out, enable):
    with pytest.raises(ValueError, match=f"out_features={out}"):
        lora.MergedLinear(4, out, r=1, enable_lora=enable)


def test_caller_keeps_its_own_enable_list():
    enable = [True, False]
    layer = lora.MergedLinear(4, 6, r=1, enable_lora=enable)
    enable[1] = True
    assert layer.enable_lora == [True, False]


def test_embedding_with_max_norm_and_adapter_is_refused():
    with pytest.raises(ValueError, match=r"max_norm=1.0"):
        lora.Embedding(10, 8, r=2, max_norm=1.0)
    plain = lora.Embedding(10, 8, max_norm=1.0)
    assert (plain(IDS.clamp(max=9)).norm(dim=-1) <= 1 + 1e-5).all()


def test_sparse_embedding_trains_its_adapter():
    layer = randomize(lora.Embedding(11, 7, r=2, sparse=True))
    dense = lora.Embedding(11, 7, r=2)
    dense.load_state_dict(layer.state_dict())
    for each in (layer, dense):
        each(IDS).pow(2).sum().backward()
    assert torch.equal(layer.lora_A.grad, dense.lora_A.grad)
    assert torch.equal(layer.lora_B.grad, dense.lora_B.grad)


def test_adapter_gets_no_gradient_at_the_padding_id():
    layer = randomize(lora.Embedding(11, 7, r=2, padding_idx=3))
    layer(IDS).sum().backward()
    assert not layer.lora_A.grad[:, 3].any()
    assert layer.lora_A.grad[:, 5].any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: lora.Linear(4, 4, r=64),
        lambda: lora.MergedLinear(4, 12, r=5, enable_lora=[True, False, False]),
        lambda: lora.Embedding(9, 3, r=4),
        lambda: lora.Conv2d(4, 8, 3, groups=4, r=2),
    ],
)
def test_rank_that_saves_nothing_warns(make):
    with pytest.warns(UserWarning, match=r"r=\d+ is above \d"):
        make()


def test_rank_up_to_the_smaller_side_does_not_warn():
    with warnings.catch_warnings(action="error"):
        lora.Linear(4, 6, r=4)
        lora.MergedLinear(8, 12, r=4, enable_lora=[True, False, True])
        for name in LAYERS:
            build(name)
        lora.MergedLinear(768, 2304, r=4, enable_lora=[True, False, True])


# --- dropout and dtypes ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "embedding"])
def test_dropout_touches_the_adapters_input_only(name):
    x = input_of(name)
    layer = trained(name, lora_dropout=0.5)
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    no_bias = torch.zeros_like(layer.bias)
    plain = trained(name)
    plain.load_state_dict(layer.state_dict())
    base = frozen_output(plain, x)
    with torch.no_grad():
        plain.bias.copy_(no_bias)
    update = plain(dropped) - frozen_output(plain, dropped)
    torch.testing.assert_close(out, base + update)
    torch.testing.assert_close(layer.eval()(x), base + plain(x) - frozen_output(plain, x))


@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
def test_output_has_the_base_dtype_whatever_the_adapters(name, dtype, adapter_dtype):
    layer = trained(name).to(dtype)
    if adapter_dtype:
        layer.lora_A.data = layer.lora_A.data.to(adapter_dtype)
        layer.lora_B.data = layer.lora_B.data.to(adapter_dtype)
    x = input_of(name, dtype)
    unmerged = layer(x)
    assert unmerged.dtype == dtype
    unmerged.float().sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_A.dtype
    with torch.no_grad():
        merged = layer.eval()(x)
    assert merged.dtype == layer.weight.dtype == dtype
    exact = trained(name).double()
    exact.load_state_dict(layer.state_dict())
    reference = exact(input_of(name, dtype).double() if name != "embedding" else x)
    tolerance = 8 * torch.finfo(dtype).eps * max(1.0, reference.abs().max().item())
    for out in (unmerged, merged):
        torch.testing.assert_close(out.double(), reference, atol=tolerance, rtol=0)


@each_layer
def test_autocast_trains_and_merges_in_full_precision(name):
    layer, x = trained(name), input_of(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).float().sum().backward()
        merged = layer.eval().weight
    assert layer.lora_A.grad.dtype == torch.float32
    assert layer.lora_A.grad.any()
    assert layer.train().eval().weight.equal(merged)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        unmerged, out = unmerged_output(layer, x), layer(x)
    torch.testing.assert_close(unmerged.float(), out.float(), atol=0.1, rtol=0.05)


def test_merged_linear_never_builds_the_dense_update_in_training():
    """The largest new tensor of forward and backward is the output, never (in, out)."""
    layer = lora.MergedLinear(256, 768, r=2, enable_lora=[True, False, True], fan_in_fan_out=True)
    x = torch.randn(1, 256, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        layer(x).sum().backward()
    dense = 256 * 768 * 4
    largest = max(abs(event.cpu_memory_usage) for event in profile.events())
    assert largest < dense / 10
