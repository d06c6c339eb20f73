"""A vocabulary: `python -m data.train_bpe TEXT.jsonl --out FOLDER [--entries 2048]`.

A byte-level BPE, in the files of GPT-2's vocabulary (vocab.json, merges.txt),
trained on the text of a base. `<|endoftext|>` has the last id, as in GPT-2. Deterministic.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from common.errors import InputError, Parser, run
from common.files import read_json_lines, replacing

ENTRIES = 2048
END = "<|endoftext|>"


def train_bpe(texts: Iterable[str], entries: int = ENTRIES) -> tuple[dict[str, int], list[str]]:
    """(vocabulary: token to id, merges: `left right` in order); every byte is a token.

    Raises InputError where there are fewer entries than bytes and the end of text, or the texts
    have too few distinct words for that many.
    """
    if entries <= 256:
        raise InputError(f"--entries {entries} must be at least 257: every byte, and {END}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=entries - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = {**model["vocab"], END: entries - 1}
    if len(vocab) != entries:
        raise InputError(f"the text gives {len(vocab)} entries, not {entries}: use more text")
    return vocab, [" ".join(pair) for pair in model["merges"]]


def write_vocabulary(folder: Path, vocab: dict[str, int], merges: list[str]) -> None:
    """vocab.json and merges.txt, as Hugging Face and OpenAI lay them out."""
    with replacing(folder / "vocab.json") as file:
        json.dump(dict(sorted(vocab.items(), key=lambda item: item[1])), file, ensure_ascii=False)
        file.write("\n")
    with replacing(folder / "merges.txt") as file:
        file.write("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges))


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="JSONL of contexts and completions")
    parser.add_argument("--out", type=Path, required=True, help="folder of the vocabulary")
    parser.add_argument("--entries", type=int, default=ENTRIES, help="default: %(default)s")
    args = parser.parse_args()
    texts = (f"{row['context']} {row['completion']}" for row in read_json_lines(args.text))
    write_vocabulary(args.out, *train_bpe(texts, args.entries))
    print(f"{args.out}: vocab.json, merges.txt, {args.entries:,} entries")


if __name__ == "__main__":
    run(main)
