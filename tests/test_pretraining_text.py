"""Text to pretrain on: its form, its halves, and nothing of E2E or WebNLG in it."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InputError
from data.convert_e2e import e2e_rows
from data.convert_webnlg import webnlg_rows
from data.pack import packed
from data.pretraining_text import (
    dart_pairs,
    normalised,
    rnnlg_rows,
    sgd_rows,
    split,
    tokenised,
    without_e2e,
)
from data.rows import read_text

E2E = [{"context": "name : Aromi | area : riverside", "completion": "Aromi is by the river ."}]
# The text that the weights in data/mini were trained on.
SHA256 = {
    "train.jsonl": "57038401abbd4b5312c347d7ff59f50a7580eb7906541c662e024263b247f478",
    "valid.jsonl": "fa3cf23fab1dade63008aa25bd295956ba3d178509ab661a6f0a9f8075997cfe",
}
ROWS = st.builds(
    lambda context, completion: {"context": context, "completion": completion},
    st.text("abcd |:", max_size=6),
    st.text("abc .", max_size=4),
)


def frame(*actions: tuple[str, str, list[str]], service: str = "Restaurants_2") -> dict:
    named = [{"act": act, "slot": slot, "values": values} for act, slot, values in actions]
    return {"service": service, "actions": named}


def system(utterance: str, *frames: dict) -> dict:
    return {"speaker": "SYSTEM", "utterance": utterance, "frames": list(frames)}


def written(path: Path, value: object, head: str = "") -> Path:
    path.write_text(head + json.dumps(value), encoding="utf-8")
    return path


def test_a_system_turn_says_its_acts_its_domain_and_its_slots(tmp_path: Path) -> None:
    offer = frame(
        ("OFFER", "restaurant_name", ["Kawa Sushi"]),
        ("OFFER", "has_live_music", ["True"]),
        ("INFORM_COUNT", "count", ["3"]),
    )
    asks = frame(("REQUEST", "city", []), ("REQUEST", "price_range", ["cheap", "moderate"]))
    intent = frame(("OFFER_INTENT", "intent", ["ReserveRestaurant"]), service="RideSharing_1")
    empty = frame(("REQUEST", "city", []))
    user = {**system("No.", offer), "speaker": "USER"}
    turns = [
        system("There's Kawa Sushi, with live music.", offer),
        system("Where? Cheap, or moderate?", asks),
        system("Shall I book?", intent),
        system("Where?", empty),
        user,
    ]
    rows = list(sgd_rows(written(tmp_path / "d.json", [{"turns": turns}])))
    assert [(row["context"], row["completion"]) for row in rows] == [
        (
            "offer, inform count | domain : restaurants | name : Kawa Sushi | "
            "has live music : yes | count : 3",
            "There 's Kawa Sushi , with live music .",
        ),
        (
            "request | domain : restaurants | city : ? | price : cheap , moderate",
            "Where ? Cheap , or moderate ?",
        ),
        (
            "offer intent | domain : ride sharing | intent : reserve restaurant",
            "Shall I book ?",
        ),
    ]


def test_an_act_on_one_named_thing_is_written_as_e2e_writes_it(tmp_path: Path) -> None:
    entries = [
        [
            "inform(name='inn at the presidio';kidsallowed='yes';near=soma)",
            "inn at the presidio near soma allows child -s",
            "",
        ],
        ["?request(near)", "what area do i look in", ""],
        ["inform_count(type='hotel';count='9';hasinternet=dont_care)", "there are 9 hotel -s", ""],
        ["goodbye()", "goodbye", ""],
        ["inform(name='crios 93';ecorating=a)", "name crios 93 ecorating a", ""],
    ]  # fmt: skip
    path = written(tmp_path / "t.json", entries, head="# Copyright\n")
    assert [(row["context"], row["completion"]) for row in rnnlg_rows(path, "hotel")] == [
        (
            "name : Inn at the Presidio | Type : hotel | kids allowed : yes | near : Soma",
            "Inn at the Presidio near Soma allows children .",
        ),
        ("request | domain : hotel | near : ?", "What area do I look in ?"),
        (
            "inform count | domain : hotel | Type : hotel | count : 9 | has internet : any",
            "There are 9 hotels .",
        ),
    ]


def test_triples_of_one_subject_are_slots_and_e2e_and_webnlg_are_left_out(tmp_path: Path) -> None:
    def entry(source: str, *triples: list[str]) -> dict:
        return {"tripleset": triples, "annotations": [{"source": source, "text": "A fact."}]}

    one, two = ["Mars Hill", "JOINED", "1973"], ["Mars Hill", "NO_OF_STUDENTS", "9"]
    entries = [
        entry("WikiSQL_lily", one, two),
        entry("WikiSQL_lily", one, ["1973", "SEASON", "a"]),
        entry("e2e", one),
        entry("webnlg", one),
        entry("WebNLG", one),
    ]
    rows = list(dart_pairs(written(tmp_path / "d.json", entries)))
    assert [row["context"] for row in rows] == [
        "name : Mars Hill | joined : 1973 | no of students : 9",
        "Mars Hill : joined : 1973 | 1973 : season : a",
    ]
    assert {row["completion"] for row in rows} == {"A fact ."}


@pytest.mark.parametrize("content", [{"a": 1}, [[1]], [{"turns": [{}]}], "text", [["f(", "x", ""]]])
def test_a_file_of_another_form_is_named(tmp_path: Path, content: object) -> None:
    path = written(tmp_path / "other.json", content)
    for rows in (sgd_rows(path), rnnlg_rows(path, "tv")):
        with pytest.raises(InputError, match="other.json: not a file of"):
            list(rows)


@given(st.text())
def test_tokenising_moves_no_word_and_is_done_once(text: str) -> None:
    assert normalised(tokenised(text)) == normalised(text)
    assert tokenised(tokenised(text)) == tokenised(text)


def test_tokens_are_those_of_the_e2e_release(shared: Path) -> None:
    raw = read_text(shared / "data/e2e/devset.csv.gz").splitlines()
    texts = [record[1] for record in csv.reader(raw[1:])]
    released = [row["completion"] for row in e2e_rows(str(shared / "data/e2e/valid.txt"))]
    equal = sum(
        tokenised(text) == " ".join(release.split())
        for text, release in zip(texts, released, strict=True)
    )
    assert (equal, len(texts)) == (4_498, 4_672)  # most others have a price such as £20-25


@given(st.lists(ROWS, max_size=40))
def test_no_input_and_no_text_is_on_both_sides_of_the_split(rows: list[dict]) -> None:
    train, valid = split(rows)
    for side in ("context", "completion"):
        known = {normalised(row[side]) for row in train}
        assert not known & {normalised(row[side]) for row in valid}
    lost = [row for row in rows if row not in train and row not in valid]
    assert {normalised(r["completion"]) for r in lost} <= {
        normalised(r["completion"]) for r in train
    }


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=12), max_size=300))
def test_every_pair_is_whole_in_one_packed_row(pairs: list[list[int]]) -> None:
    numbered = [[1000 + number, *pair] for number, pair in enumerate(pairs)]
    found = []
    for row in packed(numbered, 20):
        assert len(row) <= 20
        starts = [place for place, token in enumerate(row) if token >= 1000] + [len(row)]
        found += [row[a:b] for a, b in zip(starts, starts[1:], strict=False)]
        assert starts[0] == 0
    assert sorted(found) == numbered


def test_e2e_is_left_out_in_any_spelling() -> None:
    rows = [
        {"context": "Name : AROMI | Area : Riverside", "completion": "Other words."},
        {"context": "a : b : c", "completion": "Aromi is by the river."},
        {"context": "a : b : c", "completion": "..."},
        {"context": "a : b : c", "completion": "Aromi is by the sea."},
        {"context": "a : b : c", "completion": "Aromi is by the sea."},
    ]
    assert list(without_e2e(rows, E2E)) == [rows[3]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real text, made once; skips where the raw files are not at hand."""
    data = ROOT.parent / "shared" / "data"
    if not data.is_dir():
        pytest.skip(f"{data} is not there: the real SGD, RNNLG, DART and E2E are needed")
    folder = tmp_path_factory.mktemp("text")
    subprocess.run(
        [sys.executable, "-m", "data.pretraining_text", folder],
        check=True, cwd=ROOT, env={**os.environ, "DATA_DIR": str(data)},
    )  # fmt: skip
    return folder


