// Every text of the data enters the document as a text node, so none can become markup.
"use strict";

const report = JSON.parse(document.getElementById("data").textContent);
const { items, systems, segments, metrics, result } = report;
const two = systems.length === 2;
const last = systems.length - 1;
const PER_PAGE = 50, BINS = 24;
const SMALL_P = 0.05;

const byId = (id) => document.getElementById(id);
const lowerIsBetter = (metric) => report.lower_is_better.includes(metric);
const number = (value, digits = 4) => (value == null ? "n/a" : value.toFixed(digits));
const signed = (value, digits = 4) =>
  (value > 0 ? "+" : value < 0 ? "−" : "±") + Math.abs(value).toFixed(digits);
const count = (value) => value.toLocaleString("en");
const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;
const capital = (text) => text.replace(/^./, (first) => first.toUpperCase());
const side = (system) => (system === 0 && two ? "a" : "b");
const letter = (system) => side(system).toUpperCase();

function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child != null && child !== false));
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function badge(system) {
  return two && h("span", { class: `badge ${side(system)}` }, letter(system));
}

// The state of the page is its address, so a view can be linked to.

const DEFAULTS = {
  metric: metrics[0] ?? "", sort: metrics.length ? (two ? "gain" : "worst") : "data",
  show: "all", q: "", page: "1", refs: "", theme: "",
};
let state = {};

function readAddress() {
  state = { ...DEFAULTS, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) };
  if (!metrics.includes(state.metric)) state.metric = DEFAULTS.metric;
  if (!SORTS.some(([name]) => name === state.sort)) state.sort = DEFAULTS.sort;
  if (!FILTERS.some(([name]) => name === state.show)) state.show = "all";
}

function change(changes) {
  const kept = Object.entries({ ...state, page: "1", ...changes });
  const told = kept.filter(([name, value]) => value !== DEFAULTS[name]);
  history.replaceState(null, "", "#" + new URLSearchParams(told));
  render();
}

// Scores of single items. Quality grows as outputs get better, also where the score falls.

function quality(item, system = last) {
  const score = segments[system][state.metric]?.[item] ?? null;
  return score == null ? null : lowerIsBetter(state.metric) ? -score : score;
}

function gain(item) {
  const [ours, theirs] = [quality(item, 1), quality(item, 0)];
  return ours == null || theirs == null ? null : Number((ours - theirs).toFixed(4));
}

const negative = (value) => (value == null ? null : -value);
const faults = (item, system) => items[item].faults[system].length;

const SORTS = [
  ["data", "of the data", (item) => item],
  two && metrics.length && ["gain", "B better first", (item) => negative(gain(item))],
  two && metrics.length && ["loss", "A better first", gain],
  metrics.length && ["worst", `worst${two ? " of B" : ""} first`, (item) => quality(item)],
  metrics.length && ["best", `best${two ? " of B" : ""} first`, (item) => negative(quality(item))],
  report.faults && [
    "faults", `most ${report.faults}${two ? " in B" : ""} first`, (item) => -faults(item, last),
  ],
].filter(Boolean);

const FILTERS = [
  ["all", "All", () => true],
  two && metrics.length && ["b", "B better", (item) => gain(item) > 0],
  two && metrics.length && ["a", "A better", (item) => gain(item) < 0],
  two && metrics.length && ["equal", "Equal score", (item) => gain(item) === 0],
  ...systems.map((_, system) => report.faults && [
    `faults-${side(system)}`,
    capital(report.faults) + (two ? ` in ${letter(system)}` : ""),
    (item) => faults(item, system) > 0,
  ]),
  ...[["seen", true], ["unseen", false]].map(([name, flag]) =>
    items.some(({ seen }) => seen === flag) && [
      name, capital(name), (item) => items[item].seen === flag,
    ]),
].filter(Boolean);

const every = items.map((_, item) => item);
const how = (list, name) => list.find(([own]) => own === name)[2];

let haystacks = null;

function matching(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return every;
  haystacks ??= items.map((item, i) =>
    [`#${i + 1} `, item.context, ...item.references, ...item.outputs.map((runs) => runs.join(""))]
      .join("\n").toLowerCase());
  return every.filter((item) => words.every((word) => haystacks[item].includes(word)));
}

