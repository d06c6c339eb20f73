"""The text files that the official scorers read.

E2E: one reference per line, an empty line after each item's; one output per line. WebNLG and DART:
files STEM0, STEM1, ... with one reference of each item, where an item with fewer repeats its first.
"""

from pathlib import Path

from common.errors import InputError
from common.files import replacing
from common.text_files import TextFile
from eval.texts import Item, warn


def _write(path: str | Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text)


def _lines(path: str | Path) -> list[str]:
    """The stripped lines of a file. Only a newline ends a line, and one at the end of the file
    starts no further line; other line breaks within a line become spaces."""
    with TextFile(path) as file:
        text = file.read()
    lines = text.removesuffix("\n").split("\n") if text else []
    return [" ".join(line.splitlines()).strip() for line in lines]


def read_hypotheses(path: str | Path) -> list[str]:
    """One output per line; an empty line is an empty output."""
    return _lines(path)


def read_e2e_references(path: str | Path, outputs: int) -> list[Item]:
    """Items of an E2E reference file: lines between empty lines, however many of these stand there.

    A file without any empty line has one reference for each of the `outputs`, if it is that long.
    """
    groups: list[list[str]] = [[]]
    for line in _lines(path):
        if line:
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
    groups = [group for group in groups if group]
    if len(groups) == 1 and len(groups[0]) == outputs:
        groups = [[line] for line in groups[0]]
    return [Item("", group, row) for row, group in enumerate(groups)]


def read_webnlg_references(stem: str) -> list[Item]:
    """Items of the files STEM0, STEM1, ...; an empty line is no reference, nor is a repetition of
    the first one at the end."""
    paths: list[str] = []
    while Path(f"{stem}{len(paths)}").is_file():
        paths.append(f"{stem}{len(paths)}")
    if not paths:
        raise InputError(f"there is no file {stem}0; name the part before the number")
    columns = [_lines(path) for path in paths]
    lengths = {path: len(column) for path, column in zip(paths, columns, strict=True)}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{path} {length}" for path, length in lengths.items())
        raise InputError(f"the reference files differ in their number of lines: {counts}")
    items = []
    for row, texts in enumerate(zip(*columns, strict=True)):
        references = [text for text in texts if text]
        while len(references) > 1 and references[-1] == references[0]:
            references.pop()
        items.append(Item("", references, row))
    return items


def check_counts(items: list[Item], hypotheses: list[str], references: str, outputs: str) -> None:
    """Raise InputError naming the items if a file of outputs is shorter or longer than the items,
    or if an item has no reference."""
    bare = [item.row + 1 for item in items if not item.references]
    if bare:
        raise InputError(f"{references}: item {bare[0]} has no reference; give it one")
    have, need = len(hypotheses), len(items)
    if have == need:
        return
    if have < need:
        first = items[have].references[0]
        what = f"from item {have + 1} on there is none (that item's reference is {first!r})"
    else:
        what = f"lines {need + 1} to {have} belong to no item (the first is {hypotheses[need]!r})"
    raise InputError(f"{outputs} has {have} lines, {references} has {need} items: {what}")


def write_references(path: str | Path, items: list[Item], task: str) -> list[str]:
    """Write the references in the task's official form; return the files' names."""
    if task not in ("webnlg", "dart"):
        blocks = ("\n".join(item.references) + "\n\n" for item in items)
        _write(path, "".join(blocks))
        return [str(path)]
    names = []
    for k in range(max(len(item.references) for item in items)):
        lines = (item.references[k if k < len(item.references) else 0] for item in items)
        names.append(f"{path}{k}")
        _write(names[-1], "".join(f"{line}\n" for line in lines))
    if Path(f"{path}{len(names)}").exists():
        warn(f"{path}{len(names)} is there from before and would count as one more reference")
    return names


def write_hypotheses(path: str | Path, hypotheses: list[str]) -> None:
    """Write one output per line."""
    _write(path, "".join(f"{text}\n" for text in hypotheses))
