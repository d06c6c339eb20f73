"""METEOR, ROUGE-L and CIDEr with the jars and classes that pycocoevalcap ships.

Its own wrappers of the two jars are not used: the tokenizer's writes into its package folder, the
scorer's loses Java's error text. Both jars need `java` on the PATH; without it, or where it fails,
the functions raise `JavaError` with what Java said.
"""

import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from eval.measure import Measure, Unscored, mean_of

METEOR_VERSION, METEOR_FLAGS = "1.5", "-l en -norm"
# Places in the jar's counts of an item: length, length of the reference, chunks, matches in both.
_CHUNKS = 20
_ROW = [0, 1, _CHUNKS, 21, 22]
ENCODING = "-Dfile.encoding=UTF-8"  # the jars would take the locale's


class JavaError(Unscored):
    """Java is missing or failed; the text is the reason."""


def _java() -> str:
    java = shutil.which("java")
    if java is None:
        raise JavaError("no java on the PATH (METEOR, ROUGE-L and CIDEr need a Java runtime)")
    return java


def _jar(name: str) -> str:
    package = find_spec("pycocoevalcap")
    if package is None:
        raise JavaError(f"pycocoevalcap, which ships {Path(name).name}, is not installed")
    return str(Path(package.submodule_search_locations[0]) / name)


def ptb_tokenize(texts: list[str]) -> list[str]:
    """The words of each text by the Stanford PTB tokenizer: lower case, punctuation dropped.

    All texts go in one run and in their order, duplicates too, as in the official program: at the
    end of a line the tokenizer looks at the line after it.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    jar = _jar("tokenizer/stanford-corenlp-3.4.1.jar")
    command = [_java(), ENCODING, "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer"]
    run = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"],
        input="\n".join(" ".join(text.splitlines()) for text in texts) + "\n",
        capture_output=True,
        encoding="utf-8",
    )
    lines = run.stdout.split("\n")[:-1]
    if run.returncode or len(lines) != len(texts):
        message = run.stderr.strip() or f"{len(lines)} lines for {len(texts)} texts"
        raise JavaError(f"the PTB tokenizer failed (exit code {run.returncode}): {message}")
    # Only a space ends a token: "1 1/2" and telephone numbers keep a no-break space within.
    tokens = [line.rstrip().split(" ") for line in lines]
    return [" ".join(token for token in line if token not in PUNCTUATIONS) for line in tokens]


def ptb_tokenize_groups(groups: list[list[str]]) -> list[list[str]]:
    """`ptb_tokenize` for texts by item."""
    words = iter(ptb_tokenize([text for texts in groups for text in texts]))
    return [[next(words) for _ in texts] for texts in groups]


class Meteor:
    """METEOR 1.5 as a running jar, used in a `with` block. Starting it takes seconds, so it starts
    on first use, or ahead of it by `start`, and serves all systems, subsets and samples."""

    def __init__(self):
        self._process: subprocess.Popen | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._errors.close()

    def start(self) -> None:
        """Start the jar without waiting for it."""
        if self._process is not None:
            return
        # The parallel collector loads the paraphrase table a fifth faster than Java's default.
        options = [ENCODING, "-Xmx2G", "-XX:+UseParallelGC"]
        command = [_java(), *options, "-jar", _jar("meteor/meteor-1.5.jar")]
        # A pipe that nobody reads would fill up and stop Java.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command, "-", "-", "-stdio", *METEOR_FLAGS.split()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )

    def _ask(self, line: str, answers: int) -> list[str]:
        """Send one request line; return its answer lines."""
        self.start()
        try:
            print(line, file=self._process.stdin, flush=True)
        except OSError as error:
            raise self._failure() from error
        lines = [self._process.stdout.readline().strip() for _ in range(answers)]
        if "" in lines:
            raise self._failure()
        return lines

    def _failure(self) -> JavaError:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip() or "it said nothing"
        return JavaError(f"METEOR's jar stopped (exit code {code}): {said}")

    def measure(self, references: list[list[str]], hypotheses: list[str]) -> Measure:
        """METEOR of tokenized texts; the score of a corpus is that of its summed counts."""
        rows = []
        for texts, hypothesis in zip(references, hypotheses, strict=True):
            # The best reference counts, so a second copy of one changes nothing but the time.
            fields = [*dict.fromkeys(texts), hypothesis]
            line = " ||| ".join(["SCORE", *map(_one_field, fields)])
            rows.append(self._ask(line, answers=1)[0].split())
        counts = np.array(rows, dtype=np.float64)
        # Adding up items, the jar leaves out the one chunk of an item that matches from end to end.
        length, reference_length, chunks, matched, reference_matched = counts[:, _ROW].T
        perfect = (chunks == 1) & (matched == length) & (reference_matched == reference_length)
        counts[perfect, _CHUNKS] = 0
        return Measure(counts, self.score)

    def score(self, sums: np.ndarray) -> float:
        """The jar's score of summed counts."""
        counts = " ".join(str(float(value)) for value in sums)
        _, final = self._ask(f"EVAL ||| {counts}", answers=2)
        return float(final)


def _one_field(text: str) -> str:
    """The text without what separates fields and requests in the jar's protocol."""
    return " ".join(text.replace("|||", "").splitlines()).replace("  ", " ")


def _captions(
    references: list[list[str]], hypotheses: list[str]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    return dict(enumerate(references)), {i: [text] for i, text in enumerate(hypotheses)}


def rouge_l(references: list[list[str]], hypotheses: list[str]) -> Measure:
    """ROUGE-L of PTB-tokenized texts: LCS F (beta 1.2) of the largest precision and the largest
    recall over the references, mean over items."""
    from pycocoevalcap.rouge.rouge import Rouge

    _, values = Rouge().compute_score(*_captions(references, hypotheses))
    return mean_of(list(values))


def cider(references: list[list[str]], hypotheses: list[str]) -> Measure:
    """CIDEr of PTB-tokenized texts, raw (0 to 10), mean over items; document frequencies are those
    of the references given, so one item alone scores 0."""
    from pycocoevalcap.cider.cider import Cider

    if not any(text for texts in references for text in texts):
        return mean_of([0.0] * len(hypotheses))
    _, values = Cider().compute_score(*_captions(references, hypotheses))
    return mean_of(list(values))