function inOrder() {
  const chosen = matching(state.q).filter(how(FILTERS, state.show));
  const key = how(SORTS, state.sort);
  const keys = new Map(chosen.map((item) => [item, key(item) ?? Infinity]));
  return chosen.sort((one, other) => keys.get(one) - keys.get(other) || one - other);
}

// At a glance

const fact = (figure, ...text) => h("p", {}, h("strong", {}, figure), ...text);
const versus = (ours, theirs) => [
  h("span", { class: "own b" }, count(ours)), " : ", h("span", { class: "own a" }, count(theirs)),
];
const sides = () => [badge(1), " : ", badge(0)];

function scoreFact() {
  const { differences, p_values = {} } = result.compare;
  const names = Object.keys(differences);
  const better = names.filter((name) => (lowerIsBetter(name) ? 1 : -1) * differences[name] > 0);
  const sure = better.filter((name) => p_values[name] < SMALL_P);
  return fact(
    h("span", { class: "own b" }, `${better.length} of ${names.length}`),
    "scores better in ", badge(1), " than in ", badge(0),
    result.bootstrap ? `, ${sure.length} with p\u00a0<\u00a0${SMALL_P}` : "",
  );
}

function itemFact() {
  const gains = every.map(gain);
  const [better, worse, equal] = [(g) => g > 0, (g) => g < 0, (g) => g === 0]
    .map((test) => gains.filter((g) => g != null && test(g)).length);
  const what = `items better by ${state.metric}, `;
  return fact(versus(better, worse), what, ...sides(), `; ${count(equal)} equal`);
}

function faultFact() {
  const counts = systems.map((_, system) => every.filter((item) => faults(item, system)).length);
  const what = `of ${plural(items.length, "text")} with ${report.faults}`;
  if (!two) return fact(count(counts[0]), what);
  return fact(versus(counts[1], counts[0]), `${what}, `, ...sides());
}

function showFacts() {
  byId("facts").replaceChildren(...[
    two && Object.keys(result.compare.differences).length > 0 && scoreFact(),
    two && metrics.length > 0 && itemFact(),
    !two && metrics.length > 0 && fact(number(result.scores[metrics[0]]), metrics[0]),
    report.faults && faultFact(),
  ].filter(Boolean));
}

// The table of scores

const scoresOf = (system) => (system === 0 ? result.scores : result.compare.scores);
const intervalsOf = (system) =>
  (system === 0 ? result.bootstrap?.intervals : result.compare.intervals) ?? {};

function scoreCell(name, system) {
  const interval = intervalsOf(system)[name];
  return h("td", {}, number(scoresOf(system)[name]),
    interval && h("span", { class: "quiet" }, ` ± ${number(interval.ci)}`));
}

function intervalCell(name) {
  const interval = intervalsOf(0)[name];
  return h("td", {}, interval ? `${number(interval.low)} to ${number(interval.high)}` : "");
}

function plotCell(name) {
  const shown = systems.map((_, system) => ({
    at: scoresOf(system)[name], ...(intervalsOf(system)[name] ?? {}),
  })).filter(({ at }) => at != null);
  const ends = shown.flatMap(({ at, low, high }) => [at, low ?? at, high ?? at]);
  const [least, most] = [Math.min(...ends), Math.max(...ends)];
  const percent = (value) => 4 + (92 * (value - least)) / (most - least || 1);
  const track = h("div", { class: "track", "aria-hidden": "true" });
  shown.forEach(({ at, low, high }, system) => {
    const classes = `${side(system)} ${system ? "second" : "first"}`;
    if (low != null) {
      const bar = h("i", { class: classes });
      bar.style.left = `${percent(low)}%`;
      bar.style.width = `${percent(high) - percent(low)}%`;
      track.append(bar);
    }
    const dot = h("b", { class: classes });
    dot.style.left = `${percent(at)}%`;
    track.append(dot);
  });
  return h("td", { class: "plot" }, track);
}

function differenceCells(name) {
  const difference = result.compare.differences[name];
  if (difference == null) return [h("td", {}, "n/a"), h("td")];
  const better = (lowerIsBetter(name) ? difference : -difference) > 0;
  const p = result.compare.p_values?.[name];
  const own = difference === 0 ? "" : `own ${better ? "b" : "a"}`;
  const interval = result.compare.difference_intervals?.[name];
  return [
    h("td", { class: `win ${own}` }, signed(-difference),
      interval && h("span", { class: "quiet" }, ` ± ${number(interval.ci)}`)),
    h("td", {}, p == null ? "" : p < 0.001 ? "< 0.001" : number(p, 3)),
  ];
}

