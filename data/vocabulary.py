"""The files of a byte-level BPE vocabulary, GPT-2's or one like it, read and checked.

Two files, `vocab.json` with `merges.txt` or `encoder.json` with `vocab.bpe`, or the one that
transformers writes, `tokenizer.json`, which rules where both are there, as it does in transformers.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from common.errors import InputError
from common.json_text import JSONFault, parse_json
from common.text_files import TextFile

END_OF_TEXT = "<|endoftext|>"
FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


@dataclass(frozen=True)
class BPEFiles:
    """What a vocabulary's files say: ids by entry, pairs that merge, the first one first, and the
    tokens that were added to both, as keyword arguments of `tokenizers.AddedToken`.

    Raises:
        InputError: the ids are not 0, 1, 2 ..., none is the end of text's, or a merge is not of two
            parts.
    """

    path: Path
    entries: dict[str, int]
    merges: list[list[str]]
    added: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        entries, path = self.entries, self.path
        if not isinstance(entries, dict) or not all(type(i) is int for i in entries.values()):
            raise InputError(f"{path} is no vocabulary: it must be an object of ids by entry")
        taken: set[int] = set()
        for entry, number in entries.items():
            if number in taken or not 0 <= number < len(entries):
                why = "is another's, too" if number in taken else f"is not below {len(entries)}"
                raise InputError(
                    f"{path}: the id {number} of entry {entry!r:.40} {why}; the {len(entries)} ids "
                    "must be 0, 1, 2 and so on without a gap"
                )
            taken.add(number)
        if END_OF_TEXT not in {*entries, *(token["content"] for token in self.added)}:
            raise InputError(f"{path} has no entry {END_OF_TEXT}, which ends every text")
        for number, merge in enumerate(self.merges, start=1):
            if not isinstance(merge, list) or [type(part) for part in merge] != [str, str]:
                raise InputError(f"{path}: merge {number} is not of two parts: {merge!r:.60}")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """A byte-level BPE tokenizer as GPT-2's, from the files in `folder`."""
    files = read_vocabulary(folder)
    try:
        merges = [(left, right) for left, right in files.merges]
        tokenizer = Tokenizer(models.BPE(vocab=files.entries, merges=merges))
        tokenizer.add_tokens([AddedToken(**token) for token in files.added])
    except Exception as error:  # the library raises bare Exception for every fault of the merges
        raise InputError(f"{files.path} and its merges are no BPE vocabulary: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends every text."""
    number = tokenizer.token_to_id(END_OF_TEXT)
    assert number is not None, f"a tokenizer without {END_OF_TEXT} is refused in reading"
    return number


def bytes_without_entry(tokenizer: Tokenizer) -> set[int]:
    """The bytes that a byte-level vocabulary lacks, and which would be lost from a text."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}  # these stand for themselves
    others = iter(range(256, 512))
    symbols = {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}
    return {byte for byte, symbol in symbols.items() if tokenizer.token_to_id(symbol) is None}


def vocabulary_files(folder: str | Path) -> tuple[Path, ...]:
    """The files in a folder that hold its vocabulary: `tokenizer.json`, or entries and merges."""
    try:
        for names in FILES:
            paths = tuple(Path(folder) / name for name in names)
            if all(path.is_file() for path in paths):
                return paths
        if not Path(folder).exists():
            raise InputError(
                f"--vocab {folder} does not exist; give the folder of the base's vocabulary "
                "(scripts/download_vocab.sh fetches GPT-2's into vocab)"
            )
    except OSError as error:
        raise InputError(f"--vocab {folder} cannot be read: {error.strerror}") from error
    raise InputError(
        f"--vocab {folder} holds neither vocab.json with merges.txt, nor encoder.json with "
        "vocab.bpe, nor tokenizer.json; scripts/download_vocab.sh fetches GPT-2's"
    )


def read_vocabulary(folder: str | Path) -> BPEFiles:
    """Read the vocabulary of a folder."""
    path, *merges = vocabulary_files(folder)
    if not merges:
        return _read_tokenizer_json(path)
    with TextFile(merges[0]) as text:
        lines = [line.rstrip("\r\n") for line in text.lines()]
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return BPEFiles(path, _read_json(path), pairs)


def _read_tokenizer_json(path: Path) -> BPEFiles:
    """What transformers writes as one file, if it encodes as GPT-2 does."""
    described = _read_json(path)
    try:
        model, steps = described["model"], described["pre_tokenizer"]
        as_gpt2 = (
            model.get("type", "BPE") == "BPE"
            and not any(model.get(name) for name in CHANGES_OF_MODEL)
            and not described.get("normalizer")
            and (steps["type"], steps["add_prefix_space"]) == ("ByteLevel", False)
            and steps.get("use_regex", True)
        )
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        added = [t for t in described["added_tokens"] if t["content"] not in model["vocab"]]
        added.sort(key=lambda token: token["id"])
        first = len(model["vocab"])
        in_order = [t["id"] for t in added] == list(range(first, first + len(added)))
        added = [{name: token[name] for name in ADDED_TOKEN} for token in added]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no tokenizer.json of a BPE vocabulary ({error})") from error
    if not as_gpt2:
        raise InputError(f"{path} describes a tokenizer that does not encode as GPT-2's does")
    if not in_order:
        raise InputError(f"{path}: the ids of added tokens must follow {first - 1} without a gap")
    return BPEFiles(path, model["vocab"], merges, added)


CHANGES_OF_MODEL = (
    "dropout", "byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix",
)  # fmt: skip
ADDED_TOKEN = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def _read_json(path: Path) -> Any:
    with TextFile(path) as text:
        content = text.read()
    try:
        return parse_json(content)
    except JSONFault as fault:
        raise InputError(f"{path}, line {fault.line}: {fault}") from fault
