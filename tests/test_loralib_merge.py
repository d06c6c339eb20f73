"""Merging: the base is never touched, nothing shows a stale sum, nothing is lost on the way."""

import copy
import io
import pickle
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_loralib import (
    LAYERS,
    build,
    each_layer,
    input_of,
    randomize,
    trained,
    unmerged_output,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import loralib as lora

# These tests look at what state_dict() of a merged layer holds, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:state_dict of a merged layer")

each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16]
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def update_of(name: str, layer: nn.Module) -> torch.Tensor:
    """W - W0 as PyPI's formulas give it, in fp64."""
    a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    if name.startswith("merged"):
        rows = iter(
            b_i @ a_i for a_i, b_i in zip(a.split(layer.r), b.split(layer.part), strict=True)
        )
        zero = torch.zeros(layer.part, layer.in_features, dtype=torch.float64)
        product = torch.cat([next(rows) if on else zero for on in layer.enable_lora])
    else:
        product = b @ a
    if name == "embedding" or getattr(layer, "fan_in_fan_out", False):
        product = product.T
    return layer.scaling * product.reshape(layer.weight.shape)


def plain_layer(name: str, weight: torch.Tensor, layer: nn.Module) -> nn.Module:
    """torch's own layer with this weight and the bias of `layer`."""
    _, sizes, options, plain_class, _ = LAYERS[name]
    own = {"enable_lora", "fan_in_fan_out"}
    plain = plain_class(*sizes, **{k: v for k, v in options.items() if k not in own})
    plain.weight.data = (weight.T if options.get("fan_in_fan_out") else weight).float()
    if name != "embedding":
        plain.bias.data = layer.bias.data
    return plain.requires_grad_(False)


def no_grad_output(layer: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return layer(input_of(name))


# --- merging and unmerging ---------------------------------------------------------------------


@each_layer
@each_dtype
def test_parent_eval_merges_and_train_restores_the_base_bit_for_bit(name, dtype):
    layer = trained(name).to(dtype)
    parent, base, before = nn.Sequential(layer), layer.weight, layer.weight.detach().clone()
    parent.eval()
    assert layer.merged is True
    rounding = torch.finfo(dtype).eps if dtype.itemsize < 8 else 1e-12
    expected = before.double() + update_of(name, layer)
    torch.testing.assert_close(layer.weight.double(), expected, atol=rounding, rtol=rounding)
    if dtype.itemsize == 2:
        assert torch.equal(layer.weight, expected.to(dtype))  # rounded once
    parent.train()
    assert layer.merged is False
    assert layer.weight is base
    assert torch.equal(base, before)


@each_layer
def test_merging_and_unmerging_are_idempotent(name):
    layer = trained(name).eval()
    merged = layer.weight.clone()
    assert torch.equal(layer.eval().weight, merged)
    layer.merge()
    assert torch.equal(layer.weight, merged)
    base = layer.train().weight
    assert layer.train().weight is base
    layer.unmerge()
    assert layer.weight is base


@each_layer
def test_train_and_eval_return_the_layer(name):
    layer = build(name)
    assert layer.eval() is layer
    assert layer.train() is layer
    assert layer.to(torch.float64) is layer


@each_layer
def test_merge_weights_false_keeps_eval_unmerged_and_manual_merge_ends_in_train(name):
    layer = trained(name, merge_weights=False).eval()
    assert not layer.merged
    layer.merge()
    assert layer.eval().merged
    assert not layer.train().merged


OPERATIONS = {
    "eval": lambda layer: layer.eval(),
    "train": lambda layer: layer.train(),
    "merge": lambda layer: layer.merge(),
    "unmerge": lambda layer: layer.unmerge(),
    "edit": randomize,
    "copy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "reload": lambda layer: layer.load_state_dict(layer.state_dict()) and layer,
    "assign": lambda layer: (
        layer.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}, assign=True)
        and layer
    ),
    "widen": lambda layer: layer.double().float(),
    "rescale": lambda layer: setattr(layer, "scaling", layer.scaling * 2) or layer,
}


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(list(LAYERS)),
    operations=st.lists(st.sampled_from(list(OPERATIONS)), max_size=8),
    number=st.integers(0, 99),
)
def test_whatever_happens_the_base_stays_and_the_output_is_current(name, operations, number):
    torch.manual_seed(number)
    layer = trained(name)
    before = layer.weight.detach().clone()
    for operation in operations:
        layer = OPERATIONS[operation](layer) or layer
        assert torch.equal(layer.base_weight, before)
        assert torch.equal(layer.state_dict()["weight"], before)
        expected = plain_layer(name, before + update_of(name, layer), layer)(input_of(name))
        torch.testing.assert_close(no_grad_output(layer, name), expected, atol=1e-4, rtol=1e-4)
    layer.train()
    assert torch.equal(layer.weight, before)


