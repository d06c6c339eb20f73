"""What TensorBoard shows: norms of the updates, samples, settings; and that watching changes
nothing."""

from pathlib import Path

import pytest
import torch
from conftest import Tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gpt2_ft
import loralib as lora
from training.tensorboard import update_norms

KINDS = [("lora", False), ("lora", True), ("lora_fa", False), ("dora", False), ("pissa", False)]


@pytest.mark.parametrize(("kind", "use_rslora"), KINDS)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_the_norm_of_an_update_is_that_of_the_difference_of_the_weights(
    kind: str, use_rslora: bool, fan_in_fan_out: bool
) -> None:
    torch.manual_seed(0)
    layer = lora.MergedLinear(
        6, 12, r=2, lora_alpha=3, enable_lora=[True, False, True], kind=kind,
        use_rslora=use_rslora, fan_in_fan_out=fan_in_fan_out,
    ).double()  # fmt: skip
    layer.start_from_base()
    assert update_norm(layer) == pytest.approx(0, abs=1e-6)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter)
    before = layer.base_weight.clone()
    layer.merge()
    expected = torch.linalg.norm(layer.weight - before)
    assert update_norm(layer) == pytest.approx(float(expected), rel=1e-6)


def update_norm(layer: lora.LoRALayer) -> float:
    return update_norms(torch.nn.Sequential(layer))["0"]


def train(tiny: Tiny, work_dir: Path, *flags: str) -> Path:
    settings = ["--max_step=4", "--eval_interval=2", "--log_interval=1", "--lora_dropout=0.1"]
    gpt2_ft.main([*tiny.argv(work_dir), *settings, *flags])
    return work_dir


def test_samples_norms_and_settings_are_on_tensorboard(tiny: Tiny, tmp_path: Path) -> None:
    folder = train(tiny, tmp_path / "run", "--valid_samples=2")
    events = EventAccumulator(str(folder / "tensorboard" / "run"), {"tensors": 0})
    events.Reload()
    tags = events.Tags()
    norms = [tag for tag in tags["scalars"] if tag.startswith("update_norm/")]
    assert norms == [f"update_norm/h.{i}.attn.c_attn" for i in range(len(norms))] and norms
    for tag in norms:
        assert [event.step for event in events.Scalars(tag)] == [2, 4]
    samples = [tag for tag in tags["tensors"] if tag.startswith("samples/")]
    assert samples == ["samples/1/text_summary", "samples/2/text_summary"]
    text = events.Tensors(samples[0])[0].tensor_proto.string_val[0].decode()
    assert "**context**" in text and "**output**" in text and "**reference**" in text
    assert events.Scalars("loss/best")


def test_watching_changes_no_byte_of_the_adapter(tiny: Tiny, tmp_path: Path) -> None:
    files = [
        train(tiny, tmp_path / count, f"--valid_samples={count}") / "model.4.safetensors"
        for count in ("0", "3")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_norms_of_a_model_have_its_layers_names() -> None:
    assert update_norms(torch.nn.Sequential(lora.Linear(3, 3, r=1))) == {"0": pytest.approx(0)}
