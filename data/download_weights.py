"""Published GPT-2 weights into the Hugging Face cache: `python -m data.download_weights NAME`."""

from checkpoints.hub import REPOSITORIES, find
from common.errors import Parser, run


def main() -> None:
    """The command line: the names; prints where the weights of each are."""
    parser = Parser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=REPOSITORIES, metavar="NAME")
    for name in parser.parse_args().names:
        print(f"{name}: {find(name)}", flush=True)


if __name__ == "__main__":
    run(main)
