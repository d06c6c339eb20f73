"""README and docs: every command is run at tiny size or left out for a reason, what they name
exists, and both languages say the same."""

import csv
import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ENGLISH, CHINESE, ROOT / "CONTRIBUTING.md", *DOCS]
NANO = "data/nano/model.safetensors"

LEFT_OUT = {
    "python3 -m venv .venv": "tests/test_package.py makes environments",
    "source .venv/bin/activate": "the same",
    "pip install -r requirements.txt": "the same",
    "bash scripts/quickstart.sh": "makes an environment; tests/test_training.py trains the sample",
    "bash scripts/test.sh": "this is it",
    "pip install .": "tests/test_package.py",
    "bash scripts/test.sh tests/test_cuda.py": "the same",
    "bash scripts/test.sh tests/test_loralib.py": "the same",
    "bash scripts/test.sh -k beam": "the same",
    "bash scripts/download_vocab.sh": "tests/test_downloads.py",
    "bash scripts/kill_and_resume.sh": "tests/test_pipeline_scripts.py",
    "bash scripts/test.sh tests/test_oracles.py": "this is one of them",
    "bash scripts/e2e.sh": "tests/test_pipeline_scripts.py",
    "SELECT=best bash scripts/e2e.sh": "tests/test_pipeline_scripts.py",
    "bash scripts/webnlg.sh": "tests/test_pipeline_scripts.py",
    "bash scripts/dart.sh": "tests/test_pipeline_scripts.py",
    "METHOD=adapter_l bash scripts/e2e.sh": "tests/test_pipeline_scripts.py",
    "METHOD=adapter_l ADAPTER_DIM=224 bash scripts/webnlg.sh": "tests/test_pipeline_scripts.py",
    "METHOD=full bash scripts/dart.sh": "tests/test_pipeline_scripts.py",
    "MODEL=gpt2.nano TRAIN_ROWS=8000 VALID_ROWS=400 TEST_ROWS=1000 MAX_STEP=1000 WARMUP_STEP=100 "
    "LR=5e-3 bash scripts/e2e.sh": "tests/test_pipeline_scripts.py",
    "MODEL=gpt2.mini LR=1e-2 MAX_STEP=1000 WARMUP_STEP=100 VALID_ROWS=400 bash scripts/e2e.sh":
        "the same",
    "python -m experiments.soak --steps 2000 --kills 20": "tests/test_soak.py",
    "python -m data.make_base mini": "hours; tests/test_mini_base.py reads it",
    "python -m data.make_base mini --out /tmp/mini --max_step 20": "tests/test_mini_base.py",
    "python convert_adapter.py --adapter runs/e2e --to peft --output "
    "e2e-peft --scores scores.json --push_to_hub OWNER/NAME": "tests/test_hand_on.py",
    "python -m experiments.tables": "tests/test_tables.py",
    "python -m experiments.sweep --methods lora:r=4 full --max_step 50": "tests/test_sweep.py",
    "python -m experiments.sweep --train_data my/train.jsonl --valid_data my/valid.jsonl "
    "--test_data my/test.jsonl --init_checkpoint gpt2 --vocab vocab --out results/mine "
    "--methods lora:r=4 lora:r=16,targets=all adapter_l:dim=6 prefix:length=5 full top2 bitfit "
    "--lr 2e-4 1e-3 5e-3 --max_step 2000 --seeds 3": "the same",
    'python -m experiments.sweep --methods lora:r=4 full --launcher slurm --workers 8 '
    '--sbatch="--gpus=1 --time=2:00:00"': "the same",
    "python -m experiments.e2e must table3 --dry_run": "the same; it needs E2E",
    "python -m data.clean_e2e e2e/train.txt.gz train.jsonl --official devel-fixed.no-ol.csv.gz "
    "--without devel-fixed.no-ol.csv.gz test-fixed.csv.gz": "tests/test_clean_e2e.py",
}  # fmt: skip

