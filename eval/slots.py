"""Is a text true? The slot errors of E2E (Dušek, Howcroft and Rieser 2019, section 4).

    from eval.slots import slot_errors
    slot_errors(["name[Aromi], area[riverside]"], ["Aromi is in the city centre."])[0].wrong  # 1

PHRASES says which words state which value. They were written from the texts of the data set, so
that the counts are those that the official script gives; docs/metrics.md lists where they differ.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from common.errors import InputError
from eval.measure import Measure
from eval.texts import fold

SLOTS = (
    "name", "eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near",
)  # fmt: skip
SHORT_NAMES = {"type": "eatType", "price": "priceRange"}  # as the LoRA release spells them
NAMES = (
    "Alimentum", "Aromi", "Bibimbap House", "Blue Spice", "Browns Cambridge", "Clowns", "Cocum",
    "Cotto", "Fitzbillies", "Giraffe", "Green Man", "Loch Fyne", "Midsummer House", "Strada",
    "Taste of Cambridge", "The Cambridge Blue", "The Cricketers", "The Dumpling Tree", "The Eagle",
    "The Golden Curry", "The Golden Palace", "The Mill", "The Olive Grove", "The Phoenix",
    "The Plough", "The Punter", "The Rice Boat", "The Twenty Two", "The Vaults", "The Waterman",
    "The Wrestlers", "Travellers Rest Beefeater", "Wildwood", "Zizzi",
)  # fmt: skip
PLACES = (
    "All Bar One", "Avalon", "Burger King", "Café Adriatic", "Café Brazil", "Café Rouge",
    "Café Sicilia", "Clare Hall", "Crowne Plaza Hotel", "Express by Holiday Inn",
    "Rainbow Vegetarian Café", "Raja Indian Cuisine", "Ranch", "The Bakers", "The Portland Arms",
    "The Rice Boat", "The Six Bells", "The Sorrento", "Yippee Noodle Bar",
)  # fmt: skip

UP_TO_2, UP_TO_3 = r"(\w+ ){0,2}", r"(\w+ ){0,3}"
GUESTS = "(famil(y|ies)|kids?|child(ren)?s?)"
WELCOME = (
    rf"{GUESTS} (friendly|orient(at)?ed|place)",
    rf"{GUESTS} (is|are) (allowed|welcome)",
    rf"(accept|allow|welcome)s? {UP_TO_2}{GUESTS}",
    rf"for {GUESTS}",
)
PRICED = r"(?= price[sd]?(?!\S))"
PRICES = rf"prices?( range)? {UP_TO_3}"
RATED = rf"(?= {UP_TO_2}(rated|ratings?|reviews?|quality)(?!\S))"
RATINGS = rf"(rate[ds]?|ratings?|reviews?|quality) {UP_TO_2}"

# Slot -> the values that a phrase is right for, the one that it means first -> the phrases, as
# regular expressions over the words of `_words`. Of phrases that overlap, the one that starts first
# counts; of those that start together, the one that stands first here.
PHRASES = {
    "eatType": {
        "restaurant": ("restaurant",),
        "coffee shop": ("coffee( shops?)?", "cafes?"),
        "pub": ("pub",),
    },
    "food": {
        "Chinese": ("chinese?",),
        "English": ("english", "british"),
        "Fast food": ("fast food",),
        "French": ("french",),
        "Indian": ("indian",),
        "Italian": ("italian",),
        "Japanese": ("japanese",),
    },
    "area": {
        "riverside": ("riverside", "(along|at|beside|by|close to|near|off|on) the river"),
        "city centre": (
            "(city|town) cent(er|re)",
            "cent(er|re) of (the )?(city|town)",
            "in the cent(er|re)",
        ),
    },
    # An adjective belongs to the price or the rating that is close by: in "an average rating and a
    # high price" the official script sees an average and a high rating, and so does this table.
    "priceRange": {
        "more than £30 | high": (
            "(more|greater|higher) than (£ )?30",
            "(above|over) (£ )?30",
            "£ 30 (or more|and up)",
            "expensive",
            f"high{PRICED}",
            f"{PRICES}high",
        ),
        "less than £20 | cheap": (
            "(cheaper|less|lower) than (£ )?20",
            "(below|under) (£ )?20",
            "inexpensive",
        ),
        "£20-25 | moderate": ("(£ )?20 ((to|and) )?(£ )?25",),
        "cheap | less than £20 | low": ("cheap(ly)?", f"low{PRICED}", f"{PRICES}low"),
        "cheap | less than £20 | £20-25 | moderate": ("affordabl[ey]",),
        "less than £20 | £20-25 | moderate": ("moderately priced?",),
        "moderate | £20-25": (
            f"(average(ly)?|moderate|reasonable){PRICED}",
            f"{PRICES}(average|moderate|reasonable)",
        ),
        "moderate": (f"mid range{PRICED}",),
    },
    "customer rating": {
        "1 out of 5 | low": (
            "(1|one) (stars?|(out )?of (5|five))",
            f"(bad|low(ly)?|poor(ly)?){RATED}",
            f"{RATINGS}(bad|low|poor)",
            f"not ((got|have) )?(a )?good{RATED}",
        ),
        "5 out of 5 | high": (
            "(5|five) (stars?|(out )?of (5|five))",
            f"(excellent|great|high(ly)?|very good){RATED}",
            f"{RATINGS}high",
            "high standard",
        ),
        "3 out of 5 | average": (
            "(3|three) (stars?|(out )?of (5|five))",
            f"(average(ly)?|good|well){RATED}",
            f"{RATINGS}average",
        ),
    },
    "familyFriendly": {
        "no": (
            *(rf"(non?|not|never|nor)(?! only) {UP_TO_3}{phrase}" for phrase in WELCOME),
            f"no {GUESTS}",
            f"not (friendly )?(to|with) {GUESTS}",
            "not family (friend|recommended)",
            f"{GUESTS} (unfriendly|are not (allowed|welcome))",
            "adults? only",
            "(only|place) for adults",
            "adult establish(ment)?",
        ),
        "yes": WELCOME,
    },
}

Meaning = list[tuple[str, str]]  # slots with their values
Reading = tuple[str, ...]  # the values that a phrase is right for


COUNTS = ("added", "missing", "wrong", "repeated", "slots", "correct")


class SlotErrors(NamedTuple):
    """How many slots a text has wrong, of how many in its input; then the names of these slots."""

    added: int
    missing: int
    wrong: int
    repeated: int
    slots: int
    added_slots: tuple[str, ...]
    missing_slots: tuple[str, ...]
    wrong_slots: tuple[str, ...]
    repeated_slots: tuple[str, ...]

    @property
    def errors(self) -> int:
        """The errors of all four kinds."""
        return self.added + self.missing + self.wrong + self.repeated


def parse_meaning(text: str) -> Meaning:
    """The slots and values of `name[Aromi], eatType[pub]` or of `name : Aromi | Type : pub`, the
    slots as the data set spells them.

    Raises:
        InputError: the text is of neither form.
    """
    bracket, colon = text.find("["), text.find(" : ")
    if bracket >= 0 and not 0 <= colon < bracket:
        parts = [part.partition("[") for part in text.strip().removesuffix("]").split("]")]
    else:
        parts = [part.partition(" : ") for part in text.split(" | ")]
    pairs = [(slot.strip(" ,"), value.strip()) for slot, _, value in parts]
    if not all(slot and value for slot, value in pairs):
        raise InputError(f"{text!r:.80} is not of the form name[value], ... or name : value | ...")
    known = {_plain(slot): slot for slot in SLOTS} | SHORT_NAMES
    return [(known.get(_plain(slot), slot), value) for slot, value in pairs]


def _plain(slot: str) -> str:
    return slot.replace(" ", "").lower()


def _words(text: str) -> str:
    """The text's words in lower case and its punctuation marks, one blank between any two: of
    `family-friendly`, `£20` and `isn't` it makes `family friendly`, `£ 20` and `is not`."""
    text = re.sub(r" ?n ?['’] ?t\b", " not", fold(text))
    return " ".join(re.findall(r"\w+|[£.,:;!?]", text))


@lru_cache(maxsize=1 << 14)
def _key(value: str) -> str:
    """What two spellings of a value or a name have in common."""
    return _words(value).removeprefix("the ")


def _accepts(reading: Reading, value: str) -> bool:
    return _key(value) in map(_key, reading)


def _whole_words(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\S)(?:{pattern})(?!\S)")


@cache
def _table() -> dict[str, tuple[re.Pattern[str], dict[str, Reading]]]:
    """Slot -> one pattern of all its phrases, and what each named group of the pattern means."""
    table = {}
    for slot, phrases in PHRASES.items():
        readings = {f"r{i}": tuple(values.split(" | ")) for i, values in enumerate(phrases)}
        groups = zip(readings, phrases.values(), strict=True)
        pattern = "|".join(f"(?P<{group}>{'|'.join(of_group)})" for group, of_group in groups)
        table[slot] = _whole_words(pattern), readings
    return table


@lru_cache(maxsize=1 << 14)
def _has_phrases(slot: str, value: str) -> bool:
    return any(_accepts(tuple(values.split(" | ")), value) for values in PHRASES.get(slot, ()))


@lru_cache(maxsize=1024)
def _any_of(names: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return _whole_words("|".join(map(re.escape, longest_first)))


class Mention(NamedTuple):
    """Words of a text that state a slot."""

    slot: str
    reading: Reading
    words: str


def mentions(meaning: Meaning, text: str) -> list[Mention]:
    """What the text states: names and places of the data set and of `meaning`, phrases of the
    table, and, word for word, those values of `meaning` that the table does not know."""
    words = _words(text)
    proper = {_key(name): ("name", name) for name in NAMES}
    proper |= {_key(place): ("near", place) for place in PLACES}
    proper |= {_key(value): (slot, value) for slot, value in meaning if slot in ("name", "near")}
    names = _any_of(frozenset(proper) - {""})
    found = [Mention(proper[key][0], (proper[key][1],), key) for key in names.findall(words)]
    words = names.sub("<>", words)  # "Raja Indian Cuisine" does not make the food Indian
    for slot, (pattern, readings) in _table().items():
        matches = pattern.finditer(words)
        found += [Mention(slot, readings[str(m.lastgroup)], m.group()) for m in matches]
    for slot, value in meaning:
        if slot not in ("name", "near") and _key(value) and not _has_phrases(slot, value):
            pattern = _any_of(frozenset({_key(value)}))
            found += [Mention(slot, (value,), match) for match in pattern.findall(words)]
    return found


def _judge(meaning: Meaning, text: str) -> SlotErrors:
    found = mentions(meaning, text)
    added: list[str] = []
    missing: list[str] = []
    wrong: list[str] = []
    for slot in dict.fromkeys([*dict(meaning), *(mention.slot for mention in found)]):
        values = [value for of_slot, value in meaning if of_slot == slot]
        readings = {mention.reading for mention in found if mention.slot == slot}
        absent = sum(not any(_accepts(r, value) for r in readings) for value in values)
        others = {r[0] for r in readings if not any(_accepts(r, value) for value in values)}
        wrong += [slot] * min(absent, len(others))
        missing += [slot] * (absent - len(others))
        added += [slot] * (len(others) - absent)
    often = Counter(found).items()
    repeated = [m.slot for m, times in often if times > 1 and m.slot not in ("name", "eatType")]
    counts = len(added), len(missing), len(wrong), len(repeated), len(meaning)
    return SlotErrors(*counts, tuple(added), tuple(missing), tuple(wrong), tuple(repeated))


def slot_errors(mrs: Sequence[str], texts: Sequence[str]) -> list[SlotErrors]:
    """The errors of each text against its meaning representation (`parse_meaning` says how one
    looks). A slot of the MR that the text does not state is missing, or wrong if the text states
    another value of it; further values are added; a value that is stated twice in the same words
    is repeated, but for name and type, which serve as pronouns do.

    Raises:
        InputError: there are not as many texts as MRs, or an MR has another form.
    """
    if len(mrs) != len(texts):
        raise InputError(f"there are {len(texts)} texts for {len(mrs)} MRs; give one for each")
    return [_judge(parse_meaning(mr), text) for mr, text in zip(mrs, texts, strict=True)]


def stated_meaning(meaning: Meaning, text: str) -> Meaning:
    """The meaning that the text states: of each slot all values, those of `meaning` in its words,
    in the order of the cleaned data of E2E (a text may state two values, and then both stand)."""
    found = mentions(meaning, text)
    stated: Meaning = []
    for slot in dict.fromkeys((*SLOTS, *dict(meaning))):
        values = [value for of_slot, value in meaning if of_slot == slot]
        readings = {mention.reading for mention in found if mention.slot == slot}
        said = {v for r in readings for v in [w for w in values if _accepts(r, w)] or r[:1]}
        stated += [(slot, value) for value in sorted(said)]
    return stated


def slot_error_rate(errors: Sequence[SlotErrors]) -> Measure:
    """SER: errors of all kinds / slots of the MRs. The statistics are `COUNTS`, in this order."""
    rows = [(*item[:5], item.errors == 0) for item in errors]
    return Measure(np.array(rows, dtype=np.float64), lambda sums: sums[:4].sum() / sums[4])


def counts_of(rate: Measure) -> dict[str, int]:
    """What `slot_error_rate` counted in all texts: errors by kind, slots, and correct texts, which
    have no error."""
    return dict(zip(COUNTS, map(int, rate.statistics.sum(axis=0)), strict=True))
