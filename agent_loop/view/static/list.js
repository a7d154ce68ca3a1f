// The episode list: virtual rows, order by any column, one search field for filters and text.

import { h, number, oneLine, seconds, virtualRows } from "./dom.js";
import { exported, get, writeHash } from "./api.js";

const PAGE = 200;
const COLUMNS = [
  ["step", "step", (r) => number(r.step)],
  ["id", "episode", (r) => oneLine(r.id, 60)],
  ["env", "environment", (r) => oneLine(r.env, 24)],
  ["stop", "stopped", (r) => oneLine(r.error || r.stop || "", 34)],
  ["kl", "KL", (r) => number(r.kl)],
  ["kl_max", "worst", (r) => number(r.kl_max, 2)],
  ["reward", "reward", (r) => number(r.reward, 2)],
  ["turns", "turns", (r) => number(r.turns ?? 0)],
  ["tool_errors", "tool err.", (r) => number(r.tool_errors ?? 0)],
  ["trained", "trained", (r) => number(r.trained ?? 0)],
  ["tokens", "tokens", (r) => number(r.tokens ?? 0)],
  ["seconds", "time", (r) => seconds(r.seconds)],
];
const CHIPS = [["failed", "is:failed"], ["cut short", "is:truncated"], ["tool errors", "tool_errors>0"], ["bad lines", "is:problem"], ["scored", "is:scored"]];

export async function listPage({ query }) {
  let q = query.get("q") || "";
  let sort = query.get("sort") || "";
  let pages = new Map();
  let total = 0;
  let generation = 0;
  let cursor = Number(query.get("row") || 0);
  const chosen = new Map();
  const status = h("span", { class: "quiet", role: "status" });
  const input = h("input", { type: "search", value: q, class: "query", "aria-label": "search and filter", spellcheck: "false",
    placeholder: "tool:timeout  kl>0.5  stop:max_turns  user:\"two words\"  is:failed" });
  const header = h("div", { class: "listhead", role: "row" });
  const rows = virtualRows({ height: 32, count: 0, render: drawRow, label: "episodes" });
  const actions = h("span", { class: "actions" });
  rows.element.classList.add("list");

  function drawRow(i) {
    const page = pages.get(Math.floor(i / PAGE));
    const row = page?.[i % PAGE];
    if (page === undefined) load(Math.floor(i / PAGE));
    if (!row) return h("div", { class: "listrow" }, h("span", { class: "quiet" }, "…"));
    const box = h("input", { type: "checkbox", checked: chosen.has(row.key), "aria-label": `choose ${oneLine(row.id)}`,
      onclick: (event) => { event.stopPropagation(); choose(row); } });
    if (row.problem) {
      return h("a", { class: `listrow problem${i === cursor ? " cursor" : ""}`, href: `#/episode/${row.key}` }, h("span", {}, "⚠"),
        h("span", { class: "wide" }, `${oneLine(row.file, 60)}:${row.line}: ${oneLine(row.problem)}`));
    }
    return h("a", { class: `listrow${row.error ? " failed" : ""}${i === cursor ? " cursor" : ""}`, href: `#/episode/${row.key}` }, box,
      COLUMNS.map(([name, , text]) => h("span", { class: `c-${name}` }, text(row))));
  }

  function choose(row) {
    if (!chosen.delete(row.key)) chosen.set(row.key, row);
    drawActions();
    rows.reset(total);
  }

  function drawActions() {
    const keys = [...chosen.keys()];
    actions.replaceChildren(
      keys.length === 2 ? h("a", { class: "button", href: `#/compare/${keys[0]}/${keys[1]}` }, "Compare these two") : "",
      keys.length && !exported ? h("a", { class: "button", href: `/api/export?keys=${keys.join(",")}`, download: "episodes.html" }, `Export ${keys.length}`) : "");
  }

  async function load(page) {
    const mine = generation;
    pages.set(page, null);
    try {
      const values = new URLSearchParams({ q, sort, offset: page * PAGE, limit: PAGE });
      const found = await get(`/api/episodes?${values}`);
      if (mine !== generation) return;
      total = found.total;
      pages.set(page, found.rows);
      input.setCustomValidity("");
      const cut = found.searched < found.candidates ? `; searched ${number(found.searched)} of ${number(found.candidates)} before the time was up` : "";
      status.textContent = `${number(total)} of ${number(found.all)} episodes${cut}`;
    } catch (error) {
      if (mine !== generation) return;
      total = 0;
      pages.set(page, []);
      status.textContent = oneLine(error.message, 400);
    }
    rows.reset(total);
  }

  function again() {
    generation += 1;
    pages = new Map();
    drawHeader();
    remember();
    return load(0);
  }

  function remember() {
    writeHash("episodes", { q, sort, row: cursor || "" });
  }

  function drawHeader() {
    header.replaceChildren(h("span", {}), ...COLUMNS.map(([name, title]) => {
      const way = sort === name ? " ▲" : sort === `-${name}` ? " ▼" : "";
      return h("button", { class: `c-${name}`, onclick: () => {
        sort = sort === `-${name}` ? name : sort === name ? "" : `-${name}`;
        again();
      } }, title + way);
    }));
  }

  function move(step) {
    cursor = Math.max(0, Math.min(total - 1, cursor + step));
    rows.reset(total);
    rows.show(cursor);
    remember();
  }

  const rowAt = (i) => pages.get(Math.floor(i / PAGE))?.[i % PAGE];
  let timer = null;
  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => { q = input.value; cursor = 0; again(); }, 250);
  });
  const chips = h("span", { class: "chips" }, CHIPS.map(([title, text]) => h("button", { class: "chip", onclick: () => {
    q = q.includes(text) ? q.replace(text, "").trim() : `${q} ${text}`.trim();
    input.value = q;
    again();
  } }, title)));
  const element = h("main", { class: "listpage" },
    h("div", { class: "toolbar" }, exported ? null : input, exported ? null : chips, actions, status), header, rows.element);
  await again();
  return {
    element,
    title: "Episodes",
    keys: new Map([
      ["j", () => move(1)], ["k", () => move(-1)], ["ArrowDown", () => move(1)], ["ArrowUp", () => move(-1)],
      ["g", () => move(-total)], ["G", () => move(total)],
      ["/", () => input.focus()], ["f", () => input.focus()],
      ["x", () => rowAt(cursor) && choose(rowAt(cursor))],
      ["Enter", () => { const row = rowAt(cursor); if (row) location.hash = `#/episode/${row.key}`; }],
      ["d", () => { const keys = [...chosen.keys()]; if (keys.length === 2) location.hash = `#/compare/${keys[0]}/${keys[1]}`; }],
    ]),
    shown: () => { rows.reset(total); rows.show(cursor); },
    changed: again,
  };
}
