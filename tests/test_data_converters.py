"""Raw E2E, WebNLG and DART become the published rows: counts, order, contexts, texts."""

import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InputError
from data.convert_dart import dart_rows
from data.convert_e2e import e2e_rows
from data.convert_webnlg import webnlg_rows
from data.rows import read_text, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
DART = "dart/dart-v1.1.1-full-"


def public(name: str) -> Path:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path}, a public raw file, is not here")
    return path


def contexts(rows: list[dict]) -> list[str]:
    return [row["context"] for row in rows]


# (rows, distinct contexts) as counted on the public files by their publishers or by the papers.
@pytest.mark.parametrize(
    ("rows_of", "name", "rows", "distinct"),
    [
        (e2e_rows, "e2e/train.txt.gz", 42_061, 4_862),
        (e2e_rows, "e2e/valid.txt", 4_672, 547),
        (e2e_rows, "e2e/test.txt", 4_693, 630),
        (webnlg_rows, "webnlg/train.json.gz", 18_025, 6_888),
        (webnlg_rows, "webnlg/dev.json.gz", 2_258, 870),
        (webnlg_rows, "webnlg/test.json.gz", 4_928, 1_862),
        (dart_rows, f"{DART}dev.json.gz", 6_980, 2_721),
        (dart_rows, f"{DART}test.json.gz", 12_551, 4_159),  # and one without a text
    ],
)
def test_every_published_row_is_there(
    rows_of: Callable, name: str, rows: int, distinct: int
) -> None:
    converted = list(rows_of(public(name)))
    assert (len(converted), len(set(contexts(converted)))) == (rows, distinct)


def test_e2e_test_rows_are_the_official_references_in_order() -> None:
    rows = list(e2e_rows(public("e2e/test.txt")))
    groups = [(context, list(group)) for context, group in groupby(rows, lambda r: r["context"])]
    golden = public("metrics_golden/e2e_full/refs.txt").read_text(encoding="utf-8")
    wanted = [block.split("\n") for block in golden.strip("\n").split("\n\n")]
    assert [[row["completion"] for row in group] for _, group in groups] == wanted
    meanings = public("metrics_golden/e2e_full/mrs.txt").read_text(encoding="utf-8")
    assert [context for context, _ in groups] == meanings.splitlines()


@pytest.mark.parametrize(
    ("raw", "released"),
    [
        ("e2e/devset.csv.gz", "e2e/valid.txt"),
        ("e2e/testset_w_refs.csv.gz", "e2e/test.txt"),
    ],
)
def test_the_csv_form_of_e2e_gives_the_released_contexts_row_by_row(
    raw: str, released: str
) -> None:
    from_csv = list(e2e_rows(public(raw)))
    assert contexts(from_csv) == contexts(list(e2e_rows(public(released))))
    with gzip.open(public(raw), "rt", encoding="utf-8", newline="") as file:
        references = [record["ref"].strip() for record in csv.DictReader(file)]
    assert [row["completion"] for row in from_csv] == references


def letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text.lower())


def test_webnlg_groups_hold_the_golden_references() -> None:
    """The golden files are lower-cased and tokenised: letters and digits are compared. Each item
    there has its references but for the one that serves as output."""
    folder = public("metrics_golden/webnlg_small/references/reference0").parent
    files = [(folder / f"reference{i}").read_text("utf-8").splitlines() for i in range(6)]
    items = [{letters(text) for text in texts} for texts in zip(*files, strict=True)]
    groups: dict[str, set[str]] = {}
    for row in webnlg_rows(public("webnlg/dev.json.gz")):
        groups.setdefault(row["context"], set()).add(letters(row["completion"]))
    assert len(items) == 100
    for item in items:
        assert any(item <= group for group in groups.values()), item


def test_webnlg_says_which_categories_training_has_seen() -> None:
    rows = list(webnlg_rows(public("webnlg/test.json.gz")))
    entries = {(row["context"], row["seen"]) for row in rows}
    assert sum(seen for _, seen in entries) == 971
    assert len(entries) - 971 == 891
    train = {row["category"] for row in webnlg_rows(public("webnlg/train.json.gz"))}
    assert {row["category"] for row in rows if row["seen"]} <= train
    assert not {row["category"] for row in rows if not row["seen"]} & train


