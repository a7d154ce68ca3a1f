// The episode page: dialogue, tokens, worst tokens, raw; a rail with KL a turn; playback.

import { copy, h, number, oneLine, say, seconds, visible } from "./dom.js";
import { exported, get, mayFork, writeHash } from "./api.js";
import { heatClass, inspector, legend, METRICS, segmentAt, tokenText, tokenView, worstTokens } from "./tokens.js";
import { dialogue } from "./dialogue.js";
import { markdownOf } from "./markdown.js";
import { playback } from "./playback.js";
import { forkText } from "./whatif.js";

const VIEWS = ["dialogue", "tokens", "worst", "raw"];

export async function episodePage({ path, query }) {
  const key = path[1];
  const [page, run] = await Promise.all([get(`/api/episode/${key}`), get("/api/run")]);
  if (page.problem) return problemPage(page);
  const { row, episode, traces } = page;
  const scale = run.scale;
  const state = {
    view: VIEWS.includes(query.get("view")) ? query.get("view") : "dialogue",
    turn: Math.min(Number(query.get("turn") ?? 0) || 0, Math.max(0, episode.turns.length - 1)),
    trace: Math.min(Number(query.get("trace") ?? 0) || 0, Math.max(0, traces.length - 1)),
    token: query.get("token") === null ? null : Number(query.get("token")),
    metric: METRICS.has(query.get("metric")) ? query.get("metric") : "kl",
  };
  let replaying = false;
  let view = null;
  const remember = () => writeHash(`episode/${key}`, { ...state, turn: state.turn || "", trace: state.trace || "",
    view: state.view === "dialogue" ? "" : state.view, metric: state.metric === "kl" ? "" : state.metric });
  const body = h("div", { class: "viewbody" });
  const side = h("aside", { class: "side" });
  const tabs = h("nav", { class: "tabs", "aria-label": "views" });
  const talk = dialogue({ episode, traces, scale, onTokens: openTurn, onTurn: (i) => setTurn(i, false),
    fork: mayFork() && run.what_if ? { key, model: run.what_if.model } : null, store: page.pages ? key : null });
  const rail = h("ol", { class: "rail", "aria-label": "KL by turn" }, episode.turns.map((turn, i) => railItem(turn, i)));
  const player = traces.length ? playback({ length: traces[state.trace].ids.length, places: placesOf(state.trace), go }) : null;

  function railItem(turn, i) {
    const kl = talk.kls[i];
    const calls = turn.message.tool_calls.map((call) => oneLine(call.name || "?", 16)).join(", ");
    const failed = turn.tool_results.some((result) => result.error);
    return h("li", {}, h("button", { class: `railitem${failed ? " bad" : ""}`, onclick: () => setTurn(i, true), title: `turn ${turn.index}: KL ${number(kl)}` },
      h("span", { class: "railnum" }, turn.index), h("span", { class: `railbar ${heatClass(kl, scale)}` }, number(kl, 2)),
      h("span", { class: "railname" }, calls || "text")));
  }

  function placesOf(index) {
    const own = episode.turns.filter((turn) => turn.trace === index && turn.end);
    return { turn: own.map((turn) => turn.end - 1), call: own.filter((turn) => turn.message.tool_calls.length).map((turn) => turn.end - 1) };
  }

  function turnAt(position) {
    const found = episode.turns.findLastIndex((turn) => turn.trace === state.trace && turn.start !== null && turn.start <= position);
    return Math.max(0, found);
  }

  function go(position, unit) {
    replaying = true;
    state.turn = turnAt(position);
    if (unit === "token" && state.view === "dialogue") setView("tokens");
    if (view) {
      view.setLimit(position);
      state.token = position;
      view.select(position, true);
      drawSide();
    }
    if (state.view === "dialogue") talk.show(state.turn, true);
    drawRail();
    remember();
  }

  function setTurn(i, scroll) {
    if (i < 0 || i >= episode.turns.length) return;
    state.turn = i;
    replaying = false;
    const turn = episode.turns[i];
    if (state.view === "tokens" && turn.trace !== null) openTurn(turn);
    else talk.show(i, false, scroll);
    if (player && turn.end && turn.trace === state.trace) player.set(turn.end - 1);
    drawRail();
    remember();
  }

  function drawRail() {
    [...rail.children].forEach((item, i) => item.classList.toggle("current", i === state.turn));
  }

  function openTurn(turn) {
    openToken(turn.trace, turn.start);
  }

  function openToken(trace, i) {
    state.trace = trace;
    state.token = i;
    setView("tokens");
  }

  function drawSide() {
    if (state.view !== "tokens" || !view) {
      side.replaceChildren();
      return;
    }
    side.replaceChildren(inspector(view.trace, view.cursor()));
  }

  function selected(i) {
    state.token = i;
    const [, turn] = segmentAt(view.trace, i);
    const place = episode.turns.findIndex((one) => one.index === turn);
    if (place >= 0) state.turn = place;
    if (player) player.set(i);
    drawRail();
    drawSide();
    remember();
  }

  function setView(name) {
    state.view = name;
    view = null;
    tabs.replaceChildren(...VIEWS.map((one) => h("button", { class: one === name ? "on" : "", "aria-pressed": one === name, onclick: () => setView(one) }, one)));
    if (name === "dialogue") body.replaceChildren(talk.element);
    else if (name === "tokens") body.replaceChildren(...tokenBody());
    else if (name === "worst") body.replaceChildren(worstBody());
    else body.replaceChildren(rawBody(page, state.turn));
    drawSide();
    drawRail();
    remember();
    shown();
  }

  function tokenBody() {
    if (!traces.length) return [h("p", { class: "quiet" }, "Only messages were exchanged: no ids were seen.")];
    const trace = traces[state.trace];
    view = tokenView({ trace, scale, metric: state.metric, onSelect: selected });
    const metric = h("select", { "aria-label": "colour by", onchange: () => { state.metric = metric.value; view.setMetric(metric.value); remember(); } },
      [...METRICS].map(([name, title]) => h("option", { value: name, selected: name === state.metric }, title)));
    const picker = traces.length < 2 ? null : h("select", { "aria-label": "trace", onchange: () => openToken(Number(picker.value), 0) },
      traces.map((one, i) => h("option", { value: i, selected: i === state.trace }, `trace ${i}: ${one.ids.length} tokens`)));
    const banner = page.tokenizer ? null : h("p", { class: "banner" }, "No tokenizer was found: ids are shown. Name one with --tokenizer.");
    return [h("div", { class: "tokenbar" }, metric, picker, legend(scale)), banner, view.element].filter(Boolean);
  }

  function worstBody() {
    const found = worstTokens(traces);
    if (!found.length) return h("p", { class: "quiet" }, "No token of this episode has a number by the teacher.");
    return h("table", { class: "plain worst" }, h("tr", {}, ["KL", "token", "before", "turn", "position", "student", "teacher"].map((name) => h("th", {}, name))),
      found.map(({ trace, i, gap }) => {
        const one = traces[trace];
        const before = one.ids.slice(Math.max(0, i - 8), i).map((id) => tokenText(one, id)).join("");
        return h("tr", { class: "jump", tabindex: "0", onclick: () => openToken(trace, i), onkeydown: (event) => { if (event.key === "Enter") openToken(trace, i); } },
          h("td", { class: `num ${heatClass(gap, scale)}` }, number(gap, 2)), h("td", { class: "mono" }, tokenText(one, one.ids[i])), h("td", { class: "mono quiet" }, before),
          h("td", { class: "num" }, segmentAt(one, i)[1]), h("td", { class: "num" }, number(i)), h("td", { class: "num" }, number(one.student[i])), h("td", { class: "num" }, number(one.teacher[i])));
      }));
  }

  function shown() {
    if (view) {
      view.select(Math.max(0, Math.min(state.token ?? 0, view.trace.ids.length - 1)));
    } else if (state.view === "dialogue" && state.turn) talk.show(state.turn, false);
  }

  const moveToken = (step) => {
    if (!view) setView("tokens");
    if (view) view.select((view.cursor() ?? -1) + step);
  };
  const other = (name) => { if (page[name]) location.hash = `#/episode/${page[name]}`; };
  const element = h("main", { class: "episode" }, heading(page, key, () => copy(markdownOf(row, episode))), tabs,
    h("div", { class: "columns" }, rail, body, side), player?.element);
  setView(state.view);
  drawRail();
  return {
    element,
    title: row.id,
    shown,
    closed: () => player?.pause(),
    keys: new Map([
      ["j", () => setTurn(state.turn + 1, true)], ["k", () => setTurn(state.turn - 1, true)],
      ["h", () => moveToken(-1)], ["l", () => moveToken(1)],
      ["n", () => other("next")], ["p", () => other("previous")],
      ["[", () => { if (!view) setView("tokens"); view?.jump(-1); }], ["]", () => { if (!view) setView("tokens"); view?.jump(1); }],
      ["t", () => setView(state.view === "tokens" ? "dialogue" : "tokens")],
      ["w", () => setView("worst")], ["r", () => setView("raw")],
      ["m", () => { view?.toggleMask(); }],
      ["o", () => talk.fold("details.result")], ["e", () => talk.fold("details.reasoning, details.sampled")],
      [" ", () => player?.toggle()], [".", () => player?.step(1)], [",", () => player?.step(-1)],
      ["g", () => (view ? view.select(0) : setTurn(0, true))],
      ["G", () => (view ? view.select(view.trace.ids.length - 1) : setTurn(episode.turns.length - 1, true))],
      ["d", () => { if (page.siblings.length) location.hash = `#/compare/${key}/${page.siblings[0].key}`; else say("No other episode of this task"); }],
      ["i", () => {
        if (!mayFork() || !run.what_if) say("Start the viewer with --what-if, and open the address that it prints");
        else if (episode.turns.length) {
          if (state.view !== "dialogue") setView("dialogue");
          talk.edit(state.turn);
        }
      }],
      ["y", () => copy(location.href)], ["c", () => copy(markdownOf(row, episode))],
    ]),
  };
}

