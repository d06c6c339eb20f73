"""Tables and figures are those of results/, and say nothing that was not run."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

import checkpoints
from common.errors import InputError
from experiments import chinese, figures, plot_run, tables
from experiments.e2e import GROUPS
from experiments.sweep import chosen_rate

E2E = ROOT / "results" / "e2e"


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]


def a_run(method: str = "full", steps: int = 5000, seed: int = 1, **own: object) -> dict:
    scores = {
        "BLEU": 0.5 + seed / 100, "NIST": 8.5, "METEOR": None, "ROUGE_L": 0.7, "CIDEr": 2.1,
        "SER": 0.1, "coverage": 0.9,
    }  # fmt: skip
    return {
        "method": method, "steps": steps, "seed": seed, "variant": "", "subset": 0, "lr": 0.1,
        "rows": 50, "trainable": 20_480, "scores": scores, "valid_loss": {"last": 2.0, "best": 1.9},
        "seconds": {"training": None, "decoding": 60.0, "scoring": 12.0}, "peak_memory_gb": 1.0,
        "curves": {"valid": [[steps // 2, 3.0], [steps, 2.0 + seed / 10]]},
    } | own  # fmt: skip


def a_short_run(method: str, lr: float, loss: float | None, variant: str = "") -> dict:
    return {
        "method": method, "variant": variant, "settings": {"lr": lr}, "valid_loss": {"last": loss},
        "seconds": {"training": 100 * lr},
    }  # fmt: skip


def test_pages_and_figures_are_those_of_results() -> None:
    assert tables.differing(tables.make_tables(), tables.make_figures()) == []


def test_every_result_of_e2e_is_of_the_shipped_base_and_of_the_best_learning_rate() -> None:
    base = checkpoints.read_base(str(ROOT / "data" / "mini" / "model.safetensors"))
    short = tables.read_results(E2E / "grid")
    for result in tables.read_results(E2E):
        assert result["settings"]["base"] == base.fingerprint
        losses = tables.grid_losses(short, result["method"], result["variant"])
        assert result["lr"] == chosen_rate(losses), result["method"]


def test_the_share_of_the_weights_is_of_all_that_full_fine_tuning_trains() -> None:
    full = [r for r in tables.read_results(E2E / "grid") if r["method"] == "full"]
    assert {r["trainable"] for r in full} == {tables.WEIGHTS}


def test_tables_of_the_chinese_readme_are_in_chinese_with_the_same_numbers() -> None:
    page = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    made = tables.make_tables()
    for name in re.findall(r"<!-- table: (\w+) -->", page):
        table = chinese.translated(made[name])
        assert not chinese.untranslated(table), "add these words to experiments/chinese.py"
        assert re.findall(r"[\d.]+", table) == re.findall(r"[\d.]+", made[name])


def test_a_row_has_mean_and_deviation_of_its_own_runs_in_the_papers_units() -> None:
    runs = [a_run("lora-r4", seed=seed) for seed in (1, 2, 3, 4)]
    runs += [a_run("lora-r4", steps=1000), a_run("lora-r16"), a_run("lora-r4", variant="cleaned")]
    head, _, full, r4, r16, _ = cells(tables.e2e_table(tables.e2e_groups("must", runs)))
    assert head == [
        "method", "trained", "% of the weights", "lr", "BLEU", "NIST", "MET", "ROUGE-L", "CIDEr",
        "SER", "valid loss", "seeds",
    ]  # fmt: skip
    assert r4[:7] == ["LoRA, r 4", "20,480", "0.40", "0.1", "52.0 ± 1.0", "8.50 ± 0.00", ""]
    assert r4[9:] == ["10.0 ± 0.0", "2.000 ± 0.000", "3 of 3"]
    assert r16[4] == "51.0" and r16[-1] == "1 of 3"
    assert full[0] == "full fine-tuning" and not any(full[1:])


def test_with_little_data_rows_are_told_and_the_loss_is_that_of_the_decoded_adapter() -> None:
    runs = [a_run(steps=400, seed=seed, subset=50) for seed in (1, 2)]
    groups = tables.e2e_groups("lowdata", runs)
    head, _, small, other, *_ = cells(tables.e2e_table(groups, GROUPS["lowdata"].choose))
    assert head[:2] == ["method", "rows"] and small[1] == "50"
    assert small[5] == "51.5 ± 0.7" and small[-2:] == ["1.900 ± 0.000", "2 of 5"]
    assert other[:2] == ["LoRA, r 4", "50"] and not any(other[2:])


def test_runs_on_cleaned_rows_stand_apart_from_those_on_all() -> None:
    runs = [a_run(steps=1000), a_run(steps=1000, seed=2, variant="cleaned")]
    rows = {row[0]: row for row in cells(tables.e2e_table(tables.e2e_groups("cleaned", runs)))}
    assert rows["full fine-tuning"][4] == "51.0"
    assert rows["full fine-tuning, cleaned rows"][4] == "52.0"


@pytest.mark.parametrize("name", GROUPS)
def test_where_nothing_was_run_a_page_says_how_to_run_it(name: str) -> None:
    groups = tables.e2e_groups(name, [])
    section = tables.e2e_section(name, groups)
    runs = sum(group.asked for group in groups)
    assert section == f"Not run yet: `python -m experiments.e2e {name}`, {runs} runs.\n"


def test_the_readme_has_what_was_trained_and_two_scores() -> None:
    runs = [a_run("lora-r16", seed=seed, trainable=81_920) for seed in (1, 2, 3)]
    _, _, _, _, r16, _ = cells(tables.readme_table(tables.e2e_groups("must", runs)))
    assert r16 == ["LoRA, r 16", "81,920", "1.60", "52.0 ± 1.0", "10.0 ± 0.0", "3 of 3"]


def test_learning_rates_are_told_with_the_best_in_bold() -> None:
    short = [a_short_run("full", 5e-4, 1.4), a_short_run("full", 1e-3, 1.3)]
    short += [a_short_run("full", 2e-3, None), a_short_run("full", 5e-4, 1.2, "cleaned")]
    head, _, *rows = cells(tables.rates_table(short))
    of = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    full = of["full fine-tuning"]
    assert (full["0.0005"], full["0.001"], full["0.002"]) == ("1.400", "**1.300**", "diverged")
    assert of["full fine-tuning, cleaned rows"]["0.0005"] == "**1.200**"
    assert head[1:] == ["0.0005", "0.001", "0.002"] and len(rows) == 2


def test_seconds_are_those_of_parts_that_were_not_interrupted() -> None:
    short = [a_short_run("full", lr, 1.0) for lr in (1, 2, 4)]
    rows = cells(tables.seconds_table(short, [a_run(), a_run(seed=2)]))[2:]
    assert rows[0] == ["training, 200 steps", "200 (100 to 400)", "3"]
    assert rows[-3][0] == "training, 5,000 steps" and not any(rows[-3][1:])
    assert rows[-2] == ["decoding", "60 (60 to 60)", "2"]


def test_a_page_with_an_old_number_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- table: e2e -->\nold\n<!-- end -->\nb\n", encoding="utf-8")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    made = tables.make_tables()
    assert tables.differing(made, {}) == [page]
    text = tables.filled(page.read_text(encoding="utf-8"), made)
    assert text.startswith("a\n<!-- table: e2e -->\n| method |")
    assert text.endswith("|\n<!-- end -->\nb\n")
    with pytest.raises(KeyError):
        tables.filled("<!-- table: nobodys -->\n<!-- end -->", made)


OWN = {"must": {}, "cleaned": {"steps": 1000}, "lowdata": {"steps": 400, "subset": 50}}
OTHER = {
    "must": {"method": "lora-r4"},
    "cleaned": {"variant": "cleaned"},
    "lowdata": {"subset": 200},
}
DRAWN = [(group, figure) for group in OWN for figure in figures.of_group(group)]


@pytest.mark.parametrize(("group", "figure"), DRAWN)
def test_a_figure_carries_the_digest_of_its_numbers(
    group: str, figure: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{figure}.png"
    assert figures.source_of(path) is None
    runs = [a_run(**{"seed": seed} | OWN[group]) for seed in (1, 2)]
    runs.append(a_run(**OWN[group] | OTHER[group]))
    groups = tables.e2e_groups(group, runs)
    figures.draw(path, groups)
    assert figures.source_of(path) == figures.digest(figure, groups)
    assert figures.digest(figure, tables.e2e_groups(group, runs[:2])) != figures.source_of(path)
    assert f"figures/{figure}.png" in tables.e2e_section(group, groups)


def test_bleu_by_size_has_lines_at_full_fine_tuning_and_close_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    runs = [a_run(seed=seed) for seed in (1, 3)] + [a_run("lora-r4")]
    figures.draw(tmp_path / "e2e_trained.png", tables.e2e_groups("must", runs))
    axes = drawn[0].axes[0]
    levels = [line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    assert levels == pytest.approx([52.0, 0.95 * 52])
    assert axes.get_title() and axes.get_ylabel() == "BLEU"


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
