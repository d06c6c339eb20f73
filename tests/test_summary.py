"""Summing results up, and drawing runs: a file is read right or refused in one sentence."""

import json
from pathlib import Path

import pytest
from conftest import FUZZ, ROOT, refusal, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import InputError
from eval import official, summary, texts
from eval.texts import Row
from experiments import plot_run

fuzz = settings(
    max_examples=300 * FUZZ, derandomize=True, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(
    scalar,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


def mutated(valid: dict) -> st.SearchStrategy[dict]:
    """Objects with some fields gone, and some of another type."""
    fields = {name: st.just(value) | anything for name, value in valid.items()}
    return st.fixed_dictionaries({}, optional=fields)


def is_read_or_refused(read, *arguments: object) -> None:
    try:
        read(*arguments)
    except InputError as error:
        assert "\n" not in str(error)


RESULT = {
    "scores": {"BLEU": 0.5, "METEOR": None},
    "subsets": {"seen": {"items": 2, "scores": {"BLEU": 0.25}}},
}


@fuzz
@given(mutated(RESULT) | anything)
def test_any_json_is_a_result_or_refused(tmp_path: Path, value: object) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    is_read_or_refused(summary.read_scores, "a", str(path))
    is_read_or_refused(summary.over_runs, [str(path)] * 2)
    is_read_or_refused(plot_run.read_scores, tmp_path)


RECORD = {"kind": "valid", "step": 3, "loss": 1.5, "ppl": 4.5}


@pytest.mark.parametrize(
    "metric, best", [("loss", 4), (None, 4), ("bleu", 2), ("ser,bleu", 3), ("nist", 5)]
)
def test_the_best_validation_is_that_of_the_metric_that_chose_it(
    metric: str | None, best: int, tmp_path: Path
) -> None:
    """Of equal ones the first, as the run keeps it."""
    settings = {} if metric is None else {"valid_metric": metric}
    described = {"settings": settings, "git_commit": None, "python": "3", "torch": "2"}
    (tmp_path / "run.json").write_text(json.dumps(described), encoding="utf-8")
    values = [(2, 5, 0.7, 0.5, 1), (3, 4, 0.7, 0.1, 1), (4, 3, 0.6, 0.1, 1), (5, 3, 0.5, 0.2, 2)]
    names = ("step", "loss", "bleu", "ser", "nist")
    rows = [{"kind": "valid", **dict(zip(names, row, strict=True))} for row in values]
    write_rows(tmp_path / "log.jsonl", rows)
    result = summary.read_run(tmp_path)
    assert result["best_step"] == best
    chosen = next(row for row in rows if row["step"] == best)
    assert result["best_valid_loss"] == chosen["loss"]
    assert result["best_valid_scores"] == {name: chosen[name] for name in ("bleu", "nist", "ser")}


def test_validations_before_a_run_was_resumed_under_another_metric_have_no_say(
    tmp_path: Path,
) -> None:
    described = {"git_commit": None, "python": "3", "torch": "2"}
    described["settings"] = {"valid_metric": "bleu"}
    (tmp_path / "run.json").write_text(json.dumps(described), encoding="utf-8")
    by_loss = {"kind": "valid", "step": 2, "loss": 1.0}
    later = [{"kind": "valid", "step": 2 + n, "loss": 2.0, "bleu": 0.1 * n} for n in (1, 2)]
    write_rows(tmp_path / "log.jsonl", [by_loss, *later])
    result = summary.read_run(tmp_path)
    assert (result["best_step"], result["best_valid_scores"]) == (4, {"bleu": 0.2})
    write_rows(tmp_path / "log.jsonl", [by_loss])
    assert summary.read_run(tmp_path)["best_step"] is None


@fuzz
@given(st.lists(mutated(RECORD | {"bleu": 0.5}), min_size=1, max_size=3), anything)
def test_any_log_of_a_run_by_any_metric_is_summed_up_or_refused(
    tmp_path: Path, records: list[dict], settings: object
) -> None:
    for own in (settings, {"valid_metric": "bleu"}, {"valid_metric": settings}):
        described = {"settings": own, "git_commit": None, "python": "3", "torch": "2"}
        (tmp_path / "run.json").write_text(json.dumps(described), encoding="utf-8")
        write_rows(tmp_path / "log.jsonl", records)
        is_read_or_refused(summary.read_run, tmp_path)


@fuzz
@given(st.lists(mutated(RECORD), min_size=1, max_size=3))
def test_any_log_is_summed_up_or_refused(tmp_path: Path, records: list[dict]) -> None:
    described = {"settings": {}, "git_commit": None, "python": "3", "torch": "2"}
    (tmp_path / "run.json").write_text(json.dumps(described), encoding="utf-8")
    write_rows(tmp_path / "log.jsonl", records)
    is_read_or_refused(summary.read_run, tmp_path)


@fuzz
@given(st.lists(mutated({"id": 0, "text": "a", "context": [0, 1]}), min_size=1, max_size=3))
def test_any_predictions_are_read_or_refused(tmp_path: Path, found: list[dict]) -> None:
    path = write_rows(tmp_path / "predictions.jsonl", found)
    for key in ("a", (0, 1)):
        is_read_or_refused(texts.read_predictions, path, [Row("a", "b", key)])


@fuzz
@given(st.lists(mutated({"context": "a", "completion": [1], "seen": True}), min_size=1, max_size=3))
def test_any_data_are_read_or_refused(tmp_path: Path, rows: list[dict]) -> None:
    path = write_rows(tmp_path / "data.jsonl", rows)
    is_read_or_refused(texts.read_data, path, str(ROOT / "data" / "nano"))


@fuzz
@given(st.binary(max_size=40))
def test_any_bytes_are_official_files_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f0").write_bytes(content)
    is_read_or_refused(official.read_hypotheses, tmp_path / "f0")
    is_read_or_refused(official.read_e2e_references, tmp_path / "f0", 1)
    is_read_or_refused(official.read_webnlg_references, str(tmp_path / "f"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a=there.json", "--json", "there.json"], "there.json is also there.json"),
        (["a=there.json", "--json", "."], "--json . is a folder"),
        (["there.json", "--json", "new"], "result 'there.json' is not NAME=VALUE"),
        (["a=there.json", "--json", "new", "--published", "x: BLEU"], "is not NAME: METRIC=VALUE"),
        (["a=away.json", "--json", "new"], "away.json cannot be read"),
        (["--json"], "--help lists every flag"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_writes_nothing(
    argv: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text(json.dumps(RESULT), encoding="utf-8")
    assert message in refusal(argv, capsys, summary.main)
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]
    assert json.loads((tmp_path / "there.json").read_text(encoding="utf-8")) == RESULT


def test_a_figure_of_runs_without_scores_has_no_empty_panel(tmp_path: Path, monkeypatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="drawing needs matplotlib")
    panels = []
    monkeypatch.setattr(pyplot, "close", lambda figure: panels.append(len(figure.axes)))
    (tmp_path / "run").mkdir()
    write_rows(tmp_path / "run" / "log.jsonl", [RECORD, RECORD | {"kind": "train", "lr": 0.1}])
    for scored in (False, True):
        if scored:
            (tmp_path / "run" / "scores.json").write_text(json.dumps(RESULT), encoding="utf-8")
        plot_run.main([str(tmp_path / "run"), "--output", str(tmp_path / "runs.png")])
    valid = RECORD | {"bleu": 0.5, "ser": 0.25}
    write_rows(tmp_path / "run" / "log.jsonl", [valid, RECORD | {"kind": "train", "lr": 0.1}])
    plot_run.main([str(tmp_path / "run"), "--output", str(tmp_path / "runs.png")])
    assert panels == [3, 4, 6]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"lora_dim": 4}, "r 4"),  # a run of before there were methods
        ({"lora_dim": 8, "method": "lora", "adapter_dim": None}, "r 8"),
        ({"lora_dim": 0, "method": "adapter_l", "adapter_dim": 6}, "adapter_l 6"),
        ({"lora_dim": 0, "method": "adapter_h", "adapter_dim": 112}, "adapter_h 112"),
        ({"lora_dim": 0, "method": "full", "adapter_dim": None}, "full"),
    ],
)
def test_the_headline_names_the_method_and_its_size(chosen: dict, words: str) -> None:
    own = {"model_card": "gpt2.md", "trained_parameters": 1000, "random_seed": 1} | chosen
    result = {"settings": own, "seconds": {}, "best_valid_loss": None, "steps": 2}
    assert summary.headline(result).startswith(f"gpt2.md, {words}, 1,000 trained, seed 1, 2 steps")
