"""What the rows of the LoRA paper's table 3 train (Hu et al. 2021, arXiv:2106.09685)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A row of the table: its setting in the words of this repository, how many numbers are saved
    here, and what the paper prints for them. `size` is r, dim or length, 0 where there is none."""

    name: str
    card: str
    method: str
    size: int
    count: int
    printed: str
    note: str = ""


# The widths of AdapterL are nowhere in print: they follow from the counts, by the formula in
# section 5.1, and no other width gives them.
_BUDGET = "0.1 % of the model and no count"
TABLE_3 = (
    Row("FT", "gpt2.md", "full", 0, 354_823_168, "354.92 M", "which GPT-2 medium has not"),
    Row("AdapterL", "gpt2.md", "adapter_l", 6, 368_784, "0.37 M"),
    Row("AdapterL", "gpt2.md", "adapter_l", 224, 11_089_152, "11.09 M"),
    Row("AdapterH", "gpt2.md", "adapter_h", 112, 11_064_576, "11.09 M", "which no width gives"),
    Row("FT-Top2", "gpt2.md", "top2", 0, 25_194_496, "25.19 M"),
    Row("PreLayer", "gpt2.md", "prefix", 5, 245_760, "0.35 M", _BUDGET),
    Row("LoRA", "gpt2.md", "lora", 4, 393_216, "0.35 M", _BUDGET),
    Row("FT", "gpt2.lg", "full", 0, 774_030_080, "774.03 M"),
    Row("AdapterL", "gpt2.lg", "adapter_l", 8, 875_808, "0.88 M"),
    Row("AdapterL", "gpt2.lg", "adapter_l", 248, 23_002_848, "23.00 M"),
    Row("PreLayer", "gpt2.lg", "prefix", 5, 460_800, "0.77 M", _BUDGET),
    Row("LoRA", "gpt2.lg", "lora", 4, 737_280, "0.77 M", _BUDGET),
)


def table_3_row(card: str, method: str, size: int) -> Row | None:
    """Return the row of a setting, None where the table has none."""
    found = (row for row in TABLE_3 if (row.card, row.method, row.size) == (card, method, size))
    return next(found, None)
