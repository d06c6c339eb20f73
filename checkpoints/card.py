"""The model card of an exported adapter: what it is, how well it does, and how to load it.

A README.md with the metadata of the Hugging Face hub in front, made from the adapter's header, its
run's run.json and a result of `python -m eval.evaluate --json`; whatever is not known is left out.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import hub
from checkpoints.header import AdapterHeader
from common.errors import InputError

PERCENT = ("BLEU", "METEOR", "ROUGE_L", "TER", "chrF++")  # stored as fractions
NAMES = {"lora": "LoRA", "lora_fa": "LoRA-FA", "dora": "DoRA", "pissa": "PiSSA"}
BOTTLENECKS = {
    "adapter_l": "AdapterL (Lin et al. 2020) of {}: a bottleneck after each block",
    "adapter_h": "AdapterH (Houlsby et al. 2019) of {}: two bottlenecks in each block",
}
SUBSETS = {
    "full": "All weights",
    "top": "The last blocks",
    "top2": "The last two blocks and the LayerNorm after them",
    "bias": "The biases",
}
PROMPT = (
    "A prompt is the context followed by `<|endoftext|>`; the model continues with a space and the "
    "text. It was trained on no other form. `gpt2_beam.py` adds the token itself, other "
    "programs must be given it."
)


@dataclass(frozen=True)
class Origin:
    """What a card says beyond the header: the command and code of the run, and scored results."""

    command: str | None = None
    commit: str | None = None
    torch: str | None = None
    result: Mapping[str, Any] = field(default_factory=dict)


def read_origin(adapter: str | Path, scores: str | Path | None = None) -> Origin:
    """The origin of an adapter in a run's work_dir, as far as files there tell it.

    Args:
        adapter: the adapter file or the work_dir.
        scores: a result of eval.evaluate; one in the work_dir is not searched for, because nothing
            says which adapter it belongs to.

    Raises:
        InputError: `scores` is not such a result.
    """
    path = Path(adapter)
    run = _read_object((path if path.is_dir() else path.parent) / "run.json")
    command = run.get("command")
    readable = isinstance(command, list) and all(isinstance(part, str) for part in command)
    result: dict[str, Any] = {}
    if scores is not None:
        result = _read_object(Path(scores))
        if not isinstance(result.get("scores"), dict):
            raise InputError(
                f"--scores {scores} is not a result of scoring; make one by "
                "python -m eval.evaluate … --json FILE"
            )
    return Origin(
        command=f"python {shlex.join(command)}" if readable and command else None,
        commit=_text(run.get("git_commit")),
        torch=_text(run.get("torch")),
        result=result,
    )


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def model_card(
    header: AdapterHeader, form: str, name: str, origin: Origin, base_name: str | None = None
) -> str:
    """The card, in Markdown, of an export called `name` in the format `form` of --to.

    Others find the base by `base_name`, or by its name on the hub; any other base is one of this
    machine, for which the card's commands have a word that stands for it.
    """
    if base_name is None and hub.published_name(header.base.name or ""):
        base_name = header.base.name
    sections = [
        _metadata(base_name, header, form, name, origin.result),
        f"# {name}",
        _summary(header, form),
        _scores(origin.result),
        f"## How to use it\n\n{PROMPT}\n\n{_loading(base_name, header, form, name)}",
        _training(header, origin),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _metadata(
    base_name: str | None, header: AdapterHeader, form: str, name: str, result: Mapping[str, Any]
) -> str:
    """The front matter, YAML whose scalars are JSON strings, so that any name is safe in it."""
    lines = ["---"]
    if base_name:
        lines += [f"base_model: {json.dumps(base_name)}"]
        relation = "finetune" if form == "merged" else "adapter"
        lines += [f"base_model_relation: {relation}"]
    if form in ("peft", "merged"):
        lines += [f"library_name: {'peft' if form == 'peft' else 'transformers'}"]
    lines += ["pipeline_tag: text-generation", "tags:", "- gpt2", f"- {header.kind}"]
    if numbers := _numbers(result):
        task = json.dumps(str(result.get("task", "own")))
        lines += ["model-index:", f"- name: {json.dumps(name)}", "  results:", "  - task:"]
        lines += ["      type: text-generation", "    dataset:", f"      name: {task}"]
        lines += [f"      type: {task}", "    metrics:"]
        for metric, value, _ in numbers:
            lines += [f"    - type: {json.dumps(metric.lower())}", f"      value: {value:.4f}"]
    return "\n".join([*lines, "---"])


def _numbers(result: Mapping[str, Any]) -> list[tuple[str, float, float | None]]:
    """Name, value and half the 95 % interval of each score that is a number."""
    bootstrap = result.get("bootstrap")
    intervals = bootstrap.get("intervals", {}) if isinstance(bootstrap, dict) else {}
    numbers = []
    for name, value in (result.get("scores") or {}).items():
        if isinstance(value, int | float):
            interval = intervals.get(name)
            half = interval.get("ci") if isinstance(interval, dict) else None
            numbers.append((str(name), float(value), half))
    return numbers


def _summary(header: AdapterHeader, form: str) -> str:
    base = f"`{header.base.name}`" if header.base.name else "GPT-2"
    if header.base.fingerprint:
        base += f" (fingerprint `{header.base.fingerprint[:16]}…`)"
    if lora := header.lora:
        text = (
            f"A {NAMES[header.kind]} adapter of {base}: rank {lora.r}, alpha {lora.alpha:g}"
            f"{' (scaled by 1/√r)' if lora.rslora else ''}, on {', '.join(lora.targets)}."
        )
    elif bottleneck := header.bottleneck:
        text = f"{BOTTLENECKS[header.kind].format(base)}, {bottleneck.dim} wide."
    elif header.prefix:
        text = f"A prefix (Li & Liang 2021) of {base}: {header.prefix.length} virtual tokens."
    else:
        text = f"{SUBSETS[header.kind]} of {base} were fine-tuned."
    if form == "merged":
        text += " Its update is added to the weights here, so no adapter library is needed."
    return text


def _scores(result: Mapping[str, Any]) -> str:
    numbers = _numbers(result)
    if not numbers:
        return ""
    lines = ["## Scores", "", "| score | value | 95 % interval |", "|---|---|---|"]
    for name, value, half in numbers:
        scale, digits = (100, 1) if name in PERCENT else (1, 2)
        spread = f"± {scale * half:.{digits}f}" if half is not None else ""
        lines.append(f"| {name} | {scale * value:.{digits}f} | {spread} |")
    items, references = result.get("items"), result.get("references")
    lines += ["", f"On {items} inputs with {references} references (task {result.get('task')})."]
    return "\n".join(lines)


def _loading(base_name: str | None, header: AdapterHeader, form: str, name: str) -> str:
    """How to load this format here and, where they can, in PEFT and transformers."""
    base, local = base_name or "BASE", shlex.quote(name.rpartition("/")[2])
    ours = f"python gpt2_beam.py --init_checkpoint {shlex.quote(base)} --vocab VOCAB --data FILE"
    blocks = [_fenced("bash", f"{ours} --adapter {local}")]
    if form == "merged":
        merged = f"python gpt2_beam.py --init_checkpoint {local} --vocab {local} --data FILE"
        blocks = [_fenced("bash", merged)]
        blocks += [
            _fenced(
                "python",
                "from transformers import pipeline\n\n"
                f"generate = pipeline('text-generation', model={name!r})\n"
                "prompt = CONTEXT + '<|endoftext|>'\n"
                "print(generate(prompt, return_full_text=False)[0]['generated_text'])",
            ),
            "vLLM and other servers load this folder like any GPT-2.",
        ]
    elif form == "peft":
        hint = "" if header.prefix else "  # or .merge_and_unload()"
        blocks += [
            _fenced(
                "python",
                "from peft import PeftModel\n"
                "from transformers import GPT2LMHeadModel\n\n"
                f"base = GPT2LMHeadModel.from_pretrained({base!r})\n"
                f"model = PeftModel.from_pretrained(base, {name!r}){hint}",
            ),
            "vLLM does not serve adapters of GPT-2; it serves what `--to merged` writes.",
        ]
    elif header.bottleneck is None:
        blocks += [
            "For PEFT and transformers convert it: `python convert_adapter.py --adapter "
            f"{local} --to peft`{'' if header.prefix else ' or `--to merged`'}."
        ]
    if not base_name and form != "merged":
        blocks += ["`BASE` stands for the folder of the base that is named above."]
    return "\n\n".join(blocks)


def _fenced(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```"


def _training(header: AdapterHeader, origin: Origin) -> str:
    rows = []
    if header.train_data:
        rows.append(("sha256 of the training data", f"`{header.train_data}`"))
    if header.step:
        rows.append(("steps", f"{header.step:,}"))
    if header.seed is not None:
        rows.append(("seed", str(header.seed)))
    if origin.commit:
        rows.append(("commit of the code", f"`{origin.commit}`"))
    if origin.torch:
        rows.append(("PyTorch", origin.torch))
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])
    command = _fenced("bash", origin.command) if origin.command else ""
    parts = [table if rows else "", command]
    if not any(parts):
        return ""
    return "\n\n".join(["## Training", *filter(None, parts)])
