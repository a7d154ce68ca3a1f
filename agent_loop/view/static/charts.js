// Line charts in SVG.

import { h, number } from "./dom.js";

const WIDTH = 420;
const HEIGHT = 150;
const LEFT = 46;

// series: [{name, values}], over xs; missing values break the line.
export function chart(title, xs, series) {
  const all = series.flatMap((one) => one.values).filter((v) => v !== null);
  if (!all.length) return null;
  let low = Math.min(0, ...all);
  let high = Math.max(...all);
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const first = Math.min(...xs);
  const span = Math.max(...xs) - first || 1;
  const x = (v) => LEFT + ((v - first) / span) * (WIDTH - LEFT - 8);
  const y = (v) => 8 + (1 - (v - low) / (high - low)) * (HEIGHT - 28);
  const lines = series.map((one, index) => {
    let path = "";
    let drawing = false;
    one.values.forEach((v, i) => {
      if (v === null) {
        drawing = false;
        return;
      }
      path += `${drawing ? "L" : "M"}${x(xs[i]).toFixed(1)} ${y(v).toFixed(1)}`;
      drawing = true;
    });
    return h("path", { d: path, class: `line c${index}` });
  });
  const ticks = [low, (low + high) / 2, high].map((v) =>
    h("g", {}, h("line", { x1: LEFT, x2: WIDTH - 8, y1: y(v), y2: y(v), class: "grid" }),
      h("text", { x: LEFT - 5, y: y(v) + 3, class: "tick end" }, number(v, 2))));
  const ends = [Math.min(...xs), Math.max(...xs)].map((v, i) =>
    h("text", { x: x(v), y: HEIGHT - 5, class: i ? "tick end" : "tick" }, i ? `step ${v}` : v));
  const last = series.map((one, index) => h("span", { class: `key c${index}` }, `${one.name} ${number(one.values.findLast((v) => v !== null))}`));
  return h("figure", { class: "chart" }, h("figcaption", {}, h("b", {}, title), h("span", { class: "keys" }, last)),
    h("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}: ${series.map((s) => s.name).join(", ")}` }, ticks, ends, lines));
}
