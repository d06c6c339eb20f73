"""Text of a base that knows data-to-text but not E2E: `python -m data.pretraining_text OUT`.

Pairs of facts and a sentence from three sources, into OUT/{train,valid}.jsonl in one form, the one
of the E2E rows of the LoRA release: `name : Udupi Palace | Type : restaurant | food : Indian`, both
sides tokenised. What is no plain description says what it does first:
`offer | domain : restaurants | name : Kawa Sushi | location : Livermore`.

    sgd    Schema-Guided Dialogue (Rastogi et al. 2020): system turns whose actions carry values
    rnnlg  Wen et al. 2015 and 2016: restaurants and hotels of San Francisco, laptops, televisions
    dart   Nan et al. 2021: the development rows of neither E2E nor WebNLG (test rows stay unseen)

What equals a text or an input of E2E but for case and punctuation is left out. The raw files come
from DATA_DIR, or are downloaded into data_raw by commit and checksum (data/downloads.json).
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.errors import InputError, Parser, run
from data.convert_dart import dart_rows
from data.convert_e2e import e2e_rows
from data.download import MANIFEST, fetch
from data.rows import Row, read_json, read_text, write_jsonl

RAW = Path(__file__).resolve().parents[1] / "data_raw"
VALID_SHARE = 200  # one input of that number is for validation
LONGEST = 480  # characters of a pair; what is longer is rare, and pads the batch it falls into
DART_FILE = "dart-v1.1.1-full-dev.json"
E2E_FILES = ("train.txt", "valid.txt", "test.txt")
RNNLG_DOMAINS = {"restaurant": "restaurant", "hotel": "hotel", "laptop": "laptop", "tv": "TV"}
ANYTHING = ("dontcare", "dont_care", "none")
# RNNLG writes its slots in one word; those that are no word by themselves are divided here.
RNNLG_SLOTS = {
    "pricerange": "price", "type": "Type", "kidsallowed": "kids allowed",
    "goodformeal": "good for meal", "dogsallowed": "dogs allowed", "hasinternet": "has internet",
    "acceptscreditcards": "accepts credit cards", "weightrange": "weight range",
    "isforbusinesscomputing": "is for business computing", "batteryrating": "battery rating",
    "driverange": "drive range", "hasusbport": "has USB port", "hdmiport": "HDMI ports",
    "ecorating": "eco rating", "screensizerange": "screen size range",
    "screensize": "screen size", "powerconsumption": "power consumption",
}  # fmt: skip
PROPER = ("name", "area", "near", "address", "family", "food")  # slots written with capitals
RAW_SLOTS = "|".join(slot for slot in RNNLG_SLOTS if slot != "type")
UNFINISHED = re.compile(rf"\b(dont_?care|has_|{RAW_SLOTS})\b")


def normalised(text: str) -> str:
    """The text's letters and digits alone, in lower case, words apart by one blank."""
    return " ".join(re.findall(r"\w+", text.lower()))


def tokenised(text: str) -> str:
    """The text as the LoRA release spells E2E: `It's family-friendly.` as
    `It 's family - friendly .`, `$5.50` as `$ 5.50`, times and numbers whole."""
    text = re.sub(r"(?<=\w)'(?=\w)", " '", text)
    text = re.sub(r"(?<=[A-Za-z])-(?=[A-Za-z])", " - ", text)
    text = re.sub(r"([$£€#])(?=\d)", r" \1 ", text)
    text = re.sub(r"([?!;()\"|]|[.,:](?!\w))", r" \1 ", text)
    return " ".join(text.split())


