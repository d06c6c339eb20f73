"""The metrics that need no Java, on small data of our own. Oracles: numbers worked out by hand from
the definitions, sacreBLEU, pyter."""

import math
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyter
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from common.errors import InputError
from eval import bootstrap, coco, mteval, webnlg
from eval.measure import Unscored, mean_of
from eval.metrics import e2e_scores, measure, segment_scores, webnlg_scores

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["red", "Red", "inn", "by", "the", "river", "cheap", "1,000.5", "child-friendly", "."]

texts = st.lists(st.sampled_from(WORDS), min_size=4, max_size=9).map(" ".join)
item = st.tuples(st.lists(texts, min_size=1, max_size=4), texts)
corpus = st.lists(item, min_size=1, max_size=5).map(
    lambda items: [list(part) for part in zip(*items, strict=True)]
)
short_words = st.lists(st.sampled_from("abcd"), max_size=9)


def bleu(references, hypotheses):
    return mteval.bleu(mteval.count_references(references), hypotheses)


def nist(references, hypotheses):
    return mteval.nist(mteval.count_references(references), hypotheses)


def test_bleu_is_the_geometric_mean_of_four_precisions():
    got = bleu([["a b c d e"]], ["a b c d f"]).score()
    assert got == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, abs=1e-12)


def test_bleu_takes_the_closest_reference_length_and_the_shorter_of_two():
    measure = bleu(
        [["a b c d", "a b c d e f"], ["x x x x x x x x", "x"]], ["a b c d e", "x x x x x x"]
    )
    assert measure.statistics[:, 1].tolist() == [4, 8]


def test_bleu_clips_matches_at_the_largest_count_in_one_reference():
    measure = bleu([["the cat is on the mat", "the the the dog"]], ["The the the the the the the"])
    assert measure.statistics[0, 2] == 3


def test_bleu_ignores_case_and_counts_an_empty_output_as_one_token():
    assert bleu([["ONE two Three four"]], ["one TWO three four"]).score() == pytest.approx(1)
    assert bleu([["one"]], [""]).statistics[0].tolist() == [1, 1, 0, 0, 0, 0, 1, 0, -1, -2]


def test_bleu_penalises_short_output():
    assert bleu([["a b c d e f g h"]], ["a b c d"]).score() == pytest.approx(math.exp(1 - 8 / 4))


@settings(deadline=None, max_examples=60)
@given(corpus)
def test_bleu_equals_sacrebleu_where_outputs_have_four_tokens(data):
    references, hypotheses = data
    theirs = BLEU(lowercase=True, tokenize="13a", smooth_method="none", force=True)
    score = theirs.corpus_score(hypotheses, webnlg.by_position(references)).score / 100
    ours = bleu(references, hypotheses).score()
    # Without any matching 4-gram the official program bounds the precision from below.
    assert ours == pytest.approx(score, abs=1e-9 if score else 1e-3)


def test_nist_weighs_matches_by_information():
    # Four tokens: info(a) = log2(4/2), info(b) = log2(4/1), info(a b) = log2(2/1).
    measure = nist([["a b"], ["a c"]], ["a b", "a d"])
    assert measure.score() == pytest.approx((1 + 2 + 1) / 4 + 1 / 2)


def test_nist_halves_at_two_thirds_of_the_mean_reference_length():
    assert nist([["a b", "a b c d"]], ["a b"]).statistics[0, 0] == 3
    # Six tokens: info(a) = info(b) = log2(6/2), info(a b) = 0.
    assert nist([["a b", "a b c d"]], ["a b"]).score() == pytest.approx(math.log2(3) / 2)


def test_nist_counts_all_references_and_clips_at_the_largest():
    # Seven tokens of which a occurs four times, at most three times in one reference.
    measure = nist([["a a a b", "a c c"]], ["a a a a"])
    assert measure.statistics[0, 1] == pytest.approx(3 * math.log2(7 / 4))


def test_ter_of_a_perfect_system_is_zero():
    references = [["one two three .", "another one"], ["four five"]]
    scores = webnlg_scores(references, ["one two three .", "four five"], ["BLEU", "TER", "chrF++"])
    assert scores["TER"] == 0
    assert scores["chrF++"] == pytest.approx(1)


