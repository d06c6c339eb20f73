"""Each benchmark at its smallest: peers agree, a result is written, a table is made. Nothing here
looks at times."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks import common

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