# --- what a merged layer shows to the rest of torch ----------------------------------------------


@each_layer
def test_parameters_of_a_merged_layer_are_the_same_objects(name):
    layer = trained(name)
    before, keys = dict(layer.named_parameters()), list(layer.state_dict())
    layer.eval()
    after = dict(layer.named_parameters())
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    assert list(layer.state_dict()) == keys
    assert len(list(layer.parameters())) == len(before)


@each_layer
def test_state_dict_of_a_merged_layer_is_unmerged(name):
    layer = trained(name).eval()
    fresh = build(name)
    fresh.load_state_dict(layer.state_dict())
    expected = no_grad_output(layer, name)
    for mode in (True, False):
        actual = no_grad_output(fresh.train(mode), name)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@each_layer
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("part", ["all", "base", "adapter"])
def test_loading_into_a_merged_layer_is_right_at_once(name, assign, part):
    source, target = trained(name), trained(name).eval()
    state = {
        key: value.clone()
        for key, value in source.state_dict().items()
        if part == "all" or ("lora_" in key) == (part == "adapter")
    }
    target.load_state_dict(state, strict=False, assign=assign)
    assert target.merged
    merged = target.weight.clone()
    assert torch.equal(target.eval().weight, merged)
    if part == "all":
        assert torch.equal(source.eval().weight, merged)


@each_layer
@each_dtype
def test_merged_layer_survives_a_change_of_dtype(name, dtype):
    layer = trained(name).eval()
    moved = copy.deepcopy(layer).to(dtype)
    unmerged_first = layer.train().to(dtype)
    assert moved.merged
    assert moved.weight.dtype == dtype
    assert torch.equal(moved.train().weight, unmerged_first.weight)
    assert torch.equal(moved.eval().weight, unmerged_first.eval().weight)


@each_layer
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_copies_and_pickles_hold_the_same_layer(name, merged, p):
    layer = trained(name, **({} if name == "embedding" else {"lora_dropout": p}))
    layer.train(not merged)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    )
    for other in copies:
        assert other.merged is merged
        assert torch.equal(other.weight, layer.weight)
        assert torch.equal(other.train().weight, layer.base_weight)
        randomize(other)
        assert not torch.equal(other.lora_B, layer.lora_B)
        update = update_of(name, other)
        expected = plain_layer(name, other.base_weight.detach() + update, other)(input_of(name))
        merged_output = no_grad_output(other.eval(), name)
        torch.testing.assert_close(merged_output, expected, atol=1e-5, rtol=1e-4)
    stale = randomize(layer.eval())
    expected = copy.deepcopy(stale)
    with torch.no_grad():
        torch.testing.assert_close(expected(input_of(name)), unmerged_output(stale, input_of(name)))


def test_base_shared_with_another_module_is_never_written():
    embedding = trained("embedding")
    head = nn.Linear(7, 11, bias=False)
    head.weight = embedding.weight
    before = head.weight.detach().clone()
    embedding.eval()
    no_grad_output(embedding, "embedding")
    assert torch.equal(head.weight, before)
    assert head.weight is embedding.train().weight


def test_base_replaced_while_merged_is_taken_up():
    layer = trained("linear").eval()
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    torch.testing.assert_close(
        no_grad_output(layer, "linear"), unmerged_output(layer, input_of("linear"))
    )
    assert not layer.train().weight.any()


def test_layer_built_on_the_meta_device_loads_and_merges():
    expected = nn.Sequential(trained("merged_linear"), trained("embedding"))
    state = expected.state_dict()
    with torch.device("meta"):
        models = [nn.Sequential(build("merged_linear"), build("embedding")) for _ in range(2)]
    models[0].to_empty(device="cpu")
    models[0].load_state_dict(state)
    base = {key: value for key, value in state.items() if "lora_" not in key}
    adapter = {key: value for key, value in state.items() if "lora_" in key}
    for part in (base, adapter):
        models[1].eval().load_state_dict(part, strict=False, assign=True)
    for model in models:
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        for i, name in enumerate(("merged_linear", "embedding")):
            right = no_grad_output(expected[i].eval(), name)
            torch.testing.assert_close(no_grad_output(model[i], name), right)
            torch.testing.assert_close(no_grad_output(model.eval()[i], name), right)


