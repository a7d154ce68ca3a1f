// The token view: every token of a trace, wrapped in lines of one height, of which only those in sight are elements.

import { h, number, visible, virtualRows } from "./dom.js";

export const MARKS = ["not in the mask", "scored", "not scored", "unusable"];
export const METRICS = new Map([
  ["kl", "reverse KL sample"],
  ["student", "student log-probability"],
  ["teacher", "teacher log-probability"],
]);
const LEVELS = 6;

// Nats; null where there is no number, which is never drawn as zero.
export function valueOf(trace, metric, i) {
  if (metric === "student") return trace.student[i];
  if (metric === "teacher") return trace.marks[i] === 3 ? null : trace.teacher[i];
  return trace.marks[i] === 1 ? trace.student[i] - trace.teacher[i] : null;
}

export function heatClass(value, scale) {
  if (value === null) return "";
  const level = Math.min(LEVELS, Math.round((Math.abs(value) / scale) * LEVELS));
  return level === 0 ? "h0" : value > 0 ? `hp${level}` : `hn${level}`;
}

export function textsOf(trace) {
  if (!trace.textMap) {
    trace.textMap = new Map(trace.texts);
    trace.specialSet = new Set(trace.special);
  }
  return trace.textMap;
}

export function tokenText(trace, id) {
  const text = textsOf(trace).get(id);
  return text === undefined ? `#${id}` : text === "" ? `⟨${id}⟩` : visible(text).replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

export function segmentAt(trace, i) {
  let low = 0;
  let high = trace.segments.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (trace.segments[middle][3] <= i) low = middle + 1;
    else high = middle;
  }
  return trace.segments[low];
}

// Lines of positions: a line ends where the next token does not fit, and after a line break.
function wrap(trace, columns, from) {
  const texts = textsOf(trace);
  const lines = [];
  let line = [];
  let used = 0;
  const widths = new Map();
  for (let i = from; i < trace.ids.length; i++) {
    const id = trace.ids[i];
    let width = widths.get(id);
    if (width === undefined) {
      const shown = tokenText(trace, id);
      width = [...shown].reduce((sum, c) => sum + (c.codePointAt(0) > 0x2e7f ? 2 : 1), 0);
      width += trace.specialSet.has(id) || !texts.has(id) ? 2 : 0;
      widths.set(id, width);
    }
    if (line.length && (used + width > columns)) {
      lines.push(line);
      line = [];
      used = 0;
    }
    line.push(i);
    used += width;
    if (texts.get(id)?.endsWith("\n")) {
      lines.push(line);
      line = [];
      used = 0;
    }
  }
  if (line.length) lines.push(line);
  return lines;
}

// select(i, quiet) moves the cursor; onSelect(i) hears of it. `from` folds a shared beginning, `mark` shows a first difference.
export function tokenView({ trace, scale, metric = "kl", from = 0, mark = null, onSelect, label = "tokens" }) {
  let lines = [];
  let lineOf = new Map();
  let columns = 0;
  let cursor = null;
  let limit = null; // playback: later tokens are dim
  let start = from;
  textsOf(trace);
  const rows = virtualRows({ height: 26, count: 0, render: drawLine, label });
  rows.element.classList.add("tokens");
  rows.element.addEventListener("click", (event) => {
    const token = event.target.closest("[data-i]");
    if (token) select(Number(token.dataset.i));
  });

  function drawLine(index) {
    return h("div", { class: "tline" }, lines[index].map((i) => {
      const id = trace.ids[i];
      const kind = ["tok", `m${trace.marks[i]}`, heatClass(valueOf(trace, metric, i), scale), `s-${segmentAt(trace, i)[0]}`];
      if (trace.specialSet.has(id)) kind.push("special");
      if (i === cursor) kind.push("cursor");
      if (i === mark) kind.push("firstdiff");
      if (limit !== null && i > limit) kind.push("future");
      return h("span", { class: kind.join(" "), "data-i": i }, tokenText(trace, id));
    }));
  }

  function layout() {
    const wanted = Math.max(20, Math.floor((rows.element.clientWidth - 30) / 7.83));
    if (wanted === columns && lines.length) return;
    columns = wanted;
    relayout();
  }

  function relayout() {
    lines = wrap(trace, columns || 100, start);
    lineOf = new Map();
    lines.forEach((line, index) => line.forEach((i) => lineOf.set(i, index)));
    rows.reset(lines.length);
  }

  function select(i, quiet = false) {
    if (i === null || i < 0 || i >= trace.ids.length) return;
    cursor = i;
    rows.reset(lines.length);
    const line = lineOf.get(i);
    if (line !== undefined) rows.show(line);
    if (!quiet && onSelect) onSelect(i);
  }

  new ResizeObserver(layout).observe(rows.element);
  return {
    element: rows.element,
    trace,
    select,
    cursor: () => cursor,
    setMetric(name) {
      metric = name;
      rows.reset(lines.length);
    },
    setLimit(i) {
      limit = i;
      rows.reset(lines.length);
    },
    unfold() {
      start = 0;
      relayout();
    },
    toggleMask: () => rows.element.classList.toggle("showmask"),
    // the next trained token with |KL| above half of the scale
    jump(step) {
      for (let i = (cursor ?? (step > 0 ? -1 : trace.ids.length)) + step; i >= 0 && i < trace.ids.length; i += step) {
        const value = valueOf(trace, "kl", i);
        if (value !== null && Math.abs(value) >= scale / 2) return select(i);
      }
    },
  };
}