def webnlg_entry(number: int, comment: str = "good") -> dict:
    triples = [
        {"subject": "Aarhus_Airport", "property": "cityServed", "object": '"Aarhus, Denmark"'},
        {"subject": "Aarhus", "property": "leaderName", "object": "Jørgen"},
    ]
    texts = [{"comment": comment, "lex": " Aarhus."}, {"comment": "good", "lex": "Århus!"}]
    return {
        str(number): {"category": "Comet", "modifiedtripleset": triples, "lexicalisations": texts}
    }


def test_webnlg_joins_triples_and_keeps_good_texts_untouched(tmp_path: Path) -> None:
    raw = tmp_path / "raw.json"
    entries = [webnlg_entry(1, "toFix"), webnlg_entry(2)]
    raw.write_text(json.dumps({"entries": entries}), encoding="utf-8")
    rows = list(webnlg_rows(raw))
    assert [row["completion"] for row in rows] == ["Århus!", " Aarhus.", "Århus!"]
    context = 'Aarhus_Airport : cityServed : "Aarhus, Denmark" | Aarhus : leaderName : Jørgen'
    assert rows[0] == {
        "context": context, "completion": "Århus!", "category": "Comet", "seen": False,
    }  # fmt: skip


def test_dart_lowers_relations_alone_and_leaves_empty_texts_out(tmp_path: Path) -> None:
    raw = tmp_path / "raw.json"
    entry = {
        "tripleset": [["Mars Hill", "JOINED", "1973"], ["[TABLECONTEXT]", "[TITLE]", "Schools"]],
        "annotations": [{"source": "x", "text": ""}, {"source": "y", "text": "It joined.\t"}],
    }
    raw.write_text(json.dumps([entry, {**entry, "annotations": []}]), encoding="utf-8")
    context = "Mars Hill : joined : 1973 | [TABLECONTEXT] : [title] : Schools"
    assert list(dart_rows(raw)) == [
        {"context": context, "completion": "It joined.\t", "source": "y"},
    ]


@pytest.mark.parametrize(
    ("rows_of", "text", "message"),
    [
        (e2e_rows, "a : b||c\nd : e\n", r"raw, line 2: no '\|\|'"),
        (e2e_rows, 'mr,ref\n"name[A]",x\nname A,y\n', "raw, line 3: 'name A' is not of the form"),
        (e2e_rows, "MR\nname[A]\n", "raw, line 1: expected the columns mr,ref"),
        (e2e_rows, "mr,ref,fixed,orig_mr\nname[A],x,0\n", "raw, line 2: expected mr,ref,fixed"),
        (e2e_rows, "mr,ref\n" + "a" * 200_000 + ",x\n", "raw, line 2: not CSV .*field larger"),
        (webnlg_rows, '{"entries": [\n{,}]}', "raw, line 2: not JSON"),
        (webnlg_rows, "[]", "raw: expected an object with a list 'entries'"),
        (webnlg_rows, json.dumps({"entries": [webnlg_entry(1), webnlg_entry(3)]}), "raw, entry 2"),
        (webnlg_rows, '{"entries": [7]}', "raw, entry 1"),
        (dart_rows, "{}", "raw: expected a list of entries"),
        (dart_rows, '[{"tripleset": [["a", "B"]], "annotations": []}]', "raw, entry 1"),
        (dart_rows, '[{"tripleset": []}]', "raw, entry 1: .*annotations"),
    ],
)
def test_bad_input_is_named_by_file_and_place(
    rows_of: Callable, text: str, message: str, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    raw.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        list(rows_of(raw))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a : b||c\nd : \xff||e\n", "raw, line 2: not UTF-8"),
        (gzip.compress(b"a : b||c\n" * 99, mtime=0)[:-9], "raw cannot be read"),
        (None, "raw cannot be read"),
    ],
)
def test_an_unreadable_file_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    if content is not None:
        raw.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(e2e_rows(raw))


@pytest.mark.parametrize("content", ["name : A||b\n", 'mr,ref\n"name[A]",b\n'])
def test_a_byte_order_mark_is_no_part_of_the_first_context(content: str, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert list(e2e_rows(raw)) == [{"context": "name : A", "completion": "b"}]
    raw.write_bytes(b"\xef\xbb\xbf" + json.dumps([]).encode())
    assert list(dart_rows(raw)) == []


@pytest.mark.parametrize("content", ["[" * 100_000, "[" + "9" * 5000 + "]", '{"a": 1, "a": 2}'])
def test_json_that_cannot_be_held_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "raw").write_text(content, encoding="utf-8")
    for rows_of in (webnlg_rows, dart_rows):
        with pytest.raises(InputError, match="raw, line 1: not JSON"):
            list(rows_of(tmp_path / "raw"))