def test_ter_of_an_empty_output_is_one():
    assert webnlg.ter([["one two"], ["three"]], ["", "three"]).segments() == [1, 0]


@settings(deadline=None)
@given(short_words, short_words.filter(len))
def test_edit_distance_equals_the_table_method(words, reference):
    assert webnlg.edit_distance_to(reference)(words) == pyter.edit_distance(words, reference)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(short_words.filter(len), min_size=1, max_size=4), short_words),
        min_size=1,
        max_size=3,
    )
)
def test_ter_is_the_mean_of_the_least_over_references(items):
    want = np.mean([min(pyter.ter(own, ref) for ref in refs) for refs, own in items])
    references = [[" ".join(ref) for ref in refs] for refs, _ in items]
    got = webnlg.ter(references, [" ".join(own) for _, own in items]).score()
    assert got == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("metric", ["BLEU", "TER", "chrF++"])
def test_unequal_numbers_of_references_score_as_in_the_official_layout(metric):
    hypotheses = ["the red inn by the river", "a cheap pub"]
    references = [
        ["the red inn near a river", "by the river is the inn", "red"],
        ["cheap pub", "a pub"],
    ]
    padded = [references[0], [*references[1], references[1][0]]]
    ours = webnlg_scores(references, hypotheses, [metric])
    assert ours == webnlg_scores(padded, hypotheses, [metric])


def test_webnlg_bleu_keeps_case_and_has_no_smoothing():
    assert webnlg.bleu([["a B c d e"]], ["a B c d e"]).score() == pytest.approx(1)
    assert webnlg.bleu([["a B c d e"]], ["a b c d e"]).score() == 0


def test_cider_is_zero_for_one_item_and_ten_for_two_perfect_ones():
    one = "the red inn is by the old river"
    two = "five cheap pubs stand in our town"
    assert coco.cider([[one]], [one]).score() == 0
    assert coco.cider([[one], [two]], [one, two]).score() == pytest.approx(10)


def test_cider_of_references_without_words_is_zero():
    assert coco.cider([[""], [""]], ["a", "b"]).score() == 0


def test_rouge_l_takes_largest_precision_and_recall_from_any_reference():
    # Precision 1 from the longer reference, recall 1 from the shorter one.
    assert coco.rouge_l([["a b", "a b c d e f"]], ["a b c d"]).score() == pytest.approx(1)
    precision, recall = 2 / 4, 2 / 3
    want = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert coco.rouge_l([["a x b"]], ["a b c d"]).score() == pytest.approx(want)


def test_segment_scores_have_one_value_per_item():
    got = segment_scores("webnlg", [["a b c d"], ["e f g h"]], ["a b c d", "x"], ["BLEU", "TER"])
    assert got["TER"] == [0, 1]
    assert got["BLEU"][0] == pytest.approx(1)
    assert got["BLEU"][1] < 0.1


@pytest.mark.parametrize("score", [e2e_scores, webnlg_scores])
def test_unequal_counts_are_named(score):
    with pytest.raises(InputError, match="1 outputs for 2 items"):
        score([["a"], ["b"]], ["a"], ["BLEU"])
    with pytest.raises(InputError, match="item 2 has no reference"):
        score([["a"], []], ["a", "b"], ["BLEU"])
    with pytest.raises(InputError, match="no item"):
        score([], [], ["BLEU"])


def test_without_java_its_scores_are_none_and_the_rest_is_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = e2e_scores([["a b c d"], ["e f g h"]], ["a b c d", "e f g h"])
    assert scores["BLEU"] == pytest.approx(1)
    assert scores["NIST"] > 0
    assert [scores[name] for name in ("METEOR", "ROUGE_L", "CIDEr")] == [None] * 3


@pytest.mark.parametrize(
    "use",
    [
        lambda _, texts: coco.ptb_tokenize(texts),
        lambda meteor, texts: meteor.measure([texts], texts),
    ],
    ids=["tokenizer", "METEOR"],
)
def test_a_failing_java_is_quoted(monkeypatch, tmp_path, use):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'no heap for you' >&2\nexit 7\n", encoding="utf-8")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    failure = pytest.raises(coco.JavaError, match=r"exit code 7.*no heap for you")
    with coco.Meteor() as meteor, failure:
        use(meteor, ["a text"])


