"""Vocabularies: every form of their files, what the ids are, and what is refused."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FUZZ, ROOT, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from checkpoints.export import write_tokenizer
from common.errors import InputError
from data.vocabulary import bytes_without_entry, load_tokenizer
from data_utils import default_end_ids, read_rows, vocabulary_fingerprint

NANO = ROOT / "data" / "nano"
ENTRIES = {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "<|endoftext|>": 4}
MERGES = "#version: 0.2\na b\n"
HF, OPENAI = ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")


def write_vocabulary(
    folder: Path, entries: object = None, merges: str = MERGES, names: tuple[str, str] = HF
) -> Path:
    folder.mkdir(exist_ok=True)
    content = entries if isinstance(entries, str) else json.dumps(entries or ENTRIES)
    (folder / names[0]).write_text(content, encoding="utf-8")
    (folder / names[1]).write_text(merges, encoding="utf-8")
    return folder


def test_a_byte_level_vocabulary_is_read_under_either_naming(tmp_path: Path) -> None:
    one = load_tokenizer(write_vocabulary(tmp_path / "hf"))
    two = load_tokenizer(write_vocabulary(tmp_path / "openai", names=OPENAI))
    assert one.encode("ab ba").ids == [2, 3, 1, 0]
    assert vocabulary_fingerprint(one) == vocabulary_fingerprint(two)
    assert default_end_ids(one) == [4]
    rows = write_rows(tmp_path / "rows.jsonl", [{"context": "ab", "completion": "b"}])
    (row,) = read_rows(rows, one, 5)
    assert row.context.tolist() == [2, 4]
    assert row.completion.tolist() == [3, 1, 4]


def test_marks_and_windows_line_ends_in_the_files_do_not_matter(tmp_path: Path) -> None:
    content = "\ufeff" + json.dumps(ENTRIES)
    folder = write_vocabulary(tmp_path, content, "\ufeff" + MERGES.replace("\n", "\r\n"))
    assert load_tokenizer(folder).encode("ab ba").ids == [2, 3, 1, 0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """A folder as transformers saves nano's vocabulary with two tokens more, and its tokenizer."""
    from transformers import GPT2Tokenizer

    folder = tmp_path_factory.mktemp("saved")
    theirs = GPT2Tokenizer(str(NANO / "vocab.json"), str(NANO / "merges.txt"))
    theirs.add_tokens(["<sep>"])
    theirs.add_special_tokens({"pad_token": "<pad>"})
    theirs.save_pretrained(folder)
    return folder, theirs


def test_tokenizer_json_alone_is_the_vocabulary_that_transformers_saved(
    saved: tuple[Path, object], tmp_path: Path
) -> None:
    from transformers import GPT2Tokenizer

    GPT2Tokenizer(str(NANO / "vocab.json"), str(NANO / "merges.txt")).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    one, two = load_tokenizer(tmp_path), load_tokenizer(NANO)
    assert one.get_vocab() == two.get_vocab()
    assert vocabulary_fingerprint(one) == vocabulary_fingerprint(two)
    assert default_end_ids(one) == default_end_ids(two)
    assert one.encode("a <|endoftext|>").ids == two.encode("a <|endoftext|>").ids
    assert load_tokenizer(saved[0]).get_vocab_size() == two.get_vocab_size() + 2


