"""The shipped sample: what both programs use where neither data nor base is given."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data" / "sample"


def sample_settings() -> dict[str, Any]:
    """Return the flags of a training run on the sample, with absolute paths, and `test_data`."""
    settings = json.loads((SAMPLE / "settings.json").read_text(encoding="utf-8"))
    for name in ("train_data", "valid_data", "init_checkpoint", "vocab"):
        settings[name] = str(ROOT / settings[name])
    return settings | {"test_data": str(SAMPLE / "test.jsonl")}
