"""Adapters written for and read from PEFT, transformers and the original code: equal logits."""

import contextlib
import dataclasses
import io
import json
import random
import re
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import FUZZ, TINY_CARD, Tiny, finish, random_base, start
from test_adapter_header import mutated
from test_checkpoint import loaded
from torch import Tensor

import checkpoints
import convert_adapter
import gpt2_ft
import loralib as lora
from checkpoints import AdapterHeader, Base, hub
from checkpoints.export import write_tokenizer
from common.errors import InputError
from loralib.peft import READ, WITHOUT_EFFECT
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
    given = {"r": 3, "lora_alpha": 7} | settings
    config = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **given)
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


STARTS = [
    {"init_lora_weights": "pissa", "target_modules": ["c_attn"]},
    {"init_lora_weights": "pissa", "target_modules": ["c_attn", "c_fc", "mlp.c_proj"],
     "use_rslora": True},
    {"init_lora_weights": "pissa", "target_modules": ["c_attn", "attn.c_proj"],
     "rank_pattern": {"c_attn": 5}, "alpha_pattern": {"attn.c_proj": 2}},
    {"init_lora_weights": "pissa", "target_modules": ["c_fc"], "layers_to_transform": [1]},
    {"init_lora_weights": "olora", "target_modules": ["attn.c_proj"]},
    {"init_lora_weights": "olora", "target_modules": ["attn.c_proj"], "use_rslora": True,
     "alpha_pattern": {"h.1.attn.c_proj": 2}},
    {"init_lora_weights": "gaussian", "target_modules": ["c_attn"]},
    {"init_lora_weights": "orthogonal", "target_modules": ["c_attn"], "r": 4},
    {"init_lora_weights": "mica", "target_modules": ["c_attn", "c_fc"]},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", STARTS, ids=str)
def test_what_peft_takes_from_the_base_at_the_start_is_taken_here(
    settings: dict, tiny: Tiny
) -> None:
    folder, expected = native(tiny, **settings)
    assert error(peft_logits(tiny, folder), expected) < 1e-4
    assert error(our_logits(tiny, folder), expected) < 1e-4
    merged = convert(tiny, folder, "merged", "merged")
    with torch.no_grad():
        read = transformers.GPT2LMHeadModel.from_pretrained(merged).eval()
        assert error(read(IDS).logits, expected) < 1e-4
    kept = convert(tiny, folder, "safetensors", "kept.safetensors")
    again = convert(tiny, kept, "peft", "again")
    assert error(peft_logits(tiny, again), expected) < 1e-4
    if settings["init_lora_weights"] in ("pissa", "olora"):
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        (folder / "adapter_config.json").write_text(
            json.dumps(config | {"init_lora_weights": True}), encoding="utf-8"
        )
        assert error(our_logits(tiny, folder), expected) > 1e-2  # as it was read before
        with pytest.raises(InputError, match="changed the base, which is needed"):
            (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
            checkpoints.read_adapter(folder)


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "eva", "loftq", "lora_ga", "x", 5, []])
def test_initialisations_whose_change_of_the_base_is_lost_are_refused_by_name(
    start: object, tiny: Tiny
) -> None:
    folder = convert(tiny, ours(tiny)[0], "peft", "peft")
    change_config(folder, init_lora_weights=start)
    with pytest.raises(InputError, match=f"init_lora_weights is {re.escape(repr(start))}"):
        checkpoints.load(tiny.base, folder)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | changes), encoding="utf-8")


def test_every_setting_of_peft_is_honoured_known_or_refused_by_name(tiny: Tiny) -> None:
    folder = convert(tiny, ours(tiny)[0], "peft", "peft")
    written = (folder / "adapter_config.json").read_text(encoding="utf-8")
    expected = our_logits(tiny, folder)
    names = {field.name for field in dataclasses.fields(peft.LoraConfig)} | {"a_newer_setting"}
    for name in names - READ:
        change_config(folder, **{name: ["x"]})
        if name in WITHOUT_EFFECT:
            assert torch.equal(our_logits(tiny, folder), expected), name
        else:
            with pytest.raises(InputError, match=f"{name} is set, which has no counterpart"):
                checkpoints.load(tiny.base, folder)
        for nothing in (None, False, {}, []):
            change_config(folder, **{name: nothing})
            assert torch.equal(our_logits(tiny, folder), expected), name
        (folder / "adapter_config.json").write_text(written, encoding="utf-8")


