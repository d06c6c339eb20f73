"""Adapters written for and read from PEFT, transformers and the original code: equal logits."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import TINY_CARD, Tiny, finish, random_base, start
from test_checkpoint import loaded
from torch import Tensor

import checkpoints
import convert_adapter
import gpt2_ft
import loralib as lora
from checkpoints import AdapterHeader, Base
from checkpoints.export import write_tokenizer
from common.errors import InputError
from model import GPT2Config, GPT2LMModel

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SHAPE = {"vocab_size": 64, "n_positions": 32, **TINY_CARD}
IDS = torch.randint(64, (3, 11), generator=torch.Generator().manual_seed(0))
ALL = ("q", "k", "v", "o", "fc", "proj")


def hf_config() -> transformers.GPT2Config:
    return transformers.GPT2Config(
        **SHAPE, bos_token_id=0, eos_token_id=0, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
    )


def hf_base(tiny: Tiny) -> transformers.GPT2LMHeadModel:
    gpt = transformers.GPT2LMHeadModel(hf_config())
    gpt.transformer.load_state_dict(
        {n.removeprefix("transformer."): t for n, t in random_base(TINY_CARD).items()}
    )
    gpt.tie_weights()
    return gpt.eval()


def ours(tiny: Tiny, **settings: object) -> tuple[Path, Tensor]:
    """A file with a random adapter, and the logits it should have."""
    config = lora.LoraConfig(r=2, alpha=6, **settings)
    model = GPT2LMModel(GPT2Config(**SHAPE, lora=config))
    base = random_base(TINY_CARD)
    checkpoints.load_weights(model, base)
    lora.start_from_base(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in lora.lora_state_dict(model).items():
            if not name.endswith("0"):
                tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    header = AdapterHeader(
        lora=model.config.lora,
        base=Base("tiny", checkpoints.base_fingerprint(base)),
        model_card=tiny.card,
        step=7,
        seed=5,
    )
    path = tiny.folder / "adapter.safetensors"
    checkpoints.save_adapter(path, lora.lora_state_dict(model), header)
    with torch.no_grad():
        return path, model.eval()(IDS)[0]


def convert(tiny: Tiny, source: Path, to: str, name: str, *more: object) -> Path:
    argv = ["--adapter", source, "--init_checkpoint", tiny.base, "--to", to]
    convert_adapter.main([str(x) for x in [*argv, "--output", tiny.folder / name, *more]])
    return tiny.folder / name


def our_logits(tiny: Tiny, adapter: Path, **given: object) -> Tensor:
    with torch.no_grad():
        return loaded(tiny, adapter, **given)(IDS)[0]


def peft_logits(tiny: Tiny, folder: Path) -> Tensor:
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        return peft.PeftModel.from_pretrained(hf_base(tiny), folder).eval()(IDS).logits


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


SETTINGS = [
    {},
    {"rslora": True},
    {"targets": ("k",)},
    {"targets": ALL},
    {"targets": ALL, "rslora": True},
    {"targets": ("c_attn", "o")},
    {"targets": ("q", "v", "wte")},
    {"kind": "dora"},
    {"kind": "dora", "targets": ALL},
    {"kind": "pissa", "targets": ("q", "v", "fc")},
    {"kind": "lora_fa", "targets": ALL},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_peft_computes_what_we_do_from_our_export_and_gives_it_back_whole(
    settings: dict, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, expected = ours(tiny, **settings)
    with torch.no_grad():
        assert error(hf_base(tiny)(IDS).logits, expected) > 1e-2
    folder = convert(tiny, adapter, "peft", "peft")
    assert error(peft_logits(tiny, folder), expected) < 1e-5
    back = convert(tiny, folder, "safetensors", "back.safetensors")
    assert error(our_logits(tiny, back), expected) < 1e-5
    if settings.get("kind") != "pissa":  # which comes back as plain LoRA of twice the rank
        assert back.read_bytes() == adapter.read_bytes()


def test_query_and_value_are_one_peft_adapter_of_twice_the_rank(tiny: Tiny) -> None:
    for rslora, alpha in ((False, 12), (True, 6 * 2**0.5)):
        adapter, _ = ours(tiny, rslora=rslora)
        folder = convert(tiny, adapter, "peft", "peft")
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["lora_alpha"] == pytest.approx(alpha)
        assert (config["r"], config["use_rslora"]) == (4, rslora)
        assert config["target_modules"] == ["attn.c_attn"]
        assert config["fan_in_fan_out"] is True


NATIVE = [
    {"target_modules": ["c_attn"]},
    {"target_modules": ["c_attn"], "use_rslora": True},
    {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    {"target_modules": ["c_attn", "attn.c_proj"], "use_dora": True},
    {"target_modules": ["mlp.c_proj", "wte"]},
    {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 5}},
    {"target_modules": ["c_attn", "c_fc"], "alpha_pattern": {"c_attn": 3}},
    {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": [1], "use_dora": True},
    {"target_modules": ["c_attn"], "bias": "lora_only"},
    {"target_modules": ["c_fc"], "bias": "all"},
]  # fmt: skip


def native(tiny: Tiny, **settings: object) -> tuple[Path, Tensor]:
    """A folder that PEFT wrote, its tensors random, and PEFT's logits."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=7, fan_in_fan_out=True, **settings
    )
    model = peft.get_peft_model(hf_base(tiny), config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in (p for p in model.parameters() if p.requires_grad):
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
        expected = model(IDS).logits
    model.save_pretrained(tiny.folder / "native")
    return tiny.folder / "native", expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", NATIVE, ids=str)
def test_what_peft_trained_computes_the_same_here_and_back_in_peft(
    settings: dict, tiny: Tiny
) -> None:
    folder, expected = native(tiny, **settings)
    assert error(our_logits(tiny, folder), expected) < 1e-5
    kept = convert(tiny, folder, "safetensors", "kept.safetensors")
    assert error(our_logits(tiny, kept), expected) < 1e-5
    again = convert(tiny, kept, "peft", "again")
    assert error(peft_logits(tiny, again), expected) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_modules": ["c_fc"], "modules_to_save": ["ln_f"]}, "modules_to_save is set"),
        ({"target_modules": ["wpe"]}, "transformer.wpe, for which"),
        ({"target_modules": ["c_fc"], "lora_bias": True}, "lora_bias is set"),
    ],
)
def test_peft_adapters_without_counterpart_are_refused_with_the_reason(
    settings: dict, message: str, tiny: Tiny
) -> None:
    folder, _ = native(tiny, **settings)
    with pytest.raises(InputError, match=f"native.*{message}"):
        checkpoints.read_adapter(folder)


