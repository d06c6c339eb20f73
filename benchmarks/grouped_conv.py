"""Time the product by B in a MergedLinear, computed in three ways.

    python -m benchmarks.grouped_conv

They are the original's grouped convolution, one dense block-diagonal matrix, and the separate
products of loralib/. Each takes the same (tokens, parts · r) from A, forward and backward; outputs
and gradients must agree. The result goes to results/bench/.
"""

import os
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from common.errors import Parser, run

WIDTHS = {"sm": 768, "md": 1024}
TOKENS, PARTS = 480, 2  # a batch of E2E; query and value
REPEATS = 5


def convolved(h: Tensor, b: Tensor) -> Tensor:
    """B as a kernel (out, r, 1) of a 1-d convolution with one group per part, along the tokens."""
    return F.conv1d(h.T[None], b[..., None], groups=PARTS)[0].T


def dense(h: Tensor, b: Tensor) -> Tensor:
    """B as one (out, parts · r) matrix, zero outside its blocks."""
    return F.linear(h, torch.block_diag(*b.chunk(PARTS)))


def apart(h: Tensor, b: Tensor) -> Tensor:
    """One product per part, as `loralib.MergedLinear` does it."""
    pairs = zip(h.chunk(PARTS, -1), b.chunk(PARTS), strict=True)
    return torch.cat([h_i @ b_i.T.contiguous() for h_i, b_i in pairs], -1)


WAYS = {"grouped convolution": convolved, "block-diagonal matrix": dense, "products apart": apart}


def make_inputs(width: int, rank: int) -> tuple[Tensor, Tensor]:
    """What A gives, (tokens, parts · r), and B, (parts · width, r)."""
    torch.manual_seed(0)
    h = torch.randn(TOKENS, PARTS * rank, requires_grad=True)
    return h, torch.randn(PARTS * width, rank, requires_grad=True)


def milliseconds(way: str, width: int, rank: int) -> float:
    """Of one forward and backward."""
    h, b = make_inputs(width, rank)
    gradient = torch.ones(TOKENS, PARTS * width)
    started = perf_counter()
    for _ in range(REPEATS):
        WAYS[way](h, b).backward(gradient)
    return 1e3 * (perf_counter() - started) / REPEATS


def check(width: int, rank: int) -> None:
    """The three agree in outputs and gradients."""
    found = []
    for way in WAYS.values():
        h, b = make_inputs(width, rank)
        out = way(h, b)
        out.backward(torch.ones_like(out))
        found.append((out.detach(), h.grad, b.grad))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def measure(width: int, rank: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each way, all in turns; the first round is a warm-up."""
    times = {way: [milliseconds(way, width, rank)] for way in WAYS}
    for _ in range(rounds):
        for way, own in times.items():
            own.append(milliseconds(way, width, rank))
    return {way: common.summary(own[1:]) for way, own in times.items()}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--ranks", type=int, nargs="+", default=(4, 64), help="default: 4 and 64")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    cases: list[dict] = []
    for size, width in WIDTHS.items():
        for rank in args.ranks:
            check(width, rank)
            ways = measure(width, rank, args.rounds)
            cases.append({"size": size, "rank": rank, "milliseconds": ways})
            shown = {way: round(values["median"], 2) for way, values in ways.items()}
            print(f"gpt2.{size}, r {rank}, {TOKENS} tokens, ms: {shown}")
    result = {"benchmark": "grouped_conv", "machine": common.machine(args.threads), "cases": cases}
    print(common.write_result("grouped-conv", result))


if __name__ == "__main__":
    run(main)
