"""docs/troubleshooting.md: each error that it explains is what the program says to that command.

`RENEW=1 bash scripts/test.sh -n 0 tests/test_troubleshooting.py` puts new sentences onto the page;
read then whether what the page says about them is still right.
"""

import importlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from safetensors.torch import load_file, save_file

from common import locks
from common.errors import InputError

PAGE = ROOT / "docs" / "troubleshooting.md"
NANO = ROOT / "data" / "nano"
# What stands for `...`: the rest of a right command, at tiny size.
TRAIN = (
    "--train_data my/train.jsonl --vocab vocab --init_checkpoint base/model.safetensors "
    "--model_card gpt2.nano --max_step 2 --warmup_step 0 --train_batch_size 2 --seq_len 128 "
    "--valid_samples 0 --device cpu --work_dir runs/new"
)
REST = {
    "gpt2_ft": TRAIN,
    "gpt2_beam": "--data my/test.jsonl --vocab vocab --init_checkpoint base/model.safetensors "
    "--beam 2 --eval_len 3 --device cpu --output_file runs/new.jsonl",
    "convert_adapter": "--init_checkpoint base/model.safetensors --output exported",
    "eval.evaluate": "--task e2e --metrics bleu",
}  # fmt: skip
CASES = re.findall(r"^    \$ python (?:-m )?(\S+) (.*)\n    error: (.*)$", PAGE.read_text(), re.M)


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything is right, and next to it what people get wrong."""
    folder = tmp_path_factory.mktemp("mistaken")
    (folder / "my").mkdir()
    (folder / "vocab").symlink_to(NANO)
    (folder / "base").symlink_to(NANO)
    for name in ("train", "test"):
        lines = (ROOT / "data" / "sample" / f"{name}.jsonl").read_text(encoding="utf-8")
        rows = "".join(lines.splitlines(keepends=True)[:4])
        (folder / "my" / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    write_bad_data(folder / "my")
    write_other_models(folder)
    write_predictions(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        program("gpt2_ft").main(f"{TRAIN} --work_dir runs/mine".split())
        program("gpt2_ft").main(f"{TRAIN} --work_dir runs/bottleneck --method adapter_l".split())
        shutil.copytree("runs/mine", "runs/damaged")
        damage(Path("runs/damaged/model.2.safetensors"), -1)
        state = Path("runs/damaged/state.pt")
        damage(state, state.stat().st_size // 2)  # within a tensor
        to_pt = "--to pt --adapter runs/mine --output mine.pt"
        program("convert_adapter").main(f"{to_pt} --init_checkpoint base".split())
    return folder


def program(name: str):
    return importlib.import_module(name.removesuffix(".py"))


def damage(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def write_bad_data(folder: Path) -> None:
    good = json.dumps({"context": "name : The Vaults", "completion": "The Vaults is a pub ."})
    message = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    texts = {
        "facts.csv": "facts,text\nname : The Vaults,The Vaults is a pub .\n",
        "many.csv": "prompt,response,answer\na,b,c\n",
        "chat.jsonl": json.dumps({"messages": message}) + "\n",
        "empty.csv": "prompt,response\nname : The Vaults,The Vaults is a pub .\nname : Aromi,\n",
        "cut.jsonl": f"{good}\n{good[:40]}\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def write_other_models(folder: Path) -> None:
    """A vocabulary of GPT-2's size, one with two ids swapped, and a base with another weight."""
    entries = json.loads((NANO / "vocab.json").read_text(encoding="utf-8"))
    filler = {f"<filler {i}>": i for i in range(len(entries), 50257)}
    swapped = entries | {"a": entries["b"], "b": entries["a"]}
    for name, changed in (("gpt2_vocab", entries | filler), ("other_vocab", swapped)):
        (folder / name).mkdir()
        shutil.copy(NANO / "merges.txt", folder / name)
        (folder / name / "vocab.json").write_text(json.dumps(changed), encoding="utf-8")
    weights = load_file(NANO / "model.safetensors")
    weights["wpe.weight"][0, 0] += 1
    (folder / "other").mkdir()
    save_file(weights, folder / "other" / "model.safetensors")


def write_predictions(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "my" / "test.jsonl").open(encoding="utf-8")]
    made = [
        {"id": i, "context": row["context"], "text": row["completion"]}
        for i, row in enumerate(rows)
    ]
    for name, kept in (("short.jsonl", made[:-1]), ("predictions.jsonl", made)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in kept))


@pytest.mark.parametrize(("name", "flags", "sentence"), CASES, ids=lambda part: part[:40])
def test_an_error_of_the_page_is_what_the_program_says(
    name: str, flags: str, sentence: str, mistaken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--device cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    monkeypatch.chdir(mistaken)
    rest = REST[name.removesuffix(".py")] if "..." in flags else ""
    arguments = shlex.split(f"{rest} {flags.replace('...', '')}")
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.1)
    (mistaken / "runs" / "busy").mkdir(exist_ok=True)
    busy = FileLock(mistaken / "runs" / "busy" / locks.LOCK_FILE)
    with busy, pytest.raises(InputError) as error:
        program(name).main(arguments)
    if "RENEW" in os.environ:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(page.replace(f"error: {sentence}\n", f"error: {error.value}\n"))
    else:
        assert str(error.value) == sentence, "renew the page as the head of this file tells"


def test_the_page_explains_at_least_twenty_errors() -> None:
    assert len(CASES) >= 20
