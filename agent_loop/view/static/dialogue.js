// The dialogue: one block a turn, tool calls and results as cards. Only blocks near the window have content.

import { h, number, oneLine, seconds, visible } from "./dom.js";
import { whatIf } from "./whatif.js";
import { heatClass, valueOf } from "./tokens.js";

const LONG = 1500; // characters before a text is folded

// Mean reverse KL of each turn's trained tokens, by turn index; null where none is scored.
export function turnKl(episode, traces) {
  return episode.turns.map((turn) => {
    const trace = turn.trace === null ? null : traces[turn.trace];
    let sum = 0;
    let count = 0;
    for (let i = turn.start ?? 0; trace && i < Math.min(turn.end ?? 0, trace.ids.length); i++) {
      const value = valueOf(trace, "kl", i);
      if (value === null) continue;
      sum += value;
      count += 1;
    }
    return count ? sum / count : null;
  });
}

function prose(text, kind) {
  const shown = visible(text);
  if (shown.length <= LONG) return h("pre", { class: `prose ${kind}` }, shown);
  const body = h("pre", { class: `prose ${kind}` }, shown.slice(0, LONG) + "…");
  const more = h("button", { class: "more", onclick: () => {
    const open = body.textContent.length <= LONG + 1;
    body.textContent = open ? shown : shown.slice(0, LONG) + "…";
    more.textContent = open ? "less" : `all ${number(shown.length)} characters`;
  } }, `all ${number(shown.length)} characters`);
  return h("div", {}, body, more);
}

function message(role, text) {
  return h("div", { class: `message ${["system", "user"].includes(role) ? role : "user"}` }, h("div", { class: "who" }, oneLine(role, 20)), prose(text, ""));
}

// Keys of the page store that a result names: those of typed tools, else what was asked for or where it ended.
function pageLinks(metadata, store) {
  if (!store) return null;
  const keys = Array.isArray(metadata.keys) ? metadata.keys : [metadata.asked ?? metadata.url];
  const sums = Array.isArray(metadata.keys) && Array.isArray(metadata.sha256) ? metadata.sha256 : [metadata.sha256];
  return keys.slice(0, 8).map((key, i) => {
    if (typeof key !== "string" || !/^(https?:\/\/|tool:)/.test(key)) return null;
    const query = new URLSearchParams({ page: key, turn: store.turn, ...(typeof sums[i] === "string" ? { sha256: sums[i] } : {}) });
    return h("a", { class: "pagelink", href: `#/page/${store.key}?${query}`, title: oneLine(key, 200) }, keys.length > 1 ? `stored page ${i + 1}` : "stored page");
  });
}

function callCard(call, result, store) {
  const failed = call.parse_error || result?.error;
  const name = call.name || "(no name)";
  return h("div", { class: `card${failed ? " bad" : ""}` },
    h("div", { class: "cardhead" }, h("b", {}, oneLine(name, 80)), result ? h("span", { class: "quiet" }, seconds(result.duration_s)) : null,
      call.parse_error ? h("span", { class: "badge" }, `malformed: ${oneLine(call.parse_error, 120)}`) : null,
      result?.error ? h("span", { class: "badge" }, `${oneLine(result.error.kind, 40)}: ${oneLine(result.error.message, 160)}`) : null,
      result?.truncated_chars ? h("span", { class: "quiet" }, `${number(result.truncated_chars)} characters cut`) : null,
      result?.ends_episode ? h("span", { class: "quiet" }, "ends the episode") : null,
      result && !result.error ? pageLinks(result.metadata, store) : null),
    call.arguments !== null
      ? h("dl", { class: "arguments" }, Object.entries(call.arguments).map(([k, v]) => [h("dt", {}, oneLine(k, 60)), h("dd", {}, oneLine(typeof v === "string" ? v : JSON.stringify(v), 2000))]))
      : prose(call.raw, "code"),
    result ? h("details", { class: "result", open: true }, h("summary", {}, "result"), prose(result.content, "code")) : null,
    result && Object.keys(result.metadata).length ? h("details", {}, h("summary", {}, "metadata, not seen by the model"), prose(JSON.stringify(result.metadata, null, 1), "code")) : null);
}

