"""The comparison of methods: which runs there are, what they are told, what becomes of them."""

import json
import math
import os
import re
import shutil
import signal
import threading
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import pytest
import sacrebleu
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import gpt2_ft
from common import locks
from common.errors import InputError
from common.files import read_json_lines
from eval import evaluate, webnlg
from experiments import compare, e2e, launch, runs, slurm, sweep
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
        few = "".join(rows.splitlines(keepends=True)[:138:23])  # six, of as many contexts
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
    args = gpt2_ft.parse_args(Method.parse(kind).flags)
    assert args.method == ("lora" if "r" in KINDS[kind].options else kind)


@pytest.mark.parametrize(
    ("text", "name", "title"),
    [
        ("lora", "lora-r4", "LoRA, r 4"),
        ("lora:r=16,targets=all", "lora-r16-all", "LoRA, r 16, all"),
        ("lora:targets=q,k,v,r=2", "lora-r2-qkv", "LoRA, r 2, q,k,v"),
        ("lora:targets=../q", "lora-r4-q", "LoRA, r 4, ../q"),
        ("dora:r=4,alpha=16.0", "dora-r4-alpha16", "DoRA, r 4, alpha 16"),
        ("full:lr=1e-3/5e-3", "full", "full fine-tuning"),
        ("lora:alpha=1234567", "lora-r4-alpha1234567.0", "LoRA, r 4, alpha 1234567.0"),
        (
            "prefix:hidden=1000000",
            "prefix-length5-hidden1000000",
            "prefix, length 5, hidden 1000000",
        ),
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
        ("lora:lr=0", "--methods lora:lr=0: lr 0 must be above 0 and finite"),
        ("lora:lr=1e-3/nan", "lr nan must be above 0 and finite"),
    ],
)
def test_a_method_that_does_not_exist_is_one_sentence(text: str, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        Method.parse(text)


def test_a_learning_rate_that_is_named_twice_is_one_of_the_grid() -> None:
    assert Method.parse("lora:lr=1e-3/0.001/5e-3").rates == (1e-3, 5e-3)


@given(st.floats(0, 1e300))
def test_a_setting_reaches_the_trainer_as_the_number_that_was_given(value: float) -> None:
    flags = Method.parse(f"lora:alpha={value!r}").flags
    assert float(next(f for f in flags if "alpha" in f).partition("=")[2]) == value


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--lora_dim 8", "has --lora_dim, which each run sets itself"),
        ("--bf16 --max_s=3", "has --max_s, which each run sets itself"),
        ("--method full", "has --method, which"),
        ("--work_dir 'a b'", "has --work_dir, which"),
        ("--label_smooth '0", "cannot be read: No closing quotation"),
    ],
)
def test_training_flags_that_would_replace_a_run_s_own_are_refused(flags: str, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        sweep.parse_args(["--methods", "full", f"--train_flags={flags}"])


def test_flags_that_a_run_sets_are_those_that_are_refused_but_for_its_rhythm(
    tmp_path: Path,
) -> None:
    """How often it is logged, saved and validated may be changed."""
    rhythm = {
        "--valid_batch_size", "--eval_interval", "--save_interval", "--keep_last",
        "--valid_samples", "--log_interval",
    }  # fmt: skip
    for kind in KINDS:
        run = Run(a_setup(tmp_path), Method.parse(kind), 0.1, 2, 1)
        own = {word.partition("=")[0] for word in commands(run)["training"] if word[:2] == "--"}
        assert own - rhythm <= sweep.SET_BY_RUNS
    sweep.check_train_flags("--label_smooth 0 --bf16 --weight_decay -1 --train_bias lora_only")


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
    own = [
        Run(each.setup, method, 0.1, each.steps, seed, rows)
        for each in e2e.comparisons_of(group, None, None)
        for method in each.methods
        for seed in each.seeds
        for rows in each.rows
    ]
    count = len(group.methods) * group.seeds * len(group.rows) * len(group.variants)
    assert len({run.name for run in own}) == len(own) == count
    for run in own:
        gpt2_ft.parse_args(run.method.flags)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with what a comparison of three methods leaves, of which one cannot be trained, and
    the flags that made it."""
    folder = tmp_path_factory.mktemp("compared")
    methods = ["lora:r=2,targets=fc,proj", "lora:r=2,targets=x", "full"]
    flags = [*tiny_flags(folder, rows="4"), "--methods", *methods]
    with (folder / "said.txt").open("w") as said, redirect_stdout(said):
        assert sweep.main(flags) == 1
    return folder, flags


LORA, FULL = "lora-r2-fcproj-4rows-2steps-seed1", "full-4rows-2steps-seed1"


def test_a_run_ends_with_its_result(compared: tuple[Path, list[str]]) -> None:
    out = compared[0] / "out"
    result = json.loads((out / f"{LORA}.json").read_text(encoding="utf-8"))
    said = {name: result[name] for name in ("kind", "rank", "seed", "rows", "targets", "steps")}
    assert said == {
        "kind": "lora", "rank": 2, "seed": 1, "rows": 4, "targets": "fc,proj", "steps": 2,
    }  # fmt: skip
    assert result["trainable"] == 2 * 4 * 2 * (256 + 1024)  # r, blocks, layers, in + out
    assert result["seconds"]["training"] > 0 and result["peak_memory_gb"] > 0
    assert result["ser"] == result["scores"]["SER"] and result["scores"]["BLEU"] is not None
    assert not (out / "runs" / LORA / "state.pt").exists()


def test_what_is_done_is_listed_and_not_done_again(
    compared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = [*compared[1], "--out", str(tmp_path / "out")]
    shutil.copytree(compared[0] / "out", tmp_path / "out")
    path = tmp_path / "out" / f"{FULL}.json"
    before = path.stat().st_mtime_ns
    assert sweep.main([*flags, "--dry_run"]) == 0
    listed = f"{LORA}: done\nlora-r2-x-4rows-2steps-seed1: to be run\n{FULL}: done\n"
    assert capsys.readouterr().out == listed
    assert sweep.main([*flags, "--methods", "full"]) == 0 and path.stat().st_mtime_ns == before


def test_a_run_that_fails_is_said_and_does_not_stop_the_others(
    compared: tuple[Path, list[str]],
) -> None:
    said, name = (compared[0] / "said.txt").read_text(), "lora-r2-x-4rows-2steps-seed1"
    assert f"training of {name} failed: --lora_targets 'x' is none of" in said
    assert (compared[0] / "out" / f"{FULL}.json").is_file()
    assert not (compared[0] / "out" / f"{name}.json").exists()


def test_a_comparison_ends_with_a_table_a_picture_and_differences(
    compared: tuple[Path, list[str]],
) -> None:
    out = compared[0] / "out"
    report = (out / "comparison.md").read_text(encoding="utf-8")
    first, *rows = [line.split(" | ") for line in report.splitlines() if line.startswith("|")]
    assert first[:5] == ["| method", "trained", "lr", "BLEU", "NIST"]
    assert [row[0] for row in rows if len(row) == len(first)][1:] == [
        "| LoRA, r 2, fc,proj", "| LoRA, r 2, x", "| full fine-tuning",
    ]  # fmt: skip
    assert not set("".join(rows[2][1:])) - set("| ")  # it could not be trained
    assert report.endswith("![comparison](comparison.png)\n")
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    [found] = json.loads((out / "significance" / "comparison.json").read_text(encoding="utf-8"))
    scores = [json.loads((out / f"{n}.json").read_text("utf-8"))["scores"] for n in (LORA, FULL)]
    assert found["scores"]["BLEU"]["difference"] == pytest.approx(
        scores[1]["BLEU"] - scores[0]["BLEU"], abs=2e-4
    )


def test_differences_of_one_seed_are_those_that_evaluate_computes(
    compared: tuple[Path, list[str]],
) -> None:
    folder = compared[0]
    ours, theirs = (str(folder / "out" / "runs" / n / "predictions.jsonl") for n in (LORA, FULL))
    flags = ["--data", str(folder / "test.jsonl"), "--predictions", theirs, "--compare", ours]
    flags += ["--bootstrap", str(compare.SAMPLES), "--metrics", "bleu,ser", "--task", "e2e"]
    expected = evaluate.evaluate(evaluate.parse_args(flags))["compare"]
    [found] = json.loads((folder / "out" / "significance" / "comparison.json").read_text("utf-8"))
    for name, own in found["scores"].items():
        assert own["p"] == pytest.approx(expected["p_values"][name], abs=5e-5)
        assert own["difference"] == pytest.approx(expected["differences"][name], abs=5e-5)


WORDS = st.lists(st.sampled_from(["the", "a", "pub", "oak", "near", "by"]), min_size=5)


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=2, max_size=5))
def test_a_pooled_score_is_that_of_the_texts_of_all_seeds_as_one_corpus(items) -> None:
    texts = [[" ".join(words) for words in item] for item in items]
    references = [[reference] for reference, _, _ in texts]
    systems = [[item[1] for item in texts], [item[2] for item in texts]]
    makers = [webnlg.bleu(references, system, "13a", smooth="exp") for system in systems]
    both = sacrebleu.corpus_bleu(sum(systems, []), [[r for [r] in references] * 2])
    assert compare.pooled(makers).score() == pytest.approx(both.score / 100, abs=1e-9)


def test_the_learning_rate_of_the_best_loss_is_taken_and_one_that_failed_is_not(
    tmp_path: Path,
) -> None:
    setup, method = a_setup(tmp_path), Method.parse("full:lr=1/2/3")
    comparison = sweep.Comparison(setup, (method,), steps=50)
    grid = comparison.grid()
    assert [run.name for run in grid] == [f"full-lr{rate}-50steps" for rate in (1, 2, 3)]
    assert comparison.rate(method) is None and comparison.runs() == []
    for run, loss in zip(grid, (1.5, 1.2), strict=False):
        run.result.parent.mkdir(exist_ok=True)
        found = {"settings": run.settings(), "valid_loss": {"last": loss}}
        run.result.write_text(json.dumps(found), encoding="utf-8")
    assert comparison.rate(method) == 2 and comparison.runs()[0].lr == 2
    assert sweep.said_of_rate(comparison, method) == "learning rate 2"


def test_a_rate_is_the_lowest_that_comes_within_a_percent_of_the_best() -> None:
    assert sweep.chosen_rate({0.1: 2.0, 0.2: 1.009, 0.3: 1.0, 0.4: None}) == 0.2
    assert sweep.chosen_rate({0.1: 1.02, 0.2: 1.0}) == 0.2
    assert sweep.chosen_rate({0.1: None}) is None and sweep.chosen_rate({}) is None


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


def test_a_run_that_was_stopped_resumes_with_what_was_left(
    compared: tuple[Path, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared[0] / "out", out)
    first = json.loads((out / f"{FULL}.json").read_text(encoding="utf-8"))
    (out / f"{FULL}.json").unlink()
    seconds = {name: value for name, value in first["seconds"].items() if name != "scoring"}
    (out / "runs" / FULL / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    adapter = out / "runs" / FULL / "model.2.safetensors"
    before = adapter.stat().st_mtime_ns
    assert sweep.main([*compared[1], "--methods", "full", "--out", str(out)]) == 0
    again = json.loads((out / f"{FULL}.json").read_text(encoding="utf-8"))
    assert again["seconds"] | {"scoring": 0} == first["seconds"] | {"scoring": 0}
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert adapter.stat().st_mtime_ns == before


def undone(compared: tuple[Path, list[str]], out: Path) -> list[str]:
    """A copy of the results in `out` in which full's run has all of its parts and no result, and
    the flags that make it."""
    shutil.copytree(compared[0] / "out", out)
    (out / f"{FULL}.json").unlink()
    return [*compared[1], "--methods", "full", "--out", str(out)]


def test_a_loss_that_is_no_number_is_none_in_the_result_and_an_empty_cell_in_the_table(
    compared: tuple[Path, list[str]], tmp_path: Path
) -> None:
    flags = undone(compared, tmp_path / "out")
    log = tmp_path / "out" / "runs" / FULL / "log.jsonl"
    records = [
        r | ({"loss": math.nan} if r["kind"] == "valid" else {}) for r in read_json_lines(log)
    ]
    log.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    assert sweep.main(flags) == 0
    text = (tmp_path / "out" / f"{FULL}.json").read_text(encoding="utf-8")
    assert json.loads(text)["valid_loss"] == {"last": None, "best": None} and "NaN" not in text
    assert "nan" not in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"scores": [1]}, "seed1.json: scores is missing or damaged; delete the file"),
        ({"valid_loss": {"last": "low"}}, "seed1.json: valid_loss is missing or damaged"),
        ({"trainable": None}, "seed1.json: trainable is missing or damaged"),
        ({"settings": 3}, "seed1.json is of other settings"),
        (None, "seed1.json holds no object"),
    ],
)
def test_a_result_that_was_damaged_is_named(
    compared: tuple[Path, list[str]], tmp_path: Path, change: dict | None, says: str
) -> None:
    shutil.copytree(compared[0] / "out", tmp_path / "out")
    path = tmp_path / "out" / f"{FULL}.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps([] if change is None else result | change), encoding="utf-8")
    with pytest.raises(InputError, match=says):
        sweep.main([*compared[1], "--methods", "full", "--out", str(tmp_path / "out")])


def test_what_failed_is_said_where_the_disk_has_no_room_for_the_log(tmp_path: Path) -> None:
    run = Run(a_setup(tmp_path), Method.parse("full"), 0.1, 50, 1)
    run.folder.mkdir(parents=True)
    (run.folder / "log.txt").symlink_to("/dev/full")
    failing = ["-c", "print('step 1'); raise SystemExit('error: model.1 cannot be written')"]
    with pytest.raises(InputError, match="failed: model.1 cannot be written; .*log.txt has all"):
        runs.execute(run, "training", failing, 1)


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


def test_rows_of_named_columns_are_drawn_under_the_usual_names(tmp_path: Path) -> None:
    table = tmp_path / "facts.csv"
    table.write_text("id,facts,text\n1,a,One.\n2,b,Two.\n3,c,Three.\n", encoding="utf-8")
    setup = a_setup(
        tmp_path, train_data=str(table), valid_data=str(table), fields="facts:text", variant="csv"
    )
    files = training_files(Run(setup, Method.parse("full"), 0.1, 50, 1, 2))
    assert set(files) == {"train_data", "valid_data"}
    rows = [read_json_lines(str(path)) for path in files.values()]
    assert rows[1] == [
        {"context": "a", "completion": "One."}, {"context": "b", "completion": "Two."},
        {"context": "c", "completion": "Three."},
    ]  # fmt: skip
    assert len(rows[0]) == 2 and all(row in rows[1] for row in rows[0])


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
    with pytest.raises(InputError, match="--beam 0 must be from 1 to 1000"):
        sweep.parse_args(["--beam", "0"])
    with pytest.raises(InputError, match="--rows 9 is more than the 6 of"):
        sweep.main([*tiny_flags(tmp_path, rows="9"), "--methods", "full"])
    with pytest.raises(InputError, match="none is no group of runs"):
        e2e.main(["none"])


@pytest.mark.parametrize(
    "flag, says",
    [
        ("seq_len", "--seq_len 600 is above the model's 512"),
        (
            "eval_len",
            "--eval_len 600 leaves no room for a context in a window of 512 tokens",
        ),
    ],
)
def test_lengths_that_a_base_does_not_have_are_refused_before_anything_is_trained(
    flag: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        sweep.main([*tiny_flags(tmp_path, **{flag: "600"}), "--methods", "full"])
    assert not (tmp_path / "out").exists()


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.1)
    out = tmp_path / "out"
    flags = [*tiny_flags(tmp_path), "--methods", "full"]
    (out / "runs").mkdir(parents=True)
    with (
        locks.locked(out / "runs", "", ""),
        pytest.raises(InputError, match=f"--out {out} is in use by another sweep; give another"),
    ):
        sweep.main(flags)
    assert sweep.main([*flags, "--dry_run"]) == 0  # which only looks


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    flags = [*tiny_flags(tmp_path), "--methods", "full", "--out", str(tmp_path / "test.jsonl")]
    with pytest.raises(InputError, match=r"test.jsonl/runs cannot be made: (File|Not a dir)"):
        sweep.main(flags)


def test_equal_runs_are_done_once(tmp_path: Path) -> None:
    run = Run(a_setup(tmp_path), Method.parse("full"), 0.1, 50, 1)
    assert launch.missing([run, run]) == [run]


STAND_IN = """#!/usr/bin/env bash
# Takes what sbatch takes of the script, and runs the tasks of its array one after another.
echo "$*" >> "$0.log"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "${@: -1}")
for task in $(seq 0 "$last"); do
  SLURM_ARRAY_TASK_ID=$task bash "${@: -1}" >> "$0.log" 2>&1