def sides(folder: Path) -> list[str]:
    """Every input and every text of the made files, normalised."""
    rows = [json.loads(line) for path in folder.iterdir() for line in path.open(encoding="utf-8")]
    assert len(rows) == 110_623 + 542
    return [normalised(row[side]) for row in rows for side in ("context", "completion")]


def real_e2e(shared: Path) -> list[dict]:
    names = ("train.txt.gz", "valid.txt", "test.txt")
    rows = [row for name in names for row in e2e_rows(str(shared / "data/e2e" / name))]
    assert len(rows) == 42_061 + 4_672 + 4_693
    return rows


def test_the_text_is_the_one_the_shipped_base_learnt(made: Path) -> None:
    for name, expected in SHA256.items():
        assert hashlib.sha256((made / name).read_bytes()).hexdigest() == expected


def test_no_text_and_no_input_of_e2e_is_in_it(made: Path, shared: Path) -> None:
    e2e = {normalised(row[side]) for row in real_e2e(shared) for side in row}
    assert not e2e & set(sides(made))


def test_e2e_names_are_in_it_by_chance_alone(made: Path, shared: Path) -> None:
    facts = [part for row in real_e2e(shared) for part in row["context"].split(" | ")]
    pairs = [fact.split(" : ") for fact in facts]
    names = {value.strip() for slot, value in pairs if slot in ("name", "near")}
    assert len(names) == 52
    text = "\n".join(f" {side} " for side in sides(made))
    found = Counter({name: text.count(f" {normalised(name)} ") for name in names})
    assert {name for name in names if found[name]} == {"Avalon", "Giraffe", "Ranch", "The Phoenix"}


def test_no_text_and_no_input_of_webnlg_is_in_it(made: Path, shared: Path) -> None:
    webnlg = set()
    for split_name in ("train", "dev", "test"):
        path = shared / "data/webnlg" / f"{split_name}.json.gz"
        for row in webnlg_rows(str(path)):
            webnlg |= {normalised(row["context"]), normalised(row["completion"])}
    assert len(webnlg) > 30_000
    assert not webnlg & set(sides(made))
