"""The page of outputs: what is embedded in it, and how it behaves in a browser."""

import json
import statistics
from html.parser import HTMLParser
from pathlib import Path

import chromium
import pytest
from conftest import ROOT, write_rows
from hypothesis import example, given
from hypothesis import strategies as st

from common.errors import InputError
from eval import coco, evaluate, report
from eval.metrics import METRICS, measure
from eval.texts import Item, group, read_data

SAMPLE = ROOT / "data" / "sample" / "test.jsonl"
NO_JAVA = {
    name: {"BLEU", "NIST", "TER", "chrF++"} & set(of_task) for name, of_task in METRICS.items()
}
HOSTILE = (
    "</script><script>document.title = 'taken'</script>",
    "<!--<script>",
    "<img src='file:///nowhere.png' onerror=\"document.title = 'taken'\">",
    "]]> &lt;b&gt; &amp; {{js}} ${alert(1)} `'\"\\",
    "line\u2028separator\u2029 and \u202eright to left\u202c",
    "\x00\x1b\ufeff \ud800 alone, \U0001f600 in two",
)
hostile_texts = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(st.characters()))).map("".join)


class Embedded(HTMLParser):
    """The text of the script element with the data, and the scripts' number."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.data, self.scripts, self._inside = "", 0, False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self._inside = dict(attrs).get("id") == "data"
        self.scripts += tag == "script"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        self.data += data if self._inside else ""


def embedded(path: Path) -> dict:
    return json.loads(Embedded(path.read_text(encoding="utf-8")).data)


# What is embedded


@given(st.recursive(hostile_texts, lambda own: st.lists(own) | st.dictionaries(hostile_texts, own)))
@example(list(HOSTILE))
def test_any_text_comes_back_from_the_page_as_it_went_in(value):
    page = report.page({"value": value})
    parsed = Embedded(page)
    assert json.loads(parsed.data) == {"value": value}
    assert parsed.scripts == 2
    assert parsed.data.isascii() and "<" not in parsed.data


def test_what_is_no_number_is_embedded_as_null():
    assert report.embedded_json([float("nan"), float("inf"), 0.5]) == "[null,null,0.5]"


words = st.lists(st.sampled_from(["a", "b", "c", "B", ",", "né", "猫", " "])).map(" ".join)


@given(st.tuples(words | hostile_texts, words | hostile_texts))
def test_pieces_make_up_the_texts_and_unmarked_words_are_common_to_both(texts):
    pieces = report.differing_words(*texts)
    assert tuple("".join(runs) for runs in pieces) == texts
    common = [[w for run in runs[::2] for w in report.WORD.findall(run)] for runs in pieces]
    assert common[0] == common[1]
    assert all(report.WORD.search(run) for runs in pieces for run in runs[1::2])
    assert report.differing_words(texts[0], texts[0]) == ([texts[0]], [texts[0]])


def test_words_that_differ_are_marked_and_no_others():
    one, other = report.differing_words("A cheap pub by the river.", "A pub by the old river.")
    assert one == ["A ", "cheap", " pub by the river."]
    assert other == ["A pub by the ", "old", " river."]


def test_slot_errors_of_e2e_are_named_with_their_values():
    item = Item("name[Aromi], food[Chinese], area[riverside]", ["x"])
    outputs = [["Aromi is in the city centre."], ["Aromi is an Italian pub by the riverside."]]
    name, of_items = report.faults("e2e", [item], outputs)
    assert name == "slot errors"
    assert of_items == [
        [
            [("missing", "food: Chinese"), ("wrong", "area: riverside")],
            [("wrong", "food: Chinese"), ("added", "eatType")],
        ]
    ]


def test_other_texts_are_checked_for_the_values_of_their_contexts():
    items = [Item("Ann : born in : Old Town | Ann : age : 30", ["x"])]
    of_items = report.faults("webnlg", items, [["ann , aged 30 ."]])
    assert of_items == ("missing values", [[[("missing", "Old Town")]]])


@pytest.mark.parametrize("task", METRICS)
def test_nothing_is_checked_where_contexts_have_no_values(task):
    assert report.faults(task, [Item("Say hello", ["x"])], [["hello"]]) == (None, [[[]]])


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["runs/a.jsonl"], ["a"]),
        (["a.jsonl", "b.jsonl"], ["a", "b"]),
        (["x/out.jsonl", "y/out.jsonl"], ["x/out", "y/out"]),
        (["rank 1=x/out.jsonl", "y/out.jsonl"], ["rank 1", "out"]),
    ],
)
def test_systems_are_named_by_the_user_or_their_files(given, names):
    files = report.named_files(given)
    assert list(files) == names
    assert list(files.values()) == [text.split("=")[-1] for text in given]


# The program


def write_predictions(path: Path, texts_by_context: dict[str, str]) -> str:
    rows = read_data(SAMPLE)
    made = [{"id": i, "text": texts_by_context[row.context]} for i, row in enumerate(rows)]
    return str(write_rows(path, made))


@pytest.fixture(scope="module")
def decoded(tmp_path_factory) -> list[str]:
    """Predictions for the sample: references of other items, and of the items themselves."""
    folder = tmp_path_factory.mktemp("decoded")
    items = group(read_data(SAMPLE), "e2e")
    others = items[1:] + items[:1]
    of_others = {item.context: o.references[0] for item, o in zip(items, others, strict=True)}
    own = {item.context: item.references[-1] for item in items}
    own[items[3].context] = ""
    of_others[items[5].context] = own[items[5].context]
    return [
        write_predictions(folder / "weak.jsonl", of_others),
        write_predictions(folder / "strong.jsonl", own),
    ]


def make(folder: Path, task: str, decoded: list[str], *more: str) -> Path:
    page = folder / f"{task}.html"
    metrics = ",".join(NO_JAVA[task])
    arguments = ["--task", task, "--data", str(SAMPLE), "--predictions", *decoded]
    report.main([*arguments, "--html", str(page), "--metrics", metrics, "--bootstrap", "50", *more])
    return page


def test_the_page_has_the_scores_of_the_evaluation(decoded, tmp_path):
    shown = embedded(make(tmp_path, "e2e", decoded))
    arguments = ["--task", "e2e", "--data", str(SAMPLE), "--predictions", decoded[0]]
    arguments += ["--compare", decoded[1], "--metrics", "bleu,nist", "--bootstrap", "50"]
    evaluate.main([*arguments, "--json", str(tmp_path / "scores.json")])
    assert shown["result"] == json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert shown["result"]["compare"]["scores"]["BLEU"] > shown["result"]["scores"]["BLEU"]
    assert [system["name"] for system in shown["systems"]] == ["weak", "strong"]
    assert shown["metrics"] == ["BLEU"]  # NIST has no scores of single items
    assert len(shown["segments"][1]["BLEU"]) == len(shown["items"]) == 50
    assert shown["items"][3]["outputs"][1] == []


def test_equal_inputs_make_equal_pages(decoded, tmp_path):
    (tmp_path / "again").mkdir()
    pages = [make(folder, "e2e", decoded) for folder in (tmp_path, tmp_path / "again")]
    assert pages[0].read_bytes() == pages[1].read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bootstrap", "-1"], "--bootstrap -1 is too small; give at least 0"),
        (["--ref_num", "0"], "--ref_num 0 is too small; give at least 1"),
        (["--metrics", "spice"], "--metrics spice: task e2e has bleu"),
        (["--predictions", "a", "b", "c"], "names 3 files; the page shows one or two systems"),
        (["--predictions", "x=a", "x=b"], "both are 'x'; give each a name of its own"),
        (["--predictions", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_no_page(decoded, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        make(tmp_path, "e2e", decoded, *more)
    assert not list(tmp_path.iterdir())


# In a browser


@pytest.fixture(scope="module")
def browser():
    if not (program := chromium.find()):
        pytest.skip(f"none of {', '.join(chromium.NAMES)} is installed: the page is not opened")
    with chromium.Chromium(program) as started:
        yield started


@pytest.fixture(scope="module")
def page(decoded, tmp_path_factory) -> Path:
    """The page of the two systems on the sample."""
    return make(tmp_path_factory.mktemp("page"), "e2e", decoded)


def numbers(browser: chromium.Chromium) -> list[int]:
    """The items that the page lists, in its order, from 0."""
    titles = browser.evaluate("[...document.querySelectorAll('article h3')].map(e => e.innerText)")
    return [int(title.removeprefix("#")) - 1 for title in titles]


def text_of(browser: chromium.Chromium, selector: str) -> str:
    return browser.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")


@pytest.mark.parametrize("systems", [1, 2])
@pytest.mark.parametrize("task", METRICS)
def test_the_page_opens_from_disk_and_asks_for_nothing_else(
    browser, decoded, tmp_path, task, systems
):
    made = make(tmp_path, task, decoded[:systems])
    browser.open(made)
    assert browser.faults() == []
    assert browser.requests() == [made.resolve().as_uri()]
    assert browser.evaluate("document.title") == ("weak", "strong compared with weak")[systems - 1]
    assert len(numbers(browser)) == 50
    columns = browser.evaluate("document.querySelectorAll('.outputs')[0].children.length")
    assert columns == systems


def test_without_scores_of_single_items_the_page_still_lists_them(browser, decoded, tmp_path):
    browser.open(make(tmp_path, "e2e", decoded, "--metrics", "nist", "--bootstrap", "0"))
    assert browser.faults() == []
    assert numbers(browser) == list(range(50))
    assert browser.evaluate("document.querySelector('#charts').hidden")


def test_without_java_the_page_says_what_is_missing(browser, decoded, tmp_path, monkeypatch):
    arguments = ["--task", "e2e", "--data", str(SAMPLE), "--predictions", *decoded]
    monkeypatch.setenv("PATH", str(tmp_path))
    report.main([*arguments, "--html", str(tmp_path / "page.html"), "--bootstrap", "0"])
    browser.open(tmp_path / "page.html")
    assert browser.faults() == []
    assert "METEOR could not be computed: no java on the PATH" in text_of(browser, "#reasons")
    rows = browser.evaluate("[...document.querySelectorAll('tbody tr')].map(e => e.innerText)")
    assert [row.split()[0] for row in rows if "n/a" in row] == ["METEOR", "ROUGE_L", "CIDEr"]


def test_the_facts_say_where_the_second_system_is_better(browser, page):
    shown = embedded(page)
    pairs = list(zip(*(of_system["BLEU"] for of_system in shown["segments"]), strict=True))
    better = sum(theirs < ours for theirs, ours in pairs)
    worse = sum(theirs > ours for theirs, ours in pairs)
    wrong = [sum(bool(item["faults"][side]) for item in shown["items"]) for side in (0, 1)]
    browser.open(page)
    facts = browser.evaluate(
        "[...document.querySelectorAll('#facts strong')].map(e => e.innerText)"
    )
    assert facts == ["2 of 2", f"{better} : {worse}", f"{wrong[1]} : {wrong[0]}"]
    bleu = browser.evaluate("document.querySelector('tbody tr').innerText").split()
    scores = shown["result"]["scores"]["BLEU"], shown["result"]["compare"]["scores"]["BLEU"]
    assert [bleu[0], bleu[1], bleu[4]] == ["BLEU", *(f"{score:.4f}" for score in scores)]


def test_every_order_is_that_of_the_scores(browser, page):
    theirs, ours = (of_system["BLEU"] for of_system in embedded(page)["segments"])
    errors = [len(item["faults"][1]) for item in embedded(page)["items"]]
    keys = {
        "data": lambda i: i,
        "gain": lambda i: round(theirs[i] - ours[i], 4),
        "loss": lambda i: round(ours[i] - theirs[i], 4),
        "worst": lambda i: ours[i],
        "best": lambda i: -ours[i],
        "faults": lambda i: -errors[i],
    }
    browser.open(page)
    offered = browser.evaluate("[...document.querySelector('#sort').options].map(o => o.value)")
    assert offered == list(keys)
    assert numbers(browser) == sorted(range(50), key=keys["gain"])
    for name, key in keys.items():
        choose(browser, "#sort", name)
        assert numbers(browser) == sorted(range(50), key=key)


def choose(browser: chromium.Chromium, selector: str, value: str) -> None:
    """Choose an option of a select element as a user does."""
    browser.evaluate(
        f"(e => {{ e.value = {json.dumps(value)}; e.dispatchEvent(new Event('change')); }})"
        f"(document.querySelector({json.dumps(selector)}))"
    )


def test_lower_is_better_where_the_metric_says_so(browser, decoded, tmp_path):
    made = make(tmp_path, "webnlg", decoded)
    theirs, ours = (of_system["TER"] for of_system in embedded(made)["segments"])
    browser.open(made, "#metric=TER")
    assert numbers(browser) == sorted(range(50), key=lambda i: round(ours[i] - theirs[i], 4))
    better = sum(o < t for o, t in zip(ours, theirs, strict=True))
    assert text_of(browser, "#facts p:nth-child(2) strong").startswith(f"{better} :")


def test_filters_and_search_leave_what_they_say(browser, page):
    shown = embedded(page)
    theirs, ours = (of_system["BLEU"] for of_system in shown["segments"])
    tests = {
        "b": lambda i: ours[i] > theirs[i],
        "a": lambda i: ours[i] < theirs[i],
        "equal": lambda i: ours[i] == theirs[i],
        "faults-a": lambda i: shown["items"][i]["faults"][0],
        "faults-b": lambda i: shown["items"][i]["faults"][1],
        "all": lambda i: True,
    }
    browser.open(page, "#sort=data")
    for name, test in tests.items():
        browser.evaluate(f"document.querySelector('#show-{name}').click()")
        assert numbers(browser) == list(filter(test, range(50)))
        assert text_of(browser, f"#count-{name}") == str(len(numbers(browser)))
    browser.evaluate("document.querySelector('#query').focus()")
    browser.press(*"owl CLOCK")
    texts = [json.dumps(item).lower() for item in shown["items"]]
    found = [i for i, text in enumerate(texts) if "owl" in text and "clock" in text]
    assert 0 < len(found) < 50 and numbers(browser) == found
    assert text_of(browser, "#count") == f"1 to {len(found)} of {len(found)} items"
    browser.press(*"zzz")
    assert numbers(browser) == [] and text_of(browser, "#count") == "No items"


def test_the_address_holds_the_view(browser, page):
    browser.open(page, "#sort=data")
    browser.evaluate("document.querySelector('#query').focus()")
    browser.press(*"owl")
    address, seen = browser.evaluate("location.hash"), numbers(browser)
    browser.open(page, address)
    assert numbers(browser) == seen and len(seen) < 50
    browser.open(page, "#sort=no&metric=no&show=no&page=-7&unknown=1")
    assert browser.faults() == [] and len(numbers(browser)) == 50


def hostile_page(folder: Path) -> Path:
    items = [Item(text, [text, "x"]) for text in HOSTILE]
    systems = [list(HOSTILE), list(reversed(HOSTILE))]
    systems = [[text.encode("utf-8", "replace").decode() for text in texts] for texts in systems]
    references = [["x"] for _ in items]
    with coco.Meteor() as meteor:
        measured = measure("e2e", references, systems, ("BLEU",), meteor)
        result = evaluate.result_of("e2e", ("BLEU",), items, systems, measured)
    about = {
        "data": HOSTILE[0],
        "systems": [{"name": HOSTILE[i], "file": HOSTILE[2]} for i in (0, 2)],
    }
    path = folder / "hostile.html"
    shown = report.content(items, systems, measured, result, about)
    path.write_text(report.page(shown), encoding="utf-8")
    return path


def test_hostile_texts_are_shown_and_never_run(browser, tmp_path):
    made = hostile_page(tmp_path)
    shown = embedded(made)
    browser.open(made, "#sort=data&refs=1")
    assert browser.faults() == [] and browser.requests()[1:] == []
    for selector, texts in {
        "article .text": ["".join(runs) for item in shown["items"] for runs in item["outputs"]],
        "details li": [text for item in shown["items"] for text in item["references"]],
    }.items():
        seen = (
            f"[...document.querySelectorAll('{selector}')].map(e => JSON.stringify(e.textContent))"
        )
        assert [json.loads(text) for text in browser.evaluate(seen)] == texts
    assert browser.evaluate("document.querySelectorAll('img, article script').length") == 0
    assert browser.evaluate("document.title") == f"{HOSTILE[2]} compared with {HOSTILE[0]}"


def test_markup_that_did_enter_would_not_run(browser, page):
    browser.open(page)
    browser.evaluate(
        "document.body.innerHTML = `<img src='data:,' onerror=\"document.title = 'taken'\">`;"
        "new Promise(done => setTimeout(done, 200))"
    )
    assert browser.evaluate("document.title") == "strong compared with weak"


def test_everything_is_within_reach_of_the_keyboard(browser, page):
    focused = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"
    browser.open(page, "#sort=data")
    browser.press("j", "j", "j", "k")
    assert browser.evaluate(focused) == "Item 2"
    browser.press("r", "t")
    assert browser.evaluate(focused) == "Item 2"
    assert browser.evaluate("[...document.querySelectorAll('details')].every(e => e.open)")
    browser.press("r")
    assert not browser.evaluate("[...document.querySelectorAll('details')].some(e => e.open)")
    browser.press("/", *"owl")
    assert browser.evaluate(focused) == "Search" and len(numbers(browser)) < 50
    browser.press("Escape")
    assert len(numbers(browser)) == 50
    browser.press("?")
    assert browser.evaluate("document.querySelector('#keys').open")
    browser.press("Escape")
    assert not browser.evaluate("document.querySelector('#keys').open")
    reached = set()
    browser.evaluate("document.activeElement.blur()")
    for _ in range(12):
        browser.press("Tab")
        reached.add(browser.evaluate("document.activeElement.id"))
    assert {"theme", "help", "metric", "query", "sort", "refs", "show-all"} <= reached


# Relative luminance and contrast of WCAG 2.2, over the nearest background that is not transparent.
CONTRAST = """(selector => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = color => channels(color).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const node = document.querySelector(selector);
  let below = node;
  while (channels(getComputedStyle(below).backgroundColor)[3] === 0) below = below.parentElement;
  const pair = [getComputedStyle(node).color, getComputedStyle(below).backgroundColor]
    .map(luminance);
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
})"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast_enough_in_both_themes(browser, page, theme):
    browser.open(page, f"#theme={theme}")
    for selector in (
        ".text", ".quiet", ".a .badge", ".b .badge", ".faults li", ".own.a", ".own.b", ".a mark",
        ".b mark", ".input em", "summary", ":checked + span", "#sort", "#theme",
    ):  # fmt: skip
        assert browser.evaluate(f"{CONTRAST}({json.dumps(selector)})") >= 4.5, selector


