"""The same numbers as the original code: training and beam search on the shipped base and sample,
beside what the original computes on them (tests/oracles/), and the script that records it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import checkpoints
import gpt2_ft
import gpu
from data_utils import EpochSampler
from decoding.beam_search import SearchSettings, beam_search
from model import GPT2LMModel
from training.setup import prepare

ORACLES = ROOT / "tests" / "oracles"
NANO = ROOT / "data" / "nano"


def oracle(name: str) -> dict:
    return json.loads((ORACLES / name).read_text(encoding="utf-8"))


def adapter_at(moment: str) -> dict[str, torch.Tensor]:
    """The original's adapter before the first ("init") or after the last step ("final")."""
    tensors = load_file(ORACLES / "adapter.safetensors")
    prefix = f"{moment}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def test_fifty_steps_on_the_sample_have_the_originals_rows_losses_norms_and_adapter(
    tmp_path: Path,
) -> None:
    """The whole way of the program: tokenizer, rows, sampler, loss, gradient, optimizer, schedule.

    The original divides by Σ mask + 1e-4 where this repository divides by Σ mask, and it rounds the
    number of rows that it permutes, 1,598, up to a multiple of the batch.
    """
    expected = oracle("train.json")
    given, lora = expected["optimizer"], expected["lora"]
    flags = {
        "work_dir": tmp_path, "device": "cpu", "seq_len": expected["seq_len"], "random_seed": 110,
        "train_batch_size": expected["batch"], "label_smooth": expected["label_smooth"],
        "lora_dim": lora["r"], "lora_alpha": lora["alpha"], "lora_dropout": lora["dropout"],
        "lr": given["lr"], "adam_beta1": given["adam_beta1"], "adam_beta2": given["adam_beta2"],
        "adam_epsilon": given["adam_epsilon"], "weight_decay": given["weight_decay"],
        "scheduler": given["scheduler"], "warmup_step": given["warmup_step"],
        "max_step": given["max_step"],
    }  # fmt: skip
    args = gpt2_ft.parse_args([str(part) for key in flags for part in (f"--{key}", flags[key])])
    run = prepare(args, gpu.parse_gpu(args), tmp_path, None)
    checkpoints.apply_trained(run.model, adapter_at("init"), "the original's adapter")

    sampler = EpochSampler(1600, expected["batch"], seed=args.random_seed)
    compared = zip(
        sampler.steps(1), expected["ids"], expected["losses"], expected["grad_norms"],
        expected["mask_sums"], strict=False,
    )  # fmt: skip
    for rows, ids, loss, norm, counted in compared:
        assert rows == [ids]
        result = gpt2_ft.optimizer_step(run, rows)
        ours, count, own_norm = result.smoothed_loss, result.counted, result.norm
        assert count == counted
        assert ours * (count / (count + 1e-4)) == pytest.approx(loss, abs=1e-5)
        assert own_norm == pytest.approx(norm, abs=1e-4)
    final = dict(run.model.named_parameters())
    for name, tensor in adapter_at("final").items():
        assert (final[name].detach() - tensor).abs().max() < 1e-5, name


@pytest.fixture(scope="module")
def trained() -> GPT2LMModel:
    """The shipped base with the original's adapter of its last step."""
    expected = oracle("train.json")
    base = checkpoints.read_base(NANO / "model.safetensors")
    lora = expected["lora"]
    shape = {"lora_attn_dim": lora["r"], "lora_attn_alpha": lora["alpha"]}
    model = GPT2LMModel(checkpoints.model_config("gpt2.nano", base, **shape))
    checkpoints.load_base(model, base)
    checkpoints.apply_trained(model, adapter_at("final"), "the original's adapter")
    return model.eval()


SETS = {chosen["name"]: chosen for chosen in oracle("decode.json")["sets"]}


@pytest.mark.parametrize(
    ("name", "batch_size"), [*((name, 5) for name in SETS), ("published", 1), ("published", 16)]
)
def test_beam_search_finds_the_originals_sequences_under_every_setting_and_batch_size(
    trained: GPT2LMModel, name: str, batch_size: int
) -> None:
    given = dict(SETS[name]["settings"])
    chosen = SearchSettings(end_ids=tuple(given.pop("eos_token_id")), **given)
    contexts = [torch.tensor(context) for context, _ in SETS[name]["texts"]]
    found = beam_search(trained, contexts, chosen, batch_size)
    assert [best.tokens for best, *_ in found] == [output for _, output in SETS[name]["texts"]]


