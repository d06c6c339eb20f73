"""METEOR, ROUGE-L and CIDEr with the jars and classes that pycocoevalcap ships.

Its own wrappers of the two jars are not used: the tokenizer's writes into its package folder, the
scorer's loses Java's error text. Both jars need `java` on the PATH; without it, or where it fails,
the functions raise `JavaError` with what Java said.
"""

import shutil
import subprocess
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Self

import numpy as np

from eval.measure import Measure, Unscored, mean_of

METEOR_VERSION, METEOR_FLAGS = "1.5", "-l en -norm"
# Places in the jar's counts of an item: length, length of the reference, chunks, matches in both.
_CHUNKS = 20
_ROW = [0, 1, _CHUNKS, 21, 22]
ENCODING = "-Dfile.encoding=UTF-8"  # the jars would take the locale's
JAVA_SECONDS = 300.0  # that an answer may take; METEOR's first one takes 10 to 20
MOST_METEOR_PAIRS = 1_000_000  # words of the output x words of a reference: up to ten seconds


class JavaError(Unscored):
    """Java is missing, failed or did not answer; the text is the reason."""


def _java() -> str:
    java = shutil.which("java")
    if java is None:
        raise JavaError("no java on the PATH (METEOR, ROUGE-L and CIDEr need a Java runtime)")
    return java


def _jar(name: str) -> str:
    package = find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
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
    try:
        run = subprocess.run(
            [*command, "-preserveLines", "-lowerCase"],
            input="\n".join(" ".join(text.splitlines()) for text in texts) + "\n",
            capture_output=True,
            encoding="utf-8",
            timeout=JAVA_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise JavaError(f"the PTB tokenizer did not answer within {JAVA_SECONDS:g} s") from error
    except OSError as error:
        raise JavaError(f"{command[0]} cannot be started: {error.strerror}") from error
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

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._errors is not None:
            self._process.kill()
            self._process.communicate()
            self._errors.close()

    def start(self) -> None:
        """Start the jar without waiting for it.

        Raises:
            JavaError: there is no Java, or it cannot be started.
        """
        if self._process is not None:
            return
        # The parallel collector loads the paraphrase table a fifth faster than Java's default.
        options = [ENCODING, "-Xmx2G", "-XX:+UseParallelGC"]
        command = [_java(), *options, "-jar", _jar("meteor/meteor-1.5.jar")]
        # A pipe that nobody reads would fill up and stop Java.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [*command, "-", "-", "-stdio", *METEOR_FLAGS.split()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                encoding="utf-8",
            )
        except OSError as error:
            raise JavaError(f"{command[0]} cannot be started: {error.strerror}") from error

    def _ask(self, line: str, answers: int) -> list[str]:
        """Send one request line; return its answer lines."""
        self.start()
        process, late = self._process, threading.Event()
        assert process and process.stdin and process.stdout

        def give_up() -> None:
            late.set()
            process.kill()  # which ends the wait for its answer

        timer = threading.Timer(JAVA_SECONDS, give_up)
        timer.start()
        lines = [""]
        try:
            print(line, file=process.stdin, flush=True)
            lines = [process.stdout.readline().strip() for _ in range(answers)]
        except OSError:
            pass  # it has stopped, as the missing answer shows
        finally:
            timer.cancel()
        if "" in lines:
            raise self._failure(process, late.is_set())
        return lines

    def _failure(self, process: subprocess.Popen[str], is_late: bool) -> JavaError:
        if is_late:
            return JavaError(f"METEOR's jar did not answer within {JAVA_SECONDS:g} s")
        try:
            code = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        assert self._errors
        self._errors.seek(0)
        said = self._errors.read().strip() or "it said nothing"
        return JavaError(f"METEOR's jar stopped (exit code {code}): {said}")

    def measure(self, references: list[list[str]], hypotheses: list[str]) -> Measure:
        """METEOR of tokenized texts; the score of a corpus is that of its summed counts.

        Raises:
            Unscored: names the item whose texts are too long for it, or is a JavaError.
        """
        rows = []
        for number, (texts, hypothesis) in enumerate(zip(references, hypotheses, strict=True), 1):
            _check_length(number, texts, hypothesis)
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


def _check_length(number: int, references: list[str], hypothesis: str) -> None:
    own, longest = len(hypothesis.split()), max(len(text.split()) for text in references)
    if own * longest > MOST_METEOR_PAIRS:
        raise Unscored(
            f"item {number} has an output of {own} words and a reference of {longest}, and it "
            f"compares at most {MOST_METEOR_PAIRS:,} pairs of words"
        )


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
