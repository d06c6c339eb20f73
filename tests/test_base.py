"""Base checkpoints: what their config.json says, which card they are of, and small files that claim
to be large."""

import json
import random
import resource
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import FUZZ, ROOT, TINY_CARD, Tiny, random_base
from test_adapter_header import mutated
from torch import Tensor

import checkpoints
import gpt2_ft
import loralib as lora
from checkpoints import AdapterHeader, Base
from common.errors import InputError
from data_utils import load_tokenizer
from loralib import LoraConfig

transformers = pytest.importorskip("transformers")

SHAPE = {"vocab_size": 64, "n_positions": 32, **TINY_CARD}
IDS = torch.randint(64, (3, 11), generator=torch.Generator().manual_seed(0))


def hf_folder(folder: Path, **settings: object) -> transformers.GPT2LMHeadModel:
    """A model of the tiny card's shape, and its folder as transformers writes it."""
    config = transformers.GPT2Config(**SHAPE | {"bos_token_id": 0, "eos_token_id": 0} | settings)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_heads_and_epsilon_of_a_folders_config_are_taken(tiny: Tiny) -> None:
    plain = hf_folder(tiny.folder / "plain")(IDS).logits
    for settings in ({"n_head": 8}, {"n_head": 1}, {"layer_norm_epsilon": 1e-2}):
        folder = tiny.folder / "base"
        expected = hf_folder(folder, **settings)(IDS).logits
        assert (plain - expected).abs().max() > 1e-3
        for path in (folder, folder / "model.safetensors"):
            model, _ = checkpoints.load(path)
            assert (model(IDS)[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["nano", "mini"])
def test_transformers_loads_a_shipped_base_as_it_is(name: str) -> None:
    folder, ids = ROOT / "data" / name, torch.arange(100, 140)[None]
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    ours, _ = checkpoints.load(folder)
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)[0]).abs().max() < 1e-4
    assert theirs.config.eos_token_id == load_tokenizer(folder).token_to_id("<|endoftext|>")


def test_an_adapter_belongs_to_a_base_with_its_number_of_heads(tiny: Tiny) -> None:
    folder = tiny.folder / "base"
    hf_folder(folder, n_head=8)
    gpt2_ft.main(tiny.argv("run", "--init_checkpoint", folder, "--max_step", 3))
    checkpoints.load(folder, tiny.folder / "run")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="is not the base that the adapter was trained on"):
        checkpoints.load(folder, tiny.folder / "run")


REFUSED = {
    "model_type": "gptj", "activation_function": "relu", "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True,
    "quantization_config": {"bits": 4}, "pruned_heads": {"0": [1]}, "n_layer": 3, "n_embd": 32,
    "n_positions": 64, "vocab_size": 65, "n_inner": 32, "n_head": 3, "layer_norm_epsilon": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_this_model_cannot_be_is_refused_by_name(name: str, tiny: Tiny) -> None:
    hf_folder(tiny.folder)
    path = tiny.folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {name: REFUSED[name]}
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=f"config.json: {name} is "):
        checkpoints.read_base(tiny.folder)


def test_settings_of_a_config_without_effect_on_logits_are_let_be(tiny: Tiny) -> None:
    """All that transformers writes, changed; whatever may not be is in the test above."""
    model = hf_folder(tiny.folder)
    path = tiny.folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    for name in written.keys() - REFUSED.keys():
        path.write_text(json.dumps(written | {name: "other"}), encoding="utf-8")
        read, _ = checkpoints.load(tiny.folder)
        with torch.no_grad():
            assert (read(IDS)[0] - model(IDS).logits).abs().max() < 1e-5, name


def test_a_head_that_is_said_to_be_untied_must_be_there(tiny: Tiny) -> None:
    state = {n.removeprefix("transformer."): t for n, t in random_base(TINY_CARD).items()}
    (tiny.folder / "config.json").write_text('{"tie_word_embeddings": false}', encoding="utf-8")
    safetensors.torch.save_file(state, tiny.folder / "model.safetensors")
    with pytest.raises(InputError, match="tie_word_embeddings is False, but the weights have no"):
        checkpoints.read_base(tiny.folder)
    head = {"lm_head.weight": state["wte.weight"].clone()}
    safetensors.torch.save_file(state | head, tiny.folder / "model.safetensors")
    checkpoints.read_base(tiny.folder)


