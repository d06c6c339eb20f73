"""The sample set, and the text of the nano base: `python -m data.generate`.

Writes data/sample/{train,valid,test,base_test}.jsonl (committed) and, for the base, train.jsonl
and valid.jsonl of the other domains (made anew where they are needed). Rows are
{"context": "name : The Blue Fig | Type : pub | ...", "completion": "..."}; a context has several
rows, one for each reference, and stands in one file only. The same seed gives the same bytes.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from random import Random

from common.errors import Parser, run
from data.domains import BASE, POOLS, RESTAURANTS, Domain
from data.rows import Row, write_jsonl

SLOT = re.compile(r"\{([^{}]*)\}")
CHOICE = re.compile(r"\(([^()]*)\)")
OPTION = re.compile(r"\[([^\[\]]*)\]")


def choose(text: str, rng: Random) -> str:
    """Settle every `(a|b)`, the innermost first."""
    while CHOICE.search(text):
        text = CHOICE.sub(lambda match: rng.choice(match[1].split("|")), text)
    return text


def spell(text: str, rng: Random) -> str:
    """A name or a value: pools filled in, choices settled."""
    text = choose(text, rng)
    while SLOT.search(text):
        text = SLOT.sub(lambda match: choose(POOLS[match[1]], rng), text)
    return text


def draw(domain: Domain, rng: Random) -> dict[str, str]:
    """Values for a thing of the domain: its name, and `fewest` to `most` further slots in order."""
    name, *others = domain.slots
    free = [slot for slot in others if slot not in domain.always]
    count = rng.randint(domain.fewest, domain.most) - len(domain.always)
    chosen = {name, *domain.always, *rng.sample(free, count)}
    return {slot: spell(form, rng) for slot, form in domain.slots.items() if slot in chosen}


def realise(domain: Domain, values: dict[str, str], rng: Random) -> str:
    """A text that says every value and nothing else."""
    for _ in range(1000):
        text = choose(rng.choice(domain.texts), rng)
        while OPTION.search(text):
            text = OPTION.sub(lambda match: given(match[1], values), text)
        if set(SLOT.findall(text)) == set(values):
            return tidy(SLOT.sub(lambda match: worded(domain, values, match[1], rng), text))
    raise ValueError(f"no text of the domain says exactly {list(values)}")


def given(option: str, values: Collection[str]) -> str:
    """The optional part, or nothing where it needs a slot that has no value."""
    return option if set(SLOT.findall(option)) <= set(values) else ""


def worded(domain: Domain, values: dict[str, str], slot: str, rng: Random) -> str:
    """The words that stand in a text for the slot's value."""
    return choose(domain.wording.get(slot, {}).get(values[slot], values[slot]), rng)


def tidy(text: str) -> str:
    """Sentences start with a capital; `a` is `an` before a vowel, and before 8, 11 and 18."""
    text = re.sub(r"\ba(?= (?:[aeiouAEIOU]|8|11\b|18\b))", "an", text)
    return re.sub(r"(^|[.?] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def references(domain: Domain, values: dict[str, str], most: int, rng: Random) -> list[str]:
    """Up to `most` different texts for the same values."""
    texts: dict[str, None] = {}  # a set that keeps the order
    for _ in range(3 * most):
        texts[realise(domain, values, rng)] = None
        if len(texts) == most:
            break
    return list(texts)


def rows(
    domains: Sequence[Domain], contexts: int, most: int, taken: set[str], rng: Random
) -> Iterator[Row]:
    """Rows for `contexts` new contexts, the domains in turn; `taken` grows by these contexts."""
    for number in range(contexts):
        domain = domains[number % len(domains)]
        while True:
            values = draw(domain, rng)
            context = " | ".join(f"{slot} : {value}" for slot, value in values.items())
            if context not in taken:
                break
        taken.add(context)
        for text in references(domain, values, most, rng):
            yield {"context": context, "completion": text}


# file: domains, contexts, most references of a context
SAMPLE_FILES = {
    "test": ([RESTAURANTS], 50, 8),
    "valid": ([RESTAURANTS], 50, 3),
    "train": ([RESTAURANTS], 800, 2),
    "base_test": (BASE, 48, 8),
}
BASE_FILES = {"valid": (BASE, 160, 1), "train": (BASE, 24000, 1)}


def generate(sample: Path, base: Path, seed: int = 1) -> None:
    """Write all files; no context is in two of them."""
    taken: set[str] = set()
    for folder, kind, files in ((sample, "sample", SAMPLE_FILES), (base, "base", BASE_FILES)):
        for name, (domains, contexts, most) in files.items():
            # A file's own source of chance: no domain's wording changes another file.
            rng = Random(f"{seed} {kind} {name}")
            path = folder / f"{name}.jsonl"
            count = write_jsonl(path, rows(domains, contexts, most, taken, rng))
            print(f"{path}: {count:,} rows, {contexts:,} contexts")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--sample", type=Path, default=root / "data/sample")
    parser.add_argument("--base", type=Path, default=root / "runs/nano/text")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    generate(args.sample, args.base, args.seed)


if __name__ == "__main__":
    run(main)
