"""Slot errors and coverage. Oracles: the counts that the official script gives for each output of
four systems, the cleaned data of E2E, and sentences that state a meaning slot by slot."""

import csv
import gzip
import io
import json
import re
import time
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InputError
from eval import coverage
from eval.measure import Unscored
from eval.slots import (
    COUNTS,
    NAMES,
    PLACES,
    counts_of,
    parse_meaning,
    slot_error_rate,
    slot_errors,
    stated_meaning,
)

SYSTEMS = [f"{name}.run0" for name in ("clean_tgen-minus", "orig_tgen-minus", "orig_tgen-plus")]
SYSTEMS += ["orig_tgen-std.run0"]

VALUES = {
    "name": sorted(set(NAMES) - set(PLACES)),
    "eatType": ["coffee shop", "pub", "restaurant"],
    "food": ["Chinese", "English", "Fast food", "French", "Indian", "Italian", "Japanese"],
    "priceRange": ["cheap", "moderate", "high", "less than £20", "£20-25", "more than £30"],
    "customer rating": ["low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5"],
    "area": ["city centre", "riverside"],
    "familyFriendly": ["yes", "no"],
    "near": PLACES,
}
SENTENCES = {
    "name": "It is called {}.",
    "eatType": "It is a {}.",
    "food": "You can have {} food.",
    "priceRange": "It is in the {} price range.",
    "customer rating": "It has a {} customer rating.",
    "area": "It is in the {}.",
    "near": "You find it near {}.",
}
meanings = st.fixed_dictionaries(
    {}, optional={slot: st.sampled_from(values) for slot, values in VALUES.items()}
).filter(bool)


def sentence(slot: str, value: str) -> str:
    if slot == "familyFriendly":
        return "It is family friendly." if value == "yes" else "It is not family friendly."
    return SENTENCES[slot].format(value)


def written(meaning: dict[str, str]) -> str:
    return ", ".join(f"{slot}[{value}]" for slot, value in meaning.items())


def counts(mr: str, text: str) -> tuple[int, ...]:
    return slot_errors([mr], [text])[0][:5]


def golden(shared: Path) -> Path:
    return shared / "data" / "metrics_golden" / "e2e_ser"


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def official_counts(path: Path) -> list[tuple[int, ...]]:
    return [tuple(map(int, line.split("\t"))) for line in lines(path)[1:]]


def human_references(shared: Path) -> list[tuple[str, str]]:
    """MR and text of the test set, grouped by MR in the order of the golden MRs."""
    with gzip.open(shared / "data/e2e/testset_w_refs.csv.gz", "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(io.StringIO(file.read(), newline="")))
    place = {mr: i for i, mr in enumerate(lines(golden(shared) / "mrs.txt"))}
    return sorted(((row["mr"], row["ref"]) for row in rows), key=lambda pair: place[pair[0]])


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_output_has_the_official_counts(shared: Path, system: str) -> None:
    mrs = lines(golden(shared) / "mrs.txt")
    ours = slot_errors(mrs, lines(golden(shared) / f"hyp_{system}.txt"))
    assert [item[:5] for item in ours] == official_counts(golden(shared) / f"items_{system}.tsv")
    expected = json.loads((golden(shared) / "expected.json").read_text(encoding="utf-8"))[system]
    assert slot_error_rate(ours).score() == pytest.approx(expected["SER"], abs=1e-12)
    assert counts_of(slot_error_rate(ours)) == {name: expected[name] for name in COUNTS}


def test_the_human_references_have_nearly_the_official_counts(shared: Path) -> None:
    ours = slot_errors(*zip(*human_references(shared), strict=True))
    theirs = official_counts(golden(shared) / "items_human_test_references.tsv")
    assert sum(a[:3] == b[:3] for a, b in zip(ours, theirs, strict=True)) >= 0.965 * len(theirs)
    assert sum(item.repeated for item in ours) == 37  # the official script counts none of these
    official = json.loads((golden(shared) / "expected.json").read_text(encoding="utf-8"))
    rate = official["human_test_references"]["SER"]
    assert slot_error_rate(ours).score() == pytest.approx(rate, abs=0.004)


def test_tokenised_texts_and_contexts_have_the_counts_of_the_raw_ones(shared: Path) -> None:
    with gzip.open(shared / "data/e2e/testset_w_refs.csv.gz", "rt", encoding="utf-8") as file:
        raw = [(row["mr"], row["ref"]) for row in csv.DictReader(file)]
    released = [line.split("||") for line in lines(shared / "data/e2e/test.txt")]
    assert slot_errors(*zip(*raw, strict=True)) == slot_errors(*zip(*released, strict=True))


def test_the_samples_texts_are_true() -> None:
    rows = [json.loads(line) for line in lines(ROOT / "data/sample/test.jsonl")]
    contexts, texts = ([row[side] for row in rows] for side in ("context", "completion"))
    assert slot_error_rate(slot_errors(contexts, texts)).score() == 0
    assert coverage.coverage(contexts, texts).score() == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Aromi is a family friendly pub by the river.", (0, 0, 0, 0, 4)),
        ("Aromi is a pub by the river.", (0, 1, 0, 0, 4)),
        ("Aromi is a pub by the river and not family friendly.", (0, 0, 1, 0, 4)),
        (
            "Aromi, a family friendly pub by the river, serves Thai and French food.",
            (1, 0, 0, 0, 4),
        ),
        ("Aromi is a family friendly pub by the river in the city centre.", (1, 0, 0, 0, 4)),
        ("Aromi is a pub by the river. It is kid friendly and kid friendly.", (0, 0, 0, 1, 4)),
        ("Clowns is a family friendly pub by the river.", (0, 0, 1, 0, 4)),
        ("emptyoutput", (0, 4, 0, 0, 4)),
    ],
)
def test_errors_are_counted_by_kind(text: str, expected: tuple[int, ...]) -> None:
    assert (
        counts("name[Aromi], eatType[pub], area[riverside], familyFriendly[yes]", text) == expected
    )


