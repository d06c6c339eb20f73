"""An adapter in other formats: this repository's, the original code's, PEFT's, and merged weights.

What an adapter computes with its base stays the same; merged weights are summed in fp32.
"""

import io
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import loralib as lora
from checkpoints import hub, peft, peft_prefix
from checkpoints.adapter import PEFT_FILES, assemble, check_vocabulary, read_adapter, save_adapter
from checkpoints.base import BASE_FILES, BaseWeights, card_of
from checkpoints.config import transformers_config
from checkpoints.header import AdapterHeader, Base
from common.errors import InputError
from common.files import replacing, write_json
from data_utils import END_OF_TEXT, default_end_ids, load_tokenizer, vocabulary_files
from model import GPT2LMModel


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in its model: what its file holds, in the model's names and ranks, and a header
    that says what the file did not. `vocab` is the folder of the vocabulary, if one was given."""

    base: BaseWeights
    model: GPT2LMModel
    header: AdapterHeader
    tensors: dict[str, Tensor]
    vocab: str | None = None
    base_name: str | None = None


def load_for_export(
    base: BaseWeights, path: str, vocab: str | None = None, **given: Any
) -> LoadedAdapter:
    """Read an adapter of any format; `given` as `checkpoints.load` takes it."""
    header, read = read_adapter(path, base)
    model = assemble(base, header, read, path, **given)
    own = dict(model.named_parameters())
    names = {name for name in read if name in own} | lora.lora_state_dict(model).keys()
    tensors = {name: own[name].detach() for name in sorted(names)}
    header = complete(header, model, base, given.get("model_card"))
    return LoadedAdapter(base, model, header, tensors, vocab)


def complete(
    header: AdapterHeader | None, model: GPT2LMModel, base: BaseWeights, model_card: str | None
) -> AdapterHeader:
    """The header, or one where there is none, with what the model and the base say."""
    if header is None:
        config = model.config.lora
        header = AdapterHeader(config, Base(None), method="lora" if config else "full")
    if header.model_card is None:
        header = replace(header, model_card=model_card or card_of(base.tensors))
    if header.base.fingerprint is None:
        header = replace(header, base=Base(base.name, base.fingerprint))
    return header


def load_average(
    base: BaseWeights, paths: Sequence[str], vocab: str | None = None
) -> LoadedAdapter:
    """The mean of LoRA adapters of the same layers of one base: its update is exactly the mean of
    theirs, its rank the sum of their ranks.

    Raises:
        InputError: there are fewer than two, one is not plain LoRA, or they differ in their layers
            or their base.
    """
    if len(paths) < 2:
        raise InputError(f"--average takes at least two adapters, got {len(paths)}")
    headers, tensors = [], []
    for path in paths:
        adapter = load_for_export(base, path)
        if adapter.header.kind != "lora":
            bare = adapter.header.bottleneck or adapter.header.prefix
            merged = "" if bare else ", so average merged weights in its place"
            raise InputError(
                f"--average {path} is {adapter.header.kind}; only plain LoRA adapters have a mean "
                f"that is one{merged}"
            )
        headers.append(adapter.header)
        tensors.append(adapter.tensors)
    configs = [header.lora for header in headers if header.lora]
    if differing := {config.targets for config in configs} - {configs[0].targets}:
        raise InputError(
            f"--average: the adapters are on {', '.join(configs[0].targets)} and on "
            f"{', '.join(min(differing))}; all must be on the same layers"
        )
    try:
        mean = lora.merge_adapters(
            tensors, [config.scaling for config in configs], [1 / len(paths)] * len(paths)
        )
    except ValueError as error:
        raise InputError(f"--average: {error}") from error
    rank = sum(config.r for config in configs)
    config = lora.LoraConfig(rank, float(rank), targets=configs[0].targets)
    vocabularies = {header.vocabulary for header in headers}
    header = AdapterHeader(
        config,
        headers[0].base,
        model_card=headers[0].model_card,
        vocabulary=vocabularies.pop() if len(vocabularies) == 1 else None,
    )
    model = assemble(base, header, mean, "the average")
    return LoadedAdapter(base, model, header, mean, vocab)


def write_safetensors(adapter: LoadedAdapter, path: Path) -> list[Path]:
    save_adapter(path, adapter.tensors, adapter.header)
    return [path]


def refuse_form(header: AdapterHeader, form: str) -> None:
    """Raise InputError for an adapter that this format has no place for."""
    if header.bottleneck:
        raise InputError(
            f"--to {form}: a bottleneck ({header.kind}) cannot be merged, as there is a "
            "nonlinearity between its two matrices, and neither PEFT nor the original code has it; "
            "give --to safetensors"
        )
    if header.prefix and form != "peft":
        raise InputError(
            f"--to {form}: a prefix changes no weight, so it cannot be merged, and the original "
            "code does not have it; give --to peft or --to safetensors"
        )


def write_pt(adapter: LoadedAdapter, path: Path) -> list[Path]:
    """Write the original's file: adapters of q and v by name, without their alpha."""
    refuse_form(adapter.header, "pt")
    config, kind = adapter.header.lora, adapter.header.kind
    if config is None or kind not in ("lora", "lora_fa") or config.targets != ("q", "v"):
        targets = ",".join(config.targets) if config else "no layer"
        raise InputError(
            f"--to pt: the original code knows LoRA on q and v only, this is {kind} on {targets}; "
            "give --to peft or --to merged"
        )
    data = io.BytesIO()
    torch.save({"model_state_dict": adapter.tensors}, data)
    with replacing(path, "wb") as file:
        file.write(data.getbuffer())
    alpha = config.scaling * config.r
    print(f"Decode it with --lora_dim {config.r} --lora_alpha {alpha:g}: the file says neither")
    return [path]