def divided(name: str) -> str:
    """`number_of_beds` and `NumberOfBeds` as `number of beds`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).strip().lower()


def pair(facts: Iterable[tuple[str, str]], text: str, acts: str = "", domain: str = "") -> Row:
    """One row: acts and domain, where given, then `slot : value` for each fact."""
    head = [acts, f"domain : {domain}"] if acts else []
    stated = [f"{slot} : {tokenised(value.replace('|', ','))}" for slot, value in facts]
    return {"context": " | ".join(head + stated), "completion": tokenised(text)}


def sgd_rows(path: str | Path) -> Iterator[Row]:
    """A row for each system turn with a value in its actions; `slot : ?` is what it asks for.

    Raises InputError where the file is not of that form.
    """
    try:
        for dialogue in read_json(path):
            for turn in dialogue["turns"]:
                for frame in turn["frames"] if turn["speaker"] == "SYSTEM" else ():
                    if any(action["values"] for action in frame["actions"]):
                        yield sgd_pair(frame, turn["utterance"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not a file of Schema-Guided Dialogue ({error!r})") from error


def sgd_pair(frame: dict, utterance: str) -> Row:
    """The row of one frame, its acts once each and its slots in their order."""
    acts = dict.fromkeys(divided(action["act"]) for action in frame["actions"])
    facts = [
        (sgd_slot(action["slot"]), ", ".join(map(sgd_value, action["values"])) or "?")
        for action in frame["actions"]
        if action["slot"]
    ]
    domain = divided(frame["service"].rpartition("_")[0])
    return pair(facts, utterance, ", ".join(acts), domain)


def sgd_slot(slot: str) -> str:
    """The slot in words; the name of a restaurant, an event … is its name."""
    if re.fullmatch(r"[a-z]+_name", slot):
        return "name"
    return {"price_range": "price", "type": "Type"}.get(slot, divided(slot))


def sgd_value(value: str) -> str:
    """The value in words: yes, no and any for the constants, an intent divided."""
    words = {"True": "yes", "False": "no", "dontcare": "any"}
    intent = re.fullmatch(r"([A-Z][a-z]+){2,}", value)
    return words.get(value, divided(value) if intent else value)


def rnnlg_rows(path: str | Path, domain: str) -> Iterator[Row]:
    """A row for each act that has slots, in sentences with capitals, plurals joined, full stops.

    An act that describes one thing by its name is written as E2E writes it, without act or domain.
    Texts that were left as raw slots (`name crios 93 ecorating a`) give none.

    Raises InputError where the file is not of that form.
    """
    text = read_text(path)
    try:
        entries = json.loads(text[text.index("[") :])
        for act, reference, _ in entries:
            matched = re.fullmatch(r"(\??\w+)\((.*)\)", act)
            if matched is None:
                raise ValueError(f"{act!r:.40} is not ACT(SLOTS)")
            name, slots = matched.groups()
            if slots and not UNFINISHED.search(reference):
                yield rnnlg_pair(name, slots, reference, domain)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a file of RNNLG ({error!r})") from error


def rnnlg_pair(act: str, slots: str, reference: str, domain: str) -> Row:
    """The row of one act, `slots` as RNNLG writes them: `name='the pub';near=soma`."""
    facts = []
    text = joined(reference)
    for slot, _, value in (part.partition("=") for part in slots.split(";")):
        value = value.strip("'\" ")
        if slot in PROPER and value not in ANYTHING:
            text = re.sub(rf"\b{re.escape(value)}\b", capitalised(value), text) if value else text
            value = capitalised(value)
        facts.append((RNNLG_SLOTS.get(slot, slot), rnnlg_value(value)))
    text = sentences(text, "?" if act.startswith("?") else ".")
    if act not in ("inform", "recommend") or facts[0][0] != "name":
        return pair(facts, text, divided(act.strip("?")), domain)
    if not any(slot == "Type" for slot, _ in facts):
        facts.insert(1, ("Type", domain))
    return pair(facts, text)


def joined(text: str) -> str:
    """The text with RNNLG's cut-off endings joined again: `child -s` as `children`."""
    text = re.sub(r"\bchild -s\b", "children", text)
    text = re.sub(r"(?<=[a-z][^aeiou])y -s\b", "ies", text)
    text = re.sub(r" -(s|ly|er)\b", r"\1", text)
    return re.sub(r"\bi\b", "I", text)


def rnnlg_value(value: str) -> str:
    """The value in words: yes, no, any for the constants, `?` for none."""
    if value in ANYTHING:
        return "any"
    return {"true": "yes", "false": "no", "": "?"}.get(value, value)