@pytest.mark.parametrize(
    ("text", "slot", "value"),
    [
        ("They do not allow children.", "familyFriendly", "no"),
        ("It isn 't really kid - friendly.", "familyFriendly", "no"),
        ("It is not only good but family friendly.", "familyFriendly", "yes"),
        ("Meals are £20-£25.", "priceRange", "£20-25"),
        ("Prices are moderate.", "priceRange", "moderate"),
        ("It is inexpensive.", "priceRange", "cheap"),
        ("Customers rate it low.", "customer rating", "1 out of 5"),
        ("It has five stars.", "customer rating", "high"),
        ("It is near Cafe Sicilia.", "near", "Café Sicilia"),
    ],
)
def test_a_value_is_known_in_many_words(text: str, slot: str, value: str) -> None:
    assert counts(f"{slot}[{value}]", text)[:3] == (0, 0, 0)


def test_a_name_states_nothing_else() -> None:
    assert counts("near[Raja Indian Cuisine]", "It is near Raja Indian Cuisine.") == (0, 0, 0, 0, 1)
    assert counts("name[The French Café]", "The French Café is open.") == (0, 0, 0, 0, 1)


def test_the_fields_name_the_slots() -> None:
    text = "Aromi is a French pub near Avalon. You find it near Avalon."
    item = slot_errors(["name[Aromi], area[riverside], eatType[restaurant], near[Avalon]"], [text])[
        0
    ]
    assert (item.added_slots, item.missing_slots) == (("food",), ("area",))
    assert (item.wrong_slots, item.repeated_slots) == (("eatType",), ("near",))
    assert item.errors == 4


@settings(deadline=None)
@given(meanings, st.text(max_size=200))
def test_any_text_has_counts_that_add_up(meaning: dict[str, str], text: str) -> None:
    item = slot_errors([written(meaning)], [text])[0]
    assert item.missing + item.wrong <= item.slots == len(meaning)
    assert min(item[:4]) >= 0
    assert item[:4] == tuple(map(len, item[5:]))


@settings(deadline=None)
@given(meanings, st.data())
def test_each_sentence_mends_the_slot_that_it_states(meaning: dict[str, str], data) -> None:
    mr, slots = written(meaning), list(meaning.items())
    order = data.draw(st.permutations(slots))
    stated = data.draw(st.integers(0, len(slots)))
    texts = [sentence(*pair) for pair in order]
    assert counts(mr, " ".join(texts[:stated])) == (0, len(slots) - stated, 0, 0, len(slots))
    if stated < len(slots):
        assert counts(mr, " ".join(texts[: stated + 1]))[1] == len(slots) - stated - 1


