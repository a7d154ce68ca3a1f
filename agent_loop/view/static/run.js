// The run page: curves, stop reasons, notices, the run's worst tokens.

import { h, number, oneLine } from "./dom.js";
import { get } from "./api.js";
import { chart } from "./charts.js";

const GROUPS = [
  ["Reverse KL to the teacher", ["teacher_kl", "teacher_kl/p50", "teacher_kl/p90", "teacher_kl/p99"]],
  ["KL by turn", /^teacher_kl\/turn_[0-5]$/],
  ["KL by token class", ["teacher_kl/think", "teacher_kl/call", "teacher_kl/answer"]],
  ["Entropy", ["entropy"]],
  ["Tokens an episode", ["rollout/tokens_per_episode", "rollout/sampled_tokens_per_episode"]],
  ["Turns an episode", ["rollout/num_turns", "tool/calls_per_episode"]],
  ["Reward", /^reward(\/|$)/],
  ["Tool errors and parse errors", ["tool/error_rate", "rollout/parse_errors"]],
  ["Stop reasons, share", /^stop_reason\//],
  ["Seconds by stage", /^time\//],
  ["Mismatch of server and trainer", ["mismatch_kl", "mismatch_kl/max"]],
  ["Loss and gradient", ["loss", "grad_norm"]],
];

export async function runPage() {
  const page = await get("/api/run");
  const element = h("main", { class: "page" }, page.runs.map((run, index) => runSection(run, page, index)));
  return { element, title: page.runs.map((run) => run.name).join(" and "), keys: new Map() };
}

function runSection(run, page, index) {
  const columns = new Map(run.metrics.columns);
  const steps = (columns.get("step") || []).map((v, i) => v ?? i);
  const charts = GROUPS.map(([title, names]) => {
    const chosen = Array.isArray(names) ? names.filter((n) => columns.has(n)) : [...columns.keys()].filter((n) => names.test(n));
    return steps.length ? chart(title, steps, chosen.slice(0, 7).map((name) => ({ name: oneLine(short(name), 40), values: columns.get(name) }))) : null;
  });
  const notes = notices(run, columns);
  const query = (text) => `#/episodes?q=${encodeURIComponent(page.runs.length > 1 ? `run:${index} ${text}` : text)}`;
  return h(
    "section", { class: "run" },
    h("h1", {}, oneLine(run.name)),
    h("p", { class: "facts" },
      h("a", { href: query("") }, `${number(run.episodes)} episodes`), run.forks ? [" · ", h("a", { href: query("id:#fork-") }, `${number(run.forks)} forks`)] : null, ` · ${steps.length} steps`,
      Object.entries(run.about).filter(([n]) => ["status", "student", "teacher"].includes(n)).map(([n, v]) => ` · ${n}: ${oneLine(v, 80)}`)),
    notes.length ? h("ul", { class: "notices" }, notes.map((text) => h("li", {}, text))) : null,
    h("div", { class: "charts" }, charts),
    steps.length ? null : h("p", { class: "quiet" }, "No metrics.jsonl: episodes only."),
    h("div", { class: "two" },
      h("div", {}, h("h2", {}, "Why episodes stopped"), h("table", { class: "plain" }, Object.entries(run.stops)
        .sort((a, b) => b[1] - a[1])
        .map(([name, count]) => h("tr", {}, h("td", {}, h("a", { href: query(`stop:${name}`) }, oneLine(name))), h("td", { class: "num" }, number(count)),
          h("td", { class: "barcell" }, bar(count / Math.max(1, run.episodes)))))),
        run.evals.length ? evalTable(run.evals) : null),
      h("div", {}, h("h2", {}, "Worst tokens of the run"),
        h("p", { class: "quiet" }, "By size of the reverse-KL sample; at most eight an episode."),
        h("div", { class: "tablebox" }, h("table", { class: "plain" }, run.worst.map((token) =>
          h("tr", {}, h("td", { class: "num" }, number(token.gap, 2)), h("td", {}, `token ${token.token}`),
            h("td", {}, h("a", { href: `#/episode/${token.key}?view=tokens&trace=${token.trace}&token=${token.position}` }, `${oneLine(token.id, 60)} at ${token.position}`)))))))),
  );
}

function short(name) {
  return name.replace(/^teacher_kl\//, "").replace(/^(stop_reason|time|rollout)\//, "");
}

function bar(share) {
  return h("svg", { viewBox: "0 0 100 8", class: "bar", "aria-hidden": "true", preserveAspectRatio: "none" }, h("rect", { width: 100 * share, height: 8 }));
}

function evalTable(evals) {
  const names = [...new Set(evals.flatMap((one) => Object.keys(one.metrics)))].filter((n) => /^reward(\/|$)/.test(n)).slice(0, 3);
  return [h("h2", {}, "Evaluations"), h("table", { class: "plain" },
    h("tr", {}, ["model", "step", ...names].map((name) => h("th", {}, oneLine(name, 30)))),
    evals.map((one) => h("tr", {}, h("td", {}, oneLine(one.name, 30)), h("td", { class: "num" }, number(one.step)),
      names.map((name) => h("td", { class: "num" }, number(one.metrics[name]))))))];
}

// At which steps an alarm was on: "at steps 5 to 9 and 12".
function alarmSteps(values, steps) {
  const spans = [];
  values.forEach((value, i) => {
    if (!value) return;
    if (i && values[i - 1]) spans[spans.length - 1][1] = steps?.[i] ?? i;
    else spans.push([steps?.[i] ?? i, steps?.[i] ?? i]);
  });
  const shown = spans.slice(0, 5).map(([from, to]) => (from === to ? number(from) : `${number(from)} to ${number(to)}`));
  return `at step${spans.length === 1 && spans[0][0] === spans[0][1] ? "" : "s"} ${shown.join(", ")}${spans.length > 5 ? " and more" : ""}`;
}

// What a careful person would want to be told first.
function notices(run, columns) {
  const most = (name) => Math.max(0, ...(columns.get(name) || []).filter((v) => v !== null));
  const found = [];
  if (run.problems) found.push(h("a", { href: "#/episodes?q=is:problem" }, `${number(run.problems)} lines are no episodes`));
  if (run.failed) found.push(h("a", { href: "#/episodes?q=is:failed" }, `${number(run.failed)} episodes failed`));
  if (run.unusable) found.push(h("a", { href: "#/episodes?q=unusable>0" }, `${number(run.unusable)} trained tokens have an unusable number`));
  if (run.metrics.bad) found.push(`${number(run.metrics.bad)} lines of metrics.jsonl cannot be read`);
  if (most("train/dropped")) found.push(`up to ${most("train/dropped")} episodes a step were dropped from training`);
  if (most("teacher_kl/above_5") > 0.01) found.push(`up to ${(100 * most("teacher_kl/above_5")).toFixed(1)}% of a step's tokens are further than 5 nats from the teacher: template or tokenizer?`);
  if (most("mismatch_kl/max") > 0.5) found.push(`server and trainer differ by up to ${number(most("mismatch_kl/max"))} nats on a token`);
  for (const [name, values] of columns) if (name.startsWith("alarm/")) found.push(`alarm ${oneLine(name.slice(6), 40)}: ${alarmSteps(values, columns.get("step"))}`);
  if (most("servers/restarts")) found.push(`servers were started again ${most("servers/restarts")} times`);
  return found;
}
