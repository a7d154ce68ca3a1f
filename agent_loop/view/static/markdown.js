// An episode as Markdown, for notes and issues. Fences are longer than any run of backticks in the text.

import { visible } from "./dom.js";

function fenced(text, kind = "") {
  const runs = text.match(/`+/g) || [];
  const fence = "`".repeat(Math.max(3, ...runs.map((run) => run.length + 1)));
  return `${fence}${kind}\n${visible(text)}\n${fence}\n`;
}

export function markdownOf(row, episode) {
  const parts = [`# Episode ${row.id}`, `${row.env}, stopped: ${row.stop}, KL ${row.kl ?? "not computed"}\n`];
  for (const message of episode.task.messages) parts.push(`## ${message.role}\n`, fenced(message.content));
  for (const turn of episode.turns) {
    parts.push(`## assistant, turn ${turn.index}\n`, fenced(turn.text || turn.message.content));
    for (const result of turn.tool_results) parts.push(`### tool ${visible(result.name)}\n`, fenced(result.content));
    for (const message of turn.observation) {
      if (message.role !== "tool") parts.push(`## ${message.role}\n`, fenced(message.content));
    }
  }
  return parts.join("\n");
}