# What makes a command small: its program, what stands in for `...`, what is put after it.
DATA = "--train_data my/train.jsonl --vocab vocab --init_checkpoint " + NANO
TINY = {
    "gpt2_ft.py": (
        DATA,
        "--model_card gpt2.nano --max_step 2 --warmup_step 0 --train_batch_size 2 --seq_len 128 "
        "--valid_samples 0 --device cpu --work_dir runs/new",
    ),
    "gpt2_beam.py": (
        f"--vocab vocab --init_checkpoint {NANO}",
        "--eval_len 3 --device cpu",
    ),
    "eval.evaluate": (
        "--task e2e --data test.jsonl --predictions predictions.jsonl",
        "--metrics bleu",
    ),
    "eval.report": ("--task e2e --data test.jsonl", "--metrics bleu --bootstrap 10"),
}
# Of a page's names, those that stand for files which a test has, or for a smaller thing.
STAND_INS = [
    (r"--init_checkpoint gpt2(-medium)?(?![\w-])", f"--init_checkpoint {NANO}"),
    (r"--model_card gpt2\.sm", "--model_card gpt2.nano"),
    (r"--nproc_per_node 4", "--nproc_per_node 2"),
    (r"^torchrun (?!--standalone|--nnodes)", "torchrun --standalone "),
    (r"--nnodes 2 --nproc_per_node \d", "--nnodes 1 --nproc_per_node 1"),
    (r"HOST:29500", "localhost:0"),
    (r"--bootstrap 1000", "--bootstrap 10"),
]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[str]:
    """The commands of a page's bash blocks, each in one line, without comments."""
    lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    bare = (" ".join(line.split("#")[0].split()) for line in lines)
    return [line for line in bare if line]


ALL = {command: page.name for page in PAGES for command in commands(page)}
RUN = [command for command in ALL if command not in LEFT_OUT]


def made_small(command: str) -> str:
    for pattern, replacement in STAND_INS:
        command = re.sub(pattern, replacement, command)
    program = next((name for name in TINY if name in command), None)
    if program:
        given, more = TINY[program]
        if program == "gpt2_beam.py" and not {"--data", "--prompt"} & set(command.split()):
            given += " --data my/test.jsonl"
        if "--train_data" in command:
            given = given.replace("--train_data my/train.jsonl ", "")
        command = f"{command.replace('...', given)} {more}"
    return command


def as_table(rows: str, path: Path, *names: str) -> None:
    """JSONL rows as CSV with other names for their columns."""
    sides = [tuple(json.loads(row).values())[:2] for row in rows.splitlines()]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *sides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as the pages expect it: data of one's own, a vocabulary, runs, predictions."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name not in {"runs", "my", "vocab", "datasets", "results"} and path.name[0] != ".":
            (folder / path.name).symlink_to(path)
    (folder / "vocab").symlink_to(ROOT / "data" / "nano")
    (folder / "my").mkdir()
    for name in ("train", "valid", "test"):
        lines = (ROOT / "data" / "sample" / f"{name}.jsonl").read_text(encoding="utf-8")
        rows = "".join(lines.splitlines(keepends=True)[:6])
        (folder / "my" / f"{name}.jsonl").write_text(rows, encoding="utf-8")
        as_table(rows, folder / "my" / f"{name}.csv", "prompt", "response")
        as_table(rows, folder / "my" / "facts.csv", "facts", "text")
    shutil.copy(folder / "my" / "test.jsonl", folder / "test.jsonl")
    execute(folder, made_small("python gpt2_ft.py ... --log_interval 1"))
    for name in ("quickstart/train", "a", "b", "e2e", "mine"):
        shutil.copytree(folder / "runs" / "new", folder / "runs" / name)
    shutil.rmtree(folder / "runs" / "new")
    to_peft = f"--to peft --adapter runs/e2e --init_checkpoint {NANO} --output e2e-peft"
    execute(folder, f"python convert_adapter.py {to_peft}")
    write_outputs(folder)
    return folder


def write_outputs(folder: Path) -> None:
    """Predictions and the files of the official programs, without decoding anything."""
    rows = [json.loads(line) for line in (folder / "test.jsonl").open(encoding="utf-8")]
    with (folder / "mixed.jsonl").open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            file.write(json.dumps(row | {"task": ("e2e", "webnlg")[i % 2]}) + "\n")
    made = [row | {"id": i, "text": row["completion"]} for i, row in enumerate(rows)]
    predictions = "".join(json.dumps(row) + "\n" for row in made)
    for name in ("predictions.jsonl", "other.jsonl", "runs/mine/test.jsonl"):
        (folder / name).write_text(predictions, encoding="utf-8")
    texts = "".join(row["completion"].strip() + "\n" for row in rows)
    for name in ("hyp.txt", "reference0", "reference1"):
        (folder / name).write_text(texts, encoding="utf-8")
    (folder / "refs.txt").write_text(texts.replace("\n", "\n\n"), encoding="utf-8")


