"""Pairs packed into rows of one length: `python -m data.pack TEXT.jsonl OUT.jsonl --vocab FOLDER`.

Pairs differ in length, and a batch of them is padded to its longest: of 16 rows of pretraining text
43 % of all positions are padding. Here each row holds several pairs of token ids, as GPT-2's own
training text was laid out: `context <end> completion <end> context <end> …`. Made for training on
all tokens (`--obj jlm`). Deterministic.
"""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.errors import Parser, run
from data.encoding import read_rows
from data.rows import Row, write_jsonl
from data.vocabulary import load_tokenizer

LENGTH = 160
OPEN_ROWS = 64  # of a row that more than these came after, the rest stays empty


def packed(pairs: Iterable[list[int]], length: int = LENGTH) -> Iterator[list[int]]:
    """Rows of at most `length` ids, every pair whole in one: each goes into the first open row that
    has room. A pair longer than `length` is a row by itself."""
    rows: list[list[int]] = []
    for pair in pairs:
        for row in rows:
            if len(row) + len(pair) <= length:
                row += pair
                break
        else:
            rows.append(list(pair))
            if len(rows) > OPEN_ROWS:
                yield rows.pop(0)
    yield from rows


def row_of(ids: list[int]) -> Row:
    """A row of encoded data: the first token is its context, all the others are to be predicted."""
    return {"context": ids[:1], "completion": ids[1:]}


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab", required=True, help="folder of the vocabulary")
    parser.add_argument("--length", type=int, default=LENGTH, help="default: %(default)s")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.vocab)
    pairs = [
        [*row.context.tolist(), *row.completion.tolist()]
        for row in read_rows(args.text, tokenizer, tokenizer.get_vocab_size())
    ]
    random.Random(0).shuffle(pairs)
    rows = list(packed(pairs, args.length))
    count = write_jsonl(args.out, map(row_of, rows))
    tokens = sum(map(len, pairs))
    full = tokens / (count * args.length)
    print(f"{args.out}: {len(pairs):,} pairs, {tokens:,} tokens in {count:,} rows, {full:.1%} full")


if __name__ == "__main__":
    run(main)
