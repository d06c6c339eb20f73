"""From data rows, predictions and official files to items with references and one output each."""

import gzip
import json
import re

import pytest
from conftest import write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InputError
from eval import official, texts
from eval.texts import Item

line = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


def row(context: str, completion: str, **more) -> dict:
    return {"context": context, "completion": completion, **more}


def predicted(*outputs: str) -> list[dict]:
    return [{"id": i, "text": text} for i, text in enumerate(outputs)]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (" An inn . <|endoftext|> more", "An inn ."),
        ("An inn.\n\nAnother text", "An inn."),
        ("An inn\nby the\r\nriver", "An inn by the river"),
        ("\n\nAn inn", ""),
        ("<|endoftext|>", ""),
        ("Double  spaces stay", "Double  spaces stay"),
    ],
)
def test_a_text_ends_at_its_end_mark_or_a_blank_line(text, want):
    assert texts.clean(text) == want


def test_webnlg_texts_are_lower_cased_and_spaced_around_non_words():
    got = texts.prepare("The A.S. Roma_1 (Rome)  has 1,500 members.<|endoftext|>", "webnlg")
    assert got == "the a . s . roma_1 ( rome ) has 1 , 500 members ."
    assert texts.prepare("The Inn.", "e2e") == "The Inn."


@given(line)
def test_a_prepared_text_is_one_line_and_stays_as_it_is(text):
    for task in ("e2e", "webnlg"):
        once = texts.prepare(text, task)
        assert once.splitlines() in ([], [once])
        assert texts.prepare(once, task) == once


def test_references_are_grouped_by_context_in_order_of_first_appearance():
    rows = [row("b", " one"), row("a", "two"), row("b", "one"), row("a", "three", seen=True)]
    assert texts.group(rows, "e2e") == [
        Item("b", ["one", "one"], 0),
        Item("a", ["two", "three"], 1),
    ]


def test_an_item_has_the_output_and_the_flag_of_its_first_row():
    rows = [row("a", "x", seen=False), row("b", "y", seen=True), row("a", "z", seen=True)]
    items = texts.group(rows, "e2e")
    assert [item.seen for item in items] == [False, True]
    assert texts.outputs(items, predicted("first", "second", "third"), "e2e") == ["first", "second"]


def test_empty_references_are_left_out_with_a_warning(capsys):
    rows = [row("a", "\n\nlost"), row("a", "kept"), row("b", "<|endoftext|>")]
    assert texts.group(rows, "e2e") == [Item("a", ["kept"], 0)]
    warnings = capsys.readouterr().err
    assert "2 empty references left out (rows 0, 2)" in warnings
    assert "1 items without any reference left out (rows 2)" in warnings


def test_an_empty_output_gets_a_visible_stand_in(capsys):
    items = [Item("a", ["x"], 0), Item("b", ["y"], 1)]
    got = texts.outputs(items, predicted("<|endoftext|>", "fine"), "webnlg")
    assert got == ["emptyoutput", "fine"]
    assert "1 empty outputs" in capsys.readouterr().err


def test_missing_predictions_are_named(tmp_path):
    rows = [row("c", "x")] * 4
    path = write_rows(tmp_path / "p.jsonl", [predicted("", "", "", "")[i] for i in (0, 2)])
    with pytest.raises(InputError, match="no prediction for ids 1, 3"):
        texts.read_predictions(path, rows)


def test_predictions_of_other_data_are_refused(tmp_path):
    rows = [row("name : A", "x"), row("name : B", "y")]
    good = [{"id": 1, "text": "b", "context": "name : B"}, {"id": 0, "text": "a"}]
    path = write_rows(tmp_path / "p.jsonl", good)
    assert [p["text"] for p in texts.read_predictions(path, rows)] == ["a", "b"]
    for bad, ids in (({"id": 7, "text": "c"}, 7), ({"id": 1, "text": "b", "context": "C"}, 1)):
        others = [p for p in good if p["id"] != bad["id"]]
        path = write_rows(tmp_path / "p.jsonl", [*others, bad])
        with pytest.raises(InputError, match=f"ids {ids} are not of these data"):
            texts.read_predictions(path, rows)
    path = write_rows(tmp_path / "p.jsonl", [*good, good[0]])
    with pytest.raises(InputError, match="id 1 occurs twice"):
        texts.read_predictions(path, rows)


def test_bad_rows_are_named_by_file_and_line(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [row("a", "x"), {"context": "b"}])
    with pytest.raises(InputError, match=r"d.jsonl, line 2: there is no 'completion'"):
        texts.read_data(path)
    path = write_rows(tmp_path / "d.jsonl", [row("a", "x"), row("b", 5)])
    with pytest.raises(InputError, match="line 2: completion is neither a text nor a list"):
        texts.read_data(path)
    path = write_rows(tmp_path / "d.jsonl", [row([5], [6])])
    with pytest.raises(InputError, match="--vocab DIR"):
        texts.read_data(path)


def test_encoded_rows_are_decoded_with_the_vocabulary(tmp_path):
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "\u0120": 3, "\u0120b": 4}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n\u0120 b\n", encoding="utf-8")
    path = write_rows(tmp_path / "d.jsonl", [row([1, 2], [4, 1, 0])])
    items = texts.group(texts.read_data(path, str(tmp_path)), "e2e")
    assert items == [Item("ab", ["ba"], 0)]
    path = write_rows(tmp_path / "d.jsonl", [row([1, 9], [4])])
    with pytest.raises(InputError, match="token id 9 is not among the 5"):
        texts.read_data(path, str(tmp_path))


