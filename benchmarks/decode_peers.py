"""The peers of benchmarks/decode.py: each decodes contexts and says sequences and seconds."""

from collections.abc import Callable
from time import perf_counter

import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

import checkpoints
import gpu
from benchmarks import common
from decoding.beam_search import SearchSettings, beam_search
from decoding.packed import pack
from model import GPT2Config, GPT2LMModel

Work = Callable[[list[list[int]]], dict]


def ours(search: str) -> Callable[[dict], Work]:
    """This repository's search, `--search original` or `--search hf`."""

    def make(settings: dict) -> Work:
        gpu.reuse_freed_memory()
        model = GPT2LMModel(GPT2Config(**settings["shape"]))
        checkpoints.load_weights(model, load_file(settings["base"]))
        pack(model.eval())
        rules = SearchSettings(search=search, **settings["rules"])

        def work(contexts: list[list[int]]) -> dict:
            started = perf_counter()
            prompts = [torch.tensor(context) for context in contexts]
            found = beam_search(model, prompts, rules, settings["batch"])
            seconds = perf_counter() - started
            outputs = [hypotheses[0].tokens for hypotheses in found]
            return {"outputs": outputs, "seconds": seconds}

        return work

    return make


def transformers(settings: dict) -> Work:
    """transformers' generate, as many contexts at once as we take, the longest first as well."""
    import transformers as library

    rules = settings["rules"]
    config = library.GPT2Config(**settings["shape"] | {"attn_implementation": "sdpa"})
    model = library.GPT2LMHeadModel(config).eval()
    model.load_state_dict(load_file(settings["base"]), strict=False)
    options = {
        "num_beams": rules["beam"],
        "length_penalty": rules["length_penalty"],
        "no_repeat_ngram_size": rules["no_repeat_ngram_size"],
        "max_new_tokens": rules["eval_len"],
        "eos_token_id": list(rules["end_ids"]),
        "pad_token_id": rules["end_ids"][0],
        "do_sample": False,
    }

    @torch.inference_mode()
    def generate(contexts: list[list[int]]) -> list[list[int]]:
        rows = [torch.tensor(context) for context in contexts]
        ids = pad_sequence(rows, True, rules["end_ids"][0], padding_side="left")
        real = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side="left")
        texts = model.generate(ids, attention_mask=real, **options)[:, ids.size(1) :].tolist()
        return [cut_after_end(text, rules["end_ids"]) for text in texts]

    def work(contexts: list[list[int]]) -> dict:
        started = perf_counter()
        order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
        outputs: list[list[int]] = [[] for _ in contexts]
        for start in range(0, len(order), settings["batch"]):
            rows = order[start : start + settings["batch"]]
            for row, text in zip(rows, generate([contexts[i] for i in rows]), strict=True):
                outputs[row] = text
        return {"outputs": outputs, "seconds": perf_counter() - started}

    return work


def cut_after_end(tokens: list[int], end_ids: list[int]) -> list[int]:
    """The tokens without the padding after the end token."""
    ends = [place for place, token in enumerate(tokens) if token in end_ids]
    return tokens[: ends[0] + 1] if ends else tokens


if __name__ == "__main__":
    common.serve(
        {
            "ours": ours("original"),
            "ours-hf": ours("hf"),
            "transformers": transformers,
            "gemm": common.gemm,
        }
    )
