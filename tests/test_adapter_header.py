"""The header of an adapter file: written and read back equal, and every bad field refused."""

import copy
import hashlib
import json
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import FUZZ, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoints
from checkpoints import AdapterHeader, Base, Vocabulary
from common.errors import InputError
from data_utils import load_tokenizer
from loralib import KINDS, LoraConfig
from methods import BOTTLENECKS, BottleneckConfig, PrefixConfig
from model import LORA_TARGETS

NANO = ROOT / "data" / "nano"
TARGETS = st.lists(st.sampled_from(list(LORA_TARGETS)), min_size=1, unique=True).map(tuple)
COUNTS = st.integers(0, 2**63 - 1)
NAMES = st.text(max_size=20)
PLAIN = st.none() | st.booleans() | COUNTS | st.floats(-1e30, 1e30) | NAMES
CONFIGS = st.builds(
    LoraConfig,
    r=st.integers(1, 4096),
    alpha=st.floats(1e-6, 1e6) | st.integers(1, 1000),
    dropout=st.floats(0, 0.99),
    targets=TARGETS,
    kind=st.sampled_from(list(KINDS)),
    rslora=st.booleans(),
)
COMMON = {
    "base": st.builds(Base, st.none() | NAMES, st.none() | NAMES),
    "model_card": NAMES,
    "vocabulary": st.none() | st.builds(Vocabulary, st.integers(1, 10**6), NAMES),
    "step": COUNTS,
    "seed": st.none() | COUNTS,
    "train_data": st.none() | NAMES,
    "settings": st.none() | st.dictionaries(NAMES, PLAIN, max_size=4),
}
HEADERS = st.builds(AdapterHeader, lora=CONFIGS, **COMMON) | st.builds(
    AdapterHeader,
    lora=st.none(),
    method=st.sampled_from(["full", "top", "bias", "top2"]),
    **COMMON | {"settings": st.none()},
)
for kind in BOTTLENECKS:
    config = st.builds(BottleneckConfig, dim=st.integers(1, 2**16), kind=st.just(kind))
    HEADERS |= st.builds(
        AdapterHeader, lora=st.none(), method=st.just(kind), bottleneck=config, **COMMON
    )
PREFIXES = st.builds(PrefixConfig, length=st.integers(1, 2**16))
HEADERS |= st.builds(
    AdapterHeader, lora=st.none(), method=st.just("prefix"), prefix=PREFIXES, **COMMON
)


@settings(max_examples=200 * FUZZ, deadline=None)
@given(HEADERS)
def test_a_header_comes_back_equal_and_is_written_the_same_again(header: AdapterHeader) -> None:
    text = header.to_json()
    read = AdapterHeader.from_json(text, "--adapter a")
    assert read == header
    assert read.to_json() == text
    assert json.loads(text) == header.to_fields()


FIELDS = {
    "format": 1, "kind": "lora", "model_card": "gpt2.sm", "r": 4, "alpha": 32.0, "dropout": 0.1,
    "rslora": False, "targets": ["q", "v"], "vocabulary": {"size": 9, "sha256": "0"},
    "base": {"name": "base", "fingerprint": "0"}, "step": 3, "seed": 1, "train_data": "0",
    "settings": {"lr": 0.1, "obj": "clm"},
}  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": None}, "no good format"),
        ({"format": "1"}, "no good format"),
        ({"format": True}, "no good format"),
        ({"format": 2}, "format 2, this program reads 1"),
        ({"model_card": None}, "no good model_card"),
        ({"kind": "x"}, "kind 'x' is none of lora, dora"),
        ({"r": 0}, "r=0"),
        ({"r": -1}, "no good r .*from 0 to 65536"),
        ({"r": 10**9}, "no good r "),
        ({"r": 2.0}, "no good r "),
        ({"alpha": 0}, "lora_alpha=0"),
        ({"alpha": -1}, "no good alpha"),
        ({"alpha": float("nan")}, "no good alpha"),
        ({"alpha": 10**400}, "no good alpha"),
        ({"alpha": "8"}, "no good alpha"),
        ({"dropout": 1}, "lora_dropout=1"),
        ({"rslora": 1}, "no good rslora"),
        ({"targets": 5}, "no good targets"),
        ({"targets": "qv"}, "no good targets"),
        ({"targets": [1]}, "no good targets"),
        ({"targets": ["x"]}, "target 'x' is none of q, k, v"),
        ({"targets": ["q", "q"]}, "targets must be distinct"),
        ({"targets": []}, "at least one"),
        ({"vocabulary": 5}, "no good vocabulary"),
        ({"vocabulary": {"size": 0, "sha256": ""}}, "no good vocabulary size"),
        ({"vocabulary": {"size": 5}}, "no good vocabulary sha256"),
        ({"base": 5}, "no good base"),
        ({"base": {"name": 5}}, "no good base name"),
        ({"step": -1}, "no good step"),
        ({"seed": "1"}, "no good seed"),
        ({"train_data": 1}, "no good train_data"),
        ({"settings": 1}, "no good settings"),
        ({"settings": {"lr": [1]}}, "no good settings .*lr"),
        ({"settings": {"global_batch": 10**30}}, "no good settings .*global_batch"),
        ({"kind": "adapter_l"}, "no good dim"),
        ({"kind": "adapter_l", "dim": 0}, "no good dim .*from 1 to 65536"),
        ({"kind": "adapter_h", "dim": 10**9}, "no good dim .*from 1 to 65536"),
        ({"kind": "adapter_h", "dim": True}, "no good dim"),
        ({"kind": "adapter_h", "dim": "8"}, "no good dim"),
        ({"kind": "prefix"}, "no good prefix_length"),
        ({"kind": "prefix", "prefix_length": 0}, "no good prefix_length .*from 1 to 65536"),
        ({"kind": "prefix", "prefix_length": 2.0}, "no good prefix_length"),
        ({"kind": "prefix", "prefix_length": 10**9}, "no good prefix_length .*from 1 to 65536"),
    ],
    ids=str,
)
def test_a_field_of_another_type_or_out_of_bounds_is_named(change: dict, message: str) -> None:
    AdapterHeader.from_json(json.dumps(FIELDS), "--adapter a")
    with pytest.raises(InputError, match=f"^--adapter a has .*{message}"):
        AdapterHeader.from_json(json.dumps(FIELDS | change), "--adapter a")


