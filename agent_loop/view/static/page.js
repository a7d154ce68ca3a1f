// A page as it lies in the run's page store: text, never markup, and nothing of it is fetched.

import { h, number, oneLine, visible } from "./dom.js";
import { get } from "./api.js";

export async function storedPage({ path, query }) {
  const page = await get(`/api/page/${path[1]}?${new URLSearchParams({ page: query.get("page") || "" })}`);
  const back = h("p", {}, h("a", { href: `#/episode/${path[1]}?turn=${Number(query.get("turn")) || 0}` }, "back to the episode"));
  if (page.problem) {
    return { element: h("main", { class: "page" }, back, h("h1", {}, "No stored page"), h("p", { class: "banner" }, visible(page.problem)), h("p", { class: "mono" }, oneLine(query.get("page") || "", 2000))), title: "no stored page", keys: new Map() };
  }
  const read = query.get("sha256");
  const facts = [["asked for", page.url], ["ended at", page.final_url], ["status", page.status], ["fetched", page.fetched_at || "–"], ["SHA-256", page.sha256]];
  const element = h("main", { class: "page" }, back, h("h1", {}, oneLine(page.title || "Stored page", 200)),
    read && read !== page.sha256 ? h("p", { class: "banner" }, "The store holds another page than the one that was read.") : null,
    h("dl", { class: "arguments" }, facts.map(([name, value]) => [h("dt", {}, name), h("dd", { class: "mono" }, oneLine(value, 2000))])),
    page.length > page.text.length ? h("p", { class: "banner" }, `The first ${number(page.text.length)} of ${number(page.length)} characters.`) : null,
    h("pre", { class: "prose code pagetext" }, visible(page.text)));
  return { element, title: oneLine(page.title || "stored page", 60), keys: new Map() };
}
