// Replay: play, pause and step by turn, tool call or token; a scrubber.

import { h } from "./dom.js";

// places: {turn: [position...], call: [...], token: [...]} of one trace; go(position, unit) shows the episode up to there.
export function playback({ length, places, go }) {
  let unit = "turn";
  let at = -1;
  let timer = null;
  const scrubber = h("input", { type: "range", min: 0, max: Math.max(0, length - 1), value: 0, class: "scrubber", "aria-label": "position in the episode",
    oninput: () => { at = Number(scrubber.value); go(at, unit); label(); } });
  const button = h("button", { onclick: toggle, "aria-label": "play or pause" }, "▶");
  const where = h("span", { class: "where" });
  const choice = h("select", { "aria-label": "step by", onchange: () => { unit = choice.value; } },
    ["turn", "call", "token"].map((name) => h("option", { value: name }, name === "call" ? "tool call" : name)));
  const speed = h("select", { "aria-label": "steps a second" }, [1, 2, 8, 30].map((n) => h("option", { value: n }, `${n}/s`)));

  function label() {
    where.textContent = `${Math.max(0, at) + 1} / ${length}`;
  }

  function step(way) {
    if (unit === "token") at = Math.max(0, Math.min(length - 1, at + way));
    else {
      const stops = places[unit];
      const next = way > 0 ? stops.find((p) => p > at) : stops.findLast((p) => p < at);
      if (next === undefined) {
        pause();
        return;
      }
      at = next;
    }
    scrubber.value = at;
    label();
    go(at, unit);
    if (at >= length - 1) pause();
  }

  function pause() {
    clearInterval(timer);
    timer = null;
    button.textContent = "▶";
  }

  function toggle() {
    if (timer) return pause();
    button.textContent = "❚❚";
    if (at >= length - 1) at = -1;
    timer = setInterval(() => step(1), 1000 / Number(speed.value));
    step(1);
  }

  label();
  return {
    element: h("div", { class: "playback" }, h("button", { onclick: () => step(-1), "aria-label": "step back" }, "◀◀"), button,
      h("button", { onclick: () => step(1), "aria-label": "step forward" }, "▶▶"), scrubber, where, choice, speed),
    toggle,
    pause,
    step,
    set(i) { at = i; scrubber.value = i; label(); },
  };
}
