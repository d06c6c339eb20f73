"""Each benchmark at its smallest: peers agree, a result is written, a table is made. Nothing here
looks at times."""

import gzip
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT, finish, start

from benchmarks import common
from common.errors import InputError
from common.files import read_json_lines
from data.convert_e2e import e2e_rows
from data_utils import load_tokenizer, read_rows
from model import GPT2Model

pytest.importorskip("peft", reason="a peer of the benchmarks")
needs_peers = pytest.mark.skipif(
    not (ROOT / ".venv-peers" / f"{common.REQUIREMENTS}.done").exists(),
    reason="python -m benchmarks.train makes .venv-peers, which this needs",
)


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


@needs_peers
def test_trl_has_our_losses_without_label_smoothing_padded_and_padding_free(
    benchmark, tmp_path
) -> None:
    flags = "--size small --rounds 1 --steps 1 --gate_steps 2 --threads 1 --batch 2"
    train = benchmark("train")
    train.main([*flags.split(), "--peers", *train.SFT])
    result = json.loads((tmp_path / "train-small.json").read_text(encoding="utf-8"))
    assert set(result["gate"]["errors"]) == {*train.SFT}
    assert max(result["gate"]["errors"].values()) < 1e-5
    assert f"trl {result['versions']['trl']}" in benchmark("tables").table("train", [result])


@needs_peers
def test_both_paths_from_raw_files_to_scores_have_their_scores_and_seconds(
    benchmark, tmp_path
) -> None:
    flags = "--max_step 2 --batch 2 --contexts 4 --rounds 1 --threads 1"
    benchmark("end_to_end").main(flags.split())
    result = json.loads((tmp_path / "end-to-end-sample.json").read_text(encoding="utf-8"))
    for path in result["paths"].values():
        assert 0 <= path["scores"]["BLEU"]["median"] <= 1
        assert path["seconds"]["training"]["median"] > 0
    lines = benchmark("tables").table("end_to_end", [result]).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:4]] == ["ours", "transformers"]
    assert "raw files to scores, sample, batch 2" in benchmark("tables").speed([result])


def test_both_paths_train_and_decode_the_same_token_ids(benchmark, tmp_path) -> None:
    end_to_end, peer = benchmark("end_to_end"), benchmark("end_to_end_peer")
    end_to_end.write_base(tmp_path / "base")
    tokenizer = peer.tokenizer_of({"base": str(tmp_path / "base")})
    paths = end_to_end.write_raw_files("sample", 20, 5, tmp_path)
    vocabulary = load_tokenizer(end_to_end.BASE)
    rows = read_rows(paths["train_data"], vocabulary, vocabulary.get_vocab_size())
    texts = peer.read_rows(paths["train_data"])
    assert len(rows) == len(texts) == 20
    for row, (context, completion) in zip(rows, texts, strict=True):
        whole = f"{context}{tokenizer.eos_token} {completion}{tokenizer.eos_token}"
        assert tokenizer(whole)["input_ids"] == [*row.context.tolist(), *row.completion.tolist()]
        prompt = tokenizer(context + tokenizer.eos_token)["input_ids"]
        assert prompt == row.context.tolist()


def test_raw_e2e_is_cut_to_its_budget_and_read_alike_by_both_paths(
    benchmark, tmp_path, monkeypatch
) -> None:
    end_to_end, peer = benchmark("end_to_end"), benchmark("end_to_end_peer")
    with pytest.raises(InputError, match="name by DATA_DIR"):
        end_to_end.write_raw_files("e2e", 2, 2, tmp_path)
    (tmp_path / "e2e").mkdir()
    lines = "".join(f"name : {n}||It is {n} . \n" for n in range(9))
    with gzip.open(tmp_path / "e2e" / "train.txt.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    (tmp_path / "e2e" / "test.txt").write_text(lines, encoding="utf-8")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    paths = end_to_end.write_raw_files("e2e", 3, 2, tmp_path)
    names = [context for context, _ in peer.read_rows(paths["train_data"])]
    assert names == ["name : 0", "name : 3", "name : 6"]  # from all over the file
    for split in ("train", "test"):
        ours = [tuple(row.values()) for row in e2e_rows(paths[f"{split}_data"])]
        assert peer.read_rows(paths[f"{split}_data"]) == ours
    assert len(list(read_json_lines(paths["scored_data"]))) == 2


@pytest.mark.parametrize("pip", [True, False])
def test_the_environment_of_the_peers_is_made_once_or_a_sentence_says_why_not(
    pip: bool, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(common, "ROOT", tmp_path)
    for name in ("scripts", "requirements.txt", common.REQUIREMENTS):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = tmp_path / ".venv-peers" / "bin"
    commands.mkdir(parents=True)
    (commands / "activate").write_text(f'PATH="{commands}:$PATH"\n', encoding="utf-8")
    for name in ("pip", "python"):
        script = f"#!/bin/sh\necho $0 $@ >> {tmp_path}/log\n{str(pip).lower()}\n"
        (commands / name).write_text(script, encoding="utf-8")
        (commands / name).chmod(0o755)
    find = common.peers_python.__wrapped__
    if not pip:
        with pytest.raises(InputError, match="requirements-peers.txt could not be installed"):
            find()
        return
    assert find() == find() == str(commands / "python")
    assert (tmp_path / "log").read_text(encoding="utf-8").count("-r requirements-peers.txt") == 1


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