// Of a fork: what it is a fork of, with the way to both side by side.
function forkLine(page, key) {
  const fork = page.episode.metadata.fork;
  if (!fork || typeof fork !== "object") return null;
  const original = page.siblings.find((one) => one.id === fork.of);
  return h("p", { class: "quiet" }, forkText(fork), original ? [" · ", h("a", { href: `#/compare/${original.key}/${key}` }, "compare with it")] : null);
}

function heading(page, key, onMarkdown) {
  const { row } = page;
  const facts = [["stopped", row.stop], ["KL", number(row.kl)], ["reward", number(row.reward, 2)], ["turns", number(row.turns ?? 0)], ["tool errors", number(row.tool_errors ?? 0)],
    ["trained", `${number(row.trained ?? 0)} of ${number(row.tokens ?? 0)} tokens`], ["weights", row.version ?? "–"], ["time", seconds(row.seconds)]];
  const picker = page.siblings.length ? h("select", { "aria-label": "compare with", onchange: () => { if (picker.value) location.hash = `#/compare/${key}/${picker.value}`; } },
    h("option", { value: "" }, `compare with… (${page.siblings.length})`), page.siblings.map((one) => h("option", { value: one.key }, `${oneLine(one.id, 60)} (${oneLine(one.file, 30)})`))) : null;
  return h("header", { class: "episodehead" }, h("div", { class: "titleline" }, h("h1", {}, oneLine(row.id, 120)), h("span", { class: "quiet" }, `${oneLine(row.env, 40)} · ${oneLine(row.file, 60)}:${row.line}`),
    h("span", { class: "actions" }, picker, h("button", { onclick: onMarkdown }, "Copy as Markdown"),
      exported ? null : h("a", { class: "button", href: `/api/export?keys=${key}`, download: "episode.html" }, "Export HTML"))),
    forkLine(page, key),
    h("div", { class: "factline" }, facts.map(([name, value]) => h("span", {}, h("i", {}, name), " ", oneLine(value, 80)))));
}

