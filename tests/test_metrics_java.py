"""METEOR, ROUGE-L and CIDEr with Java, and all metrics against what the official programs computed
on the golden files beside the repository."""

import json
import shutil

import pytest

from eval import coco, official
from eval.metrics import METRICS, measure

pytestmark = pytest.mark.skipif(
    shutil.which("java") is None, reason="no java on the PATH: METEOR and the PTB tokenizer need it"
)
KNOWN_METEOR = [
    (
        "Alimentum is located in the city centre. It is not family-friendly.",
        "There is a place in the city centre, Alimentum, that is not family-friendly.",
        0.42485,
    ),
    (
        "It is a guide to action which ensures that the military always obeys the commands of the "
        "party",
        "It is a guide to action that ensures that the military will forever heed Party commands",
        0.44736,
    ),
]


@pytest.fixture(scope="module")
def meteor():
    """One running jar for all tests: it takes seconds to start."""
    with coco.Meteor() as running:
        running.start()
        yield running


@pytest.mark.parametrize(("output", "reference", "want"), KNOWN_METEOR)
def test_meteor_is_version_1_5_with_normalisation(meteor, output, reference, want):
    assert meteor.measure([[reference]], [output]).score() == pytest.approx(want, abs=1e-5)


def test_meteor_of_summed_counts_is_what_the_jar_gives_for_the_items(meteor):
    outputs = [KNOWN_METEOR[0][0], "the inn is by the river", "", "a pub"]
    references = [
        [KNOWN_METEOR[0][1]],
        ["the inn is by the river"],
        ["one", "two"],
        ["a cheap pub"],
    ]
    counts = [
        meteor._ask(" ||| ".join(["SCORE", *texts, output]), 1)[0]
        for texts, output in zip(references, outputs, strict=True)
    ]
    *segments, corpus = map(float, meteor._ask(" ||| ".join(["EVAL", *counts]), 5))
    ours = meteor.measure(references, outputs)
    assert ours.score() == pytest.approx(corpus, abs=1e-12)
    assert ours.segments() == pytest.approx(segments, abs=1e-12)


def test_meteor_survives_its_own_separators_and_line_breaks(meteor):
    texts = ["a ||| b", "a\rb\nc", "SCORE ||| EVAL ||| x", "caf\u00e9 \u2028 bar"]
    segments = meteor.measure([[text, "other"] for text in texts], texts).segments()
    assert segments == pytest.approx([1, 1, 1, 1])


def test_ptb_tokens_stay_with_their_texts():
    texts = [
        "",
        "Don't stop, please!",
        "one\ntwo\u2028three",
        " ",
        "Caf\u00e9 \u00a320 (cheap)",
        "",
    ]
    # Brackets stay, lower-cased and so unknown to the list of punctuation marks.
    assert coco.ptb_tokenize(texts) == [
        "",
        "do n't stop please",
        "one two three",
        "",
        "caf\u00e9 # 20 -lrb- cheap -rrb-",
        "",
    ]
    groups = [["One.", "Two."], [], ["Three."]]
    assert coco.ptb_tokenize_groups(groups) == [["one", "two"], [], ["three"]]


def test_a_fraction_stays_one_ptb_token():
    (words,) = coco.ptb_tokenize(["it is 1 1/2 miles"])
    assert words.split(" ") == ["it", "is", "1\u00a01/2", "miles"]


def test_java_reads_utf8_whatever_the_locale(monkeypatch, meteor):
    monkeypatch.setenv("LC_ALL", "C")
    assert coco.ptb_tokenize(["Caf\u00e9"]) == ["caf\u00e9"]
    assert meteor.measure([["caf\u00e9 bar"]], ["caf\u00e9 bar"]).score() == pytest.approx(1)


def _golden(shared, name: str, case: str):
    folder = shared / "data" / "metrics_golden" / name
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))[case]
    hypotheses = official.read_hypotheses(folder / expected["hyp"])
    items = official.read_e2e_references(folder / expected["refs"], len(hypotheses))
    official.check_counts(items, hypotheses, expected["refs"], expected["hyp"])
    references = [item.references for item in items]
    assert (len(items), sum(map(len, references))) == (
        expected["instances"],
        expected["references"],
    )
    return folder, expected["official_minus_p"], references, hypotheses


def _check_segments(folder, case, measures):
    header, *lines = (folder / f"segments_{case}.tsv").read_text(encoding="utf-8").splitlines()
    columns = zip(*(map(float, line.split("\t")) for line in lines), strict=True)
    for name, want in zip(header.split("\t"), columns, strict=True):
        assert measures[name].segments() == pytest.approx(want, abs=1e-9), name


def _check_e2e(shared, meteor, name, case):
    folder, want, references, hypotheses = _golden(shared, name, case)
    measured = measure("e2e", references, [hypotheses], METRICS["e2e"], meteor)
    assert measured.reasons == {}
    scores = {metric: of.score() for metric, of in measured.systems[0].items()}
    assert scores == pytest.approx(want, abs=1e-9)
    _check_segments(folder, case, measured.systems[0])


@pytest.mark.parametrize("case", ["neighbour", "leave_one_out", "edge"])
def test_small_e2e_sets_score_as_the_official_program(shared, meteor, case):
    _check_e2e(shared, meteor, "e2e_small", case)


def test_the_full_e2e_test_set_scores_as_the_official_program(shared, meteor):
    _check_e2e(shared, meteor, "e2e_full", "neighbour")


def test_the_full_e2e_test_set_without_meteor(shared, meteor):
    _, want, references, hypotheses = _golden(shared, "e2e_full", "leave_one_out")
    wanted = ("BLEU", "NIST", "ROUGE_L", "CIDEr")
    measures = measure("e2e", references, [hypotheses], wanted, meteor).systems[0]
    for name in wanted:
        assert measures[name].score() == pytest.approx(want[name], abs=1e-9), name


def test_webnlg_scores_as_the_official_program(shared, meteor):
    folder = shared / "data" / "metrics_golden" / "webnlg_small"
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    hypotheses = official.read_hypotheses(folder / "hypothesis.txt")
    items = official.read_webnlg_references(str(folder / "references" / "reference"))
    references = [item.references for item in items]
    measured = measure("webnlg", references, [hypotheses], METRICS["webnlg"], meteor)
    want = expected["no_trailing_newline"]
    scores = {name: of.score() for name, of in measured.systems[0].items()}
    assert scores == pytest.approx(
        {
            "BLEU": want["bleu_full"] / 100,
            "METEOR": want["meteor"],
            "TER": want["ter"],
            "chrF++": want["chrf++"],
        },
        abs=1e-9,
    )