function turnContent(turn, kl, scale, onTokens, onWhatIf, store) {
  const results = new Map(turn.tool_results.map((result) => [result.call_id, result]));
  const calls = turn.message.tool_calls;
  const loose = turn.tool_results.filter((result) => !calls.some((call) => call.id === result.call_id));
  const size = turn.start === null ? "tokens not known" : `${number(turn.end - turn.start)} tokens`;
  return [
    h("div", { class: "turnhead" }, h("b", {}, `Turn ${turn.index}`), h("span", {}, size),
      h("span", { class: `klbadge ${heatClass(kl, scale)}` }, `KL ${number(kl)}`), h("span", {}, `${seconds(turn.sample_s)} model, ${seconds(turn.env_s)} tools`),
      turn.policy_version === null ? null : h("span", {}, `weights ${turn.policy_version}`),
      turn.finish_reason === "stop" ? null : h("span", { class: "badge" }, `cut: ${turn.finish_reason}`),
      turn.start === null ? null : h("button", { class: "link", onclick: () => onTokens(turn) }, "tokens"),
      turn.start === null || !onWhatIf ? null : h("button", { class: "link", onclick: (event) => { event.stopPropagation(); onWhatIf(); } }, "what if")),
    h("div", { class: "message assistant" }, h("div", { class: "who" }, "assistant"),
      turn.message.reasoning ? h("details", { class: "reasoning" }, h("summary", {}, `reasoning, ${number(turn.message.reasoning.length)} characters`), prose(turn.message.reasoning, "")) : null,
      turn.message.content ? prose(turn.message.content, "") : null,
      calls.map((call) => callCard(call, results.get(call.id), store)),
      loose.map((result) => callCard({ name: result.name, arguments: {}, parse_error: null, raw: "" }, result, store)),
      h("details", { class: "sampled" }, h("summary", {}, "as sampled (decoded from ids)"), prose(turn.text, "code"))),
    turn.observation.filter((m) => m.role !== "tool").map((m) => message(m.role, m.content)),
  ];
}

// `store`: key of the episode whose run has stored pages, else null. `fork`: what `whatIf` needs, else null.
export function dialogue({ episode, traces, scale, onTokens, onTurn, fork, store }) {
  const kls = turnKl(episode, traces);
  const blocks = episode.turns.map((turn, i) => h("section", { class: "turn", "data-turn": i, "aria-label": `turn ${turn.index}`, onclick: () => onTurn(i, true) }));
  const filled = new Set();
  const element = h("div", { class: "dialogue" }, h("details", { class: "prompt", open: true }, h("summary", {}, "Task"), episode.task.messages.map((m) => message(m.role, m.content))),
    blocks, h("div", { class: "ending" }, `Stopped: ${episode.stop_reason}`, episode.error ? prose(`${episode.error.boundary}: ${episode.error.kind}: ${episode.error.message}`, "code") : null));
  function fill(i) {
    if (filled.has(i)) return;
    filled.add(i);
    blocks[i].style.minHeight = "";
    blocks[i].append(...turnContent(episode.turns[i], kls[i], scale, onTokens, fork ? () => edit(i) : null, store ? { key: store, turn: i } : null).flat().filter(Boolean));
  }
  let editor = null;
  let edited = null;
  function edit(i) {
    editor?.element.remove();
    const again = edited === i && editor;
    editor = null;
    edited = i;
    if (again || !fork || episode.turns[i].start === null) return;
    editor = whatIf({ ...fork, turn: episode.turns[i], onClose: () => edit(i) });
    fill(i);
    blocks[i].querySelector(".turnhead").after(editor.element);
    editor.focus();
  }
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const i = Number(entry.target.dataset.turn);
      if (entry.isIntersecting) fill(i);
      else if (filled.has(i) && blocks.length > 30 && !(editor && edited === i)) {
        blocks[i].style.minHeight = `${entry.boundingClientRect.height}px`;
        blocks[i].replaceChildren();
        filled.delete(i);
      }
    }
  }, { rootMargin: "600px" });
  blocks.forEach((block, i) => {
    if (i > 8) block.style.minHeight = "220px";
    watcher.observe(block);
  });
  return {
    element,
    kls,
    edit,
    show(i, dim, scroll = true) {
      fill(i);
      blocks.forEach((block, j) => {
        block.classList.toggle("current", j === i);
        block.classList.toggle("future", dim && j > i);
      });
      if (scroll) blocks[i].scrollIntoView({ block: "nearest" });
    },
    fold(selector) {
      const found = [...element.querySelectorAll(selector)];
      const open = !found.some((item) => item.open);
      found.forEach((item) => { item.open = open; });
    },
  };
}
