"""The other path of benchmarks/end_to_end.py, as users of transformers, peft and trl write it.

    python -m benchmarks.end_to_end_peer train SETTINGS.json
    python -m benchmarks.end_to_end_peer decode SETTINGS.json

It imports nothing of this repository and runs in the environment `.venv-peers`.
"""

import json
import sys
from pathlib import Path
from typing import Any

# GPT-2's card asks for dropout in the base; this repository's training has none there.
WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def read_rows(path: str) -> list[tuple[str, str]]:
    """Contexts and completions of a raw file: JSON lines, or E2E's `context||completion`."""
    lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    if path.endswith(".jsonl"):
        rows = [json.loads(line) for line in lines]
        return [(row["context"], row["completion"]) for row in rows]
    pairs = [line.strip().split("||") for line in lines]
    return [(context, completion) for context, completion in pairs]


def tokenizer_of(settings: dict[str, Any]) -> Any:
    """The base's tokenizer, padding with its end of text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["base"])
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train(settings: dict[str, Any]) -> None:
    """Fine-tune an adapter by trl's trainer with its default loss."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = tokenizer_of(settings)
    rows = [
        {"prompt": context + tokenizer.eos_token, "completion": " " + completion}
        for context, completion in read_rows(settings["train_data"])
    ]
    arguments = SFTConfig(
        output_dir=settings["output"], max_steps=settings["max_step"], use_cpu=True, bf16=False,
        per_device_train_batch_size=settings["batch"], learning_rate=settings["lr"],
        lr_scheduler_type="linear", warmup_steps=settings["warmup_step"], weight_decay=0.01,
        adam_epsilon=1e-6, max_grad_norm=0, gradient_checkpointing=False, seed=settings["seed"],
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    adapter = LoraConfig(
        r=settings["rank"], lora_alpha=settings["alpha"], lora_dropout=0.1,
        target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM",
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings["base"], **WITHOUT_DROPOUT),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.train()
    trainer.save_model(settings["output"])


def decode(settings: dict[str, Any]) -> None:
    """Decode each distinct context once with merged weights; write a prediction for each row."""
    import torch
    from peft import AutoPeftModelForCausalLM

    tokenizer = tokenizer_of(settings)
    tokenizer.padding_side = "left"
    model = AutoPeftModelForCausalLM.from_pretrained(settings["output"]).merge_and_unload().eval()
    rows = [context for context, _ in read_rows(settings["test_data"])]
    # The longest first, so that a batch has little padding.
    contexts = sorted(dict.fromkeys(rows), key=len, reverse=True)
    texts: dict[str, str] = {}
    for start in range(0, len(contexts), settings["decode_batch"]):
        batch = contexts[start : start + settings["decode_batch"]]
        prompts = [context + tokenizer.eos_token for context in batch]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            found = model.generate(
                **inputs, num_beams=10, length_penalty=0.8, no_repeat_ngram_size=4,
                max_new_tokens=64, do_sample=False, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        completions = found[:, inputs["input_ids"].size(1) :]
        outputs = tokenizer.batch_decode(completions, skip_special_tokens=True)
        texts |= zip(batch, outputs, strict=True)
    lines = (json.dumps({"id": n, "text": texts[context]}) for n, context in enumerate(rows))
    Path(settings["predictions"]).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    part, path = sys.argv[1:]
    {"train": train, "decode": decode}[part](json.loads(Path(path).read_text(encoding="utf-8")))