// What is known of one token, in full.
export function inspector(trace, i) {
  if (i === null || i === undefined) return h("div", { class: "inspector" }, h("p", { class: "quiet" }, "Choose a token: click it, or h and l."));
  const [source, turn] = segmentAt(trace, i);
  const kl = valueOf(trace, "kl", i);
  const sampled = trace.student[i] !== null;
  const facts = [
    ["position", number(i)],
    ["token id", trace.ids[i]],
    ["segment", turn < 0 ? source : `${source}, turn ${turn}`],
    ["mask", trace.marks[i] === 0 ? "not in the mask" : "trained on"],
    ["student", sampled ? `${number(trace.student[i], 4)} (${(100 * Math.exp(trace.student[i])).toPrecision(3)}%)` : "not sampled"],
    ["teacher", teacherText(trace, i)],
    ["reverse KL sample", kl === null ? `no number: ${MARKS[trace.marks[i]]}` : `${number(kl, 4)} nats`],
    ["mismatch", "not stored in episode files"],
    ["weights", trace.versions?.[i] ?? "not said"],
  ];
  return h(
    "div", { class: "inspector" },
    h("div", { class: "bigtoken" }, tokenText(trace, trace.ids[i])),
    h("dl", {}, facts.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    candidates(trace, i, "teacher_topk", "teacher's likeliest"),
    candidates(trace, i, "sampling_topk", "student's likeliest"),
  );
}

function teacherText(trace, i) {
  if (trace.marks[i] === 3) return `${trace.teacher[i]}: unusable`;
  if (trace.teacher[i] === null) return trace.asked ? "not scored" : "the teacher was not asked";
  return `${number(trace.teacher[i], 4)} (${(100 * Math.exp(trace.teacher[i])).toPrecision(3)}%)`;
}

function candidates(trace, i, name, title) {
  const found = trace[name]?.[i];
  if (!found) return null;
  return h("table", { class: "topk" }, h("caption", {}, title), found.map(([id, value]) =>
    h("tr", { class: id === trace.ids[i] ? "same" : "" },
      h("td", { class: "mono" }, tokenText(trace, id)), h("td", {}, number(value, 3)),
      h("td", {}, `${(100 * Math.exp(value)).toFixed(1)}%`))));
}

// Trained tokens by the size of their gap.
export function worstTokens(traces, count = 100) {
  const found = [];
  traces.forEach((trace, index) => {
    for (let i = 0; i < trace.ids.length; i++) {
      const gap = valueOf(trace, "kl", i);
      if (gap !== null) found.push({ trace: index, i, gap });
    }
  });
  return found.sort((a, b) => Math.abs(b.gap) - Math.abs(a.gap)).slice(0, count);
}

export function legend(scale) {
  const steps = [];
  for (let level = -LEVELS; level <= LEVELS; level++) {
    steps.push(h("span", { class: `swatch ${level === 0 ? "h0" : level > 0 ? "hp" + level : "hn" + -level}` }));
  }
  return h(
    "div", { class: "legend" },
    h("span", {}, `−${scale} teacher likes it more`), h("span", { class: "swatches" }, steps), h("span", {}, `+${scale} nats, teacher likes it less`),
    h("span", { class: "tok m0" }, "not in the mask"), h("span", { class: "tok m2" }, "not scored"), h("span", { class: "tok m3" }, "unusable"),
  );
}