def execute(folder: Path, command: str) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    run = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, f"{command}\n{run.stdout}\n{run.stderr}"
    return run.stdout


@pytest.mark.parametrize("command", RUN)
def test_a_command_of_the_pages_runs(command: str, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(trained, folder, symlinks=True)
    execute(folder, made_small(command))


def test_nothing_is_left_out_that_no_page_has() -> None:
    assert set(LEFT_OUT) <= set(ALL)


def test_the_sweep_lists_its_runs(tmp_path: Path) -> None:
    listed = execute(ROOT, f"python -m experiments.sweep --dry_run --out {tmp_path}").splitlines()
    assert len(listed) == 12 and "lora-r4-1000steps-seed1: to be run" in listed


def test_the_example_of_the_layers_page_computes_what_it_says() -> None:
    failed, tried = doctest.testfile(str(ROOT / "docs" / "lora.md"), module_relative=False)
    assert (failed, tried >= 8) == (0, True)


def test_both_readmes_have_the_same_commands_tables_and_sections() -> None:
    assert commands(ENGLISH) == commands(CHINESE)
    texts = [page.read_text(encoding="utf-8") for page in (ENGLISH, CHINESE)]
    for pattern in (r"^#+ ", r"<!-- table: \w+ -->", r"\]\((?!README)[^)]+\)", r"^\|[ :-]*---.*"):
        english, chinese = (re.findall(pattern, text, re.MULTILINE) for text in texts)
        assert english == chinese
    for lines in zip(*map(table_lines, texts), strict=True):
        numbers = [sorted(re.findall(r"\d(?:[\d.,]*\d)?", line)) for line in lines]
        assert numbers[0] == numbers[1]
    files = [re.findall(r"^    ([\w./]+)  ", text, re.MULTILINE) for text in texts]
    assert files[0] == files[1]


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_waits_for_its_text(page: Path) -> None:
    assert not re.findall(r"^[A-Z]+-[A-Z]+$|TODO|FIXME", page.read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    named = re.findall(
        r"`((?:tests|scripts|docs|eval|data|benchmarks|loralib|experiments)/[\w./]+)`", text
    )
    for name in named:
        assert (ROOT / name).exists(), name


def test_every_page_is_in_the_index_and_the_index_in_the_readme() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS if f"({page.name})" not in index] == ["README.md"]
    assert "(docs/README.md)" in ENGLISH.read_text(encoding="utf-8")


def test_headings_that_pages_link_to_exist() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, place in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
            other = (page.parent / name).read_text(encoding="utf-8") if name else text
            titles = re.findall(r"^#+ (.*)$", other, re.M)
            places = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert place in places, f"{page.name}: {name}#{place}"


OF_OTHERS = {
    "--standalone", "--nproc_per_node", "--max-restarts", "--nnodes", "--rdzv_backend",
    "--rdzv_endpoint", "--logdir", "--no-index", "--find-links", "--lora_dims",  # a mistake, shown
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_of_a_page_exist(page: Path) -> None:
    sources = [path for pattern in ("*.py", "*/*.py", "*/*.sh") for path in ROOT.glob(pattern)]
    code = "\n".join(
        path.read_text(encoding="utf-8") for path in sources if path.parent.name != "tests"
    )
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8")))
    unknown = [f for f in sorted(flags - OF_OTHERS) if not re.search(rf'["\s]{f}["\s=)|]', code)]
    assert unknown == []


def test_the_help_of_a_program_begins_with_a_whole_sentence() -> None:
    for path in sorted(ROOT.glob("*/*.py")):
        text = path.read_text(encoding="utf-8")
        if path.parent.name != "tests" and "description=__doc__.splitlines()[0]" in text:
            assert re.match(r'"""[^\n]*[.?]\n', text), path


def test_the_tree_of_the_readme_names_every_file_at_the_top() -> None:
    text = ENGLISH.read_text(encoding="utf-8")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    modules = [name for name in tracked.stdout.split() if re.fullmatch(r"\w+\.py", name)]
    assert len(modules) == 8 and [name for name in modules if name not in text] == []