@settings(max_examples=100 * FUZZ, deadline=None)
@given(parts=st.lists(st.text(max_size=8) | st.sampled_from(["<sep>", "<pad>", " "]), max_size=5))
def test_added_tokens_have_the_ids_of_transformers(
    parts: list[str], saved: tuple[Path, object]
) -> None:
    folder, theirs = saved
    text = "".join(parts).replace("<|endoftext|>", "")
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(text).ids
    assert ids == theirs(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_an_export_holds_the_vocabulary_that_it_was_given(
    saved: tuple[Path, object], tmp_path: Path
) -> None:
    for i, source in enumerate((saved[0], NANO)):
        folder = tmp_path / str(i)
        names = [path.name for path in write_tokenizer(str(source), folder, 1024)]
        assert set(names) == {path.name for path in folder.iterdir()}
        assert ("vocab.json" in names) == (source == NANO)
        one, two = load_tokenizer(folder), load_tokenizer(source)
        assert one.get_vocab() == two.get_vocab()
        assert one.encode("a <sep> b").ids == two.encode("a <sep> b").ids


CHANGES: dict[str, Callable[[dict], object]] = {
    "prefix": lambda t: t["pre_tokenizer"].update(add_prefix_space=True),
    "other": lambda t: t["pre_tokenizer"].update(type="Metaspace"),
    "sequence": lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": []}),
    "none": lambda t: t.update(pre_tokenizer=None),
    "lower case": lambda t: t.update(normalizer={"type": "Lowercase"}),
    "dropout": lambda t: t["model"].update(dropout=0.1),
    "WordPiece": lambda t: t["model"].update(type="WordPiece"),
    "no model": lambda t: t.pop("model"),
    "no merges": lambda t: t["model"].pop("merges"),
    "triple": lambda t: t["model"]["merges"].append(["a", "b", "c"]),
    "gap": lambda t: t["added_tokens"][-1].update(id=3000),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_tokenizer_that_encodes_otherwise_is_refused(
    kind: str, saved: tuple[Path, object], tmp_path: Path
) -> None:
    described = json.loads((saved[0] / "tokenizer.json").read_text(encoding="utf-8"))
    CHANGES[kind](described)
    (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(InputError, match="tokenizer.json") as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)


BAD = {
    "no end": ({"a": 0}, MERGES, "vocab.json has no entry <|endoftext|>"),
    "gap": (ENTRIES | {"c": 6}, MERGES, "vocab.json: the id 6 of entry 'c' is not below 6; "
            "the 6 ids must be 0, 1, 2 and so on without a gap"),
    "negative": (ENTRIES | {"c": -1}, MERGES, "the id -1 of entry 'c' is not below 6"),
    "twice": (ENTRIES | {"c": 3}, MERGES, "the id 3 of entry 'c' is another's, too"),
    "fraction": (ENTRIES | {"c": 5.0}, MERGES, "vocab.json is no vocabulary"),
    "truth": (ENTRIES | {"c": True}, MERGES, "vocab.json is no vocabulary"),
    "list": ("[1, 2]", MERGES, "vocab.json is no vocabulary"),
    "not JSON": ("{", MERGES, "vocab.json, line 1: not JSON"),
    "deep": ("[" * 100_000, MERGES, "vocab.json, line 1: not JSON"),
    "unknown merge": (ENTRIES, "a c\n", "vocab.json and its merges are no BPE vocabulary"),
    "triple": (ENTRIES, "#version: 0.2\na b\na b c\n", "vocab.json: merge 2 is not of two parts"),
    "not UTF-8": (ENTRIES, "\udcff b\n", "merges.txt, line 1: not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_vocabulary_that_cannot_be_used_is_refused(kind: str, tmp_path: Path) -> None:
    entries, merges, message = BAD[kind]
    write_vocabulary(tmp_path, entries)
    (tmp_path / "merges.txt").write_bytes(merges.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as refused:
        load_tokenizer(tmp_path)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds neither vocab.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["absent", "x" * 300])
def test_a_folder_of_a_vocabulary_that_is_not_there_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist|cannot be read: File name too"):
        load_tokenizer(tmp_path / name)


def test_bytes_that_a_vocabulary_lacks_are_refused_where_a_text_holds_them(tmp_path: Path) -> None:
    assert bytes_without_entry(load_tokenizer(NANO)) == set()
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "vocab"))
    assert bytes_without_entry(tokenizer) == set(range(256)) - set(b"ab ")
    path = write_rows(tmp_path / "rows.jsonl", [{"context": "ab", "completion": "abc"}])
    with pytest.raises(
        InputError, match="line 1: completion has the byte 99, which --vocab has no"
    ):
        read_rows(path, tokenizer, 5)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_a_damaged_vocabulary_is_refused_or_read_without_a_crash(
    name: str, saved: tuple[Path, object], tmp_path: Path
) -> None:
    source = (saved[0] if name == "tokenizer.json" else NANO) / name
    for other in {*HF} - {name, "merges.txt" if name == "tokenizer.json" else ""}:
        (tmp_path / other).write_bytes((NANO / other).read_bytes())
    content, refused = source.read_bytes(), 0
    for seed in range(60 * FUZZ):
        draw = random.Random(seed)
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 1, 4])):
            place = draw.randrange(draw.choice([300, len(content)]))
            damaged[place] = draw.choice([draw.randrange(256), *b'09ax,:"{}[] \n-'])
        (tmp_path / name).write_bytes(damaged[: draw.choice([len(content)] * 4 + [place])])
        try:
            assert isinstance(load_tokenizer(tmp_path), Tokenizer)
        except InputError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            refused += 1
    print(f"{name}: {60 * FUZZ} damaged files, {refused} refused")
    assert refused > 10 * FUZZ
