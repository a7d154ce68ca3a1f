// Elements from text. Nothing here, and nothing anywhere else, makes markup of data.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "line", "rect", "g", "polyline", "text"]);

// h("button", {class: "x", onclick: f}, "text", child): an element; null and false children are left out.
export function h(tag, attributes, ...children) {
  const element = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled") element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

// Text that cannot mislead: control, bidirectional and zero-width characters are spelled out.
export function visible(text) {
  return String(text).replace(/\p{C}/gu, (c) => (c === "\n" || c === "\t" ? c : `\\u{${c.codePointAt(0).toString(16)}}`));
}

export function oneLine(text, limit = 200) {
  const found = visible(text).replace(/\s+/g, " ");
  return found.length > limit ? found.slice(0, limit) + "…" : found;
}

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return (value || 0).toLocaleString("en");
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e6) ? value.toExponential(2) : value.toFixed(digits);
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 1 ? `${(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms` : `${value.toFixed(2)} s`;
}

// Rows of one height, of which only those in sight are elements.
export function virtualRows({ height, count, render, label }) {
  const inner = h("div", { class: "vinner" });
  const scroller = h("div", { class: "vscroll", tabindex: "0", "aria-label": label }, inner);
  const shown = new Map();
  let total = count;
  function draw() {
    const first = Math.max(0, Math.floor(scroller.scrollTop / height) - 8);
    const last = Math.min(total, Math.ceil((scroller.scrollTop + (scroller.clientHeight || 600)) / height) + 8);
    for (const [i, row] of shown) {
      if (i < first || i >= last) {
        row.remove();
        shown.delete(i);
      }
    }
    for (let i = first; i < last; i++) {
      if (shown.has(i)) continue;
      const row = render(i);
      row.classList.add("vrow");
      row.style.transform = `translateY(${i * height}px)`;
      shown.set(i, row);
      inner.append(row);
    }
  }
  let asked = false;
  scroller.addEventListener("scroll", () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      draw();
    });
  });
  const watcher = new ResizeObserver(draw);
  watcher.observe(scroller);
  return {
    element: scroller,
    reset(newCount) {
      total = newCount;
      inner.style.height = `${total * height}px`;
      for (const row of shown.values()) row.remove();
      shown.clear();
      draw();
    },
    show(i) {
      const top = i * height;
      const room = scroller.clientHeight;
      if (top < scroller.scrollTop + height || top > scroller.scrollTop + room - 2 * height) {
        scroller.scrollTop = Math.max(0, top - room / 3);
      }
      draw();
    },
  };
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied");
  } catch {
    const area = h("textarea", { class: "copyarea", readonly: true, "aria-label": "text to copy" });
    area.value = text;
    const box = h("dialog", {}, h("p", {}, "Copy this:"), area, h("form", { method: "dialog" }, h("button", {}, "Close")));
    document.body.append(box);
    box.addEventListener("close", () => box.remove());
    box.showModal();
    area.select();
  }
}

// A line for eyes and screen readers, gone after a moment.
export function say(text) {
  let box = document.getElementById("said");
  if (!box) {
    box = h("div", { id: "said", role: "status" });
    document.body.append(box);
  }
  box.textContent = text;
  box.classList.add("on");
  clearTimeout(box.timer);
  box.timer = setTimeout(() => box.classList.remove("on"), 1600);
}
