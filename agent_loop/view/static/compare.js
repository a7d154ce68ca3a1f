// Two episodes side by side: shared beginning folded, first differing token marked, both heat maps on one scale.

import { h, number, oneLine } from "./dom.js";
import { get } from "./api.js";
import { forkText } from "./whatif.js";
import { inspector, legend, tokenView } from "./tokens.js";

export async function comparePage({ path }) {
  const [left, right, run] = await Promise.all([get(`/api/episode/${path[1]}`), get(`/api/episode/${path[2]}`), get("/api/run")]);
  if (left.problem || right.problem) throw new Error("one of the two lines is no episode");
  const pages = [left, right];
  const { index, shared, same } = firstDifference(left.traces, right.traces);
  const traces = pages.map((page) => page.traces[index]);
  const views = [];
  const columns = pages.map((page, side) => {
    const panel = h("div", { class: "panel" });
    const view = traces[side] ? tokenView({ trace: traces[side], scale: run.scale, from: Math.min(shared, traces[side].ids.length), mark: shared,
      label: side ? "tokens of the second" : "tokens of the first", onSelect: (i) => panel.replaceChildren(inspector(traces[side], i)) }) : null;
    views.push(view);
    return h("section", { class: "half" }, h("h2", {}, h("a", { href: `#/episode/${page.row.key}` }, oneLine(page.row.id, 80))),
      h("p", { class: "quiet" }, `${oneLine(page.row.file, 50)} · weights ${page.row.version ?? "–"}`), view ? view.element : h("p", {}, "no ids"), panel);
  });
  const unfold = h("button", { onclick: () => { views.forEach((view) => view?.unfold()); unfold.remove(); } }, `show the ${number(shared)} shared tokens`);
  const element = h("main", { class: "compare" }, h("div", { class: "toolbar" },
    h("b", {}, same ? "The same tokens throughout" : `First difference at token ${number(shared)}${index ? ` of trace ${index}` : ""}`), shared ? unfold : null, legend(run.scale)),
    pages.map((page) => (page.episode.metadata.fork ? h("p", { class: "quiet" }, `${oneLine(page.row.id, 80)}: ${forkText(page.episode.metadata.fork)}`) : null)),
    left.row.task === right.row.task ? null : h("p", { class: "banner" }, "These are episodes of different tasks."),
    deltas(left, right), h("div", { class: "halves" }, columns));
  return {
    element,
    title: "Compare",
    keys: new Map([["u", () => unfold.click()], ["s", () => { location.hash = `#/compare/${path[2]}/${path[1]}`; }]]),
    shown: () => views.forEach((view, side) => view?.select(Math.min(shared, traces[side].ids.length - 1), true)),
  };
}

// The first trace in which they differ, and how many of its tokens they share; trace 0 if they never do.
function firstDifference(left, right) {
  for (let index = 0; index < Math.max(left.length, right.length); index++) {
    if (!left[index] || !right[index]) return { index, shared: 0, same: false };
    const shared = sharedPrefix(left[index].ids, right[index].ids);
    if (shared < Math.max(left[index].ids.length, right[index].ids.length)) return { index, shared, same: false };
  }
  return { index: 0, shared: left[0]?.ids.length ?? 0, same: left.length > 0 };
}

function sharedPrefix(a, b) {
  let i = 0;
  while (i < a.length && i < b.length && a[i] === b[i]) i += 1;
  return i;
}

function deltas(left, right) {
  const calls = (page) => page.episode.turns.flatMap((turn) => turn.message.tool_calls.map((call) => oneLine(call.name, 30))).join(" → ") || "none";
  const rows = [
    ["KL", number(left.row.kl), number(right.row.kl), left.row.kl != null && right.row.kl != null ? number(right.row.kl - left.row.kl) : ""],
    ["reward", number(left.row.reward, 2), number(right.row.reward, 2), ""],
    ["stopped", left.row.stop, right.row.stop, left.row.stop === right.row.stop ? "same" : "differs"],
    ["turns", left.row.turns ?? 0, right.row.turns ?? 0, (right.row.turns ?? 0) - (left.row.turns ?? 0)],
    ["tools called", calls(left), calls(right), calls(left) === calls(right) ? "same" : "differs"],
  ];
  return h("table", { class: "plain deltas" }, h("tr", {}, ["", "first", "second", "change"].map((name) => h("th", {}, name))),
    rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, oneLine(cell, 160))))));
}