def write_peft(adapter: LoadedAdapter, folder: Path) -> list[Path]:
    """Write a folder for PEFT."""
    refuse_form(adapter.header, "peft")
    header, name = adapter.header, adapter.base_name or name_for_peft(adapter.base)
    if header.prefix is not None:
        written = peft_prefix.write(adapter.model.config, adapter.tensors, header, name)
    elif header.lora is not None:
        biases = any(name.endswith("bias") for name in adapter.tensors)
        written = peft.write(adapter.model, header, biases, name)
    else:
        raise InputError(f"--to peft: {header.kind} training has no adapter; give --to merged")
    config, tensors, metadata = written
    config_name, tensors_name = PEFT_FILES
    write_tensors(folder / tensors_name, tensors, metadata)
    write_json(folder / config_name, config)
    return [folder / config_name, folder / tensors_name]


def name_for_peft(base: BaseWeights) -> str:
    """Return where PEFT finds a base: the hub's name of published weights, or the path of its model
    folder or file."""
    if name := hub.published_name(base.source):
        return hub.REPOSITORIES[name]
    path = Path(base.source).resolve()
    return str(path.parent if path.name in BASE_FILES else path)


def write_merged(adapter: LoadedAdapter, folder: Path) -> list[Path]:
    """Write a folder for transformers, with the tokenizer's files where the vocabulary is given."""
    refuse_form(adapter.header, "merged")
    config, end_of_text = adapter.model.config, None
    if adapter.vocab:
        tokenizer = load_tokenizer(adapter.vocab)
        end_of_text = tokenizer.token_to_id(END_OF_TEXT)
        check_vocabulary(tokenizer, adapter.vocab, adapter.base, adapter.header)
    elif known := default_end_ids(None, config.vocab_size):
        end_of_text = known[0]
    state = merged_weights(adapter.model)
    write_tensors(folder / "model.safetensors", state, {"format": "pt"})
    tied = "lm_head.weight" not in state
    write_json(folder / "config.json", transformers_config(config, end_of_text, tied))
    written = [folder / "config.json", folder / "model.safetensors"]
    if adapter.vocab:
        print("Prompt the merged model with context + <|endoftext|>, the form it was trained on")
        return written + write_tokenizer(adapter.vocab, folder, config.n_positions)
    print(f"Without --vocab {folder} has no tokenizer files")
    return written


def merged_weights(model: GPT2LMModel) -> dict[str, Tensor]:
    """The weights with every adapter summed into its layer, in fp32, under Hugging Face's names;
    the head only where an adapter of the embedding has parted the two."""
    state = {name: tensor.float() for name, tensor in lora.merged_state_dict(model).items()}
    if "wte" in model.config.targets:
        state["lm_head.weight"] = model.head_weight.float()
    return state


def write_tokenizer(vocab: str, folder: Path, window: int) -> list[Path]:
    """Write the vocabulary as one tokenizer.json, and its two files, if there are two, under
    transformers' names."""
    files = vocabulary_files(vocab)
    names = ["vocab.json", "merges.txt"] if len(files) == 2 else []
    for path, name in zip(files, names, strict=False):
        with path.open("rb") as source, replacing(folder / name, "wb") as target:
            shutil.copyfileobj(source, target)
    tokenizer = load_tokenizer(vocab)
    tokenizer.add_special_tokens([END_OF_TEXT])
    with replacing(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str())
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": window}
    write_json(folder / "tokenizer_config.json", settings | {"add_prefix_space": False} | special)
    return [folder / name for name in (*names, "tokenizer.json", "tokenizer_config.json")]


def write_card(path: Path, text: str) -> Path:
    """Write a model card: README.md in the folder of an export, or a file's name with .md."""
    card = path / "README.md" if path.is_dir() else path.with_suffix(".md")
    with replacing(card) as file:
        file.write(text)
    return card


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    state = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    with replacing(path, "wb") as file:
        file.write(safetensors.torch.save(state, metadata))


WRITERS: dict[str, Callable[[LoadedAdapter, Path], list[Path]]] = {
    "safetensors": write_safetensors,
    "pt": write_pt,
    "peft": write_peft,
    "merged": write_merged,
}
