"""Renews `pins.json` and says what moved, and by how much; for a commit that means to move it.

    python -m tests.pins.renew          in the root of the repository

The old adapter files and the texts that they decode to are never made anew.
"""

import io
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

from .measure import PINS, furthest, measure_all


def changes(then: dict, now: dict) -> Iterator[str]:
    """A sentence for each thing that is no longer what it was."""
    for name in ("made_on", "dropout", "decode"):
        if then[name] != now[name]:
            yield f"{name} changed"
    for kind in then["runs"].keys() ^ now["runs"].keys():
        yield f"{kind} is in one of the two alone"
    for kind in then["runs"].keys() & now["runs"].keys():
        old, new = then["runs"][kind], now["runs"][kind]
        fields = old["header"].keys() | new["header"].keys()
        moved = [f for f in sorted(fields) if old["header"].get(f) != new["header"].get(f)]
        if moved:
            yield f"{kind}: the header changed in {', '.join(moved)}"
        for part in ("tensors", "state"):
            if old[part]["sha256"] != new[part]["sha256"]:
                yield f"{kind}: the {part} changed, {_by_how_much(old[part], new[part])}"


def _by_how_much(old: dict, new: dict) -> str:
    if odd := sorted(old["values"].keys() ^ new["values"].keys()):
        return f"{len(odd)} of them in name, first {odd[0]}"
    return f"stored values by at most {furthest(old['values'], new['values']):.1e}"


def as_text(pins: dict) -> str:
    """JSON with lists of plain values on one line each."""
    text = json.dumps(pins, indent=1, sort_keys=True, ensure_ascii=False)
    one_line = re.compile(r"\[\n[^\[\]{}]*?\n\s*\]")
    return one_line.sub(lambda found: re.sub(r"\n\s*", "", found[0]), text) + "\n"


def main() -> None:
    """Measure everything, say what moved, and write the file."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        now = json.loads(json.dumps(measure_all(Path(folder))))
    if PINS.exists():
        then = json.loads(PINS.read_text(encoding="utf-8"))
        print("\n".join(sorted(changes(then, now))) or "Nothing moved")
    PINS.write_text(as_text(now), encoding="utf-8")


if __name__ == "__main__":
    main()