def test_any_content_of_a_config_is_read_or_refused_in_one_sentence(tiny: Tiny) -> None:
    hf_folder(tiny.folder)
    path = tiny.folder / "config.json"
    written, refused = json.loads(path.read_text(encoding="utf-8")), 0
    texts = [json.dumps(mutated(written, random.Random(seed))) for seed in range(150 * FUZZ)]
    for text in [*texts, "", "[" * 100_000, "[]", "\ufeff{}", '{"n_head": 1' + "0" * 5000 + "}"]:
        path.write_text(text, encoding="utf-8")
        try:
            checkpoints.load(tiny.folder)
        except InputError as error:
            assert "config.json" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 3


def test_the_card_follows_from_the_base_and_a_contradiction_names_the_right_one(tiny: Tiny) -> None:
    base = checkpoints.read_base(tiny.base)
    assert base.card() == base.card("gpt2.tiny") == "gpt2.tiny"
    with pytest.raises(InputError, match="--model_card gpt2.md contradicts .*gpt2.tiny's; leave"):
        checkpoints.load(tiny.base, model_card="gpt2.md")
    argv = [part for part in tiny.argv("run", "--max_step", 3)]
    at = argv.index("--model_card")
    gpt2_ft.main(argv[:at] + argv[at + 2 :])
    header, _ = checkpoints.read_adapter(tiny.folder / "run")
    assert header is not None and header.model_card == "gpt2.tiny"
    run = json.loads((tiny.folder / "run" / "run.json").read_text(encoding="utf-8"))
    assert run["settings"]["model_card"] == "gpt2.tiny"


def test_embeddings_may_have_rows_that_the_vocabulary_has_not(tiny: Tiny) -> None:
    from conftest import ROOT

    from data_utils import load_tokenizer

    tokenizer = load_tokenizer(ROOT / "data" / "nano")
    state = random_base(TINY_CARD)
    for rows, fits in ((2047, False), (2048, True), (2049, True), (2112, True), (2304, False)):
        base = checkpoints.BaseWeights(
            "base", state | {"transformer.wte.weight": torch.zeros(rows, 16)}
        )
        if fits:
            base.check_vocabulary(tokenizer, "nano")
            continue
        with pytest.raises(InputError, match=f"nano has 2048 entries but .* {rows}"):
            base.check_vocabulary(tokenizer, "nano")


def claims(tiny: Tiny) -> dict[str, Path]:
    """Files of some kilobytes that claim to be many gigabytes."""
    state, wte = random_base(TINY_CARD), "transformer.wte.weight"
    files = {name: tiny.folder / name for name in ("zeros.safetensors", "zeros.pt", "expanded.pt",
                                                   "view.pt", "packed.pt", "deep.pt")}  # fmt: skip
    nothing = torch.zeros(2_000_000_000, 0)
    safetensors.torch.save_file(state | {wte: nothing}, files["zeros.safetensors"])
    torch.save(state | {wte: nothing}, files["zeros.pt"])
    torch.save(state | {wte: torch.zeros(1).expand(2_000_000_000, 16)}, files["expanded.pt"])
    torch.save({"model_state_dict": state | {wte: torch.zeros(16).expand(10**8, 16)}},
               files["view.pt"])  # fmt: skip
    torch.save(state | {"more": torch.zeros(10_000_000)}, files["zeros.pt"].with_name("big.pt"))
    packed = zipfile.ZipFile(files["packed.pt"], "w", zipfile.ZIP_DEFLATED)
    with packed, zipfile.ZipFile(tiny.folder / "big.pt") as whole:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    (tiny.folder / "big.pt").unlink()
    nested: object = [torch.zeros(1)]
    for _ in range(60):
        nested = [nested, nested]  # 2 ** 60 paths to one tensor
    torch.save({"a": nested}, files["deep.pt"])
    return files


def test_small_files_that_claim_to_be_large_are_refused_in_little_memory(tiny: Tiny) -> None:
    for name, path in claims(tiny).items():
        assert path.stat().st_size < 200_000
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(InputError, match=name):
            checkpoints.load(path)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 100_000 * (1024 if sys.platform == "darwin" else 1), name