// What the model read before a turn, decoded from the ids as a whole by the server.
function promptPart(page, turn) {
  const out = h("div", {});
  const choice = h("select", { "aria-label": "turn of the prompt" }, page.episode.turns.map((one, i) => h("option", { value: i, selected: i === turn }, `turn ${one.index}`)));
  const show = async () => {
    try {
      const found = await get(`/api/prompt/${page.row.key}?turn=${choice.value}`);
      out.replaceChildren(found.text === null ? h("p", { class: "banner" }, "No tokenizer was found: the prompt is its ids. Name one with --tokenizer.")
        : h("div", {}, h("p", { class: "banner" }, `Decoded from ${number(found.tokens)} ids (${oneLine(found.tokenizer, 80)}). Copied as it is; here control characters are spelled out.`),
          h("button", { onclick: () => copy(found.text) }, "Copy the prompt"), h("pre", { class: "prose code pagetext prompttext" }, visible(found.text))));
    } catch (error) {
      out.replaceChildren(h("p", { class: "banner" }, visible(error.message)));
    }
  };
  return h("section", {}, h("div", { class: "toolbar" }, choice, h("button", { onclick: show }, "Show the exact prompt")), out);
}

function rawBody(page, turn) {
  const { row, traces } = page;
  const box = h("div", { class: "raw" });
  const part = (title, text) => h("details", {}, h("summary", {}, title), h("pre", { class: "prose code" }, text));
  box.append(h("p", {}, `${row.file}, line ${row.line}, ${number(row.length)} bytes at offset ${number(row.offset)}`));
  if (!exported && page.episode.turns.length) box.append(promptPart(page, turn));
  traces.forEach((trace, i) => {
    box.append(part(`trace ${i}: ${number(trace.ids.length)} token ids, exact`, trace.ids.join(" ")));
    const text = trace.ids.slice(0, 200_000).map((id) => trace.textMap?.get(id) ?? new Map(trace.texts).get(id) ?? `#${id}`);
    if (page.tokenizer) box.append(h("details", {}, h("summary", {}, `trace ${i} as text`),
      h("p", { class: "banner" }, `Decoded from the ids one by one (${oneLine(page.tokenizer, 80)}): the ids are what the model read.`), h("pre", { class: "prose code" }, visible(text.join("")))));
  });
  box.append(part("the line as JSON, without its traces", visible(JSON.stringify(page.episode, null, 1))));
  if (!exported) box.append(h("p", {}, h("a", { href: `/api/raw/${row.key}`, download: "episode.jsonl" }, "the exact line, as a file")));
  return box;
}

function problemPage(page) {
  const element = h("main", { class: "page" }, h("h1", {}, "This line is no episode"), h("p", { class: "banner" }, visible(page.problem)),
    h("p", {}, `${oneLine(page.row.file)}, line ${page.row.line}, ${number(page.row.length)} bytes`), h("pre", { class: "prose code" }, visible(page.head)));
  return { element, title: "not an episode", keys: new Map() };
}