def mutated(value: object, draw: random.Random) -> object:
    """The value with one part somewhere in it left out, or of another type or size."""
    value = copy.deepcopy(value)
    if isinstance(value, dict | list) and value and draw.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = draw.choice(keys)
        if draw.random() < 0.2:
            del value[key]
        else:
            value[key] = mutated(value[key], draw)
        return value
    strange = [None, True, -1, 0, 5, 2.5, 10**9, 10**400, float("nan"), float("inf"), "", "x", [],
               {}, [[]], [None], {"x": 1}, "\ud800", "9" * 5000]  # fmt: skip
    return draw.choice(strange)


def test_whatever_a_header_holds_it_is_read_or_refused_in_one_sentence() -> None:
    refused = 0
    several = [
        FIELDS | {"kind": "prefix", "prefix_length": 5}, FIELDS,
        FIELDS | {"kind": "adapter_l", "dim": 6},
    ]  # fmt: skip
    for seed in range(1000 * FUZZ):
        text = json.dumps(mutated(several[seed % 3], random.Random(seed)))
        try:
            header = AdapterHeader.from_json(text, "--adapter a")
        except InputError as error:
            assert str(error).startswith("--adapter a has") and "\n" not in str(error)
            assert len(str(error)) < 300
            refused += 1
        else:
            assert AdapterHeader.from_json(header.to_json(), "--adapter a") == header
    assert refused > 500 * FUZZ


@pytest.mark.parametrize("text", [None, "", "{", "[" * 100_000, '{"r": ' + "9" * 5000 + "}"])
def test_a_file_without_a_header_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "model.1.safetensors"
    metadata = None if text is None else {"adapter": text}
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata)
    with pytest.raises(InputError, match="model.1.safetensors has no adapter header"):
        checkpoints.read_adapter(path)


def test_a_header_that_is_no_object_is_refused() -> None:
    for text in ("[]", "1", "null", '"x"'):
        with pytest.raises(InputError, match="no good format"):
            AdapterHeader.from_json(text, "--adapter a")


def test_a_vocabulary_with_half_its_merges_is_another_and_old_fingerprints_are_known(
    tmp_path: Path,
) -> None:
    whole = load_tokenizer(NANO)
    lines = (NANO / "merges.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "vocab.json").write_bytes((NANO / "vocab.json").read_bytes())
    (tmp_path / "merges.txt").write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
    half = load_tokenizer(tmp_path)
    assert whole.encode("The Green Owl").ids != half.encode("The Green Owl").ids
    vocabulary = Vocabulary.of(whole)
    assert vocabulary.is_of(whole) and not vocabulary.is_of(half)
    entries = json.dumps(whole.get_vocab(), sort_keys=True)  # as headers were first written
    old = Vocabulary(2048, hashlib.sha256(entries.encode()).hexdigest())
    assert old.is_of(whole) and old != vocabulary
    header = AdapterHeader(LoraConfig(), Base("nano"), vocabulary=vocabulary)
    base = checkpoints.read_base(NANO)
    checkpoints.check_vocabulary(whole, "nano", base, header)
    with pytest.raises(InputError, match="--vocab half is not the one that --adapter was trained"):
        checkpoints.check_vocabulary(half, "half", base, header)
