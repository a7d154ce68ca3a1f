"""The same pages in one HTML file that opens from disk and asks the network for nothing.

The modules are put one after the other into one module: each imports by name from its siblings, so leaving out the
import lines and `export` is all that it takes (tests hold the modules to that). The data is a JSON block, which no text
in it can end; the policy in the file names the hashes of the one script and the one style sheet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from agent_loop.view import detail
from agent_loop.view.index import Index
from agent_loop.view.pieces import Pieces
from agent_loop.view.rows import Row

MODULES = ("dom.js", "api.js", "markdown.js", "tokens.js", "charts.js", "run.js", "list.js", "whatif.js", "dialogue.js",
           "playback.js", "episode.js", "compare.js", "page.js", "app.js")  # fmt: skip
"""A module stands after those it imports."""

_IMPORT = re.compile(r'^import \{[^}]*\} from "\./[a-z]+\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(async )?function |const |class )", re.MULTILINE)
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


@dataclass(frozen=True, slots=True)
class StaticFile:
    body: bytes
    media_type: str


def static_files() -> dict[str, StaticFile]:
    """By name; what is not in it cannot be asked for."""
    folder = files("agent_loop.view") / "static"
    return {
        item.name: StaticFile(item.read_bytes(), _KINDS[Path(item.name).suffix])
        for item in folder.iterdir()
        if Path(item.name).suffix in _KINDS
    }


def one_script() -> str:
    known = static_files()
    return "\n".join(_EXPORT.sub("", _IMPORT.sub("", known[name].body.decode())) for name in MODULES)


def write_html(index: Index, runs: list[Path], pieces: list[Pieces | None], rows: list[Row]) -> str:
    """The page of some episodes: list, dialogue, tokens, comparison; and the run's curves."""
    answers: dict[str, Any] = {
        "/api/run": detail.run_page(index, runs) | {"follow": False},
        "/api/episodes": {
            "version": 0, "total": len(rows), "all": len(rows), "searched": len(rows), "candidates": len(rows),
            "rows": [detail.row_json(row) for row in rows],
        },
    }  # fmt: skip
    keys = [row.key for row in rows]
    for run in answers["/api/run"]["runs"]:
        run["worst"] = [token for token in run["worst"] if token["key"] in keys]
    for place, row in enumerate(rows):
        page = detail.episode_page(index, row, pieces[row.run])
        page["siblings"] = [other for other in page.get("siblings", []) if other["key"] in keys]
        page["previous"] = keys[place - 1] if place else None
        page["next"] = keys[place + 1] if place + 1 < len(keys) else None
        answers[f"/api/episode/{row.key}"] = page
    script, style = one_script(), static_files()["style.css"].body.decode()
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; base-uri 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Episodes</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n"
        f'<script type="application/json" id="data">{_inert(answers)}</script>\n'
        f'<script type="module">{script}</script>\n</body>\n</html>\n'
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inert(value: Any) -> str:
    """JSON that no HTML parser sees anything in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
