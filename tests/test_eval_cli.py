"""The command line of eval/evaluate.py: what it reads, prints and writes, and its exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_rows

from common.errors import InputError
from eval import evaluate
from eval.metrics import e2e_scores, webnlg_scores

ROOT = Path(__file__).resolve().parent.parent
REFERENCES = [
    ["The red inn is by the river .", "By the river is a red inn ."],
    ["A cheap pub serves fish .", "Fish is served in a cheap pub .", "The pub is cheap ."],
    ["Our town has five old cafes ."],
]
OUTPUTS = ["The red inn is near the river .", "A cheap pub serves fish .", "There are some cafes ."]
OTHER = ["An inn .", "Fish .", "Our town has five old cafes ."]
NO_JAVA = ["--metrics", "bleu,nist"]


@pytest.fixture
def e2e(tmp_path: Path) -> list[str]:
    """Arguments that name E2E files of three items."""
    references = "".join("\n".join(texts) + "\n\n" for texts in REFERENCES)
    (tmp_path / "refs.txt").write_text(references, encoding="utf-8")
    for name, outputs in (("hyp.txt", OUTPUTS), ("other.txt", OTHER)):
        (tmp_path / name).write_text("\n".join(outputs) + "\n", encoding="utf-8")
    named = ("--references", tmp_path / "refs.txt", "--hypotheses", tmp_path / "hyp.txt")
    return ["--task", "e2e", *map(str, named)]


@pytest.fixture
def decoded(tmp_path: Path) -> list[str]:
    """Arguments that name WebNLG data rows and predictions for the same items."""
    rows, predictions = [], []
    for i, texts in enumerate(REFERENCES):
        for text in texts:
            context = f"Inn_{i} : place : river"
            predictions.append({"id": len(rows), "text": OUTPUTS[i] + "<|endoftext|>!"})
            rows.append({"context": context, "completion": text, "seen": i != 1})
    data = write_rows(tmp_path / "test.jsonl", rows)
    made = write_rows(tmp_path / "predictions.jsonl", predictions)
    return ["--task", "webnlg", "--data", str(data), "--predictions", str(made)]


def result_of(arguments: list[str], tmp_path: Path) -> dict:
    path = tmp_path / "out.json"
    assert evaluate.main([*arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_result_has_scores_first_then_counts(e2e, tmp_path, capsys):
    result = result_of([*e2e, *NO_JAVA], tmp_path)
    assert next(iter(result)) == "scores"
    assert result["scores"] == e2e_scores(REFERENCES, OUTPUTS, ("BLEU", "NIST"))
    assert (result["items"], result["references"], result["references_left_out"]) == (3, 6, 0)
    assert result["sacrebleu"]["BLEU"]["signature"].startswith("nrefs:var|case:mixed")
    printed = capsys.readouterr().out
    assert "3 items, 6 references (1 to 3 an item), 0 left out" in printed
    assert f"{result['scores']['BLEU']:.4f}" in printed
    assert f"{result['scores']['NIST']:.4f}" in printed


def test_left_out_references_are_counted(e2e, tmp_path):
    result = result_of([*e2e, *NO_JAVA, "--ref_num", "1"], tmp_path)
    first = [texts[:1] for texts in REFERENCES]
    assert result["scores"]["BLEU"] == e2e_scores(first, OUTPUTS, ["BLEU"])["BLEU"]
    assert (result["references"], result["references_left_out"]) == (3, 3)


def test_predictions_with_data_score_as_the_files_written_from_them(decoded, tmp_path):
    metrics = ["--metrics", "bleu,ter,chrf++"]
    stem, hypotheses = str(tmp_path / "reference"), str(tmp_path / "hypothesis.txt")
    write = ["--write_references", stem, "--write_hypotheses", hypotheses]
    from_data = result_of([*decoded, *metrics, *write], tmp_path)
    assert Path(hypotheses).read_text(encoding="utf-8").splitlines()[0].islower()
    files = ["--task", "webnlg", "--references", stem, "--hypotheses", hypotheses]
    from_files = result_of([*files, *metrics], tmp_path)
    for key in ("scores", "items", "references"):
        assert from_data[key] == from_files[key]


def test_seen_and_unseen_are_scored_apart(decoded, tmp_path, capsys):
    metrics = ("BLEU", "TER", "chrF++")
    result = result_of([*decoded, "--metrics", ",".join(metrics)], tmp_path)
    low = [[text.lower() for text in texts] for texts in REFERENCES]
    outputs = [text.lower() for text in OUTPUTS]
    parts = {"seen": (0, 2), "unseen": (1,)}
    for name, chosen in parts.items():
        want = webnlg_scores([low[i] for i in chosen], [outputs[i] for i in chosen], metrics)
        assert result["subsets"][name]["scores"] == pytest.approx(want)
        assert result["subsets"][name]["items"] == len(chosen)
    assert "subset unseen: 1 items, 3 references" in capsys.readouterr().out


MRS = ["name[The Red Inn], area[riverside]", "eatType[pub], priceRange[cheap]", "food[Fast food]"]


def test_slot_errors_and_coverage_stand_beside_the_scores(e2e, tmp_path, capsys):
    (tmp_path / "mrs.txt").write_text("\n".join(MRS) + "\n", encoding="utf-8")
    more = ["--inputs", str(tmp_path / "mrs.txt"), "--compare", str(tmp_path / "other.txt")]
    more += ["--metrics", "bleu,ser,coverage", "--bootstrap", "20"]
    result = result_of([*e2e, *more], tmp_path)
    # Near the river is the riverside; cafes are an added eatType, fast food is missing.
    assert result["scores"]["SER"] == 2 / 5
    assert result["slots"] == {
        "added": 1, "missing": 1, "wrong": 0, "repeated": 0, "slots": 5, "correct": 2,
    }  # fmt: skip
    assert result["scores"]["coverage"] == 3 / 5
    compare = result["compare"]
    assert compare["slots"]["missing"] == 5
    assert compare["differences"]["SER"] == pytest.approx(2 / 5 - compare["scores"]["SER"])
    for name in ("SER", "coverage"):
        interval = result["bootstrap"]["intervals"][name]
        assert interval["low"] <= interval["mean"] <= interval["high"]
        assert 0 < compare["p_values"][name] <= 1
    assert result["texts"].keys() == {"distinct_1", "distinct_2", "length_ratio"}
    printed = capsys.readouterr().out
    assert "slots: 1 added, 1 missing, 0 wrong, 0 repeated of 5; 2 texts correct" in printed
    assert "\nSER       0.4000" in printed


def test_without_inputs_slot_errors_and_coverage_are_left_out_unless_asked_for(
    e2e, tmp_path, capsys
):
    bleu = [*e2e, "--ref_num", "1", "--json", str(tmp_path / "out.json")]
    evaluate.main(bleu)
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert not {"SER", "coverage"} & result["scores"].keys()
    assert evaluate.main([*e2e, "--metrics", "ser,coverage"]) == 1
    assert capsys.readouterr().out.count("is null: no inputs are known; give --inputs") == 2


def test_inputs_of_another_form_get_a_reason(e2e, tmp_path, capsys):
    for inputs, reason in (
        ("inn\npub\ncafe\n", "an input is no meaning representation: 'inn' is not of the form"),
        ("a : b\nname : c\narea : d\n", "the inputs have slots that E2E has not: a"),
    ):
        (tmp_path / "mrs.txt").write_text(inputs, encoding="utf-8")
        arguments = [*e2e, "--inputs", str(tmp_path / "mrs.txt"), "--metrics", "ser"]
        assert evaluate.main(arguments) == 1
        assert f"SER is null: {reason}" in capsys.readouterr().out


def test_contexts_with_end_marks_are_items_of_their_own_whose_scores_are_not_merged(tmp_path):
    """Six encoded rows whose contexts begin with the mark; one output is right."""
    vocabulary = tmp_path / "vocabulary"
    vocabulary.mkdir()
    letters = "abcdefghijkl"
    entries = {"<|endoftext|>": 0, "Ġ": 1} | {letter: i + 2 for i, letter in enumerate(letters)}
    (vocabulary / "vocab.json").write_text(json.dumps(entries), encoding="utf-8")
    (vocabulary / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    words = [f"{letters[i]} {letters[i + 1]} {letters[i + 2]} {letters[i + 3]}" for i in range(6)]
    rows, predictions = [], []
    for i, text in enumerate(words):
        ids = [entries[{" ": "Ġ"}.get(letter, letter)] for letter in text]
        context = [0, 2 + i, 0]
        rows.append({"context": context, "completion": [*ids, 0]})
        predictions.append({"id": i, "context": context, "text": words[0] if i == 0 else "x x x x"})
    data = write_rows(tmp_path / "d.jsonl", rows)
    made = write_rows(tmp_path / "p.jsonl", predictions)
    named = ["--data", str(data), "--predictions", str(made), "--vocab", str(vocabulary)]
    result = result_of(["--task", "e2e", *named, *NO_JAVA], tmp_path)
    assert (result["items"], result["references"]) == (6, 6)
    assert result["scores"]["BLEU"] == pytest.approx(1 / 6)


def test_data_that_are_no_benchmark_are_scored_whole_by_default(tmp_path, capsys):
    rows = [{"prompt": f"q{i}", "response": f"one two three\n\nfour five {i}"} for i in range(3)]
    made = [{"id": i, "text": "one two three"} for i in range(3)]
    data, predictions = write_rows(tmp_path / "d.jsonl", rows), write_rows(tmp_path / "p", made)
    named = ["--data", str(data), "--predictions", str(predictions)]
    result = result_of([*named, "--metrics", "bleu,chrf++"], tmp_path)
    assert result["task"] == "own" and result["scores"]["BLEU"] < 0.7
    assert capsys.readouterr().err == ""
    cut = result_of([*named, "--task", "e2e", "--metrics", "bleu"], tmp_path)
    assert "3 references hold a blank line" in capsys.readouterr().err
    assert cut["scores"]["BLEU"] == 0 or cut["scores"]["BLEU"] > result["scores"]["BLEU"]


def test_other_tokens_may_be_named_and_stand_in_the_result(tmp_path, capsys):
    rows = [{"context": "名称：蓝香料", "completion": "蓝香料是一家中餐馆，位于河边。"}]
    made = [{"id": 0, "text": "蓝香料是一家中餐馆，在河边。"}]
    data, predictions = write_rows(tmp_path / "d.jsonl", rows), write_rows(tmp_path / "p", made)
    named = ["--data", str(data), "--predictions", str(predictions), "--metrics", "bleu,chrf++"]
    plain = result_of(named, tmp_path)
    assert "give --tokenize zh" in capsys.readouterr().err
    result = result_of([*named, "--tokenize", "zh"], tmp_path)
    assert capsys.readouterr().err == ""
    assert result["tokenize"] == "zh" and "tok:zh" in result["sacrebleu"]["BLEU"]["signature"]
    assert plain["scores"]["BLEU"] < 0.01 < 0.6 < result["scores"]["BLEU"]


def test_bootstrap_and_a_second_system(e2e, tmp_path, capsys):
    other = ["--compare", str(tmp_path / "other.txt")]
    result = result_of([*e2e, *NO_JAVA, "--bootstrap", "100", *other], tmp_path)
    assert result["bootstrap"]["samples"] == 100
    compare = result["compare"]
    assert compare["scores"] == e2e_scores(REFERENCES, OTHER, ("BLEU", "NIST"))
    for name, score in result["scores"].items():
        interval = result["bootstrap"]["intervals"][name]
        assert interval["low"] <= interval["mean"] <= interval["high"]
        assert compare["differences"][name] == pytest.approx(score - compare["scores"][name])
        assert 0 < compare["p_values"][name] <= 1
        of_difference = compare["difference_intervals"][name]
        assert of_difference["low"] <= compare["differences"][name] <= of_difference["high"]
    header = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("metric"))
    for title in ("score", "95 % interval", "sacreBLEU", "other", "difference", "p"):
        assert title in header


def test_report_shows_worst_and_best_items(e2e, tmp_path):
    (tmp_path / "inputs.txt").write_text("in one\nin two\nin three\n", encoding="utf-8")
    report = tmp_path / "report.txt"
    more = ["--inputs", str(tmp_path / "inputs.txt"), "--compare", str(tmp_path / "other.txt")]
    result_of([*e2e, *NO_JAVA, *more, "--report", str(report), "--report_items", "1"], tmp_path)
    worst, best = report.read_text(encoding="utf-8").split("The 1 best of 3 items by BLEU")
    assert worst.startswith("The 1 worst of 3 items by BLEU")
    for part, i, name in ((worst, 2, "in three"), (best, 1, "in two")):
        assert f"item {i + 1}\n" in part
        for text in (name, OUTPUTS[i], OTHER[i], *REFERENCES[i]):
            assert text in part
    assert "(BLEU 1.0000)" in best


def test_without_java_null_rows_give_the_reason(e2e, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = result_of(e2e, tmp_path)
    for name in ("METEOR", "ROUGE_L", "CIDEr"):
        assert result["scores"][name] is None
        assert "no java on the PATH" in result["reasons"][name]
    assert result["scores"]["BLEU"] > 0
    assert "METEOR is null: no java on the PATH" in capsys.readouterr().out
    assert evaluate.main([*e2e, "--metrics", "bleu,meteor"]) == 1


def test_one_item_gets_a_warning_about_cider(tmp_path, capsys):
    for name in ("refs.txt", "hyp.txt"):
        (tmp_path / name).write_text("one old inn by the river\n", encoding="utf-8")
    named = ["--references", str(tmp_path / "refs.txt"), "--hypotheses", str(tmp_path / "hyp.txt")]
    evaluate.main(["--task", "e2e", *named, "--metrics", "cider"])
    assert "CIDEr of fewer than two items is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "x.jsonl"], "not a mix"),
        (["--ref_num", "two"], "argument --ref_num: invalid int value: 'two'; --help lists every"),
        (["--tokenize", "klingon"], "argument --tokenize: invalid choice: 'klingon'"),
        (["--metrics", "bleu,spice"], "spice: task e2e has bleu, nist, meteor, rouge_l, cider"),
        (["--ref_num", "0"], "--ref_num 0 is too small"),
        (["--bootstrap", "-1"], "--bootstrap -1 is too small"),
        (["--compare", "nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
def test_wrong_arguments_are_one_clear_sentence(e2e, more, message):
    with pytest.raises(InputError, match=message):
        evaluate.main([*e2e, *more])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--json", "."], r"--json \. is a folder"),
        (["--json", "hyp.txt"], "--json hyp.txt is also --hypotheses"),
        (["--report", "refs.txt"], "--report refs.txt is also --references"),
        (["--write_references", "refs.txt"], "--write_references refs.txt is also --references"),
        (["--json", "new", "--report", "new"], "--report new is also --json; name two files"),
    ],
)
def test_an_output_that_is_an_input_or_a_folder_is_refused_before_anything_is_scored(
    e2e, flags, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=message):
        evaluate.main([*e2e, *NO_JAVA, *flags])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_numbered_references_are_not_overwritten(tmp_path):
    for name in ("r0", "r1", "hyp.txt"):
        (tmp_path / name).write_text("a b c d\n", encoding="utf-8")
    stem = str(tmp_path / "r")
    named = ["--references", stem, "--hypotheses", str(tmp_path / "hyp.txt")]
    with pytest.raises(InputError, match="r0 is also --references"):
        evaluate.main(["--task", "webnlg", *named, "--write_references", stem])


def test_unequal_counts_name_files_and_items(e2e, tmp_path):
    (tmp_path / "hyp.txt").write_text("only one\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"hyp.txt has 1 lines, .*refs.txt has 3 items"):
        evaluate.main([*e2e, *NO_JAVA])


def test_the_program_scores_and_refuses_in_a_process_of_its_own(e2e):
    script = [sys.executable, "-W", "error", "-m", "eval.evaluate"]
    run = {"cwd": ROOT, "capture_output": True, "encoding": "utf-8"}
    done = subprocess.run([*script, *e2e, *NO_JAVA], **run)
    assert (done.returncode, done.stderr) == (0, "")
    assert "BLEU" in done.stdout
    wrong = subprocess.run([*script, *e2e, "--metrics", "x"], **run)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --metrics x")


@pytest.mark.skipif(shutil.which("java") is None, reason="no java on the PATH: METEOR needs it")
def test_all_scores_of_a_task_in_one_run(e2e, tmp_path, capsys):
    report = tmp_path / "report.txt"
    result = result_of([*e2e, "--bootstrap", "20", "--report", str(report)], tmp_path)
    assert list(result["scores"]) == ["BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"]
    assert None not in result["scores"].values()
    assert result["reasons"] == {}
    assert result["meteor"] == {"version": "1.5", "flags": "-l en -norm"}
    assert "METEOR 1.5, flags -l en -norm" in capsys.readouterr().out
    assert report.read_text(encoding="utf-8").startswith("The 3 worst of 3 items by METEOR")
