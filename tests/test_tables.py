"""Tables and figures are those of results/, and say nothing that was not run."""

import itertools
import json
import re
import statistics
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InputError
from experiments import chinese, compare, figures, plot_run, tables

SWEEP = tables.read_results(ROOT / "results" / "e2e-mini")


def cells(table: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in table.splitlines()]


def a_run(kind: str = "lora", rank: int = 4, rows: int = 42_061, bleu: float = 0.5) -> dict:
    scores = {"BLEU": bleu, "NIST": 5.0, "METEOR": 0.3, "ROUGE_L": 0.6, "CIDEr": 1.5}
    return {
        "kind": kind, "rank": rank, "rows": rows, "scores": scores, "trainable": 1234, "lr": 0.1,
        "steps": 1000, "batch": 8, "valid_loss": {"last": 2.0, "best": 1.9},
        "targets": "q,v", "curves": {"valid": [[250, 3.0], [500, 2.0]]},
    }  # fmt: skip


def test_pages_and_figures_are_those_of_results() -> None:
    assert tables.differing(tables.make_tables(), SWEEP) == []


def test_tables_of_the_chinese_readme_are_in_chinese_with_the_same_numbers() -> None:
    page = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    made = tables.make_tables()
    for name in re.findall(r"<!-- table: (\w+) -->", page):
        table = chinese.translated(made[name])
        assert not chinese.untranslated(table), "add these words to experiments/chinese.py"
        assert re.findall(r"[\d.]+", table) == re.findall(r"[\d.]+", made[name])


def test_a_row_has_mean_and_deviation_of_its_own_runs_in_the_papers_units() -> None:
    bleus = [0.41, 0.44, 0.50]
    runs = [a_run(bleu=bleu) for bleu in bleus]
    others = [a_run("dora"), a_run(rank=16), a_run(rows=100)]
    rows = cells(tables.kinds_table(runs + others))
    mean, sd = 100 * statistics.mean(bleus), 100 * statistics.stdev(bleus)
    lora = next(row for row in rows if row[0] == "LoRA")
    assert lora[1:4] == ["1,234", "0.1", f"{mean:.1f} ± {sd:.1f}"] and lora[-1] == "3 of 3"
    assert lora[3] == "45.0 ± 4.6"


def test_what_was_not_run_is_an_empty_cell() -> None:
    table = tables.ranks_table([a_run(rank=1)])
    assert "| 1 | alpha/r | 1,234 | 50.0 | 5.00 |" in table
    assert "| 64 | alpha/√r |  |  |  |" in table
    assert "| 4,000 |  |  |" in tables.data_table([])


def test_runs_without_adapters_have_no_rank() -> None:
    full = a_run("full", rank=0)
    assert tables.runs_of([full, a_run()], tables.Setting("full", rank=0)) == [full]


def an_e2e_run(method: str, steps: int, seed: int, **own: object) -> dict:
    scores = {"BLEU": 0.5 + seed / 100, "SER": 0.1, "coverage": 0.9, "METEOR": None}
    return a_run() | {
        "method": method, "steps": steps, "seed": seed, "variant": "", "subset": 0,
        "scores": scores, "seconds": {"training": None}, "peak_memory_gb": 1.0,
    } | own  # fmt: skip


def test_a_group_of_the_e2e_runs_has_its_own_results_alone() -> None:
    runs = [an_e2e_run("full", 1000, seed) for seed in (1, 2, 3, 4)]
    runs += [an_e2e_run("full", 5000, 1), an_e2e_run("full", 1000, 1, variant="cleaned")]
    runs += [an_e2e_run("full", 400, seed, subset=50) for seed in (1, 2)]
    plain, _, cleaned, _ = cells(compare.table(tables.e2e_groups("cleaned", runs)))[2:]
    assert plain[:5] == ["full fine-tuning", "1,234", "0.1", "52.0 ± 1.0", "10.0 ± 0.0"]
    assert plain[-1] == "3 of 3" and cleaned[3] == "51.0" and cleaned[-1] == "1 of 3"
    head, _, small, none, *_ = cells(compare.table(tables.e2e_groups("lowdata", runs)))
    assert head[:6] == ["method", "rows", "trained", "lr", "BLEU", "SER"]
    assert small[1:5] == ["50", "1,234", "0.1", "51.5 ± 0.7"] and small[-1] == "2 of 5"
    assert none[0] == "LoRA, r 4" and set("".join(none[2:])) <= {"|"}


