// What if this turn were another: an editor for its text. The fork opens beside the original.

import { h, oneLine, say, visible } from "./dom.js";
import { fork } from "./api.js";

// What an episode's metadata.fork says.
export function forkText(fork) {
  return `fork of ${oneLine(fork.of, 80)} at turn ${oneLine(fork.turn, 10)}: ${oneLine(fork.how, 80)}`;
}

export function whatIf({ key, turn, model, onClose }) {
  const text = h("textarea", { "aria-label": `text of turn ${turn.index}`, rows: "8", spellcheck: "false", value: turn.text,
    onkeydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(text.value); } });
  let running = false;
  const status = h("p", { class: "quiet", role: "status" });
  const buttons = [h("button", { onclick: () => run(text.value) }, model ? "Run the edited text" : "Run the edited text, then stop"),
    model ? h("button", { onclick: () => run(null) }, "Sample this turn anew") : null, h("button", { onclick: onClose }, "Close")];
  async function run(edited) {
    if (running) return;
    running = true;
    buttons.forEach((button) => { if (button) button.disabled = true; });
    status.textContent = "playing…";
    try {
      const made = await fork(key, turn.index, edited);
      if (element.isConnected) location.hash = `#/compare/${key}/${made.key}`;
      else say("The fork is played: it is among the episodes");
    } catch (error) {
      status.textContent = visible(error.message);
      running = false;
      buttons.forEach((button) => { if (button) button.disabled = false; });
    }
  }
  const element = h("div", { class: "whatif", role: "group", "aria-label": `what if turn ${turn.index}` },
    h("p", {}, `The turns before are played again against the recorded tools. ${model ? `Then ${model} goes on.` : "No model was named: the edited turn is the last."} Tool calls are written as the model writes them. Ctrl+Enter runs it.`),
    text, h("div", { class: "toolbar" }, buttons), status);
  return { element, focus: () => { text.focus({ preventScroll: true }); element.scrollIntoView({ block: "nearest" }); } };
}