def test_layer_built_under_inference_mode_works_merged():
    with torch.inference_mode():
        layer = trained("linear").eval()
        torch.testing.assert_close(
            layer(input_of("linear")), unmerged_output(layer, input_of("linear"))
        )


# --- edits and training while merged -------------------------------------------------------------


@each_layer
@pytest.mark.parametrize("edited", ["lora_A", "lora_B", "base_weight"])
def test_edit_while_merged_shows_in_the_next_output(name, edited):
    layer = trained(name).eval()
    before = no_grad_output(layer, name)
    with torch.no_grad():
        getattr(layer, edited).add_(1)
    after = no_grad_output(layer, name)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, no_grad_output(layer.train(), name), atol=1e-4, rtol=1e-4)


def test_edit_through_data_shows_after_the_next_eval():
    layer = trained("linear").eval()
    layer.lora_B.data.add_(1)
    after = no_grad_output(layer.eval(), "linear")
    torch.testing.assert_close(after, no_grad_output(layer.train(), "linear"))


@each_layer
def test_training_step_in_eval_mode_trains_both_matrices(name):
    layer = trained(name).eval()
    base = layer.base_weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(input_of(name)).pow(2).sum().backward()
    assert layer.lora_A.grad.any()
    assert layer.lora_B.grad.any()
    optimizer.step()
    after = no_grad_output(layer, name)
    assert torch.equal(layer.train().weight, base)
    torch.testing.assert_close(after, no_grad_output(layer, name), atol=1e-4, rtol=1e-4)


@each_layer
def test_checkpointing_leaves_the_gradients_as_they_are(name):
    layer, x = trained(name), input_of(name)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        run(x).pow(2).sum().backward()
        gradients.append((layer.lora_A.grad.clone(), layer.lora_B.grad.clone()))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_functional_call_on_a_merged_layer_uses_the_given_tensors():
    layer, other = trained("linear").eval(), trained("linear").eval()
    x = input_of("linear")
    with torch.no_grad():
        given = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
        torch.testing.assert_close(given, other(x))
        torch.testing.assert_close(layer(x), unmerged_output(layer, x))


def test_compiled_layer_follows_an_edit_while_merged():
    layer, x = trained("merged_linear"), input_of("merged_linear")
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled.eval()
    assert layer.merged
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
        randomize(layer)
        torch.testing.assert_close(compiled(x), layer(x))
    assert isinstance(lora.lora_state_dict(compiled), dict)


# --- weights to deploy ---------------------------------------------------------------------------


@each_layer
@pytest.mark.parametrize("merged", [False, True])
def test_merged_state_dict_makes_the_plain_layer_compute_what_the_adapted_one_does(name, merged):
    model = nn.Sequential(trained(name)).train(not merged)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = lora.merged_state_dict(model)
    _, sizes, options, plain_class, _ = LAYERS[name]
    own = {"enable_lora", "fan_in_fan_out"}
    plain = nn.Sequential(plain_class(*sizes, **{k: v for k, v in options.items() if k not in own}))
    if options.get("fan_in_fan_out"):
        state["0.weight"] = state["0.weight"].T
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(input_of(name)), model(input_of(name)), atol=1e-5, rtol=1e-5)
    assert model[0].merged is merged
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_merged_state_dict_is_that_of_pypi_in_eval_mode_and_has_the_bare_models_names():
    inner = nn.ModuleDict({"a": trained("merged_linear"), "b": nn.BatchNorm1d(3)})
    inner["c"] = inner["a"]  # one layer under two names
    state = lora.merged_state_dict(torch.compile(inner, backend="eager"))
    assert list(state) == [key for key in inner.state_dict() if "lora_" not in key]
    merged = inner["a"].weight.double() + update_of("merged_linear", inner["a"])
    for key in ("a.weight", "c.weight"):
        torch.testing.assert_close(state[key].double(), merged)
    assert state["b.running_mean"].data_ptr() == inner["b"].running_mean.data_ptr()


def test_state_dict_of_a_merged_layer_warns_and_names_what_to_call():
    model = nn.Sequential(trained("linear"), trained("embedding"))
    with warnings.catch_warnings(action="error"):
        model.state_dict()
        model.eval()
        lora.merged_state_dict(model)
        lora.lora_state_dict(model)
        copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"loralib\.merged_state_dict") as caught:
        model.state_dict()
    assert {warning.message.args for warning in caught} == {caught[0].message.args}
    with warnings.catch_warnings(record=True) as shown:  # by Python's own rule, once a process
        warnings.simplefilter("default")
        for _ in range(3):
            model.state_dict()
    assert len(shown) == 1