@pytest.mark.parametrize("name", ["cleaned", "lowdata"])
def test_a_figure_of_the_e2e_runs_carries_the_digest_of_its_numbers(
    name: str, tmp_path: Path
) -> None:
    own = {"cleaned": {"steps": 1000}, "lowdata": {"steps": 400, "subset": 50}}[name]
    more = {"subset": 200} if name == "lowdata" else {"method": "lora-r4"}
    runs = [an_e2e_run("full", seed=seed, **own) for seed in (1, 2)]
    runs += [an_e2e_run(**{"method": "full", "seed": 1} | own | more)]
    groups = tables.e2e_groups(name, runs)
    assert compare.draw(tmp_path / "a.png", groups)
    assert figures.source_of(tmp_path / "a.png") == compare.digest(groups)
    assert compare.digest(tables.e2e_groups(name, runs[:2])) != compare.digest(groups)


def test_a_page_with_an_old_number_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- table: kinds -->\nold\n<!-- end -->\nb\n", encoding="utf-8")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "FIGURES", ROOT / "docs" / "figures")
    made = tables.make_tables()
    assert tables.differing(made, SWEEP) == ["README.md"]
    text = tables.filled(page.read_text(encoding="utf-8"), made)
    assert text.startswith("a\n<!-- table: kinds -->\n| method |")
    assert text.endswith("|\n<!-- end -->\nb\n")
    with pytest.raises(KeyError):
        tables.filled("<!-- table: nobodys -->\n<!-- end -->", made)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_carries_the_digest_of_the_numbers_it_shows(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.png"
    assert figures.source_of(path) is None
    runs = [a_run(bleu=0.4), a_run(bleu=0.5), a_run("full", 0), a_run(rank=16), a_run(rows=100)]
    figures.draw(path, runs)
    assert figures.source_of(path) == figures.digest(name, runs)
    assert figures.digest(name, runs) != figures.digest(name, SWEEP)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.2))
def test_labels_are_moved_apart_in_their_order_and_no_further_than_needed(places, gap) -> None:
    moved = figures.spread(places, gap)
    order = sorted(range(len(places)), key=lambda i: (places[i], i))
    ordered = [moved[i] for i in order]
    assert all(b - a > gap - 1e-9 for a, b in itertools.pairwise(ordered))
    assert statistics.mean(moved) == pytest.approx(statistics.mean(places))
    if all(b - a > gap for a, b in itertools.pairwise(sorted(places))):
        assert moved == pytest.approx(places)


@pytest.mark.parametrize("name", ["bleu_by_rank", "low_data", "bleu_by_trained"])
def test_an_axis_of_bleu_starts_at_zero_and_a_figure_has_a_title(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    figures.draw(tmp_path / f"{name}.png", [a_run(bleu=0.40), a_run(bleu=0.41), a_run(rank=16)])
    axes = drawn[0].axes[0]
    limits = axes.get_xlim() if name == "bleu_by_trained" else axes.get_ylim()
    assert limits[0] == 0 and drawn[0].get_suptitle()


def test_points_are_mean_least_and_greatest_over_seeds() -> None:
    points = figures.points([(2, 5.0), (1, 1.0), (1, 3.0)])
    assert points == [(1, 2.0, 1.0, 3.0), (2, 5.0, 5.0, 5.0)]


def write_run(folder: Path) -> None:
    folder.mkdir()
    train = {"kind": "train", "step": 1, "loss": 2.0, "ppl": 7.4, "lr": 0.1}
    records = [train, train | {"step": 2, "loss": 1.0}, {"kind": "valid", "step": 2, "loss": 1.5}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "log.jsonl").write_text(lines, encoding="utf-8")


def test_runs_are_drawn_side_by_side_with_the_scores_that_there_are(tmp_path: Path) -> None:
    for name in "ab":
        write_run(tmp_path / name)
    scores = {"scores": {"lp 0.8": {"BLEU": 0.5, "CIDEr": 2.0, "TER": None}}}
    (tmp_path / "a" / "result.json").write_text(json.dumps(scores), encoding="utf-8")
    assert plot_run.read_scores(tmp_path / "a") == {"BLEU": 0.5, "CIDEr": 2.0}
    assert plot_run.read_scores(tmp_path / "b") == {}
    output = tmp_path / "runs.png"
    plot_run.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(output)])
    assert output.read_bytes().startswith(b"\x89PNG")


def test_drawing_a_folder_that_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no log.jsonl"):
        plot_run.main([str(tmp_path)])
