"""Results that a change of the code's structure must not move, held as hashes and values.

A few steps of every kind of training on the shipped sample, and a decode, run through the command
lines alone. On the processor and torch that made the pins, which `pins/pins.json` describes, every
tensor of an adapter and of state.pt must be equal byte for byte, and so must the predictions file.
Elsewhere rounding differs: there the norm and some values of every tensor must agree within 1e-6
(relative for values above 1; PiSSA within 1e-5, as it starts from singular vectors, which the gaps
between singular values make that much less certain), and the predicted tokens must be the same.
Where torch draws other numbers for dropout (builds without MKL), runs with dropout have nothing to
be compared with and are skipped. Headers are equal everywhere.

Whoever moves a result on purpose renews the pins in that commit, and says by how much it moved:
`python -m tests.pins.renew` does and prints that.
"""

import json
from pathlib import Path

import pytest
import torch
from pins import measure

PINS = json.loads(measure.PINS.read_text(encoding="utf-8"))
SAME_PROCESSOR = PINS["made_on"] == measure.this_processor()
TOLERANCE = dict.fromkeys(measure.RUNS, 1e-6) | {"pissa": 1e-5}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of the pinned LoRA run, which is decoded, too."""
    return measure.train("lora", tmp_path_factory.mktemp("pins") / "lora")


@pytest.mark.parametrize("kind", measure.RUNS)
def test_training_gives_the_pinned_header_tensors_and_state(
    kind: str, trained: Path, tmp_path: Path
) -> None:
    adapter = trained if kind == "lora" else measure.train(kind, tmp_path / kind)
    then, now = PINS["runs"][kind], measure.measure_run(adapter)
    assert now["header"] == then["header"]
    for part in ("tensors", "state"):
        assert now[part]["values"].keys() == then[part]["values"].keys(), part
    if not SAME_PROCESSOR and kind in measure.WITH_DROPOUT and not same_dropout():
        pytest.skip("torch draws other numbers for dropout here than where the pins were made")
    for part in ("tensors", "state"):
        moved = measure.furthest(then[part]["values"], now[part]["values"])
        assert moved <= TOLERANCE[kind], part
        if SAME_PROCESSOR:
            assert now[part]["sha256"] == then[part]["sha256"], (
                f"{part}: stored values moved {moved:.1e}"
            )


def same_dropout() -> bool:
    return PINS["dropout"] == measure.dropout_draws()


def test_decoding_gives_the_pinned_predictions(trained: Path, tmp_path: Path) -> None:
    if not SAME_PROCESSOR and not same_dropout():
        pytest.skip("the adapter is another here: dropout draws other numbers")
    now = measure.measure_decode(measure.decode(trained, tmp_path))
    for row, pinned in zip(now["rows"], PINS["decode"]["rows"], strict=True):
        score = pytest.approx(pinned["score"], abs=1.01e-4)  # written with four decimals
        assert row == pinned | {"score": score}
    if SAME_PROCESSOR:
        assert now["sha256"] == PINS["decode"]["sha256"]


@pytest.mark.parametrize("kind", measure.OLD_ADAPTERS)
def test_adapter_files_of_the_first_form_load_and_decode_to_the_same_texts(
    kind: str, tmp_path: Path
) -> None:
    predictions = measure.decode(measure.OLD_ADAPTERS[kind], tmp_path)
    texts = [row["text"] for row in measure.measure_decode(predictions)["rows"]]
    assert texts == json.loads(measure.OLD_TEXTS.read_text(encoding="utf-8"))[kind]


def test_the_hash_tells_a_bit_a_name_a_shape_and_a_dtype_apart() -> None:
    tensor = torch.tensor([0.0, 1.0])
    others = [
        {"a": torch.tensor([-0.0, 1.0])},
        {"b": tensor},
        {"a": tensor[None]},
        {"a": tensor.view(torch.int32)},
    ]
    assert len({measure.digest(tensors) for tensors in ({"a": tensor}, *others)}) == 5
