// Routes, keys, theme, follow mode.

import { h, say } from "./dom.js";
import { exported, get, readHash, takeToken } from "./api.js";
import { runPage } from "./run.js";
import { listPage } from "./list.js";
import { episodePage } from "./episode.js";
import { comparePage } from "./compare.js";
import { storedPage } from "./page.js";

const ROUTES = new Map([["run", runPage], ["episodes", listPage], ["episode", episodePage], ["compare", comparePage], ["page", storedPage]]);
const HELP = [
  ["1 2", "run, episodes"], ["j k", "next, previous turn or row"], ["Enter", "open the row"], ["h l", "previous, next token"], ["[ ]", "previous, next token with a high KL"],
  ["n p", "next, previous episode"], ["t", "tokens or dialogue"], ["w r", "worst tokens, raw"], ["m", "show the mask"], ["Space", "play, pause"], [", .", "step back, forward"],
  ["o e", "fold tool output, reasoning"], ["/ f", "search and filter"], ["x", "choose a row"], ["d", "compare"], ["u s", "in a comparison: unfold, swap"], ["y", "copy the link"], ["i", "what if this turn were another"],
  ["c", "copy as Markdown"], ["g G", "first, last"], ["T", "dark, light"], ["? Esc", "this help"],
];
let page = null;
let turnOfPage = 0;
const outlet = h("div", { id: "outlet" });

async function route() {
  takeToken();
  const mine = ++turnOfPage;
  const { path, query } = readHash();
  const open = ROUTES.get(path[0]) || (exported ? listPage : runPage);
  page?.closed?.();
  let next;
  try {
    next = await open({ path, query });
  } catch (error) {
    next = { element: h("main", { class: "page" }, h("p", { class: "banner" }, error.message)), title: "error", keys: new Map() };
  }
  if (mine !== turnOfPage) return;
  page = next;
  outlet.replaceChildren(page.element);
  document.title = `${page.title} · episodes`;
  page.shown?.();
  document.body.dataset.ready = location.hash || "#/";
  document.querySelectorAll("nav.top a").forEach((link) => link.classList.toggle("on", link.getAttribute("href") === `#/${path[0] || "run"}`));
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  try {
    localStorage.setItem("theme", name);
  } catch { /* a file opened from disk may have no storage */ }
}

function otherTheme() {
  const dark = document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  theme(dark === "dark" ? "light" : "dark");
}

const help = h("dialog", { class: "help", "aria-label": "keys" }, h("h2", {}, "Keys"), h("dl", {}, HELP.map(([keys, text]) => [h("dt", {}, keys), h("dd", {}, text)])),
  h("form", { method: "dialog" }, h("button", {}, "Close")));

const everywhere = new Map([
  ["?", () => (help.open ? help.close() : help.showModal())],
  ["T", otherTheme],
  ["1", () => { location.hash = "#/run"; }],
  ["2", () => { location.hash = "#/episodes"; }],
]);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    document.activeElement?.blur();
    return;
  }
  const target = event.target;
  if (target.matches("input:not([type=checkbox]):not([type=range]), select, textarea")) return;
  if (target.matches("button, summary, a, tr") && ["Enter", " "].includes(event.key)) return;
  const act = everywhere.get(event.key) || (help.open ? null : page?.keys.get(event.key));
  if (!act) return;
  event.preventDefault();
  act();
});

async function follow(version) {
  try {
    const now = await get("/api/changes");
    if (now.version !== version && page?.changed) page.changed();
    else if (now.version !== version) say(`${now.rows} episodes`);
    version = now.version;
  } catch { /* the server has gone; it may come back */ }
  setTimeout(follow, 1000, version);
}

async function start() {
  let saved = null;
  try {
    saved = localStorage.getItem("theme");
  } catch { /* as above */ }
  if (saved === "dark" || saved === "light") theme(saved);
  document.body.append(
    h("nav", { class: "top", "aria-label": "pages" }, h("b", {}, "distillation gym"), h("a", { href: "#/run" }, "Run"), h("a", { href: "#/episodes" }, "Episodes"),
      h("span", { class: "spacer" }), h("span", { id: "live" }), h("button", { onclick: otherTheme, "aria-label": "dark or light" }, "◐"), h("button", { onclick: everywhere.get("?"), "aria-label": "keys" }, "?")),
    outlet, help);
  addEventListener("hashchange", route);
  await route();
  const run = await get("/api/run");
  if (run.follow) {
    document.getElementById("live").textContent = "● following";
    follow(run.version);
  }
}

start();
