"""The one spelling of an adapter's settings, and the original constructor that makes it."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import loralib as lora
from model import GPT2Config, GPT2LMModel

SIZES = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}


@given(r=st.integers(1, 10**6), alpha=st.floats(1e-6, 1e6), rslora=st.booleans())
def test_scaling_is_alpha_over_r_or_over_its_root_as_the_layers_have_it(
    r: int, alpha: float, rslora: bool
) -> None:
    config = lora.LoraConfig(r, alpha, rslora=rslora)
    assert config.scaling == alpha / (math.sqrt(r) if rslora else r)
    layer = lora.Linear(8, 8, r=min(r, 8), lora_alpha=alpha, use_rslora=rslora)
    assert layer.scaling == lora.LoraConfig(min(r, 8), alpha, rslora=rslora).scaling


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 0}, "r=0"),
        ({"r": -1}, "r=-1"),
        ({"r": True}, "r=True"),
        ({"r": 2.0}, "r=2.0"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"alpha": 10**400}, "alpha=1000"),
        ({"alpha": "32"}, "alpha='32'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": None}, "dropout=None"),
        ({"kind": "vera"}, "'vera'"),
        ({"kind": ["lora"]}, "'lora'"),
        ({"targets": "qv"}, "'qv'"),
        ({"targets": ["q", 1]}, "1"),
        ({"targets": 5}, "5"),
        ({"targets": ()}, "at least one"),
        ({"targets": ("q", "q")}, "distinct"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_with_their_values(
    settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lora.LoraConfig(**settings)


def test_targets_of_json_are_equal_to_those_of_flags_and_nothing_can_be_changed() -> None:
    config = lora.LoraConfig(targets=["q", "v"])
    assert config == lora.LoraConfig() and hash(config) == hash(lora.LoraConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 8


def test_the_original_constructor_makes_the_one_config() -> None:
    config = GPT2Config(**SIZES, lora_attn_dim=2, lora_attn_alpha=16, lora_dropout=0.25)
    assert config == GPT2Config(**SIZES, lora=lora.LoraConfig(2, 16, 0.25))
    layer = GPT2LMModel(config).transformer.h[0].attn.c_attn
    assert (layer.r, layer.scaling, layer.lora_dropout.p) == (2, 8.0, 0.25)
    assert layer.enable_lora == [True, False, True]
    assert GPT2Config(**SIZES).lora is None
    for old_name in ("lora_attn_dim", "lora_attn_alpha", "lora_dropout"):
        assert not hasattr(config, old_name)
    with pytest.raises(ValueError, match="not both"):
        GPT2Config(lora_attn_dim=2, lora=lora.LoraConfig())