STAND_IN = {
    "model.py": """
import torch
from torch import nn

class GPT2Config:
    def __init__(self, vocab_size_or_config_json_file, n_positions, n_ctx, n_embd, n_layer, n_head,
                 lora_attn_dim, lora_attn_alpha, lora_dropout):
        self.shape = n_layer, n_embd, lora_attn_dim

class GPT2LMModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        layers, width, rank = config.shape
        for i in range(layers):
            attention = self
            for part in f"transformer.h.{i}.attn.c_attn".split("."):
                if not hasattr(attention, part):
                    attention.add_module(part, nn.Module())
                attention = getattr(attention, part)
            attention.lora_A = nn.Parameter(torch.zeros(2 * rank, width))
            attention.lora_B = nn.Parameter(torch.zeros(2 * width, rank))

    def load_weight(self, state):
        assert state["wte.weight"].dtype == torch.float32

    def forward(self, input, lm_labels, lm_mask, label_smooth):
        assert label_smooth == 0.1 and input.shape == lm_labels.shape == lm_mask.shape
        return None, sum((p**2).sum() for p in self.parameters()).reshape(1)
""",
    "loralib.py": """
def mark_only_lora_as_trainable(model):
    assert all("lora_" in name for name, _ in model.named_parameters())
""",
    "optimizer.py": """
import torch

def create_adam_optimizer_from_args(model, args):
    assert args.adam_epislon == 1e-6
    return torch.optim.SGD(model.parameters(), lr=args.lr)

def create_optimizer_scheduler(optimizer, args):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
""",
    "data_utils.py": """
import json
import torch

class FT_Dataset(torch.utils.data.Dataset):
    def __init__(self, file, batch_size, seq_len, eval_len=0, joint_lm=False):
        with open(file, encoding="utf-8") as lines:
            self.rows = [json.loads(line) for line in lines]
        self.seq_len, self.length = seq_len, -(-len(self.rows) // batch_size) * batch_size

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        context, completion = self.rows[i]["context"], self.rows[i]["completion"]
        ids = torch.zeros(self.seq_len, dtype=torch.int64)
        ids[: len(context + completion)] = torch.tensor(context + completion)
        mask = torch.zeros(self.seq_len)
        mask[len(context) - 1 : len(context + completion) - 1] = 1
        return {"id": i, "input": ids, "target": ids.roll(-1), "mask": mask, "query": ids}
""",
    "gpt2_beam.py": """
import json
import os
from data_utils import FT_Dataset

def beam(model, data_iter, namespace):
    assert namespace is args and os.path.isdir(args.work_dir)
    with open(os.path.join(args.work_dir, args.output_file), "w") as file:
        for batch in data_iter:
            predict = [args.beam, int(batch["query"][0, 0]), *args.eos_token_id, 0, 0]
            file.write(json.dumps({"id": int(batch["id"]), "predict": predict}) + "\\n")
""",
}  # a checkout's interface, with arithmetic in place of a language model


def test_the_script_that_records_the_oracles_drives_a_checkout_as_its_programs_do(
    tmp_path: Path,
) -> None:
    for name, text in STAND_IN.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "tests.oracles.make", str(out)], cwd=ROOT, capture_output=True,
        text=True, env=os.environ | {"LORA_ORIGINAL": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    made, kept = json.loads((out / "train.json").read_text(encoding="utf-8")), oracle("train.json")
    assert list(made) == list(kept)
    same = ("ids", "mask_sums", "optimizer", "lora", "sampler")
    assert {key: made[key] for key in same} == {key: kept[key] for key in same}
    assert len(made["losses"]) == len(made["grad_norms"]) == 50
    files = (out / "adapter.safetensors", ORACLES / "adapter.safetensors")
    tensors, shipped = ({n: t.shape for n, t in load_file(file).items()} for file in files)
    assert tensors == shipped
    decodes = json.loads((out / "decode.json").read_text(encoding="utf-8"))
    for chosen, expected in zip(decodes["sets"], SETS.values(), strict=True):
        assert chosen["settings"] == expected["settings"]
        for (context, output), (given, _) in zip(chosen["texts"], expected["texts"], strict=True):
            assert context == given
            assert output == [chosen["settings"]["beam"], context[0], 2047]


def test_without_a_checkout_the_script_says_what_it_needs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.oracles.make", str(tmp_path / "out")], cwd=ROOT,
        capture_output=True, text=True, env=os.environ | {"LORA_ORIGINAL": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: set LORA_ORIGINAL to")
