"""WebNLG 2017 JSON to text JSONL: `python -m data.convert_webnlg SRC DST`."""

from collections.abc import Iterator

from common.errors import InputError, run
from data.rows import Row, convert_main, read_json

# The categories of the training set; the test set has others besides.
SEEN = frozenset(
    [
        "Airport",
        "Astronaut",
        "Building",
        "City",
        "ComicsCharacter",
        "Food",
        "Monument",
        "SportsTeam",
        "University",
        "WrittenWork",
    ]
)


def webnlg_rows(path: str) -> Iterator[Row]:
    """Rows {"context", "completion", "category", "seen"}: the texts marked good, in order."""
    raw = read_json(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("entries"), list):
        raise InputError(f"{path}: expected an object with a list 'entries'")
    for number, numbered in enumerate(raw["entries"], 1):
        try:
            yield from entry_rows(numbered[str(number)])
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path}, entry {number}: expected {{'{number}': category, modifiedtripleset, "
                f"lexicalisations}} ({error!r})"
            ) from error


def entry_rows(entry: dict) -> Iterator[Row]:
    """The rows of one entry: `subject : property : object`, triples joined by ` | `."""
    context = " | ".join(
        f"{triple['subject']} : {triple['property']} : {triple['object']}"
        for triple in entry["modifiedtripleset"]
    )
    category = entry["category"]
    for text in entry["lexicalisations"]:
        if text["comment"] == "good":
            yield {
                "context": context,
                "completion": text["lex"],
                "category": category,
                "seen": category in SEEN,
            }


if __name__ == "__main__":
    run(lambda: convert_main(webnlg_rows, __doc__))
