"""The comparison of methods: which runs there are, what they are told, what becomes of them."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import gpt2_ft
from common.errors import InputError
from experiments import e2e, launch, sweep
from experiments.methods import KINDS, Method, parse_methods
from experiments.runs import Run, Setup, commands, is_done, training_files

NANO = ROOT / "data" / "nano"


def a_setup(out: Path, **changes) -> Setup:
    """Return a setup on files that are not read."""
    own = {
        "out": str(out), "train_data": "train.jsonl", "valid_data": "valid.jsonl",
        "test_data": "test.jsonl", "init_checkpoint": "base", "base": "b", "train": "t",
        "valid": "v", "test": "s", "rows": 100,
    }  # fmt: skip
    return Setup(**own | changes)


def tiny_flags(folder: Path, **changes: str) -> list[str]:
    """Return flags of two-step runs on a few rows of the sample, with results in folder/out."""
    for name in ("train", "valid", "test"):
        rows = (ROOT / "data" / "sample" / f"{name}.jsonl").read_text(encoding="utf-8")
        few = "".join(rows.splitlines(keepends=True)[:6])
        (folder / f"{name}.jsonl").write_text(few, encoding="utf-8")
    flags = {
        "train_data": str(folder / "train.jsonl"), "valid_data": str(folder / "valid.jsonl"),
        "test_data": str(folder / "test.jsonl"), "init_checkpoint": str(NANO), "vocab": str(NANO),
        "out": str(folder / "out"), "max_step": "2", "seeds": "1", "seq_len": "128", "beam": "1",
        "lr": "1e-3", "eval_len": "4", "task": "e2e",
    }  # fmt: skip
    return [word for name, value in (flags | changes).items() for word in (f"--{name}", value)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_flags_of_a_kind_are_known_to_the_trainer(kind: str) -> None:
    args = gpt2_ft.build_parser().parse_args(Method.parse(kind).flags)
    assert (args.lora_dim > 0) == ("r" in KINDS[kind].options)


@pytest.mark.parametrize(
    ("text", "name", "title"),
    [
        ("lora", "lora-r4", "LoRA, r 4"),
        ("lora:r=16,targets=all", "lora-r16-all", "LoRA, r 16, all"),
        ("lora:targets=q,k,v,r=2", "lora-r2-qkv", "LoRA, r 2, q,k,v"),
        ("dora:r=4,alpha=16.0", "dora-r4-alpha16", "DoRA, r 4, alpha 16"),
        ("full:lr=1e-3/5e-3", "full", "full fine-tuning"),
    ],
)
def test_a_method_is_named_by_what_is_not_its_default(text: str, name: str, title: str) -> None:
    method = Method.parse(text)
    assert (method.name, method.title) == (name, title)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lore", "'lore' is none of lora, "),
        ("full:r=4", "'r' is no setting of full: lr"),
        ("lora:r=four", "'four' is not a whole number"),
        ("lora:lr=fast", "'fast' is not a number"),
    ],
)
def test_a_method_that_does_not_exist_is_one_sentence(text: str, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        Method.parse(text)


def test_two_methods_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="names lora-r4 twice"):
        parse_methods(["lora", "full", "lora:r=4,lr=1e-3"])


@given(
    rank=st.integers(1, 64), rows=st.integers(0, 50), steps=st.integers(1, 9999),
    seed=st.integers(1, 9), variant=st.sampled_from(["", "cleaned"]),
    other=st.sampled_from(["rank", "rows", "steps", "seed", "variant"]),
)  # fmt: skip
def test_runs_that_differ_have_names_that_differ(other: str, **values) -> None:
    def run_of(rank: int, rows: int, steps: int, seed: int, variant: str) -> Run:
        method = Method.parse(f"lora:r={rank}")
        return Run(a_setup(Path("out"), variant=variant), method, 0.1, steps, seed, rows)

    change = {"variant": "other"} if other == "variant" else {other: values[other] + 1}
    assert run_of(**values).name != run_of(**values | change).name


@pytest.mark.parametrize("name", e2e.GROUPS)
def test_a_group_of_the_experiment_has_its_runs_each_under_a_name_of_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(e2e, "setup_of", lambda variant, choose: a_setup(tmp_path, variant=variant))
    group = e2e.GROUPS[name]
    runs = [
        Run(each.setup, method, 0.1, each.steps, seed, rows)
        for each in e2e.comparisons_of(group, None, None)
        for method in each.methods
        for seed in each.seeds
        for rows in each.rows
    ]
    count = len(group.methods) * group.seeds * len(group.rows) * len(group.variants)
    assert len({run.name for run in runs}) == len(runs) == count


def test_a_comparison_ends_with_its_results_and_does_nothing_again(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = [*tiny_flags(tmp_path, rows="4"), "--methods", "lora:r=2,targets=fc,proj"]
    assert sweep.main(flags) == 0
    path = tmp_path / "out" / "lora-r2-fcproj-4rows-2steps-seed1.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    said = {name: result[name] for name in ("kind", "rank", "seed", "rows", "targets", "steps")}
    assert said == {
        "kind": "lora", "rank": 2, "seed": 1, "rows": 4, "targets": "fc,proj", "steps": 2,
    }  # fmt: skip
    assert result["trainable"] == 2 * 4 * 2 * (256 + 1024)  # r, blocks, layers, in + out
    assert result["seconds"]["training"] > 0 and result["peak_memory_gb"] > 0
    assert result["ser"] == result["scores"]["SER"] and result["scores"]["BLEU"] is not None
    assert not (tmp_path / "out" / "runs" / path.stem / "state.pt").exists()
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    assert sweep.main([*flags, "--dry_run"]) == 0
    assert capsys.readouterr().out == f"{path.stem}: done\n"
    assert sweep.main(flags) == 0 and path.stat().st_mtime_ns == before


def test_the_learning_rate_of_the_lowest_loss_is_taken_and_one_that_failed_is_not(
    tmp_path: Path,
) -> None:
    setup, method = a_setup(tmp_path), Method.parse("full:lr=1/2/3")
    comparison = sweep.Comparison(setup, (method,), steps=50)
    runs = comparison.grid()
    assert [run.name for run in runs] == [f"full-lr{rate}-50steps" for rate in (1, 2, 3)]
    assert comparison.rate(method) is None and comparison.runs() == []
    for run, loss in zip(runs, (1.5, 1.2), strict=False):
        run.result.parent.mkdir(exist_ok=True)
        found = {"settings": run.settings(), "valid_loss": {"last": loss}}
        run.result.write_text(json.dumps(found), encoding="utf-8")
    assert comparison.rate(method) == 2 and comparison.runs()[0].lr == 2
    assert sweep.said_of_rate(comparison, method) == "learning rate 2"


@pytest.mark.parametrize("change", ["base", "train", "test", "rows", "task", "beam", "seq_len"])
def test_a_result_of_other_settings_is_not_done_but_named(change: str, tmp_path: Path) -> None:
    setup = a_setup(tmp_path)
    run = Run(setup, Method.parse("full"), 0.1, 50, 1)
    assert not is_done(run)
    run.result.write_text(json.dumps({"settings": run.settings()}), encoding="utf-8")
    assert is_done(run)
    value = 7 if isinstance(getattr(setup, change), int) else "own other"
    other = Run(a_setup(tmp_path, **{change: value}), run.method, 0.1, 50, 1)
    with pytest.raises(InputError, match=r"full-50steps-seed1.json is of other settings \("):
        is_done(other)


def test_a_run_that_fails_is_said_and_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = tiny_flags(tmp_path)
    assert sweep.main([*flags, "--methods", "lora:r=2,targets=x", "full"]) == 1
    said = capsys.readouterr().out
    assert "training of lora-r2-x-2steps-seed1 failed: --lora_targets 'x' is none of" in said
    assert (tmp_path / "out" / "full-2steps-seed1.json").is_file()
    assert not (tmp_path / "out" / "lora-r2-x-2steps-seed1.json").exists()


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    flags = [*tiny_flags(tmp_path), "--methods", "full"]
    assert sweep.main(flags) == 0
    result, folder = (tmp_path / "out" / name for name in ("full-2steps-seed1.json", "runs"))
    first = json.loads(result.read_text(encoding="utf-8"))
    result.unlink()
    (folder / result.stem / "scores.json").unlink()
    seconds = {name: value for name, value in first["seconds"].items() if name != "scoring"}
    (folder / result.stem / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    log = (folder / result.stem / "log.txt").read_text(encoding="utf-8")
    assert sweep.main(flags) == 0
    again = json.loads(result.read_text(encoding="utf-8"))
    assert again["seconds"] | {"scoring": 0} == first["seconds"] | {"scoring": 0}
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert (folder / result.stem / "log.txt").read_text(encoding="utf-8").startswith(log)


@given(seed=st.integers(1, 5), count=st.integers(1, 6))
def test_rows_are_a_subset_of_the_training_rows_that_the_seed_decides(
    seed: int, count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    tiny_flags(folder)
    setup = a_setup(
        folder, train_data=str(folder / "train.jsonl"), valid_data=str(folder / "valid.jsonl")
    )
    run = Run(setup, Method.parse("full"), 0.1, 50, seed, count)
    files = training_files(run)
    chosen = Path(str(files["train_data"])).read_text(encoding="utf-8").splitlines()
    everything = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(chosen) == count and not set(map(str, chosen)) - set(everything)
    assert files == training_files(run)


def test_a_run_is_decoded_as_the_flags_say(tmp_path: Path) -> None:
    setup = a_setup(tmp_path, beam=3, length_penalty=0.9, choose="best", task="webnlg")
    parts = commands(Run(setup, Method.parse("full"), 0.1, 50, 1))
    assert {"--beam=3", "--length_penalty=0.9"} < set(parts["decoding"])
    assert f"--adapter={tmp_path}/runs/full-50steps-seed1:best" in parts["decoding"]
    assert "--task=webnlg" in parts["scoring"]


def test_a_flag_that_is_missing_or_out_of_range_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--valid_data is missing; give all of --train_data"):
        sweep.parse_args(["--methods", "full", "--train_data", "a", "--test_data", "b"])
    with pytest.raises(InputError, match="--workers 0 must be at least 1"):
        sweep.parse_args(["--workers", "0"])
    with pytest.raises(InputError, match="--rows 9 is more than the 6 of"):
        sweep.main([*tiny_flags(tmp_path, rows="9"), "--methods", "full"])
    with pytest.raises(InputError, match="none is no group of runs"):
        e2e.main(["none"])


def test_equal_runs_are_done_once(tmp_path: Path) -> None:
    run = Run(a_setup(tmp_path), Method.parse("full"), 0.1, 50, 1)
    assert launch.missing([run, run]) == [run]