function showScores() {
  const intervals = result.bootstrap ? (two ? "95 % intervals" : "95 % interval") : "";
  const heads = [
    h("th", { scope: "col" }, "Score"),
    ...systems.map((system, i) => h("th", { scope: "col" }, badge(i), ` ${system.name}`)),
    h("th", { scope: "col", class: two && "plot" }, intervals),
    ...(two ? [h("th", { scope: "col" }, "B − A"), h("th", { scope: "col" }, "p")] : []),
  ];
  const rows = Object.keys(result.scores).map((name) => h("tr", {},
    h("th", { scope: "row" }, name,
      lowerIsBetter(name) && h("span", { class: "quiet" }, " lower is better")),
    ...systems.map((_, system) => scoreCell(name, system)),
    ...(two ? [plotCell(name), ...differenceCells(name)] : [intervalCell(name)])));
  byId("scores").replaceChildren(h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows));
  byId("reasons").replaceChildren(...Object.entries(result.reasons).map(([name, reason]) =>
    h("p", {}, `${name} could not be computed: ${reason}`)));
}

// Distributions

function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value || 1));
  const ends = [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].map((step) => step * power);
  return ends.find((end) => end >= value * 0.9999);
}

function histogram(system, low, high) {
  const counts = new Array(BINS).fill(0);
  const scores = segments[system][state.metric].filter((score) => score != null);
  for (const score of scores) {
    counts[Math.min(BINS - 1, Math.floor((BINS * (score - low)) / (high - low)))] += 1;
  }
  const most = Math.max(...counts, 1);
  const bars = counts.map((n, i) => svg("rect", {
    class: "fill", x: i + 0.06, width: 0.88, y: 1 - n / most, height: n / most,
  }, svg("title", {}, `${number(low + (i * (high - low)) / BINS, 2)} to ${
    number(low + ((i + 1) * (high - low)) / BINS, 2)}: ${plural(n, "item")}`)));
  const mean = scores.reduce((sum, score) => sum + score, 0) / (scores.length || 1);
  const at = (BINS * (mean - low)) / (high - low);
  const mark = svg("line", { x1: at, x2: at, y1: 0, y2: 1 });
  return h("div", { class: side(system) },
    h("span", { class: "quiet" }, badge(system), ` mean ${number(mean, 3)}`),
    svg("svg", {
      class: "bars", viewBox: `0 0 ${BINS} 1`, preserveAspectRatio: "none", role: "img",
      "aria-label": `Distribution of ${state.metric}, ${systems[system].name}`,
    }, ...bars, mark));
}

function distribution() {
  const all = segments.flatMap((of) => of[state.metric]).filter((score) => score != null);
  const most = all.reduce((one, other) => Math.max(one, other), 0);
  const least = all.reduce((one, other) => Math.min(one, other), 0);
  const [low, high] = [least < 0 ? -roundUp(-least) : 0, roundUp(most)];
  return h("figure", {},
    h("figcaption", {}, `Items by ${state.metric}, with the mean`),
    ...systems.map((_, system) => histogram(system, low, high)),
    h("div", { class: "axis" },
      [low, (low + high) / 2, high].map((tick) => h("span", {}, number(tick, 2)))));
}

function gains() {
  const sorted = every.map(gain).filter((g) => g != null).sort((one, other) => other - one);
  const [most, least] = [Math.max(sorted[0] ?? 0, 0), Math.min(sorted.at(-1) ?? 0, 0)];
  const steps = (part) => sorted.map((g, i) => `L${i},${-part(g, 0)}L${i + 1},${-part(g, 0)}`);
  const area = (part) => `M0,0${steps(part).join("")}L${sorted.length},0Z`;
  return h("figure", {},
    h("figcaption", {},
      "Every item, by how much ", badge(1), " is better (up) or ", badge(0), " (down)"),
    svg("svg", {
      class: "gains", viewBox: `0 ${-most} ${sorted.length || 1} ${most - least || 1}`,
      preserveAspectRatio: "none", role: "img",
      "aria-label": `Differences of ${state.metric} by item`,
    },
    svg("g", { class: "b" }, svg("path", { class: "fill", d: area(Math.max) })),
    svg("g", { class: "a" }, svg("path", { class: "fill", d: area(Math.min) })),
    svg("line", { x1: 0, x2: sorted.length, y1: 0, y2: 0 })),
    h("div", { class: "axis" }, h("span", {}, most > 0 ? `B by up to ${number(most, 2)}` : ""),
      h("span", {}, least < 0 ? `A by up to ${number(-least, 2)}` : "")));
}

