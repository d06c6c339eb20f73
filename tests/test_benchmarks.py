"""Each benchmark at its smallest: peers agree, a result is written, a table is made. Nothing here
looks at times."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import finish, start

from benchmarks import common
from model import GPT2Model

pytest.importorskip("peft", reason="a peer of the benchmarks")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Imports a module of benchmarks/, whose results go to a folder of the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def load(name: str) -> ModuleType:
        monkeypatch.setattr(common, "RESULTS", tmp_path)
        monkeypatch.delenv("DATA_DIR", raising=False)  # the shipped sample
        return importlib.import_module(f"benchmarks.{name}")

    return load


def test_benchmarked_training_has_the_losses_of_peft_and_its_table(benchmark, tmp_path) -> None:
    flags = "--size small --rounds 2 --steps 1 --gate_steps 3 --threads 1 --batch 2"
    benchmark("train").main([*flags.split(), "--peers", "peft-sdpa"])
    result = json.loads((tmp_path / "train-small.json").read_text(encoding="utf-8"))
    assert max(result["gate"]["errors"].values()) < 1e-5
    assert set(result["peers"]) == {"ours", "peft-sdpa"}
    text = benchmark("tables").table("train", [result])
    assert "original, derived" in text and text.count("| small |") == 3


def test_benchmarked_decoding_has_the_outputs_of_transformers_and_its_table(
    benchmark, tmp_path
) -> None:
    flags = "--size small --train_steps 1 --rounds 1 --contexts 2 --batch 2 --beam 2 --eval_len 4"
    benchmark("decode").main(flags.split())
    result = json.loads((tmp_path / "decode-small-2.json").read_text(encoding="utf-8"))
    assert result["gate"]["differ_from_transformers"] == 0
    text = benchmark("tables").table("decode", [result])
    assert "transformers" in text and "derived" in text


def test_the_three_ways_of_b_agree_and_have_their_table(benchmark, tmp_path) -> None:
    benchmark("grouped_conv").main(["--rounds", "1", "--ranks", "2", "--threads", "1"])
    result = json.loads((tmp_path / "grouped-conv.json").read_text(encoding="utf-8"))
    text = benchmark("tables").table("grouped_conv", [result])
    assert text.count("| gpt2.") == 2 and "products apart" in text


def test_what_is_varied_has_a_row_each(benchmark, tmp_path, monkeypatch) -> None:
    scaling = benchmark("scaling")
    monkeypatch.setattr(scaling, "TRAINING", {"rows": (1, 2), "rank": (1,)})
    monkeypatch.setattr(scaling, "SEARCH", {"beam": (1, 2)})
    monkeypatch.setattr(scaling, "train_by_processes", lambda processes, folder: 10 * processes)
    scaling.main(["--rounds", "1", "--threads", "1"])
    result = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    lines = benchmark("tables").table("scaling", [result]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == [
        "| training: rows", "| training: rank", "| decoding: beam",
        "| training: processes of one thread",
    ]  # fmt: skip
    assert "1.00, 2.00 times as fast" in lines[5]


def test_needed_work_counts_products_behind_the_last_attention_for_counted_tokens_only(
    benchmark,
) -> None:
    """By hand: 2 layers, width 4, vocabulary 11; one row of 5 tokens with 2 in the loss."""
    train = benchmark("train")
    shape = {"n_layer": 2, "n_embd": 4, "vocab_size": 11}

    class Data:
        def __getitem__(self, row: int) -> dict:
            return {"mask": np.array([0, 0, 1, 1, 0], dtype=np.float32)}

    c_attn, behind, head = 4 * 12, 4 * 4 + 2 * 4 * 16, 4 * 11
    forward = 4 * (2 * c_attn + behind) + 2 * (behind + head)
    backward = 4 * (c_attn + behind) + 2 * (behind + head)
    assert train.needed_flop(shape, Data(), [0]) == 2 * (forward + backward)


TOY_PARTS = {
    "train-sm": [
        f"{precision} {way}"
        for precision, ways in {
            "fp32": ["padded", "compiled", "peft", "SFTTrainer"],
            "bf16": ["padded", "packed", "compiled", "peft", "SFTTrainer"],
        }.items()
        for way in ways
    ],
    "memory": ["fp32 no", "fp32 yes", "bf16 no", "bf16 yes"],
    "decode": ["fp32 ours", "fp32 transformers", "bf16 ours", "bf16 transformers"],
}


@pytest.mark.filterwarnings("ignore")  # those of the peers
@pytest.mark.parametrize("part", TOY_PARTS)
def test_each_part_for_gpus_runs_at_toy_size_and_keeps_its_table(
    part: str, benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    gpu = benchmark("gpu")
    monkeypatch.setattr(gpu, "WARM_UP", 1)
    monkeypatch.setattr(gpu, "STEPS", 1)
    monkeypatch.setattr(GPT2Model, "compile_blocks", lambda self: None)  # as tests/test_compile.py
    monkeypatch.setitem(sys.modules, "trl", None)
    gpu.main(["--part", part, "--device", "cpu", "--output", str(tmp_path)])
    result = json.loads((tmp_path / f"{part}.json").read_text(encoding="utf-8"))
    columns = ("precision", "base", "checkpointing", "way")
    names = [name for name in columns if name in result["rows"][0]]
    assert [" ".join(row[name] for name in names) for row in result["rows"]] == TOY_PARTS[part]
    notes = {row.get("way"): row["note"] for row in result["rows"] if "note" in row}
    assert notes == ({"SFTTrainer": "trl is not installed"} if part == "train-sm" else {})
    figures = [row for row in result["rows"] if "note" not in row]
    assert all(row["peak GB"] > 0 for row in figures)
    assert f"| {names[0]} |" in capsys.readouterr().out.replace("| model |", "|")


def test_what_is_not_reached_or_fails_has_a_row_that_says_so(benchmark) -> None:
    gpu = benchmark("gpu")

    def fails() -> dict:
        raise RuntimeError("no such kernel\nand a trace")

    cases = [gpu.Case({"n": 1}, lambda: {"ms": 2}), gpu.Case({"n": 2}, fails)]
    rows = gpu.measure_part(iter(cases), minutes=8)
    assert rows == [{"n": 1, "ms": 2}, {"n": 2, "note": "failed: RuntimeError: no such kernel"}]
    assert gpu.table(rows).splitlines()[0] == "| n | ms | note |"
    rows = gpu.measure_part(iter(cases[:1]), minutes=0)
    assert rows == [{"n": 1, "note": "not reached in 0 minutes"}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_benchmark_of_gpus_says_so_in_a_sentence() -> None:
    code, out, err = finish(start(["-m", "benchmarks.gpu"]))
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "error: benchmarks.gpu measures a CUDA device, and PyTorch sees none here; --device cpu "
        "runs it at toy sizes"
    ]