def test_other_peft_methods_and_strange_tensors_are_refused(tiny: Tiny) -> None:
    folder = convert(tiny, ours(tiny)[0], "peft", "peft")
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    one = next(name for name in tensors if "lora_B" in name)
    for spoilt, message in (
        (tensors | {"foo": torch.zeros(1)}, "tensor foo is neither"),
        ({n: t for n, t in tensors.items() if n != one}, "only one of lora_A and lora_B"),
        (tensors | {one: torch.zeros(48, 3)}, "do not fit"),
    ):
        safetensors.torch.save_file(spoilt, folder / "adapter_model.safetensors")
        with pytest.raises(InputError, match=message):
            checkpoints.read_adapter(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}', encoding="utf-8")
    with pytest.raises(InputError, match="peft_type is 'IA3'"):
        checkpoints.read_adapter(folder)
    (folder / "adapter_config.json").write_text("[", encoding="utf-8")
    with pytest.raises(InputError, match="adapter_config.json is no JSON"):
        checkpoints.read_adapter(folder)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_transformers_loads_the_merged_export_with_equal_logits(settings: dict, tiny: Tiny) -> None:
    adapter, expected = ours(tiny, **settings)
    folder = convert(tiny, adapter, "merged", "merged")
    model, info = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert error(model.eval()(IDS).logits, expected) < 1e-5
    names = safetensors.torch.load_file(folder / "model.safetensors").keys()
    untied = "wte" in settings.get("targets", ())
    assert ("lm_head.weight" in names) == untied
    assert not any("lora_" in name or "mask" in name for name in names)
    assert model.config.tie_word_embeddings is not untied
    first = (folder / "model.safetensors").read_bytes()
    convert(tiny, adapter, "merged", "merged")
    assert (folder / "model.safetensors").read_bytes() == first


def test_a_merged_export_is_a_base_like_any_other(tiny: Tiny) -> None:
    adapter, expected = ours(tiny)
    folder = convert(tiny, adapter, "merged", "merged")
    with torch.no_grad():
        assert error(checkpoints.load(folder)[0](IDS)[0], expected) < 1e-5