def test_metrics_not_asked_for_are_not_imported():
    code = """
import sys
from eval.metrics import e2e_scores, webnlg_scores
assert not {"sacrebleu", "nltk", "pyter", "pycocoevalcap"} & sys.modules.keys()
e2e_scores([["a b"]], ["a b"], ["BLEU", "NIST"])
webnlg_scores([["a b"]], ["a b"], ["BLEU"])
assert not {"nltk", "pyter", "pycocoevalcap", "torch"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def _two_systems():
    rng = np.random.default_rng(0)
    words = np.array(["red", "inn", "by", "the", "river", "is", "cheap", "good", "for", "all"])
    references = [[" ".join(rng.choice(words, 8))] for _ in range(40)]
    systems = [
        [
            " ".join(np.where(rng.random(8) < rate, rng.choice(words, 8), text[0].split()))
            for text in references
        ]
        for rate in (0.2, 0.35)
    ]
    return references, systems


def test_intervals_equal_sacrebleus():
    references, (hypotheses, _) = _two_systems()
    metric = BLEU(tokenize="13a", smooth_method="none", force=True)
    theirs = metric.corpus_score(hypotheses, webnlg.by_position(references), n_bootstrap=200)
    ours = bootstrap.interval(bootstrap.resampled_scores(webnlg.bleu(references, hypotheses), 200))
    assert ours["mean"] == pytest.approx(theirs._mean / 100, abs=1e-6)
    assert ours["ci"] == pytest.approx(theirs._ci / 100, abs=1e-6)
    assert ours["low"] < ours["mean"] < ours["high"]


def test_p_values_equal_sacrebleus_paired_bootstrap():
    references, systems = _two_systems()
    metric = BLEU(tokenize="13a", smooth_method="none", force=True)
    named = list(zip(("first", "second"), systems, strict=True))
    paired = PairedTest(named, {"BLEU": metric}, webnlg.by_position(references), "bs", 200)
    want = paired()[1]["BLEU"][1].p_value
    measures = [webnlg.bleu(references, hypotheses) for hypotheses in systems]
    scores = [bootstrap.resampled_scores(measure, 200) for measure in measures]
    difference = measures[0].score() - measures[1].score()
    assert bootstrap.p_value(*scores, difference) == pytest.approx(want)


def test_a_system_against_itself_is_not_significant():
    scores = bootstrap.resampled_scores(mean_of([0.1, 0.5, 0.9]), 50)
    assert bootstrap.p_value(scores, scores, 0.0) == 1


def test_slot_errors_and_coverage_need_contexts():
    references, texts = [["Aromi is a pub."], ["Cocum is cheap."]], ["Aromi is a pub.", "Cocum."]
    contexts = ["name : Aromi | Type : pub", "name : Cocum | price : cheap"]
    both = ("SER", "coverage")
    assert e2e_scores(references, texts, both, contexts) == {"SER": 1 / 4, "coverage": 3 / 4}
    assert e2e_scores(references, texts, both) == {"SER": None, "coverage": None}
    assert webnlg_scores(references, texts, ["coverage"], contexts) == {"coverage": 3 / 4}


CHINESE = [["蓝香料是一家中餐馆，位于河边，很便宜。"], ["老鹰是一家英式酒吧，适合家庭聚会。"]]
ALMOST = ["蓝香料是一家中餐馆，位于河边，不便宜。", "老鹰是一家英式酒吧，适合朋友聚会。"]


@pytest.mark.parametrize("tokenize", ["zh", "char", "intl", "none", "13a"])
def test_bleu_by_other_tokens_equals_sacrebleus(tokenize):
    words = [["one, two 3.5 three four"], ["five six seven, eight nine"]]
    outputs = ["one, two 3.5 three", "five six seven eight nine"]
    for references, hypotheses in ((CHINESE, ALMOST), (words, outputs)):
        theirs = BLEU(tokenize=tokenize, smooth_method="none", force=True, lowercase=True)
        want = theirs.corpus_score(hypotheses, webnlg.by_position(references)).score / 100
        counts = mteval.count_references(references, tokenize)
        if len(mteval.tokens(hypotheses[0], tokenize)) > 3:
            assert mteval.bleu(counts, hypotheses).score() == pytest.approx(want, abs=1e-9)
        assert webnlg.bleu(references, hypotheses, tokenize).score() == pytest.approx(want)


def test_chinese_texts_that_differ_in_a_word_score_high_by_their_characters():
    with coco.Meteor() as meteor:
        for task in ("e2e", "webnlg", "own"):
            scores = {
                tokenize: measure(task, CHINESE, [ALMOST], ["BLEU"], meteor, None, tokenize)
                .systems[0]["BLEU"].score()
                for tokenize in (None, "zh")
            }  # fmt: skip
            assert scores[None] < 0.1 < 0.7 < scores["zh"] < 1
    words = webnlg.chrf(CHINESE, ALMOST, "zh").score()
    assert webnlg.chrf(CHINESE, ALMOST).score() < words < 1


def test_own_data_score_as_sacrebleu_does_by_default():
    references = [["the red inn, by a river", "an inn"], ["a cheap pub in town"]]
    hypotheses = ["The red inn by the river", "a pub in our town"]
    with coco.Meteor() as meteor:
        measures = measure("own", references, [hypotheses], ["BLEU", "chrF++"], meteor).systems[0]
    streams = webnlg.by_position(references)
    for name, metric in (("BLEU", BLEU()), ("chrF++", CHRF(word_order=2))):
        want = metric.corpus_score(hypotheses, streams).score / 100
        assert measures[name].score() == pytest.approx(want)


def test_texts_that_ter_would_search_for_minutes_leave_it_without_a_score(monkeypatch):
    words = [f"w{i}" for i in range(400)]
    turned = " ".join(words[200:] + words[:200])
    monkeypatch.setattr(webnlg, "MOST_TER_STEPS", 100_000)
    with pytest.raises(Unscored, match="item 2 has an output of 400 words, .* more than 100,000"):
        webnlg.ter([["a b"], [" ".join(words)]], ["a b", turned])
    monkeypatch.setattr(webnlg, "MOST_TER_PAIRS", 1000)
    with pytest.raises(Unscored, match="item 1 has .* at most 1,000 pairs of words"):
        webnlg.ter([[" ".join(words)]], [turned])


def test_a_limit_of_ter_leaves_the_other_metrics_their_scores(monkeypatch):
    monkeypatch.setattr(webnlg, "MOST_TER_PAIRS", 3)
    with coco.Meteor() as meteor:
        found = measure("webnlg", [["a b c d"]], [["a b d c"]], ["BLEU", "TER"], meteor)
    assert list(found.systems[0]) == ["BLEU"] and "pairs of words" in found.reasons["TER"]


def test_texts_too_long_for_meteor_are_named_before_java_is_asked(monkeypatch):
    monkeypatch.setattr(coco, "MOST_METEOR_PAIRS", 10)
    with coco.Meteor() as meteor, pytest.raises(Unscored, match="item 1 has an output of 4 words"):
        meteor.measure([["a b c"]], ["a b c d"])


@pytest.mark.parametrize(
    "use",
    [
        lambda _, texts: coco.ptb_tokenize(texts),
        lambda meteor, texts: meteor.measure([texts], texts),
    ],
    ids=["tokenizer", "METEOR"],
)
def test_a_java_that_does_not_answer_is_given_up(monkeypatch, tmp_path, use):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(coco, "JAVA_SECONDS", 0.2)
    with coco.Meteor() as meteor, pytest.raises(coco.JavaError, match="not answer within 0.2 s"):
        use(meteor, ["a text"])


def test_a_java_that_cannot_be_started_is_a_reason(monkeypatch, tmp_path):
    java = tmp_path / "java"
    java.write_bytes(b"\x7fELF no program")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(coco.JavaError, match="cannot be started: Exec format error"):
        coco.ptb_tokenize(["a"])
    with coco.Meteor() as meteor, pytest.raises(coco.JavaError, match="cannot be started"):
        meteor.measure([["a"]], ["a"])
