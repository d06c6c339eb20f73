"""The scripts of the benchmarks and of clusters: what they print, start and sum up."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from data_utils import EpochSampler
from eval import summary
from model import MODEL_CARDS, GPT2Config, GPT2LMModel

PARTS = (
    "scripts",
    "data",
    "eval",
    "loralib",
    "methods",
    "common",
    "checkpoints",
    "training",
    "decoding",
    "requirements.txt",
    *(p.name for p in ROOT.glob("*.py")),
)
E2E_LINE = "name : Blue Spice | Type : coffee shop||Blue Spice is a coffee shop . \n"
NOWHERE = {"https_proxy": "http://127.0.0.1:1", "MIRROR": "", "HF_ENDPOINT": "http://127.0.0.1:1"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The repository's code in a folder of its own, with this Python as its environment."""
    for name in PARTS:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    activate = f'export PATH="{Path(sys.executable).parent}:$PATH"\n'
    (tmp_path / ".venv/bin/activate").write_text(activate, encoding="utf-8")
    stamp = "cat requirements.txt requirements.txt | cksum > .venv/requirements.txt.done"
    subprocess.run(["bash", "-c", stamp], cwd=tmp_path, check=True)
    return tmp_path


def run_script(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """A script of the checkout with tiny data, without a network."""
    inherited = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG")}
    path = f"{checkout / 'commands'}:{os.environ['PATH']}"
    fixed = {
        "PATH": path,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "DATA_DIR": str(checkout / "raw"),
    }
    return subprocess.run(
        ["bash", *command],
        cwd=checkout,
        env=inherited | fixed | NOWHERE | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def write_raw(checkout: Path, task: str, files: dict[str, str]) -> None:
    folder = checkout / "raw" / task
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def write_command(checkout: Path, name: str, text: str) -> None:
    """A program that the scripts find before the real one."""
    (checkout / "commands").mkdir(exist_ok=True)
    (checkout / "commands" / name).write_text(text, encoding="utf-8")
    (checkout / "commands" / name).chmod(0o755)


def write_vocabulary(checkout: Path) -> None:
    """The nano base's, where GPT-2's is expected."""
    (checkout / "vocab").mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(ROOT / "data/nano" / name, checkout / "vocab" / name)


def listing(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "__pycache__" not in str(p)}


def counted(card: str, rows: int, epochs: int) -> tuple[int, int]:
    """Trained parameters of r 4 on q and v, counted on a model; steps, counted on a sampler."""
    with torch.device("meta"):
        model = GPT2LMModel(GPT2Config(**MODEL_CARDS[card], lora_attn_dim=4))
    trained = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    return trained, epochs * len(list(EpochSampler(rows, 8).steps(1)))


def test_a_dry_run_prints_parameters_and_steps_and_leaves_only_data(checkout: Path) -> None:
    splits = {"train.txt": 41, "valid.txt": 3, "test.txt": 3}
    write_raw(checkout, "e2e", {name: E2E_LINE * rows for name, rows in splits.items()})
    write_vocabulary(checkout)
    before = listing(checkout)
    # A tiny vocabulary is that of random weights, not of the published ones; 30 steps have no room
    # for the recipe's warm-up of 500.
    done = run_script(
        checkout, "scripts/e2e.sh", "--dry_run", INIT_CHECKPOINT="none", WARMUP_STEP="3"
    )
    assert (done.returncode, done.stderr) == (0, "")
    trained, steps = counted("gpt2.md", 41, 5)
    assert f"gpt2.md: {trained:,} trainable parameters" in done.stdout
    assert f"41 rows in steps of 8, 6 steps an epoch, {steps} in all" in done.stdout
    made = {
        "datasets",
        "datasets/e2e",
        *(f"datasets/e2e/{s}.jsonl" for s in ("train", "valid", "test")),
    }
    assert listing(checkout) - before == made


@pytest.mark.parametrize("task, steps", [("e2e", "26,290"), ("webnlg", "11,270")])
def test_the_paper_runs_have_its_steps_and_parameters(
    task: str, steps: str, checkout: Path, shared: Path
) -> None:
    settings = {"DATA_DIR": str(shared / "data"), "VALID_ROWS": "8"}
    done = run_script(checkout, f"scripts/{task}.sh", "--dry_run", **settings)
    assert (done.returncode, done.stderr) == (0, "")
    sizes, published, disk = done.stdout.splitlines()[-3:]
    assert published.endswith("LoRA: 0.35 M, 0.1 % of the model and no count; here 393,216")
    assert "gpt2.md: 393,216 trainable parameters" in sizes and f"{steps} in all" in sizes
    assert disk.startswith("Disk: up to ")
    assert not (checkout / "runs").exists()


RECIPES = {  # trained numbers, rows of a step and epochs on gpt2.md, of Li and Liang's table 5
    "e2e adapter_l": (368_784, 5, 10), "e2e adapter_l 224": (11_089_152, 5, 5),
    "e2e adapter_h": (11_064_576, 5, 5), "e2e full": (354_823_168, 10, 5),
    "e2e top2": (25_194_496, 10, 5), "e2e bitfit": (271_360, 8, 5),
    "webnlg adapter_l": (368_784, 5, 10), "webnlg full": (354_823_168, 6, 10),
    "e2e prefix": (25_744_896, 10, 5), "webnlg prefix": (25_744_896, 5, 5),
    "webnlg top2": (25_194_496, 9, 10), "webnlg adapter_l 224": (11_089_152, 5, 5),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_each_method_has_its_published_recipe(name: str, checkout: Path) -> None:
    task, method, *dim = name.split()
    trained, batch, epochs = RECIPES[name]
    write_vocabulary(checkout)
    if task == "e2e":
        write_raw(checkout, "e2e", dict.fromkeys(("train.txt", "valid.txt", "test.txt"), E2E_LINE))
    else:
        text = json.dumps({"entries": [webnlg_entry(1, "Airport", 3)]})
        write_raw(checkout, "webnlg", dict.fromkeys(("train.json", "dev.json", "test.json"), text))
    settings = {"METHOD": method, "INIT_CHECKPOINT": "none"} | (
        {"ADAPTER_DIM": dim[0]} if dim else {}
    )
    done = run_script(checkout, f"scripts/{task}.sh", "--dry_run", **settings)
    assert (done.returncode, done.stderr) == (0, "")
    # The vocabulary is the nano base's, of 2,048 entries.
    trained -= (50_257 - 2_048) * 1024 if method == "full" else 0
    assert f"gpt2.md: {trained:,} trainable parameters" in done.stdout
    assert f" in steps of {batch}, 1 step an epoch, {epochs} in all, 0 of them" in done.stdout
    assert f"into runs/{task}-{method}/train" in done.stdout


def test_an_unknown_method_is_refused(checkout: Path) -> None:
    done = run_script(checkout, "scripts/dart.sh", "--dry_run", METHOD="loraa")
    assert done.returncode == 2 and "METHOD=loraa is none of lora, adapter_l" in done.stderr


def test_a_dry_run_obeys_what_is_set_from_outside(checkout: Path) -> None:
    write_raw(checkout, "e2e", dict.fromkeys(("train.txt", "valid.txt", "test.txt"), E2E_LINE * 40))
    settings = {"MODEL": "gpt2.nano", "TRAIN_ROWS": "33", "MAX_STEP": "7", "WORK_DIR": "runs/own"}
    settings["WARMUP_STEP"] = "2"
    done = run_script(checkout, "scripts/e2e.sh", "--dry_run", **settings)
    sizes = done.stdout.splitlines()[-2]
    trained, _ = counted("gpt2.nano", 33, 1)
    assert f"gpt2.nano: {trained:,} trainable parameters" in sizes
    assert "33 rows" in sizes and "7 in all, 2 of them warm-up; into runs/own/train" in sizes


def test_dart_says_in_one_line_where_its_training_file_belongs(checkout: Path) -> None:
    entry = {"tripleset": [["a", "R", "b"]], "annotations": [{"source": "x", "text": "a r b ."}]}
    names = ("dart-v1.1.1-full-dev.json", "dart-v1.1.1-full-test.json")
    write_raw(checkout, "dart", dict.fromkeys(names, json.dumps([entry])))
    write_vocabulary(checkout)
    for argument in ([], ["--dry_run"]):
        done = run_script(checkout, "scripts/dart.sh", *argument)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "put it at data_raw/dart/dart-v1.1.1-full-train.json" in done.stderr
    assert not (checkout / "runs").exists()


def test_weights_that_cannot_be_downloaded_end_the_run_with_one_sentence(checkout: Path) -> None:
    write_raw(checkout, "e2e", dict.fromkeys(("train.txt", "valid.txt", "test.txt"), E2E_LINE))
    write_vocabulary(checkout)
    done = run_script(checkout, "scripts/e2e.sh", MAX_STEP="2", WARMUP_STEP="1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "gpt2-medium" in done.stderr
    assert not (checkout / "runs").exists()


def test_an_unknown_model_is_refused(checkout: Path) -> None:
    write_raw(checkout, "e2e", dict.fromkeys(("train.txt", "valid.txt", "test.txt"), E2E_LINE))
    done = run_script(checkout, "scripts/e2e.sh", MODEL="gpt2-medium")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "MODEL=gpt2-medium is not a model card; name gpt2.nano, mini" in done.stderr


def test_an_unknown_argument_of_a_script_is_refused(checkout: Path) -> None:
    done = run_script(checkout, "scripts/webnlg.sh", "--dry-run")
    assert done.returncode == 2 and "--dry-run is not --dry_run" in done.stderr


POSIX_TOOLS = ("bash", "cat", "cksum", "dirname", "head", "mkdir", "mktemp", "rm", "sh")


def test_the_scripts_need_no_tool_that_macos_lacks(checkout: Path) -> None:
    """Whatever is not in POSIX is missing from the PATH: nproc, seq, timeout, realpath."""
    tools = checkout / "tools"
    tools.mkdir()
    for name in POSIX_TOOLS:
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    (tools / "python").chmod(0o755)
    activate = f'export PATH="{tools}"\n'
    (checkout / ".venv/bin/activate").write_text(activate, encoding="utf-8")
    write_raw(checkout, "e2e", dict.fromkeys(("train.txt", "valid.txt", "test.txt"), E2E_LINE * 9))
    settings = {"MODEL": "gpt2.nano", "TRAIN_ROWS": "8", "PATH": str(tools), "WARMUP_STEP": "1"}
    done = run_script(checkout, "scripts/e2e.sh", "--dry_run", **settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert "8 rows in steps of 8" in done.stdout


def test_the_scripts_use_no_form_that_bash_3_or_bsd_tools_refuse() -> None:
    """macOS ships bash 3.2 and BSD tools."""
    refused = (
        r"\b(local|declare|typeset) -[a-zA-Z]*[An]",
        r"\b(mapfile|readarray|coproc|nproc|realpath|timeout)\b",
        r"\$\{\w+(,,|\^\^|@[A-Z])",
        r"&>>|\|&",
        r"head -n -|readlink -f|sed -i|grep -\w*P|date -d|sort -V",
    )
    for script in (ROOT / "scripts").glob("*.sh"):
        lines = script.read_text(encoding="utf-8").splitlines()
        code = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
        found = [pattern for pattern in refused if re.search(pattern, code)]
        assert found == [], script.name


def webnlg_entry(number: int, category: str, texts: int) -> dict:
    lexicalisations = [
        {"comment": "good", "lex": f"Subject {number} does thing {i} .", "xml_id": f"Id{i}"}
        for i in range(texts)
    ]
    triples = [{"subject": f"Subject_{number}", "property": "does", "object": "Thing"}]
    return {
        str(number): {
            "category": category,
            "lexicalisations": lexicalisations,
            "modifiedtripleset": triples,
            "originaltriplesets": {"originaltripleset": [triples]},
            "shape": "",
            "shape_type": "",
            "size": "1",
            "xml_id": f"Id{number}",
        }
    }


def test_a_run_over_seeds_ends_with_results_and_their_mean(checkout: Path) -> None:
    """From raw data to the table, with a base that the repository ships."""
    if not (ROOT / "data/nano/model.safetensors").is_file():
        pytest.skip("data/nano/model.safetensors is not there: the shipped base is to be made")
    seen = [webnlg_entry(i, "Airport", 8) for i in range(1, 3)]
    unseen = [webnlg_entry(i, "Artist", 2) for i in range(3, 5)]
    text = json.dumps({"entries": seen + unseen})
    write_raw(checkout, "webnlg", dict.fromkeys(("train.json", "dev.json", "test.json"), text))
    write_command(
        checkout, "java", "#!/bin/sh\nexit 1\n"
    )  # no METEOR, which takes its time to start
    few = {"SEEDS": "5 6", "MAX_STEP": "2", "WORK_DIR": "runs/w"}
    few |= {"MODEL": "gpt2.nano"}
    done = run_script(checkout, "scripts/webnlg.sh", **few)
    assert done.returncode == 0, done.stderr
    runs = checkout / "runs/w"
    results = [json.loads((runs / f"seed-{seed}/result.json").read_text()) for seed in (5, 6)]
    for seed, result in zip((5, 6), results, strict=True):
        settings = result["settings"]
        assert (settings["random_seed"], settings["max_step"], result["steps"]) == (seed, 2, 2)
        assert settings["warmup_step"] == 0  # a tenth, as the recipe's 500 have no room
        assert settings["trained_parameters"] == counted("gpt2.nano", 8, 1)[0]
        assert result["seconds"].keys() == {"train", "decode_and_score"}
        rules = ("lp 0.8, ref_num_6", "lp 0.8, all_references")
        rows = [rule + subset for rule in rules for subset in ("", ", seen", ", unseen")]
        assert list(result["scores"]) == rows
        for rule, references in zip(rules, (16, 20), strict=True):
            name = rule.removeprefix("lp 0.8, ")
            scored = json.loads((runs / f"seed-{seed}/beam.0.8.{name}.json").read_text())
            assert scored["references"] == references
            assert result["scores"][rule] == scored["scores"]
    mean = json.loads((runs / "result.json").read_text())
    chrf = [result["scores"]["lp 0.8, ref_num_6"]["chrF++"] for result in results]
    assert mean["mean"]["lp 0.8, ref_num_6"]["chrF++"] == pytest.approx(statistics.mean(chrf))
    assert f"{statistics.mean(chrf):.4f} +- {statistics.stdev(chrf):.4f}" in done.stdout
    assert "GPT-2 M, paper" in done.stdout.split("Mean and standard deviation")[1]
    again = run_script(checkout, "scripts/webnlg.sh", **few, RESUME="1")
    assert again.returncode == 0, again.stderr
    assert "Fine-tuning" not in again.stdout
    assert f"{statistics.stdev(chrf):.4f}" in again.stdout


@pytest.mark.parametrize("seeds, folder", [("", "runs/e2e"), ("1 2", "runs/e2e/seed-2")])
def test_a_run_that_is_there_is_resumed_only_when_asked_and_its_data_stay(
    seeds: str, folder: str, checkout: Path
) -> None:
    run = checkout / folder / "train" / "run.json"
    run.parent.mkdir(parents=True)
    run.write_text("{}", encoding="utf-8")
    done = run_script(checkout, "scripts/e2e.sh", MODEL="gpt2.nano", SEEDS=seeds)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: WORK_DIR=runs/e2e holds a run already; set RESUME=1 to resume it, or another "
        "WORK_DIR\n"
    )


def test_the_best_epoch_by_bleu_is_decoded_beside_the_last(checkout: Path) -> None:
    if not (ROOT / "data/nano/model.safetensors").is_file():
        pytest.skip("data/nano/model.safetensors is not there: the shipped base is to be made")
    lines = E2E_LINE + E2E_LINE.replace("Blue Spice", "Aromi") * 7
    write_raw(checkout, "e2e", dict.fromkeys(("train.txt", "valid.txt", "test.txt"), lines))
    write_command(checkout, "java", "#!/bin/sh\nexit 1\n")
    few = {"SELECT": "best", "MODEL": "gpt2.nano", "MAX_STEP": "3", "WARMUP_STEP": "1"}
    done = run_script(checkout, "scripts/e2e.sh", "--dry_run", **few)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Scores: BLEU of 2 contexts with 8 references, by the rules of e2e, " in done.stdout
    assert "decoded 3 times with beam 10" in done.stdout  # at the ends of three epochs
    assert done.stdout.endswith("Decoded and scored: the best epoch and the last\n")
    done = run_script(checkout, "scripts/e2e.sh", **few)
    assert done.returncode == 0, done.stderr
    folder = checkout / "runs/e2e"
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    rows = [f"{which}, lp {lp}, all_references" for which in ("best", "last") for lp in (0.8, 0.9)]
    assert list(result["scores"]) == rows
    for row, name in zip(rows[::2], ("best.beam.0.8", "beam.0.8"), strict=True):
        scored = json.loads((folder / f"{name}.all_references.json").read_text(encoding="utf-8"))
        assert result["scores"][row] == scored["scores"]
    log = (folder / "train/log.jsonl").read_text(encoding="utf-8").splitlines()
    valid = [r for r in map(json.loads, log) if r["kind"] == "valid"]
    best = max(valid, key=lambda record: record["bleu"])
    assert [record["step"] for record in valid] == [1, 2, 3]
    assert (result["best_step"], result["best_valid_scores"]) == (
        best["step"], {"bleu": best["bleu"]},
    )  # fmt: skip
    table = done.stdout.split("== Result")[1]
    assert f"best valid BLEU {100 * best['bleu']:.2f} at step {best['step']}; " in table
    assert all(row in table for row in rows)


def test_a_selection_that_there_is_not_is_refused(checkout: Path) -> None:
    done = run_script(checkout, "scripts/dart.sh", SELECT="bleu")
    assert (done.returncode, done.stderr) == (2, "error: SELECT=bleu is neither last nor best\n")


def test_a_metric_that_one_run_lacks_has_no_mean(tmp_path: Path) -> None:
    paths = []
    for number, meteor in enumerate((0.5, None)):
        scores = {"lp 0.8": {"BLEU": 0.6 + 0.2 * number, "METEOR": meteor}}
        paths.append(str(tmp_path / f"{number}.json"))
        Path(paths[-1]).write_text(json.dumps({"scores": scores}), encoding="utf-8")
    both = summary.over_runs(paths)
    assert both["mean"]["lp 0.8"] == {"BLEU": pytest.approx(0.7), "METEOR": None}
    assert both["sd"]["lp 0.8"] == {"BLEU": pytest.approx(0.02**0.5), "METEOR": None}
    assert summary.over_runs(paths[:1])["sd"]["lp 0.8"] == {"BLEU": None, "METEOR": None}


def test_every_script_is_correct_bash() -> None:
    for script in (ROOT / "scripts").glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)


def start_on_slurm(checkout: Path, *arguments: str, **environment: str) -> list[str]:
    """The command line that `scripts/slurm.sh` hands to srun, on a cluster of two nodes."""
    scontrol = '#!/bin/sh\n[ "$*" = "show hostnames n[7-8]" ] && printf "n7\\nn8\\n"\n'
    srun = '#!/bin/sh\nprintf "%s\\n" "$@" "threads=$OMP_NUM_THREADS" > "$RECORD"\n'
    write_command(checkout, "scontrol", scontrol)
    write_command(checkout, "srun", srun)
    slurm = {
        "SLURM_SUBMIT_DIR": str(checkout), "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "123456", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16",
    }  # fmt: skip
    spooled = checkout / "spool"  # sbatch runs a copy of the script from elsewhere
    shutil.copy(ROOT / "scripts/slurm.sh", spooled)
    record = checkout / "record"
    slurm |= {"RECORD": str(record), "OMP_NUM_THREADS": ""} | environment
    done = run_script(checkout, str(spooled), *arguments, **slurm)
    assert done.returncode == 0, done.stderr
    return record.read_text(encoding="utf-8").splitlines()


def test_slurm_starts_one_torchrun_a_node_which_meet_on_the_first(checkout: Path) -> None:
    command = start_on_slurm(checkout, "--work_dir", "runs/a b")
    assert command[:3] == ["--kill-on-bad-exit=1", "--cpus-per-task=16", "torchrun"]
    flags = dict(zip(command[3:15:2], command[4:15:2], strict=True))
    assert flags == {
        "--nnodes": "2", "--nproc_per_node": "4", "--max-restarts": "3", "--rdzv_backend": "c10d",
        "--rdzv_id": "123456", "--rdzv_endpoint": "n7:23456",
    }  # fmt: skip
    program = ["gpt2_ft.py", "--resume", "auto", "--work_dir", "runs/a b", "threads=4"]
    assert command[15:] == program


def test_slurm_takes_the_number_of_processes_and_restarts_from_outside(checkout: Path) -> None:
    command = start_on_slurm(checkout, NPROC="2", MAX_RESTARTS="0")
    assert command[command.index("--nproc_per_node") + 1] == "2"
    assert command[command.index("--max-restarts") + 1] == "0"


def test_slurm_warns_before_the_time_limit(checkout: Path) -> None:
    """Enough for a worker to save: torchrun gives it 30 seconds."""
    lines = (ROOT / "scripts/slurm.sh").read_text(encoding="utf-8").splitlines()
    signals = [line.removeprefix("#SBATCH --signal=") for line in lines if "--signal=" in line]
    assert len(signals) == 1
    name, seconds = signals[0].split("@")
    assert name == "TERM" and int(seconds) > 30


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bytes(checkout: Path) -> None:
    done = run_script(checkout, "scripts/kill_and_resume.sh")
    assert (done.returncode, done.stderr) == (0, "")
    *_, resuming, whole, killed, verdict = done.stdout.splitlines()
    assert resuming.startswith("Resuming after step ")
    # The kill may fall between the adapter of step 10 and the state that names it.
    assert 5 <= int(resuming.rpartition(" ")[2]) < 30
    assert whole.split()[0] == killed.split()[0] and verdict == "The same bytes."
