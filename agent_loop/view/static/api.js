// Answers of the server, or of the data block in an exported file.

const block = document.getElementById("data");
const stored = block ? new Map(Object.entries(JSON.parse(block.textContent))) : null;
export const exported = stored !== null;

// Throws an Error with the server's words.
export async function get(path) {
  if (exported) {
    const found = stored.get(path.split("?")[0]);
    if (found === undefined) throw new Error("this is not in the exported file");
    return found;
  }
  const response = await fetch(path);
  const value = await response.json();
  if (!response.ok) throw new Error(value.error);
  return value;
}

// What the server lets a page do that was opened with the address that the command printed; null: nothing.
let token = null;
export const mayFork = () => token !== null;

// Takes the token out of the address: it is in no permalink and no history.
export function takeToken() {
  const found = /^#\/what-if\/([\w-]+)$/.exec(location.hash);
  try {
    if (found) sessionStorage.setItem("what-if", found[1]);
    token = exported ? null : sessionStorage.getItem("what-if");
  } catch {
    token = found ? found[1] : null;
  }
  if (found) history.replaceState(null, "", "#/run");
}

// Plays a fork; the answer has its key. Throws an Error with the server's words.
export async function fork(key, turn, text) {
  const response = await fetch("/api/what-if", { method: "POST", headers: { "content-type": "application/json", "x-what-if": token }, body: JSON.stringify({ key, turn, text }) });
  const said = await response.text();
  if (!(response.headers.get("content-type") || "").includes("json")) throw new Error(said);
  if (!response.ok) throw new Error(JSON.parse(said).error);
  return JSON.parse(said);
}

// "#/episode/KEY?token=5" -> {path: ["episode", "KEY"], query: URLSearchParams}
export function readHash() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  return { path: path.split("/").filter(Boolean), query: new URLSearchParams(query || "") };
}

// Keeps the address a permalink of what is shown; empty values are left out.
export function writeHash(path, values) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    if (value !== null && value !== undefined && value !== "") query.set(name, String(value));
  }
  const text = query.toString();
  history.replaceState(null, "", `#/${path}${text ? "?" + text : ""}`);
}