def capitalised(name: str) -> str:
    """A name in lower case with its capitals: `inn at the presidio` as `Inn at the Presidio`."""
    small = ("of", "the", "and", "in", "on", "at", "by", "or")
    words = name.split()
    return " ".join(
        word if place and word in small else word[:1].upper() + word[1:]
        for place, word in enumerate(words)
    )


def sentences(text: str, end: str) -> str:
    """The text with a capital after each full stop and with `end` where it lacks one."""
    text = text.strip()
    if not text.endswith((".", "?", "!")):
        text += f" {end}"
    return re.sub(r"(^|[.?!] )([a-z])", lambda found: found[1] + found[2].upper(), text)


def dart_pairs(path: str | Path) -> Iterator[Row]:
    """The rows of neither E2E nor WebNLG: `name : SUBJECT | relation : object` where all triples
    share a subject, else `SUBJECT : relation : object` for each."""
    for row in dart_rows(str(path)):
        if row["source"].lower() in ("e2e", "webnlg"):
            continue
        triples = [part.split(" : ") for part in row["context"].split(" | ")]
        if any(len(triple) != 3 for triple in triples):
            continue
        if len({subject for subject, _, _ in triples}) == 1:
            facts = [("name", triples[0][0])] + [(divided(slot), v) for _, slot, v in triples]
        else:
            facts = [(f"{tokenised(s)} : {divided(slot)}", v) for s, slot, v in triples]
        yield pair(facts, row["completion"])


def without_e2e(rows: Iterable[Row], e2e: Iterable[Row]) -> Iterator[Row]:
    """Those rows, once each, that have words on both sides and none of E2E's sides."""
    seen = {normalised(row[side]) for row in e2e for side in ("context", "completion")} | {""}
    for row in rows:
        sides = {normalised(row["context"]), normalised(row["completion"])}
        whole = f"{row['context']}\n{row['completion']}"
        if not sides & seen and whole not in seen and len(whole) <= LONGEST:
            seen.add(whole)
            yield row


def split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(train, valid) by content: an input goes to one side with all its texts, and no text of the
    training side stands in the other."""
    train: list[Row] = []
    valid: list[Row] = []
    for row in rows:
        digest = hashlib.sha256(normalised(row["context"]).encode()).digest()
        (train if int.from_bytes(digest[:4], "big") % VALID_SHARE else valid).append(row)
    texts = {normalised(row["completion"]) for row in train}
    return train, [row for row in valid if normalised(row["completion"]) not in texts]


def raw_files(group: str, names: Iterable[str] | None = None) -> Iterator[tuple[str, Path]]:
    """(name, path) of a group's files, fetched and checked (see data/download.py)."""
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))[group]
    for name in names or manifest:
        yield name, fetch(group, name, manifest[name], RAW / group)


def source_rows() -> Iterator[Row]:
    """Every row of the three sources in order, with its source, E2E not yet taken out."""
    for _, path in raw_files("sgd"):
        yield from (row | {"source": "sgd"} for row in sgd_rows(path))
    for name, path in raw_files("rnnlg"):
        domain = name.partition("/")[0]
        yield from (
            row | {"source": f"rnnlg {domain}"} for row in rnnlg_rows(path, RNNLG_DOMAINS[domain])
        )
    for _, path in raw_files("dart", [DART_FILE]):
        yield from (row | {"source": "dart"} for row in dart_pairs(path))


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="OUT")
    folder = parser.parse_args().folder
    e2e = [row for _, path in raw_files("e2e", E2E_FILES) for row in e2e_rows(str(path))]
    rows = list(without_e2e(source_rows(), e2e))
    for name, part in zip(("train", "valid"), split(rows), strict=True):
        count = write_jsonl(folder / f"{name}.jsonl", part)
        sources = Counter(row["source"] for row in part)
        print(f"{folder / name}.jsonl: {count:,} rows ({dict(sources)})")


if __name__ == "__main__":
    run(main)
