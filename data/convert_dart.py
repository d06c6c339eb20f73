"""DART v1.1.1 JSON to text JSONL: `python -m data.convert_dart SRC DST`."""

from collections.abc import Iterator

from common.errors import InputError, run
from data.rows import Row, convert_main, read_json


def dart_rows(path: str) -> Iterator[Row]:
    """Rows {"context", "completion", "source"}, one for each annotation, in order.

    An annotation without a text gives no row: one of the 12,552 of the test set.
    """
    raw = read_json(path)
    if not isinstance(raw, list):
        raise InputError(f"{path}: expected a list of entries")
    for number, entry in enumerate(raw, 1):
        try:
            context = " | ".join(
                f"{subject} : {relation.lower()} : {thing}"
                for subject, relation, thing in entry["tripleset"]
            )
            for annotation in entry["annotations"]:
                if annotation["text"].strip():
                    yield {
                        "context": context,
                        "completion": annotation["text"],
                        "source": annotation["source"],
                    }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{path}, entry {number}: expected tripleset of [subject, relation, object] and "
                f"annotations of text and source ({error!r})"
            ) from error


if __name__ == "__main__":
    run(lambda: convert_main(dart_rows, __doc__))