done
echo 77
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for sbatch on PATH; the path of what was told to it and what tasks printed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(STAND_IN, encoding="utf-8")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "sbatch.log"


def test_runs_are_tasks_of_a_slurm_array_that_the_same_command_collects(
    tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = [*tiny_flags(tmp_path), "--methods", "full", "lora:targets=x", "--launcher", "slurm"]
    flags += ["--sbatch", "--gpus=1 --time=1:00:00"]
    assert sweep.main(flags) == 0
    assert "job 77: 2 runs submitted" in capsys.readouterr().out
    told = cluster.read_text(encoding="utf-8")
    assert told.startswith("--parsable --gpus=1 --time=1:00:00 ")
    assert "full-2steps-seed1: valid loss" in told and "'x' is none of" in told
    assert sweep.main(flags) == 0
    said = capsys.readouterr().out
    assert "| full fine-tuning |" in said and "job 77: 1 runs submitted" in said
    (cluster.parent / "squeue").write_text("#!/bin/sh\necho 77 PENDING\n", encoding="utf-8")
    (cluster.parent / "squeue").chmod(0o755)
    assert sweep.main(flags) == 0
    assert "job 77 is queued or runs" in capsys.readouterr().out


def test_a_task_of_the_array_is_the_run_that_was_submitted(tmp_path: Path) -> None:
    run = Run(a_setup(tmp_path), Method.parse("lora:r=2,lr=1/2"), 0.1, 50, 1, 7)
    assert slurm.run_of(json.loads(json.dumps(asdict(run)))) == run


def test_a_cluster_without_sbatch_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = Run(a_setup(tmp_path), Method.parse("full"), 0.1, 50, 1)
    with pytest.raises(InputError, match="needs sbatch, which is not on PATH"):
        slurm.submit([run], 1, 1, "")


def test_a_learning_rate_that_diverges_is_a_result_of_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, method = a_setup(tmp_path), Method.parse("full:lr=1/2")
    comparison = sweep.Comparison(setup, (method,))
    diverging = ["-c", f"raise SystemExit('error: 25 steps in a row {runs.DIVERGED}; lower --lr')"]
    monkeypatch.setattr(runs, "commands", lambda run: {"training": diverging})
    for run in comparison.grid():
        assert "25 steps in a row" in runs.perform(run)["failed"] and is_done(run)
    assert comparison.rate(method) is None
    assert sweep.said_of_rate(comparison, method).startswith("every learning rate failed")


def test_a_sweep_that_is_told_to_stop_ends_its_runs_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep = ["-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(runs, "commands", lambda run: {"training": asleep})
    own = [Run(a_setup(tmp_path), Method.parse("full"), 0.1, 50, seed) for seed in (1, 2, 3)]
    threading.Timer(1, os.kill, [os.getpid(), signal.SIGTERM]).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt, match="the same command resumes"):
        launch.carry_out(own, workers=1, threads=1)
    assert time.monotonic() - started < 30 and not runs.processes
    assert not own[2].folder.exists()