def test_the_merged_exports_tokenizer_is_the_vocabularys(tiny: Tiny) -> None:
    from conftest import ROOT

    from data_utils import load_tokenizer

    vocab = ROOT / "data" / "nano"
    write_tokenizer(str(vocab), tiny.folder, 512)
    (tiny.folder / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    loaded = transformers.AutoTokenizer.from_pretrained(tiny.folder)
    text = "name : The Vaults | near : Café Adriatic.\n\nIt’s 5 stars <|endoftext|>"
    plain = load_tokenizer(vocab)
    body, end = text.removesuffix("<|endoftext|>"), plain.token_to_id("<|endoftext|>")
    assert loaded(text)["input_ids"] == [*plain.encode(body).ids, end]
    assert loaded.eos_token_id == loaded.bos_token_id == end
    assert loaded.model_max_length == 512


def test_files_of_the_original_code_under_every_prefix_and_layout(tiny: Tiny) -> None:
    adapter, expected = ours(tiny)
    _, tensors = checkpoints.read_adapter(adapter)
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    conv = {n: t[..., None] if n.endswith("lora_B") else t for n, t in tensors.items()}
    apart = {}
    for name, tensor in tensors.items():
        layer, number = name[: -len("c_attn.lora_A")], "12"[name.endswith("lora_B")]
        for part, half in zip("qv", tensor.chunk(2), strict=True):
            apart[f"module.{layer}{part}_proj_adapter{number}.weight"] = half.clone()
    layouts = [bare, tensors, conv, apart]
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        layouts.append({prefix + name: t for name, t in tensors.items()})
    for i, layout in enumerate(layouts):
        for content in (layout, {"model_state_dict": layout}):
            path = tiny.folder / f"{i}.pt"
            torch.save(content, path)
            assert torch.equal(our_logits(tiny, path, lora_alpha=6), our_logits(tiny, adapter)), i
    path = convert(tiny, adapter, "pt", "out.pt")
    assert set(torch.load(path, weights_only=True)["model_state_dict"]) == set(tensors)
    back = convert(tiny, path, "safetensors", "back.safetensors", "--lora_alpha", 6)
    assert error(our_logits(tiny, back), expected) < 1e-5


@pytest.mark.parametrize("settings", [{"targets": ("q", "o")}, {"kind": "dora"}, {"kind": "pissa"}])
def test_what_the_original_code_cannot_hold_is_refused(settings: dict, tiny: Tiny) -> None:
    adapter, _ = ours(tiny, **settings)
    with pytest.raises(InputError, match="--to pt.*LoRA on q and v only"):
        convert(tiny, adapter, "pt", "out.pt")


@pytest.mark.parametrize(
    "flags",
    [["--lora_dim", 0], ["--lora_dim", 0, "--train_top", 1], ["--train_bias", "all"]],
    ids=str,
)
def test_what_is_trained_beside_or_without_adapters_goes_into_the_merged_export(
    flags: list, tiny: Tiny
) -> None:
    gpt2_ft.main(tiny.argv("run", *flags, "--max_step", 4))
    expected = our_logits(tiny, tiny.folder / "run")
    folder = convert(tiny, tiny.folder / "run", "merged", "merged")
    with torch.no_grad():
        model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
        assert error(model(IDS).logits, expected) < 1e-5
        assert error(hf_base(tiny)(IDS).logits, expected) > 1e-3
    if "--lora_dim" in flags:
        with pytest.raises(InputError, match="--to peft: (full|top) training has no adapter"):
            convert(tiny, tiny.folder / "run", "peft", "peft")
    else:
        assert (
            error(peft_logits(tiny, convert(tiny, tiny.folder / "run", "peft", "peft")), expected)
            < 1e-5
        )


def test_the_command_explains_itself_and_its_mistakes_in_one_sentence(tiny: Tiny) -> None:
    code, out, _ = finish(start(["convert_adapter.py", "--help"]))
    assert code == 0
    for to in ("peft", "merged", "safetensors", "pt"):
        assert f"--to {to} --output" in " ".join(out.split())
    argv = ["--init_checkpoint", tiny.base, "--to", "peft", "--output", tiny.folder / "x"]
    code, out, err = finish(start(["convert_adapter.py", "--adapter", "nowhere.pt", *argv]))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and "nowhere.pt" in err
    assert not (tiny.folder / "x").exists()


@pytest.mark.parametrize("kind", lora.KINDS)
def test_every_kind_trains_in_mixed_precision_and_converts(kind: str, tiny: Tiny) -> None:
    gpt2_ft.main(tiny.argv("run", "--bf16", "--lora_kind", kind, "--max_step", 4))
    run = tiny.folder / "run"
    expected = our_logits(tiny, run)
    assert error(peft_logits(tiny, convert(tiny, run, "peft", "peft")), expected) < 1e-5