let shownMetric = null;

function showMetric() {
  if (shownMetric === state.metric) return;
  shownMetric = state.metric;
  showFacts();
  byId("charts").hidden = !metrics.length;
  if (metrics.length) byId("figures").replaceChildren(distribution(), ...(two ? [gains()] : []));
  for (const [name, , test] of FILTERS) {
    byId(`count-${name}`).textContent = count(every.filter(test).length);
  }
}

// One item

function input(context) {
  const parts = context.split(" | ").map((part) => part.split(" : "));
  return h("p", { class: "input", dir: "auto" }, parts.map((fields) => h("span", {},
    fields.length === 2 ? [h("em", {}, fields[0]), " ", fields[1]]
      : fields.length === 3 ? [fields[0], " ", h("em", {}, fields[1]), " ", fields[2]]
        : fields.join(" : "))));
}

function output(index, system) {
  const { outputs, faults: ofSystems } = items[index];
  const runs = outputs[system];
  const text = h("p", { class: "text", dir: "auto" },
    runs.map((run, i) => (i % 2 ? h("mark", {}, run) : run)),
    runs.length === 0 && h("em", { class: "fault" }, "no text"));
  return h("section", { class: side(system) },
    two && h("h4", { class: "quiet" }, badge(system), ` ${systems[system].name}`),
    text,
    h("ul", { class: "faults" }, ofSystems[system].map(([kind, slot]) =>
      h("li", { class: kind }, `${kind} `, h("b", {}, slot)))),
    h("p", { class: "segments quiet" }, Object.entries(segments[system]).map(([name, values]) =>
      h("span", {}, `${name} ${number(values[index], 3)}`))));
}

function card(index) {
  const { context, references } = items[index];
  const difference = two && metrics.length ? gain(index) : null;
  const sign = lowerIsBetter(state.metric) ? -1 : 1;
  return h("li", {}, h("article", { tabindex: "0", "aria-label": `Item ${index + 1}` },
    h("header", {},
      h("h3", {}, `#${index + 1}`),
      input(context),
      difference != null && h("span", {
        class: `gain ${difference > 0 ? "b" : difference < 0 ? "a" : ""}`,
        title: `${state.metric}, B − A`,
      }, signed(sign * difference, 3))),
    h("div", { class: "outputs" }, systems.map((_, system) => output(index, system))),
    h("details", { open: Boolean(state.refs) },
      h("summary", {}, plural(references.length, "reference")),
      h("ol", {}, references.map((text) => h("li", { dir: "auto" }, text))))));
}

// The list

function highlight() {
  if (!window.CSS?.highlights) return;
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [];
  const walker = document.createTreeWalker(byId("list"), NodeFilter.SHOW_TEXT);
  while (words.length && walker.nextNode()) {
    const node = walker.currentNode, text = node.data.toLowerCase();
    for (const word of text.length === node.length ? words : []) {
      for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) {
        const range = new Range();
        range.setStart(node, at);
        range.setEnd(node, at + word.length);
        found.push(range);
      }
    }
  }
  CSS.highlights.set("found", new Highlight(...found));
}

let shownView = null;

function showList() {
  const view = JSON.stringify([state.metric, state.sort, state.show, state.q, state.page]);
  if (view === shownView) return;
  shownView = view;
  const order = inOrder();
  const pages = Math.max(1, Math.ceil(order.length / PER_PAGE));
  const page = Math.min(Math.max(1, Math.trunc(Number(state.page)) || 1), pages);
  const first = (page - 1) * PER_PAGE;
  const shown = order.slice(first, first + PER_PAGE);
  state.page = String(page);
  byId("before").disabled = page === 1;
  byId("after").disabled = page === pages;
  byId("count").textContent = order.length === 0 ? "No items"
    : `${count(first + 1)} to ${count(first + shown.length)} of ${plural(order.length, "item")}`;
  byId("list").replaceChildren(...(shown.length ? shown.map(card)
    : [h("li", { class: "none" }, "Nothing matches. Clear the search, or show all.")]));
  highlight();
}

let openReferences = false;