def test_the_theme_is_the_systems_until_it_is_chosen(browser, page, tmp_path):
    paper = "getComputedStyle(document.body).backgroundColor"
    browser.open(page)
    seen = {}
    for scheme in ("light", "dark"):
        browser.screenshot(tmp_path / f"{scheme}.png", 1280, 900, scheme)
        seen[scheme] = browser.evaluate(paper)
        assert (tmp_path / f"{scheme}.png").stat().st_size > 10_000
    assert seen["light"] != seen["dark"]
    browser.press("t")
    assert browser.evaluate(paper) == seen["light"]


@pytest.fixture(scope="module")
def large(page) -> Path:
    """The page with its items a hundred times, 5,000 in all."""
    shown = embedded(page)
    shown["items"] *= 100
    for of_system in shown["segments"]:
        of_system["BLEU"] *= 100
    path = page.with_name("large.html")
    path.write_text(report.page(shown), encoding="utf-8")
    return path


def milliseconds(browser: chromium.Chromium, action: str, times: int = 5) -> float:
    """Median time of an action, the layout of what it changed included."""
    script = f"""(() => {{ const start = performance.now(); {action};
        document.body.offsetHeight; return performance.now() - start; }})()"""
    return statistics.median(browser.evaluate(script) for _ in range(times))