@pytest.mark.filterwarnings("ignore:r=")
@pytest.mark.parametrize("rank", [4096, 65536])
def test_a_rank_that_the_tensors_have_not_is_refused_before_anything_is_made(
    rank: int, tiny: Tiny
) -> None:
    tensors = {"transformer.h.0.attn.c_attn.lora_A": torch.zeros(4, 16)}
    header = AdapterHeader(LoraConfig(r=rank), Base("tiny"), model_card="gpt2.tiny")
    checkpoints.save_adapter(tiny.folder / "a.safetensors", tensors, header)
    with pytest.raises(InputError, match=r"a.safetensors: tensor .* of shape \[4, 16\]"):
        checkpoints.load(tiny.base, tiny.folder / "a.safetensors")


PAIR = "transformer.h.0.attn.c_attn."
STRANGE: dict[str, dict[str, Tensor]] = {
    "scalars": {"lora_A": torch.tensor(1.0), "lora_B": torch.tensor(1.0)},
    "empty B": {"lora_A": torch.zeros(4, 16), "lora_B": torch.zeros(32, 0)},
    "no A": {"lora_B": torch.zeros(32, 2)},
    "one dimension": {"lora_A": torch.zeros(4), "lora_B": torch.zeros(32)},
    "uneven": {"lora_A": torch.zeros(5, 16), "lora_B": torch.zeros(32, 2)},
    "four parts": {"lora_A": torch.zeros(8, 16), "lora_B": torch.zeros(64, 2)},
    "integers": {"lora_A": torch.zeros(4, 16).long(), "lora_B": torch.zeros(32, 2).long()},
}


@pytest.mark.parametrize("name", STRANGE)
def test_adapters_of_the_original_with_strange_shapes_are_refused(name: str, tiny: Tiny) -> None:
    path = tiny.folder / "adapter.pt"
    torch.save({PAIR + key: tensor for key, tensor in STRANGE[name].items()}, path)
    with pytest.raises(InputError, match="lora_"):
        checkpoints.load(tiny.base, path, lora_alpha=4)


def test_any_tensors_in_a_pickle_are_read_or_refused_in_one_sentence(tiny: Tiny) -> None:
    """Right checksums, wrong shapes, types and names."""
    state = random_base(TINY_CARD)
    pairs = {f"transformer.h.{i}.attn.c_attn.lora_{x}": torch.zeros(4, 16) if x == "A" else
             torch.zeros(32, 2) for i in (0, 1) for x in "AB"}  # fmt: skip
    strange = [torch.tensor(1.0), torch.zeros(0), torch.zeros(3), torch.zeros(2, 3, 4), 5, None,
               "x", [1], torch.zeros(4, 16).long(), torch.zeros(4, 16).bool(),
               torch.zeros(4, 16) + 1j,
               torch.zeros(1).expand(4, 16), torch.zeros(4, 16).half(), {}]  # fmt: skip
    loaded = 0
    for seed in range(300 * FUZZ):
        draw = random.Random(seed)
        content: dict = dict(state | pairs if draw.random() < 0.5 else pairs)
        for _ in range(draw.choice([1, 1, 2])):
            key = draw.choice(list(content))
            value = content.pop(key)
            if draw.random() < 0.7:
                content[draw.choice([key, key, key + ".x", "q_proj_adapter1.weight"])] = (
                    draw.choice([*strange, value])
                )
        path = tiny.folder / "any.pt"
        torch.save(content, path)
        base, adapter = (path, None) if draw.random() < 0.3 else (tiny.base, path)
        try:
            checkpoints.load(base, adapter, lora_alpha=4)
            loaded += 1
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
    assert 0 < loaded < 200 * FUZZ


def test_what_is_saved_with_pissa_and_dora_is_loaded_as_it_was(tiny: Tiny) -> None:
    """Loading fills every tensor: none keeps what the memory had before."""
    for kind in lora.KINDS:
        gpt2_ft.main(tiny.argv(f"run_{kind}", "--lora_kind", kind, "--max_step", 3))
        folder = tiny.folder / f"run_{kind}"
        one, other = (checkpoints.load(tiny.base, folder)[0].state_dict() for _ in range(2))
        _, tensors = checkpoints.read_adapter(folder)
        base = random_base(TINY_CARD)
        assert all(torch.equal(one[name], (base | tensors)[name]) for name in one)
        assert one.keys() == other.keys() == (base | tensors).keys()
