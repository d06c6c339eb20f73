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
from eval.texts import Item, Prediction, Row

line = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


def row(context: str, completion: str, seen: bool | None = None) -> Row:
    return Row(context, completion, context, seen)


def predicted(*outputs: str) -> list[Prediction]:
    return [Prediction(text) for text in outputs]


def sides(context: object, completion: object) -> dict:
    """A row as a data file has it."""
    return {"context": context, "completion": completion}


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
    assert texts.clean(text, "e2e") == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (" An inn . <|endoftext|>", "An inn ."),
        ("An inn.\n\nBy the river", "An inn. By the river"),
        ("Write <|endoftext|> last<|endoftext|>", "Write <|endoftext|> last"),
    ],
)
def test_a_text_of_other_data_is_kept_whole_but_for_the_mark_that_closes_it(text, want):
    assert texts.clean(text, "own") == want


def test_webnlg_texts_are_lower_cased_and_spaced_around_non_words():
    got = texts.prepare("The A.S. Roma_1 (Rome)  has 1,500 members.<|endoftext|>", "webnlg")
    assert got == "the a . s . roma_1 ( rome ) has 1 , 500 members ."
    assert texts.prepare("The Inn.", "e2e") == "The Inn."


@given(line)
def test_a_prepared_text_is_one_line_and_stays_as_it_is(text):
    for task in ("e2e", "webnlg", "own"):
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


def test_contexts_that_hold_the_end_mark_are_items_of_their_own():
    """An encoded context may begin with the mark, as one without a prompt does."""
    ids = [(0, token, 0) for token in (1, 2, 3)] + [(0, 0), (0,), ()]
    rows = [Row("<|endoftext|>" * 2, f"text {i}", context) for i, context in enumerate(ids)]
    items = texts.group(rows, "e2e")
    assert [item.references for item in items] == [[f"text {i}"] for i in range(6)]
    written = [row("a<|endoftext|>b", "x"), row("a<|endoftext|>c", "y"), row("a", "z")]
    assert [item.context for item in texts.group(written, "e2e")] == [r.context for r in written]


marked = st.lists(st.sampled_from(["a", " ", "\n", "<|endoftext|>"]), max_size=4).map("".join)


@given(st.lists(marked | st.lists(st.integers(0, 3), max_size=4).map(tuple), min_size=1))
def test_there_are_as_many_items_as_distinct_contexts(contexts):
    rows = [Row(str(context), "x", context) for context in contexts]
    items = texts.group(rows, "webnlg")
    assert len(items) == len(set(contexts))
    assert sum(len(item.references) for item in items) == len(contexts)


def test_missing_predictions_are_named(tmp_path):
    found = [{"id": i, "text": ""} for i in (0, 2)]
    path = write_rows(tmp_path / "p.jsonl", found)
    with pytest.raises(InputError, match="no prediction for ids 1, 3"):
        texts.read_predictions(path, [row("c", "x")] * 4)


def test_predictions_of_other_data_are_refused(tmp_path):
    rows = [row("name : A", "x"), row("name : B", "y")]
    good = [{"id": 1, "text": "b", "context": "name : B"}, {"id": 0, "text": "a"}]
    path = write_rows(tmp_path / "p.jsonl", good)
    assert [p.text for p in texts.read_predictions(path, rows)] == ["a", "b"]
    for bad, ids in (({"id": 7, "text": "c"}, 7), ({"id": 1, "text": "b", "context": "C"}, 1)):
        others = [p for p in good if p["id"] != bad["id"]]
        path = write_rows(tmp_path / "p.jsonl", [*others, bad])
        with pytest.raises(InputError, match=f"ids {ids} are not of these data"):
            texts.read_predictions(path, rows)
    path = write_rows(tmp_path / "p.jsonl", [*good, good[0]])
    with pytest.raises(InputError, match="id 1 occurs twice"):
        texts.read_predictions(path, rows)