def test_five_thousand_items_do_not_lag(browser, large):
    browser.open(large, "#sort=data")
    ready = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
    typed = "e => { e.value = e.value ? '' : 'owl'; e.dispatchEvent(new Event('input')); }"
    times = {
        "DOM ready": browser.evaluate(ready),
        "order": milliseconds(browser, "change({sort: state.sort == 'gain' ? 'best' : 'gain'})"),
        "filter": milliseconds(
            browser, "document.querySelector('#show input:not(:checked)').click()"
        ),
        "search": milliseconds(browser, f"({typed})(document.querySelector('#query'))"),
        "page": milliseconds(browser, "document.querySelector('#after').click()"),
    }
    print(
        {name: f"{time:.0f} ms" for name, time in times.items()}, f"{large.stat().st_size:,} bytes"
    )
    assert times.pop("DOM ready") < 5000
    assert all(time < 1000 for time in times.values()), times


def test_the_next_page_starts_where_the_last_one_ended(browser, large):
    browser.open(large, "#sort=data&page=99")
    assert numbers(browser)[-1] == 4949 and text_of(browser, "#count").endswith("of 5,000 items")
    browser.press("n")
    assert numbers(browser) == list(range(4950, 5000))
    assert browser.evaluate("document.querySelector('#after').disabled")
    browser.press("n")
    assert numbers(browser) == list(range(4950, 5000))
    browser.press("j", "k")
    assert numbers(browser) == list(range(4900, 4950))