@settings(max_examples=30)
@given(st.text())
def test_text_reads_the_same_plain_and_gzipped(tmp_path_factory, text: str) -> None:
    folder = tmp_path_factory.mktemp("raw")
    content = text.encode("utf-8", "surrogatepass")
    (folder / "plain").write_bytes(b"-" + content)
    (folder / "packed").write_bytes(gzip.compress(b"-" + content))
    try:
        expected = "-" + content.decode("utf-8")
    except UnicodeDecodeError:
        for name in ("plain", "packed"):
            with pytest.raises(InputError, match="not UTF-8"):
                read_text(folder / name)
    else:
        assert read_text(folder / "plain") == read_text(folder / "packed") == expected


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.text("abc £|:-[]", min_size=1).filter(
                lambda s: "||" not in s and s == s.strip("| ")
            ),
            st.text("abc £|:-[],é").filter(lambda s: s == s.strip()),
        ).filter(lambda pair: pair[0].strip()),
        min_size=1,
        max_size=5,
    )
)
def test_e2e_lines_are_split_at_the_first_double_bar(tmp_path_factory, pairs: list) -> None:
    raw = tmp_path_factory.mktemp("raw") / "raw"
    lines = "".join(f"{context}||{completion} \n" for context, completion in pairs)
    raw.write_text(lines, encoding="utf-8")
    assert [(row["context"], row["completion"]) for row in e2e_rows(raw)] == pairs


def test_an_error_half_way_leaves_the_old_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "rows.jsonl"
    target.write_text("old", encoding="utf-8")

    def rows():
        yield {"context": "a"}
        raise InputError("broken")

    with pytest.raises(InputError, match="broken"):
        write_jsonl(target, rows())
    assert target.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]


def run_script(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments, cwd=ROOT, env={**os.environ, **environment}, capture_output=True,
        encoding="utf-8",
    )  # fmt: skip


def test_output_bytes_do_not_depend_on_the_locale(tmp_path: Path) -> None:
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps({"entries": [webnlg_entry(1)]}, ensure_ascii=False), "utf-8")
    outputs = []
    for name, environment in (
        ("utf8", {"PYTHONUTF8": "1"}),
        ("c", {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}),
    ):
        command = sys.executable, "-m", "data.convert_webnlg", raw, tmp_path / name
        done = run_script(*command, **environment)
        assert done.returncode == 0, done.stderr
        outputs.append((tmp_path / name).read_bytes())
    assert outputs[0] == outputs[1]
    assert "Jørgen".encode() in outputs[0]


@pytest.mark.parametrize("task", ["e2e", "webnlg", "dart"])
def test_a_converter_ends_with_one_sentence_and_code_2(task: str, tmp_path: Path) -> None:
    done = run_script(
        sys.executable, "-m", f"data.convert_{task}", tmp_path / "none", tmp_path / "out"
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'none'} cannot be read: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_create_datasets_converts_what_data_dir_holds(tmp_path: Path) -> None:
    """In a copy of the few files it needs, so that this checkout's datasets/ stays as it is."""
    for name in ("scripts/create_datasets.sh", "common", "data"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    raw = tmp_path / "raw" / "webnlg"
    raw.mkdir(parents=True)
    for name in ("train", "dev", "test"):
        packed = io.BytesIO(json.dumps({"entries": [webnlg_entry(1)]}).encode())
        (raw / f"{name}.json.gz").write_bytes(gzip.compress(packed.getvalue()))
    command = "bash", tmp_path / "scripts/create_datasets.sh"
    done = run_script(*command, "webnlg", DATA_DIR=str(tmp_path / "raw"), PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    made = sorted(path.name for path in (tmp_path / "datasets/webnlg").iterdir())
    assert made == ["test.jsonl", "train.jsonl", "valid.jsonl"]
    offline = {"https_proxy": "http://127.0.0.1:1", "MIRROR": ""}
    done = run_script(*command, "dart", DATA_DIR=str(tmp_path), PYTHON=sys.executable, **offline)
    assert done.returncode == 2
    assert "put it at data_raw/dart/dart-v1.1.1-full-" in done.stderr
    assert run_script(*command, "wiki").returncode == 2