def test_predictions_are_told_apart_by_what_follows_a_mark_in_their_contexts(tmp_path):
    encoded = [Row("<|endoftext|>a", "x", (0, 1)), Row("<|endoftext|>b", "y", (0, 2))]
    right = [{"id": i, "text": "t", "context": list(r.key)} for i, r in enumerate(encoded)]
    assert texts.read_predictions(write_rows(tmp_path / "p.jsonl", right), encoded)
    swapped = [{**right[0], "context": [0, 2]}, right[1]]
    with pytest.raises(InputError, match="ids 0 are not of these data"):
        texts.read_predictions(write_rows(tmp_path / "p.jsonl", swapped), encoded)
    written = [row("<|endoftext|>a", "x"), row("<|endoftext|>b", "y")]
    swapped = [{"id": i, "text": "t", "context": written[1].context} for i in range(2)]
    with pytest.raises(InputError, match="ids 0 are not of these data"):
        texts.read_predictions(write_rows(tmp_path / "p.jsonl", swapped), written)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 0, "text": null}', "line 2: text is None; it must be text"),
        ('{"id": 0}', "line 2: text is missing; it must be text"),
        ('{"id": 0, "text": [5]}', r"line 2: text is \[5\]; it must be text"),
        ('{"id": NaN, "text": "a"}', "line 2: id is nan; it must be a row's number"),
        ('{"id": true, "text": "a"}', "line 2: id is True; it must be a row's number"),
        ('{"id": "0", "text": "a"}', "line 2: id is '0'; it must be a row's number"),
        ('{"text": "a"}', "line 2: id is None; it must be a row's number"),
        ('{"id": 0, "text": "\\ud800"}', "line 2: text holds a lone surrogate"),
        ('{"id": 0, "text": "a", "context": 5}', "line 2: context is neither a text nor"),
        ("[0]", "line 2: expected an object"),
    ],
)
def test_a_prediction_without_id_or_text_is_named_by_its_line(line, message, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(f"\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        texts.read_predictions(path, [row("c", "x")])


def test_bad_rows_are_named_by_file_and_line(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [sides("a", "x"), {"context": "b"}])
    with pytest.raises(InputError, match=r"d.jsonl, line 2: completion is missing"):
        texts.read_data(path)
    path = write_rows(tmp_path / "d.jsonl", [sides("a", "x"), sides("b", 5)])
    with pytest.raises(InputError, match="line 2: completion must be text or a list of token ids"):
        texts.read_data(path)
    path = write_rows(tmp_path / "d.jsonl", [sides("a", "x") | {"seen": 2}])
    with pytest.raises(InputError, match="line 1: seen is 2; it must be true or false"):
        texts.read_data(path)
    for ids in ([True], [1.0], [[5]]):
        path = write_rows(tmp_path / "d.jsonl", [sides(ids, [6])])
        with pytest.raises(InputError, match="line 1: context is neither a text nor a list"):
            texts.read_data(path)
    path = write_rows(tmp_path / "d.jsonl", [sides([5], [6])])
    with pytest.raises(InputError, match="--vocab DIR"):
        texts.read_data(path)


def test_a_table_is_read_with_its_flag_seen(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("mr,ref,seen\na,x,True\nb,y,false\nc,z,\n", encoding="utf-8")
    rows = texts.read_data(path)
    assert rows == [row("a", "x", True), row("b", "y", False), row("c", "z")]
    assert texts.read_data(path, fields="ref:mr")[0].context == "x"


def test_encoded_rows_are_decoded_with_the_vocabulary(tmp_path):
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "\u0120": 3, "\u0120b": 4}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n\u0120 b\n", encoding="utf-8")
    path = write_rows(tmp_path / "d.jsonl", [sides([1, 2, 0], [4, 1, 0])])
    items = texts.group(texts.read_data(path, str(tmp_path)), "e2e")
    assert items == [Item("ab", ["ba"], 0)]
    path = write_rows(tmp_path / "d.jsonl", [sides([1, 9], [4])])
    with pytest.raises(InputError, match="line 1: context: token id 9 is not among the 5"):
        texts.read_data(path, str(tmp_path))


def test_references_that_the_benchmarks_cut_are_counted_in_a_warning(capsys):
    rows = [row("a", " one\n\ntwo<|endoftext|>"), row("b", "x<|endoftext|>y"), row("c", " z\n")]
    texts.warn_of_cuts(rows, "e2e")
    said = capsys.readouterr().err
    assert "2 references hold a blank line or <|endoftext|>" in said
    assert "(rows 0, 1); --task own scores whole texts" in said
    texts.warn_of_cuts(rows, "own")
    texts.warn_of_cuts(rows[2:], "e2e")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("references", "is_warned"),
    [
        ([["蓝香料是一家中餐馆。"], ["它在河边，很便宜。"]], True),
        ([["ブルースパイスは中華料理店です。"]], True),
        ([["蓝 香料 是 一 家 中餐馆 。"]], False),
        ([["Donaudampfschifffahrtsgesellschaft ist ein Wort"]], False),
        ([["The Eagle is a pub (鹰)."]], False),
    ],
)
def test_references_without_blanks_get_a_warning_that_names_the_flag(references, is_warned, capsys):
    texts.warn_of_unspaced(references, "zh")
    assert capsys.readouterr().err == ""
    texts.warn_of_unspaced(references, None)
    assert ("--tokenize zh" in capsys.readouterr().err) == is_warned


def test_the_first_references_are_kept_on_request():
    items = [Item("a", ["1", "2", "3"], 0, True), Item("b", ["4"], 1)]
    want = [Item("a", ["1", "2"], 0, True), Item("b", ["4"], 1)]
    assert texts.limit_references(items, 2) == want


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.lists(line, min_size=1, max_size=3), line), min_size=1, max_size=5))
def test_written_files_are_read_back_item_by_item(tmp_path_factory, groups):
    folder = tmp_path_factory.mktemp("files")
    rows = [row(str(i), text) for i, (references, _) in enumerate(groups) for text in references]
    for task in ("e2e", "webnlg", "own"):
        items = texts.group(rows, task)
        if not items:
            continue
        predictions = predicted(*(groups[int(r.context)][1] for r in rows))
        outputs = texts.outputs(items, predictions, task)
        official.write_hypotheses(folder / "hyp", outputs)
        assert official.read_hypotheses(folder / "hyp") == outputs
        stem = folder / task
        official.write_references(stem, items, task)
        if task == "webnlg":
            read = official.read_webnlg_references(str(stem))
        else:
            read = official.read_e2e_references(stem, 0)
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
    with pytest.raises(InputError, match="from item 2 on there is none .*'two'"):
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
