"""The sample set and the nano base: made anew byte for byte, disjoint, truthful, of known words."""

import json
import re
from collections import Counter
from functools import cache
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from common.errors import InputError
from common.files import read_json_lines
from data.domains import BASE, POOLS, RESTAURANTS, Domain
from data.generate import generate, realise, rows, spell
from data.train_bpe import END, ENTRIES, train_bpe, write_vocabulary
from data_utils import load_tokenizer
from gpt2_ft import build_parser

ROOT = Path(__file__).resolve().parents[1]
SAMPLE, NANO = ROOT / "data/sample", ROOT / "data/nano"
FILES = ("train", "valid", "test", "base_test")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything the generator makes, in sample/ and base/."""
    folder = tmp_path_factory.mktemp("made")
    generate(folder / "sample", folder / "base")
    return folder


@pytest.fixture(scope="module")
def texts(made: Path) -> dict[str, list[dict]]:
    """Rows by file: sample/train, sample/valid, ..., base/valid."""
    return {
        f"{path.parent.name}/{path.stem}": read_json_lines(path) for path in made.glob("*/*.jsonl")
    }


def words(sample: list[dict]) -> set[str]:
    return {
        word
        for row in sample
        for word in re.findall(r"\w+", f"{row['context']} {row['completion']}".lower())
    }


def slots(context: str) -> dict[str, str]:
    return dict(part.split(" : ", 1) for part in context.split(" | "))


@pytest.mark.parametrize("name", FILES)
def test_the_generator_gives_the_committed_sample_byte_for_byte(made: Path, name: str) -> None:
    committed = SAMPLE / f"{name}.jsonl"
    assert committed.read_bytes() == (made / "sample" / committed.name).read_bytes()


def test_the_seed_alone_decides() -> None:
    def few(seed: int) -> list[dict]:
        return list(rows([RESTAURANTS], 5, 2, set(), Random(seed)))

    assert few(1) == few(1) != few(2)


def test_no_context_is_in_two_files(texts: dict[str, list[dict]]) -> None:
    assert len(texts) == 6
    seen = Counter(c for file in texts.values() for c in {row["context"] for row in file})
    assert max(seen.values()) == 1


def test_every_restaurant_word_occurs_in_the_text_of_the_base(texts: dict[str, list[dict]]) -> None:
    known = words(texts["base/train"])
    for name in FILES:
        assert words(texts[f"sample/{name}"]) <= known, name


def test_the_base_knows_no_slot_of_the_restaurants() -> None:
    assert not set(RESTAURANTS.slots) & {slot for domain in BASE for slot in domain.slots}


def test_test_inputs_have_several_references_and_none_twice(texts: dict[str, list[dict]]) -> None:
    for name in ("sample/test", "sample/base_test"):
        counts = Counter(row["context"] for row in texts[name])
        assert 40 <= len(counts) <= 60
        assert sum(counts.values()) / len(counts) >= 3, name
        assert max(counts.values()) <= 8
    for name, file in texts.items():
        assert len({(row["context"], row["completion"]) for row in file}) == len(file), name


def said(domain: Domain, slot: str, value: str) -> list[str]:
    """The ways in which a text may say the value, by brute force over its wording's choices."""
    forms = [domain.wording.get(slot, {}).get(value, value)]
    if match := re.fullmatch(r"\((.*)\)", forms[0]):
        forms = match[1].split("|")
    return [form.lower() for form in forms]


def test_every_text_says_every_value_of_its_context(texts: dict[str, list[dict]]) -> None:
    domains = {next(iter(domain.slots)): domain for domain in (*BASE, RESTAURANTS)}
    for file in texts.values():
        for row in file:
            values = slots(row["context"])
            domain = domains[next(iter(values))]
            text = row["completion"].lower()
            for slot, value in values.items():
                assert any(form in text for form in said(domain, slot, value)), (slot, row)
            slips = r"[][{}|()]|  | [.,]|^[a-z]|[.] [a-z]|\ba ([aeiou8]|11|18)"
            assert not re.search(slips, row["completion"]), row


@pytest.mark.parametrize("domain", [*BASE, RESTAURANTS], ids=lambda d: next(iter(d.slots)))
def test_a_domain_can_say_any_choice_of_its_slots(domain: Domain) -> None:
    rng = Random(0)
    name, *others = domain.slots
    for count in range(domain.fewest, domain.most + 1):
        for chosen in combinations(others, count):
            if set(domain.always) <= set(chosen):
                values = {slot: spell(domain.slots[slot], rng) for slot in (name, *chosen)}
                assert values[name] in realise(domain, values, rng)


def test_every_pool_is_used() -> None:
    used = {
        pool
        for domain in (*BASE, RESTAURANTS)
        for form in domain.slots.values()
        for pool in re.findall(r"\{(\w+)\}", form)
    }
    assert used == set(POOLS)


def test_training_again_gives_the_committed_vocabulary(made: Path, tmp_path: Path) -> None:
    text = read_json_lines(made / "base/train.jsonl")
    write_vocabulary(tmp_path, *train_bpe(f"{r['context']} {r['completion']}" for r in text))
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (NANO / name).read_bytes(), name


def test_the_end_of_text_has_the_last_of_2048_ids() -> None:
    vocabulary = json.loads((NANO / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(ENTRIES)) == list(range(2048))
    assert vocabulary[END] == ENTRIES - 1


def test_too_little_text_for_a_vocabulary_is_an_error() -> None:
    with pytest.raises(InputError, match="use more text"):
        train_bpe(["a few words"])
    with pytest.raises(InputError, match="--entries 10 must be at least 257"):
        train_bpe(["a few words"], 10)


@settings(max_examples=50)
@given(st.text())
def test_the_vocabulary_encodes_any_text_as_transformers_does(text: str) -> None:
    tokenizer = load_tokenizer(NANO)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert ids == peer_tokenizer()(text)["input_ids"]


@cache
def peer_tokenizer() -> GPT2TokenizerFast:
    return GPT2TokenizerFast(str(NANO / "vocab.json"), str(NANO / "merges.txt"))


def test_sample_rows_are_short_and_need_no_bytes() -> None:
    tokenizer = load_tokenizer(NANO)
    sample = read_json_lines(SAMPLE / "train.jsonl")
    lengths = [
        len(tokenizer.encode(row["context"]).ids + tokenizer.encode(" " + row["completion"]).ids)
        for row in sample
    ]
    assert sum(lengths) / len(lengths) <= 70
    settings_file = json.loads((SAMPLE / "settings.json").read_text(encoding="utf-8"))
    assert max(lengths) + 2 <= settings_file["seq_len"]


def test_the_settings_are_flags_of_the_trainer_and_their_files_exist() -> None:
    given_settings = json.loads((SAMPLE / "settings.json").read_text(encoding="utf-8"))
    defaults = vars(build_parser().parse_args([]))
    assert set(given_settings) <= set(defaults)
    for name in ("train_data", "valid_data", "vocab", "init_checkpoint"):
        assert (ROOT / given_settings[name]).exists(), name


def test_the_base_is_small_half_precision_and_loads_into_transformers() -> None:
    path = NANO / "model.safetensors"
    assert path.stat().st_size <= 8_000_000
    weights = safetensors.torch.load_file(path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    config = GPT2Config(
        vocab_size=2048, n_positions=512, n_embd=256, n_layer=4, n_head=4,
        bos_token_id=2047, eos_token_id=2047,
    )  # fmt: skip
    peer = GPT2LMHeadModel(config)
    missing, unexpected = peer.transformer.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == ([], [])
