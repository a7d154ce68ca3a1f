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
