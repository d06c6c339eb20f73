"""Validation by scores of texts: they are those of the separate programs, they disturb no training,
and they choose the best adapter, however often the run is stopped."""

import json
import math
import os
import signal
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import METHODS, ROOT, Tiny, finish, refusal, start
from test_resume import Killed, adapters, log_records, same_runs, scalars

import gpt2_beam
import gpt2_ft
from checkpoints import read_adapter
from common.errors import InputError
from data_utils import load_tokenizer
from decoding.packed import PackedLinear, RoundedLinear, lent_to_decoding
from eval import choice, evaluate, summary
from loralib import LoRALayer
from training import resume, scores, trackers

NANO, SAMPLE = ROOT / "data" / "nano", ROOT / "data" / "sample"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
OFFICIAL = choice.SCORES
SMALL = ["--valid_beam", 2, "--valid_eval_len", 12]


@pytest.fixture
def sample(tmp_path: Path) -> Tiny:
    """A run of 12 steps, 6 an epoch, on the shipped sample and base, with 20 contexts to decode."""
    for name, rows in (("train", 24), ("valid", 60)):
        lines = (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    return Tiny(tmp_path, NANO / "model.safetensors", "gpt2.nano")


FIXED = ["--vocab", NANO, "--seq_len", 128, "--valid_batch_size", 32, "--valid_samples", 1]


def argv(sample: Tiny, work_dir: str, *more: object) -> list[str]:
    return sample.argv(work_dir, *FIXED, *more)


def valid_records(folder: Path) -> dict[int, dict]:
    return {r["step"]: r for r in log_records(folder) if r["kind"] == "valid"}


def by_programs(sample: Tiny, adapter: str, task: str, names: list[str], flags: list) -> dict:
    """The scores that gpt2_beam.py and eval.evaluate give the validation data, by the names of
    logs."""
    data, base = str(sample.folder / "valid.jsonl"), str(sample.base)
    output, result = str(sample.folder / "out.jsonl"), sample.folder / "scores.json"
    own = [str(part).replace("--valid_", "--") for part in flags]
    gpt2_beam.main(
        ["--data", data, "--adapter", adapter, "--init_checkpoint", base, "--vocab", str(NANO),
         "--device", "cpu", "--output_file", output, *own]
    )  # fmt: skip
    metrics = ",".join(OFFICIAL[name] for name in names)
    evaluate.main(
        ["--task", task, "--data", data, "--predictions", output, "--json", str(result),
         "--metrics", metrics, "--vocab", str(NANO)]
    )  # fmt: skip
    found = json.loads(result.read_text(encoding="utf-8"))["scores"]
    return {name: found[OFFICIAL[name]] for name in names}


@pytest.mark.parametrize(
    "task, metric, flags",
    [
        ("e2e", "bleu,nist,ser,chrf", [*SMALL, "--valid_no_repeat_ngram_size", 3]),
        ("own", "loss,bleu,chrf", ["--valid_beam", 1, "--valid_length_penalty", 0]),
        ("webnlg", "chrf,bleu", [*SMALL, "--valid_length_penalty", 1.5]),
    ],
)
def test_the_logged_scores_are_those_of_the_two_programs(
    task: str, metric: str, flags: list, sample: Tiny
) -> None:
    more = ["--valid_metric", metric, *flags, "--eval_interval", 3, "--lora_kind", "dora"]
    gpt2_ft.main(argv(sample, "run", *more, "--valid_task", task))
    names = [name for name in metric.split(",") if name != "loss"]
    logged = valid_records(sample.folder / "run")
    assert list(logged) == [3, 6, 9, 12]
    for step in (3, 12):
        expected = by_programs(sample, f"{sample.folder / 'run'}:{step}", task, names, flags)
        assert {name: logged[step][name] for name in names} == expected
    described = json.loads((sample.folder / "run" / "run.json").read_text(encoding="utf-8"))
    assert described["settings"]["valid_task"] == task


def test_rows_of_token_ids_are_scored_as_their_texts(sample: Tiny) -> None:
    tokenizer = load_tokenizer(NANO)
    path = sample.folder / "valid.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    end = tokenizer.token_to_id("<|endoftext|>")
    for row in rows:
        row["context"] = [*tokenizer.encode(row["context"]).ids, end]
        row["completion"] = [*tokenizer.encode(" " + row["completion"]).ids, end]
    more = ["--max_step", 3, "--valid_metric", "bleu,ser", *SMALL]
    gpt2_ft.main(argv(sample, "text", *more))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    gpt2_ft.main(argv(sample, "ids", *more))
    logged = valid_records(sample.folder / "ids")
    assert logged == valid_records(sample.folder / "text")
    expected = by_programs(sample, str(sample.folder / "ids"), "e2e", ["bleu", "ser"], SMALL)
    assert {name: logged[3][name] for name in expected} == expected


LORA = ["--lora_dim", "2", "--lora_dropout", "0.3"]
TRAINED = METHODS | {
    "lora": LORA,
    "pissa": [*LORA, "--lora_kind", "pissa", "--lora_targets", "all", "--optimizer", "torch"],
    "bf16": [*LORA, "--bf16", "--lora_targets", "q,wte", "--gradient_checkpointing"],
}


@pytest.mark.parametrize("kind", TRAINED)
def test_training_has_the_same_bytes_with_and_without_scores(kind: str, sample: Tiny) -> None:
    more = [*FIXED, "--max_epoch", 1, "--max_step", 6, "--valid_samples", 0]
    gpt2_ft.main(sample.argv_of(TRAINED[kind], "without", *more))
    more += ["--valid_metric", "loss,bleu", "--valid_texts", 6, *SMALL]
    gpt2_ft.main(sample.argv_of(TRAINED[kind], "with", *more))
    plain, scored = sample.folder / "without", sample.folder / "with"
    assert adapters(plain) == adapters(scored)
    assert (plain / "state.pt").read_bytes() == (scored / "state.pt").read_bytes()
    names = set(OFFICIAL)
    records = [{k: v for k, v in r.items() if k not in names} for r in log_records(scored)]
    assert records == log_records(plain)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_was_lent_to_decoding_is_what_it_was(
    precision: str, sample: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    real = gpt2_ft.prepare
    monkeypatch.setattr(gpt2_ft, "prepare", lambda *a: runs.append(real(*a)) or runs[-1])
    gpt2_ft.main(argv(sample, "run", "--max_step", 3, "--lora_targets", "all"))
    model = runs[0].model

    def described() -> list:
        modules = [(name, id(module), module.training) for name, module in model.named_modules()]
        tensors = [(n, id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()]
        return [*modules, *tensors, model.packed_head]

    before, values = described(), {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(Killed), lent_to_decoding(model, precision):
        assert not model.training
        packed = [type(m) for m in model.modules() if isinstance(m, PackedLinear | RoundedLinear)]
        assert {*packed} == {PackedLinear if precision == "fp32" else RoundedLinear}
        assert not [m for m in model.modules() if isinstance(m, LoRALayer)]
        raise Killed
    assert described() == before
    assert not [m for m in model.modules() if getattr(m, "merged", False)]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in values.items())


def test_two_processes_score_what_one_does(sample: Tiny) -> None:
    """20 contexts are two batches; each process decodes one."""
    more = ["--lora_dropout", 0, "--max_step", 3, "--valid_metric", "nist,bleu,ser", *SMALL]
    two = argv(sample, "two", *more, "--grad_acc", 1)
    code, out, err = finish(start([*TORCHRUN, 2, "gpt2_ft.py", *two]))
    assert (code, err) == (0, "")
    gpt2_ft.main(argv(sample, "one", *more))
    (ours,), (theirs,) = (valid_records(sample.folder / n).values() for n in ("one", "two"))
    names = ("loss", "nist", "bleu", "ser")
    assert [theirs[n] for n in names] == pytest.approx([ours[n] for n in names], abs=1e-5)
    assert "valid NIST" in out


def killed_life(arguments: list[str], prepare: Callable[[], object]) -> int:
    """Live in a fork after `prepare`; the signal that ended it, 0 for none."""
    child = os.fork()
    if child == 0:
        prepare()
        gpt2_ft.main(arguments)
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def dying(module: object, name: str, call: int) -> Callable[[], None]:
    """Let a process die by SIGKILL as the given call of a function begins."""

    def patch() -> None:
        real, calls = getattr(module, name), iter(range(1, 10**6))

        def function(*arguments: object, **more: object) -> object:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        setattr(module, name, function)

    return patch


BY_BLEU = ["--valid_metric", "bleu,nist", *SMALL, "--resume", "auto"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by BLEU that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    for name, rows in (("train", 24), ("valid", 60)):
        lines = (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    own = Tiny(folder, NANO / "model.safetensors", "gpt2.nano")
    gpt2_ft.main(argv(own, "run", *BY_BLEU))
    return folder / "run"


@pytest.mark.parametrize(
    "module, name, call",
    [
        (gpt2_ft, "evaluate", 3),
        (scores, "search_batch", 4),  # the second batch of the validation at step 6
        (scores, "scores", 3),
        (gpt2_ft, "write_best", 2),
        (gpt2_ft, "log_validation", 3),
        (gpt2_ft, "show_validation", 1),
        (gpt2_ft, "save", 4),  # after the validation at step 12
        (resume, "write_adapter", 2),
    ],
)
def test_a_run_killed_in_any_phase_of_a_validation_resumes_to_the_same_bytes(
    module: object, name: str, call: int, sample: Tiny, whole: Path
) -> None:
    arguments = argv(sample, "run", *BY_BLEU)
    assert killed_life(arguments, dying(module, name, call)) == signal.SIGKILL
    gpt2_ft.main(arguments)
    same_runs(whole, sample.folder / "run")
    same_runs(sample.folder / "run", whole)


@pytest.mark.parametrize("batch, step", [(1, 4), (2, 4), (3, 6), (7, 12)])
def test_a_signal_stops_a_validation_between_its_batches_and_the_next_life_repeats_it(
    batch: int, step: int, sample: Tiny, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, searched = scores.search_batch, []

    def signalled(*arguments: object) -> object:
        searched.append(arguments)
        if len(searched) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    arguments, run = argv(sample, "run", *BY_BLEU), sample.folder / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(scores, "search_batch", signalled)
        gpt2_ft.main(arguments)
    stopped_within = batch % 2 == 1  # a validation has two batches
    stopped_at = step if stopped_within else step + 1
    assert ended.value.code == 143
    assert len(searched) == batch
    assert read_adapter(f"{run}:last")[0].step == stopped_at
    assert (step in valid_records(run)) != stopped_within
    gpt2_ft.main(arguments)
    same_runs(run, whole)


def test_a_signal_stops_the_loss_of_a_validation_between_its_batches(
    sample: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = argv(sample, "run", "--valid_batch_size", 4, "--resume", "auto")
    real, run = gpt2_ft.evaluate, sample.folder / "run"

    def signalled(*rest: object) -> tuple[float, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(gpt2_ft, "evaluate", signalled)
        gpt2_ft.main(arguments)
    assert ended.value.code == 130 and valid_records(run) == {}
    assert read_adapter(f"{run}:last")[0].step == 4
    gpt2_ft.main(arguments)
    gpt2_ft.main(argv(sample, "whole", "--valid_batch_size", 4))
    same_runs(run, sample.folder / "whole")


def give(monkeypatch: pytest.MonkeyPatch, validations: list[dict[str, float]]) -> None:
    """Let the validations of this process measure these values, one after the other."""
    losses, others = iter(validations), iter(validations)
    monkeypatch.setattr(gpt2_ft, "evaluate", lambda *_: (next(losses)["loss"], 1.0))
    monkeypatch.setattr(
        scores.ValidTexts,
        "score",
        lambda *_: {k: v for k, v in next(others).items() if k != "loss"},
    )


@pytest.mark.parametrize(
    "metric, values, best, last",
    [
        ("bleu", [0.2, 0.3, 0.3, 0.25], 4, 8),  # the first of two equal ones
        ("ser", [0.4, 0.2, 0.3, 0.2], 4, 8),
        ("nist", [1.0, 0.5, math.nan], 2, 6),
        ("loss", [5.0, 4.0, 4.5, 4.25], 4, 8),
    ],
)
def test_the_first_metric_decides_what_is_best_and_when_patience_ends(
    metric: str,
    values: list[float],
    best: int,
    last: int,
    sample: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    others = ["bleu", "chrf"] if metric != "bleu" else ["chrf", "loss"]
    rising = [{"loss": 9.0 - n, "chrf": n / 10, "bleu": 0.1} for n in range(4)]
    give(monkeypatch, [row | {metric: v} for row, v in zip(rising, values, strict=False)])
    more = ["--patience", 2, "--eval_interval", 2, "--valid_metric", ",".join([metric, *others])]
    gpt2_ft.main(argv(sample, "run", *more))
    run = sample.folder / "run"
    assert read_adapter(f"{run}:last")[0].step == last
    assert read_adapter(run / "model.best.safetensors")[0].step == best
    *_, early, end = capsys.readouterr().out.splitlines()
    assert f"Stopped early after step {last}: 2 validations" in early and f"step {best} (" in early
    value = choice.in_words(metric, values[best // 2 - 1])
    assert end.endswith(f"model.best.safetensors, {value} at step {best}")


def test_a_metric_in_capitals_is_kept_as_the_log_spells_it(sample: Tiny) -> None:
    """Whoever sums the run up looks for it in the log."""
    more = ["--valid_metric", "BLEU,Loss", "--valid_texts", 2, *SMALL, "--max_step", 4]
    gpt2_ft.main(argv(sample, "run", *more))
    result = summary.read_run(sample.folder / "run")
    assert result["settings"]["valid_metric"] == "bleu,loss"
    assert "best valid BLEU" in summary.headline(result | {"seconds": {}})


def test_what_is_best_is_shown_wherever_a_run_is_followed(
    sample: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    sent = []
    fake = types.SimpleNamespace(log=lambda v, step: sent.append(v), finish=lambda: None)
    monkeypatch.setattr(gpt2_ft, "import_wandb", lambda: None)
    monkeypatch.setattr(trackers, "start_wandb", lambda *_: fake)
    own = ["--valid_metric", "ser,bleu", "--csv", "--wandb", "p", *SMALL]
    gpt2_ft.main(argv(sample, "run", *own))
    run = sample.folder / "run"
    logged = valid_records(run)
    best = min(logged, key=lambda step: logged[step]["ser"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "valid loss" in line]
    for line, record in zip(lines, logged.values(), strict=True):
        assert (
            f"valid SER {100 * record['ser']:.2f} | valid BLEU {100 * record['bleu']:.2f}" in line
        )
    values = [record["ser"] for record in logged.values()]
    assert [v["valid/ser"] for v in sent if "valid/ser" in v] == values
    assert (run / "log.csv").read_text(encoding="utf-8").splitlines()[0].endswith(",ser,bleu")
    shown = scalars(run)
    assert [step for step, _ in shown["score/ser-valid"]] == list(logged)
    assert shown["score/best"][-1][1] == pytest.approx(logged[best]["ser"])


def test_another_metric_or_other_rules_are_refused_on_resume(
    sample: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    give(monkeypatch, [{"loss": 5.0 - n, "bleu": 0.5 - n / 10} for n in range(9)])
    half = ["--max_step", 12, "--max_epoch", 1, "--resume", "auto", "--resume_anyway"]
    gpt2_ft.main(argv(sample, "run", "--valid_metric", "bleu", *half))
    state = (sample.folder / "run" / "state.pt").read_bytes()
    on = ["--max_epoch", 1, "--max_step", 12, "--resume", "auto"]
    for more, words in (
        ([], "valid_metric, .* changed .*valid_metric was bleu, is loss"),
        (["--valid_metric", "chrf"], "valid_metric changed .*was bleu, is chrf"),
        (["--valid_metric", "bleu", "--valid_beam", 3], "valid_beam changed .*was 10, is 3"),
        (["--valid_metric", "bleu", "--valid_task", "e2e"], "valid_task changed .*own, is e2e"),
    ):
        with pytest.raises(InputError, match=f"--resume: {words}.*--resume_anyway"):
            gpt2_ft.main(argv(sample, "run", *more, *on))
    assert (sample.folder / "run" / "state.pt").read_bytes() == state
    capsys.readouterr()
    gpt2_ft.main(argv(sample, "run", *on, "--max_epoch", 2, "--resume_anyway"))
    out = capsys.readouterr().out
    assert "of step 4, was chosen under other flags: the next validation counts" in out
    assert read_adapter(sample.folder / "run" / "model.best.safetensors")[0].step == 12


def test_a_state_without_the_score_of_its_best_adapter_is_refused(sample: Tiny) -> None:
    more = ["--max_step", 3, "--valid_metric", "bleu", *SMALL]
    gpt2_ft.main(argv(sample, "run", *more))
    path = sample.folder / "run" / "state.pt"
    content = torch.load(path, weights_only=True)
    assert content["choice"]["valid_metric"] == "bleu"
    torch.save(content | {"best_scores": {}}, path)
    with pytest.raises(InputError, match="state.pt has no good best_scores"):
        gpt2_ft.main(argv(sample, "run", *more, "--resume", "auto"))


def test_logits_that_are_nan_have_no_best_score(
    sample: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nan(*_: object) -> None:
        raise ValueError("the model's logits are NaN")

    monkeypatch.setattr(scores, "search_batch", nan)
    gpt2_ft.main(argv(sample, "run", "--max_step", 3, "--valid_metric", "bleu", *SMALL))
    assert math.isnan(valid_records(sample.folder / "run")[3]["bleu"])
    assert not (sample.folder / "run" / "model.best.safetensors").exists()


REFUSED = {
    "unknown": (["--valid_metric", "bleu,rouge"], "--valid_metric 'rouge' is none of loss, bleu"),
    "empty": (["--valid_metric", ""], "--valid_metric '' is none of loss"),
    "not of the task": (
        ["--valid_metric", "nist", "--valid_task", "webnlg"],
        "--valid_metric nist is no score of --valid_task webnlg, which has bleu, chrf",
    ),
    "beam": (
        ["--valid_metric", "bleu", "--valid_beam", "0"],
        "--valid_beam 0 must be from 1 to 1000",
    ),
    "beams": (
        ["--valid_metric", "bleu", "--valid_beam", "1001"],
        "--valid_beam 1001 must be from 1 to 1000",
    ),
    "penalty": (
        ["--valid_metric", "bleu", "--valid_length_penalty", "nan"],
        "--valid_length_penalty nan must be",
    ),
    "texts": (["--valid_metric", "bleu", "--valid_texts", "0"], "--valid_texts 0 must be at least"),
    "without scores": (["--valid_beam", "4"], "--valid_beam is for scores of texts"),
    "no room": (
        ["--valid_metric", "bleu", "--valid_eval_len", "4096"],
        "--valid_eval_len 4096 leaves no room for a context in a window of",
    ),
}


@pytest.mark.parametrize("more", [["--dry_run"], []], ids=["dry", "real"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_scored_is_refused_in_one_sentence(
    case: str, more: list, sample: Tiny, capsys: pytest.CaptureFixture
) -> None:
    flags, sentence = REFUSED[case]
    assert sentence in refusal(argv(sample, "run", *flags, *more), capsys)
    assert not (sample.folder / "run").exists()


def test_scores_need_validation_data_a_vocabulary_and_for_ser_contexts_of_e2e(
    sample: Tiny, tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    bare = argv(sample, "run", "--valid_metric", "bleu,ser")
    at = bare.index("--valid_data")
    err = refusal(bare[:at] + bare[at + 2 :], capsys)
    assert "--valid_metric bleu,ser is of validation texts; give --valid_data" in err
    err = refusal(tiny.argv("run", "--valid_metric", "bleu"), capsys)
    assert "--valid_metric bleu is of texts, which need --vocab" in err
    path = sample.folder / "valid.jsonl"
    for context, reason in (("a plain sentence", "no meaning"), ("size : big", "has not: size")):
        path.write_text(json.dumps({"context": context, "completion": "b"}), encoding="utf-8")
        err = refusal(bare, capsys)
        assert f"--valid_metric ser: {path} is not of E2E: " in err and reason in err
    assert not (sample.folder / "run").exists()


def test_a_dry_run_says_what_the_scores_add(sample: Tiny, capsys: pytest.CaptureFixture) -> None:
    more = ["--valid_metric", "bleu,ser", "--valid_texts", 7, "--dry_run"]
    gpt2_ft.main(argv(sample, "run", *more))
    out = capsys.readouterr().out
    assert "Scores: BLEU, SER of 7 contexts with " in out
    assert (
        "decoded 4 times with beam 10 and at most 64 tokens; the best adapter is chosen by BLEU"
        in out
    )