function showControls() {
  for (const name of ["metric", "sort"]) byId(name).value = state[name];
  if (byId("query").value !== state.q) byId("query").value = state.q;
  byId(`show-${state.show}`).checked = true;
  const open = Boolean(state.refs);
  if (open !== openReferences) {
    openReferences = byId("refs").checked = open;
    for (const details of byId("list").querySelectorAll("details")) details.open = open;
  }
  if (state.theme) document.documentElement.dataset.theme = state.theme;
  else delete document.documentElement.dataset.theme;
  byId("theme").textContent = isDark() ? "Light" : "Dark";
}

function render() {
  readAddress();
  showMetric();
  showList();
  showControls();
}

// Controls

const darkScheme = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (state.theme ? state.theme === "dark" : darkScheme.matches);

function turn(pages) {
  if (byId(pages < 0 ? "before" : "after").disabled) return false;
  change({ page: String(Number(state.page) + pages) });
  byId("toolbar").scrollIntoView();
  return true;
}

function move(by) {
  let all = [...document.querySelectorAll("article")];
  const here = all.indexOf(document.activeElement?.closest("article"));
  let next = here < 0 ? 0 : here + by;
  if (next < 0 || next >= all.length) {
    if (!turn(by)) return;
    all = [...document.querySelectorAll("article")];
    next = by < 0 ? all.length - 1 : 0;
  }
  all[next]?.focus({ preventScroll: true });
  all[next]?.scrollIntoView();
}

const KEYS = {
  j: () => move(1),
  k: () => move(-1),
  n: () => turn(1),
  p: () => turn(-1),
  r: () => change({ refs: state.refs ? "" : "1", page: state.page }),
  t: () => change({ theme: isDark() ? "light" : "dark", page: state.page }),
  "/": () => byId("query").focus(),
  "?": () => byId("keys").showModal(),
};

function onKey(event) {
  const typing = event.target.closest?.("input[type=search], select, dialog");
  if (event.key === "Escape" && event.target === byId("query")) {
    change({ q: "" });
    byId("query").blur();
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
}

const on = (id, type, act) => byId(id).addEventListener(type, (event) => act(event.target, event));

function addControls() {
  byId("metric").append(...metrics.map((name) => h("option", { value: name }, name)));
  byId("sort").append(...SORTS.map(([name, text]) => h("option", { value: name }, text)));
  byId("show").append(...FILTERS.map(([name, text]) => h("label", {},
    h("input", { type: "radio", name: "show", value: name, id: `show-${name}` }),
    h("span", {}, text, h("b", { id: `count-${name}` })))));
  for (const name of ["metric", "sort", "show"]) {
    on(name, "change", ({ value }) => change({ [name]: value }));
  }
  on("query", "input", ({ value }) => change({ q: value }));
  on("refs", "change", KEYS.r);
  on("theme", "click", KEYS.t);
  on("help", "click", KEYS["?"]);
  on("before", "click", KEYS.p);
  on("after", "click", KEYS.n);
  on("toolbar", "submit", (_, event) => event.preventDefault());
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", render);
  darkScheme.addEventListener("change", render);
}

function showTitle() {
  const named = (system) =>
    [badge(system), " ", h("span", { class: `own ${side(system)}` }, systems[system].name)];
  const title = two ? [...named(1), " compared with ", ...named(0)] : [systems[0].name];
  byId("title").replaceChildren(...title);
  document.title = two ? `${systems[1].name} compared with ${systems[0].name}` : systems[0].name;
  byId("about").textContent = [
    result.task, report.data, plural(items.length, "item"), plural(result.references, "reference"),
  ].join(" · ");
}

function showNotes() {
  const notes = [
    "Texts are shown as the scorers read them." +
      (two ? " Marked words are those in which the two outputs differ." : ""),
    result.bootstrap &&
      `Intervals: the middle 95 % of ${count(result.bootstrap.samples)} bootstrap samples of the items.` +
      (two ? " p: how often two equally good systems would differ by more." : ""),
    metrics.includes("BLEU") && "BLEU of a single item is smoothed.",
    ...systems.map(({ file }, system) => `${two ? `${letter(system)}: ` : ""}${file}`),
    ...Object.entries(result.sacrebleu)
      .map(([name, { signature }]) => `sacreBLEU ${name}: ${signature}`),
  ];
  byId("notes").replaceChildren(...notes.filter(Boolean).map((text) => h("p", {}, text)));
}

addControls();
showTitle();
showNotes();
showScores();
render();