@settings(deadline=None)
@given(meanings, meanings, st.data())
def test_the_order_of_sentences_does_not_matter(meaning, said, data) -> None:
    texts = [sentence(*pair) for pair in said.items()]
    shuffled = data.draw(st.permutations(texts))
    assert counts(written(meaning), " ".join(texts)) == counts(written(meaning), " ".join(shuffled))


@settings(deadline=None)
@given(meanings, meanings)
def test_what_one_meaning_adds_the_other_lacks(meaning, said) -> None:
    text = " ".join(sentence(*pair) for pair in said.items())
    item = slot_errors([written(meaning)], [text])[0]
    assert set(item.missing_slots) == meaning.keys() - said.keys()
    assert set(item.added_slots) == said.keys() - meaning.keys()


@settings(deadline=None)
@given(meanings)
def test_the_stated_meaning_is_the_one_that_was_written(meaning: dict[str, str]) -> None:
    text = " ".join(sentence(*pair) for pair in meaning.items())
    ours = stated_meaning(list(meaning.items()), text)
    assert dict(ours) == meaning
    assert slot_error_rate(slot_errors([written(dict(ours))], [text])).score() == 0


def test_long_texts_take_linear_time() -> None:
    parts = (
        "not ",
        "price ",
        "rated ",
        "a",
        "n't",
        "£ 20 ",
        "kids ",
        " - ",
        "[",
        " : ",
        "prices a ",
    )
    start = time.perf_counter()
    for part in parts:
        slot_errors(["name[Aromi], area[riverside]"], [part * (200_000 // len(part))])
        with pytest.raises(InputError):
            parse_meaning(part * (200_000 // len(part)))
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "mr", ["", "Aromi", "name[]", "name[Aromi], pub", "name : Aromi | pub", "]["]
)
def test_an_mr_of_another_form_is_quoted(mr: str) -> None:
    with pytest.raises(InputError, match=re.escape(repr(mr)) + " is not of the form"):
        slot_errors([mr], ["Aromi"])


def test_unequal_numbers_of_texts_are_named() -> None:
    with pytest.raises(InputError, match="2 texts for 1 MRs"):
        slot_errors(["name[Aromi]"], ["a", "b"])


@pytest.mark.parametrize(
    ("context", "values"),
    [
        ("name : Aromi | Type : pub | family friendly : no", ["Aromi", "pub"]),
        (
            "Abilene : country : United_States | Abilene : mayor : Ann",
            ["Abilene", "United_States", "Ann"],
        ),
        ("[TABLECONTEXT] : title : Tower | Tower : year : 1982", ["Tower", "1982"]),
        ("name[Aromi], familyFriendly[yes], near[Avalon]", ["Aromi", "Avalon"]),
        ("Say hello to the world", []),
        ("[x]", []),
    ],
)
def test_values_are_taken_from_slots_and_triples(context: str, values: list[str]) -> None:
    assert coverage.values(context) == values


def test_coverage_counts_values_whose_words_are_all_said() -> None:
    contexts = [
        "name : Café Roma | price : £ 20 - 25",
        "a : b : Washington,_D.C.",
        "no values here",
    ]
    texts = ["The CAFE Roma charges £20-25.", "a is in Washington.", "anything"]
    assert coverage.missing_values(contexts[1], texts[1]) == ["Washington,_D.C."]
    measure = coverage.coverage(contexts, texts)
    assert measure.score() == 3 / 4
    assert measure.segments() == [1, 1 / 2, 1]


def test_distinct_n_and_length_ratio_are_those_of_their_definitions() -> None:
    texts = ["a b a b", "a c"]
    assert coverage.distinct(texts, 1) == 3 / 6
    assert coverage.distinct(texts, 2) == 3 / 4
    assert coverage.distinct([""], 2) == 0
    assert coverage.length_ratio([["a b c", "a"], ["x y"]], texts) == 6 / 4


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(max_size=40), st.text(max_size=40)), min_size=1, max_size=4))
def test_coverage_takes_any_text(pairs: list[tuple[str, str]]) -> None:
    contexts, texts = zip(*pairs, strict=True)
    if any(map(coverage.values, contexts)):
        assert 0 <= coverage.coverage(contexts, texts).score() <= 1
        assert coverage.coverage(contexts, contexts).score() == 1
    else:
        with pytest.raises(Unscored, match="no input has values"):
            coverage.coverage(contexts, texts)
    assert 0 <= coverage.distinct(texts, 1) <= 1