WRONG_VALUES = [
    ({"lora_alpha": 0}, "lora_alpha is 0"),
    ({"lora_alpha": -1}, "lora_alpha is -1"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    ({"lora_alpha": True}, "lora_alpha is True"),
    ({"alpha_pattern": {"c_attn": -1}}, "c_attn is -1"),
    ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]"),
    ({"alpha_pattern": {"(([a-z.0-9_]+)+)+!": 4}}, "is a regular expression; only names"),
    ({"rank_pattern": {"c_attn": 10**9}}, "c_attn is 1000000000"),
    ({"r": 0}, "r is 0"),
    ({"r": 1000000000}, "r is 1000000000"),
    ({"r": 7}, "have another rank than r and rank_pattern"),
    ({"use_dora": True}, "has no magnitudes"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    ({"lora_dropout": 2}, "lora_dropout=2"),
    ({"peft_type": ["LORA"]}, "peft_type is"),
    ({"base_model_name_or_path": 5}, None),
]


@pytest.mark.parametrize("changes, message", WRONG_VALUES, ids=str)
def test_settings_of_another_type_or_out_of_bounds_are_refused(
    changes: dict, message: str | None, tiny: Tiny
) -> None:
    folder = convert(tiny, ours(tiny)[0], "peft", "peft")
    change_config(folder, **changes)
    started = time.monotonic()
    if message is None:
        checkpoints.load(tiny.base, folder)
    else:
        with pytest.raises(InputError, match=message):
            checkpoints.load(tiny.base, folder)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("pattern, layers", [
    ("c_attn", (0, 1)), ("attn.c_attn", (0, 1)), ("h.1.attn.c_attn", (1,)),
    (r"h\.0\.attn\.c_attn", (0,)), ("^transformer.h.1.attn.c_attn", (1,)), ("^c_attn", ()),
    ("h.0.attn.c_attn$", (0,)), ("_attn", ()), ("ttn.c_attn", ()), ("h.0.attn", ()),
    ("attn_c_attn", ()), ("h.0xattn.c_attn", ()),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_keys_of_patterns_name_the_layers_that_they_do_in_peft(
    pattern: str, layers: tuple, tiny: Tiny
) -> None:
    names = [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)]
    assert [i for i in (0, 1) if re.match(rf"(.*\.)?({pattern})$", names[i])] == list(layers)
    folder, expected = native(tiny, target_modules=["c_attn"], alpha_pattern={pattern: 14})
    assert error(our_logits(tiny, folder), expected) < 1e-5


LORA_A, LORA_B = (f"base_model.model.transformer.h.0.attn.c_attn.lora_{x}.weight" for x in "AB")


@pytest.mark.parametrize(
    "change",
    [
        {LORA_A: torch.zeros(4)},
        {LORA_A: torch.tensor(1.0)},
        {LORA_B: torch.zeros(47, 4)},
        {LORA_B: torch.zeros(48, 0)},
        {LORA_A: torch.zeros(0, 16), LORA_B: torch.zeros(48, 0)},
        {LORA_A: torch.zeros(4, 17)},
        {LORA_A: torch.zeros(4, 16).long()},
    ],
    ids=str,
)
def test_tensors_of_strange_shapes_are_refused(change: dict, tiny: Tiny) -> None:
    folder = convert(tiny, ours(tiny)[0], "peft", "peft")
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors | change, path)
    with pytest.raises(InputError, match="native|peft"):
        checkpoints.load(tiny.base, folder)
    safetensors.torch.save_file({}, path)
    with pytest.raises(InputError, match="there are no LoRA tensors"):
        checkpoints.load(tiny.base, folder)


def test_any_content_of_a_peft_folder_is_read_or_refused_in_one_sentence(tiny: Tiny) -> None:
    folder = convert(tiny, ours(tiny)[0], "peft", "peft")
    config_path, tensors_path = (folder / name for name in checkpoints.PEFT_FILES)
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config |= {"alpha_pattern": {"h.0.attn.c_attn": 3}, "rank_pattern": {"c_fc": 2}}
    tensors, loaded = safetensors.torch.load_file(tensors_path), 0
    strange = [torch.tensor(1.0), torch.zeros(0), torch.zeros(4), torch.zeros(4, 16),
               torch.zeros(48, 4), torch.zeros(2, 2, 2), torch.zeros(4, 16).half()]  # fmt: skip
    for seed in range(300 * FUZZ):
        draw = random.Random(seed)
        config_path.write_text(json.dumps(mutated(config, draw)), encoding="utf-8")
        content = dict(tensors)
        if draw.random() < 0.5:
            name = draw.choice(list(content))
            value = content.pop(name)
            if draw.random() < 0.8:
                content[draw.choice([name, name + ".x", LORA_A])] = draw.choice([*strange, value])
        safetensors.torch.save_file(content, tensors_path)
        try:
            checkpoints.load(tiny.base, folder)
            loaded += 1
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
    assert 0 < loaded < 250 * FUZZ


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


@pytest.mark.filterwarnings("ignore")
def test_peft_finds_the_base_of_an_export_by_itself(tiny: Tiny) -> None:
    base = tiny.folder / "base"
    hf_base(tiny).save_pretrained(base)
    adapter, expected = ours(tiny)
    for given in (base, base / "model.safetensors"):
        argv = ["--adapter", adapter, "--init_checkpoint", given, "--to", "peft"]
        convert_adapter.main([str(x) for x in [*argv, "--output", tiny.folder / "peft"]])
        found = peft.AutoPeftModelForCausalLM.from_pretrained(tiny.folder / "peft").eval()
        with torch.no_grad():
            assert error(found(IDS).logits, expected) < 1e-5
    folder = convert(tiny, adapter, "peft", "named", "--base_name", "someone/gpt2")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "someone/gpt2"


@pytest.mark.parametrize("name, published", [
    ("gpt2-medium", "gpt2-medium"), ("gpt2@main", "gpt2"), ("openai-community/gpt2", "gpt2"),
    ("gpt2-small", "gpt2"), (hub.FOLDER / "gpt2-xl" / "model.safetensors", "gpt2-xl"),
    ("/c/hub/models--openai-community--gpt2-large/snapshots/1/model.safetensors", "gpt2-large"),
    ("mine/gpt2/model.safetensors", None), ("someone/gpt2", None),
])  # fmt: skip
def test_published_weights_are_known_by_name_or_by_where_they_are_kept(
    name: str | Path, published: str | None
) -> None:
    assert hub.published_name(name) == published