def test_the_first_references_are_kept_on_request():
    items = [Item("a", ["1", "2", "3"], 0, True), Item("b", ["4"], 1)]
    want = [Item("a", ["1", "2"], 0, True), Item("b", ["4"], 1)]
    assert texts.limit_references(items, 2) == want


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.lists(line, min_size=1, max_size=3), line), min_size=1, max_size=5))
def test_written_files_are_read_back_item_by_item(tmp_path_factory, groups):
    folder = tmp_path_factory.mktemp("files")
    rows = [row(str(i), text) for i, (references, _) in enumerate(groups) for text in references]
    for task in ("e2e", "webnlg"):
        items = texts.group(rows, task)
        if not items:
            continue
        predictions = predicted(*(groups[int(r["context"])][1] for r in rows))
        outputs = texts.outputs(items, predictions, task)
        official.write_hypotheses(folder / "hyp", outputs)
        assert official.read_hypotheses(folder / "hyp") == outputs
        stem = folder / task
        official.write_references(stem, items, task)
        if task == "e2e":
            read = official.read_e2e_references(stem, 0)
        else:
            read = official.read_webnlg_references(str(stem))
        assert len(read) == len(items)
        for got, item in zip(read, items, strict=True):
            assert set(got.references) == set(item.references)
        for path in folder.glob("webnlg*"):
            path.unlink()


def test_blank_lines_never_shift_items(tmp_path):
    path = tmp_path / "refs.txt"
    path.write_text("\n\na 1\na 2\n\n\n\nb 1\n \n\nc 1\n\n\n", encoding="utf-8")
    items = official.read_e2e_references(path, 3)
    assert [item.references for item in items] == [["a 1", "a 2"], ["b 1"], ["c 1"]]


def test_a_newline_at_the_end_is_no_item_and_an_empty_line_is_an_empty_output(tmp_path):
    path = tmp_path / "hyp.txt"
    for end in ("", "\n"):
        path.write_text(f"\none\u2028two\r\n\nla\rst{end}", encoding="utf-8", newline="")
        assert official.read_hypotheses(path) == ["", "one two", "", "la st"]


def test_a_reference_file_without_empty_lines_has_one_reference_an_item(tmp_path):
    path = tmp_path / "refs.txt"
    path.write_text("a\nb\nc\n", encoding="utf-8")
    assert [i.references for i in official.read_e2e_references(path, 3)] == [["a"], ["b"], ["c"]]
    assert [i.references for i in official.read_e2e_references(path, 1)] == [["a", "b", "c"]]


def test_webnlg_files_repeat_the_first_reference_where_one_is_missing(tmp_path):
    items = [Item("", ["a", "b", "c"]), Item("", ["d", "e"]), Item("", ["f"])]
    names = official.write_references(tmp_path / "reference", items, "webnlg")
    assert names == [str(tmp_path / f"reference{k}") for k in range(3)]
    columns = [open_lines(name) for name in names]
    assert columns == [["a", "d", "f"], ["b", "e", "f"], ["c", "d", "f"]]
    read = official.read_webnlg_references(str(tmp_path / "reference"))
    assert [item.references for item in read] == [item.references for item in items]


def open_lines(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return file.read().splitlines()


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "hyp.txt").write_bytes(b"\xef\xbb\xbfAn inn .\r\nA pub .\n")
    assert official.read_hypotheses(tmp_path / "hyp.txt") == ["An inn .", "A pub ."]


def test_files_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(InputError, match="no file .*none0"):
        official.read_webnlg_references(str(tmp_path / "none"))
    (tmp_path / "r0").write_text("a\nb\n", encoding="utf-8")
    (tmp_path / "r1").write_text("a\n", encoding="utf-8")
    with pytest.raises(InputError, match="r0 2, .*r1 1"):
        official.read_webnlg_references(str(tmp_path / "r"))
    items = [Item("", [text]) for text in ("one", "two", "three")]
    with pytest.raises(InputError, match="items 2 to 3 have none .*'two'"):
        official.check_counts(items, ["x"], "refs", "hyp")
    with pytest.raises(InputError, match="lines 4 to 5 belong to no item .*'w'"):
        official.check_counts(items, ["x", "y", "z", "w", "v"], "refs", "hyp")
    with pytest.raises(InputError, match="item 1 has no reference"):
        official.check_counts([Item("", [])], ["x"], "refs", "hyp")
    with pytest.raises(InputError, match="cannot be read"):
        official.read_hypotheses(tmp_path / "nowhere.txt")


def test_real_webnlg_texts_become_the_official_reference_files(shared):
    """The golden references are 100 inputs of WebNLG dev after the original's decode step."""
    data = shared / "data"
    with gzip.open(data / "webnlg" / "dev.json.gz", "rt", encoding="utf-8") as file:
        entries = json.load(file)["entries"]
    lexes = [lex for i, entry in enumerate(entries, 1) for lex in entry[str(i)]["lexicalisations"]]
    ours = {texts.prepare(lex["lex"], "webnlg") for lex in lexes if lex["comment"] == "good"}
    stem = str(data / "metrics_golden" / "webnlg_small" / "references" / "reference")
    items = official.read_webnlg_references(stem)
    assert len(items) == 100
    assert not {text for item in items for text in item.references} - ours


def test_real_e2e_rows_become_the_official_reference_file(shared):
    lines = (shared / "data" / "e2e" / "test.txt").read_text(encoding="utf-8").splitlines()
    items = texts.group([row(*text.split("||")) for text in lines], "e2e")
    want = shared / "data" / "metrics_golden" / "e2e_full" / "refs.txt"
    read = official.read_e2e_references(want, 630)
    assert [item.references for item in items] == [item.references for item in read]
    blocks = re.split("\n\n", want.read_text(encoding="utf-8").rstrip("\n"))
    assert len(blocks) == len(items) == 630
