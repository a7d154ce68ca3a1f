"""What the pages ask for, as JSON values: the run, its curves, one episode, its siblings."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from agent_loop.scoring import IMPOSSIBLE
from agent_loop.view.index import Index
from agent_loop.view.pieces import Pieces
from agent_loop.view.rows import FORKS, Row, exact, scale_of

NUM_WORST = 100

MARKS = {"masked": 0, "scored": 1, "unscored": 2, "unusable": 3}
"""States of a token: not in the mask; with a number; in the mask, teacher not asked; the number cannot be one."""


def run_page(index: Index, runs: list[Path]) -> dict[str, Any]:
    rows = index.rows()
    good = [row for row in rows if row.problem is None and row.file != FORKS]
    forks = [row for row in rows if row.problem is None and row.file == FORKS]
    return {
        "version": index.version,
        "scale": scale_of(good),
        "runs": [
            {
                "name": path.name,
                "metrics": metrics_of(path / "metrics.jsonl"),
                "evals": evals_of(path / "evals.jsonl"),
                "about": _about(path),
                "episodes": sum(row.run == run for row in good),
                "problems": sum(row.run == run and row.problem is not None for row in rows),
                "forks": sum(row.run == run for row in forks),
                "failed": sum(row.run == run and row.error is not None for row in good),
                "unusable": sum(row.unusable for row in good if row.run == run),
                "stops": Counter(row.stop for row in good if row.run == run),
                "worst": worst_of([row for row in good if row.run == run]),
            }
            for run, path in enumerate(runs)
        ],
    }


def worst_of(rows: list[Row]) -> list[dict[str, Any]]:
    """The tokens with the largest gaps, at most eight an episode."""
    tokens = ((gap, row, trace, position, token) for row in rows for gap, trace, position, token in row.worst)
    found = heapq.nlargest(NUM_WORST, tokens, key=lambda item: abs(item[0]))
    return [
        {"gap": gap, "key": row.key, "id": row.id, "trace": trace, "position": position, "token": token}
        for gap, row, trace, position, token in found
    ]


def metrics_of(path: Path) -> dict[str, Any]:
    """Columns by name, one entry a readable line, null where there is no number; and how many lines cannot be read."""
    lines: list[dict[str, Any]] = []
    bad = 0
    if path.is_file():
        for raw in path.read_bytes().splitlines():
            try:
                line = json.loads(raw, parse_constant=lambda _: None)
            except (ValueError, RecursionError):
                bad += 1
                continue
            if isinstance(line, dict):
                lines.append(line)
            else:
                bad += 1
    names = sorted({name for line in lines for name in line})
    return {"bad": bad, "columns": [[name, [_number(line.get(name)) for line in lines]] for name in names]}


def evals_of(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if path.is_file():
        for raw in path.read_bytes().splitlines():
            try:
                line = json.loads(raw, parse_constant=lambda _: None)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and isinstance(line.get("metrics"), dict):
                metrics = {name: number for name, v in line["metrics"].items() if (number := _number(v)) is not None}
                found.append({"name": str(line.get("name")), "step": _number(line.get("step")), "metrics": metrics})
    return found


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 else None


def _about(path: Path) -> dict[str, str]:
    """`run.json`, flat, for people."""
    try:
        value = json.loads((path / "run.json").read_bytes())
        return {str(name): str(part)[:200] for name, part in value.items()} if isinstance(value, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def row_json(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(row)
    found.pop("worst", None)
    found.pop("spread", None)
    return found


def siblings(index: Index, row: Row) -> list[dict[str, Any]]:
    """The other episodes of the same task and environment."""
    same = [r for r in index.rows() if r.task == row.task and r.env == row.env and r.key != row.key and not r.problem]
    return [row_json(other) for other in same[:500]] if row.problem is None else []


def episode_page(index: Index, row: Row, pieces: Pieces | None) -> dict[str, Any]:
    """One episode: `row`, and `episode` without its traces beside `traces` as columns; or `problem` and the line's
    start."""
    raw = index.raw(row)
    head = raw[:20_000].decode(errors="replace")
    if row.problem is not None:
        return {"row": row_json(row), "problem": row.problem, "head": head}
    try:
        value = exact(raw)
    except RecursionError:
        return {"row": row_json(row), "problem": "nested too deeply", "head": head}
    except ValueError as error:
        return {"row": row_json(row), "problem": str(error), "head": head}
    traces = value.pop("traces")
    neighbours = _neighbours(index, row)
    return {
        "row": row_json(row),
        "episode": value,
        "traces": [_columns(trace, pieces) for trace in traces],
        "tokenizer": pieces.name if pieces else None,
        "siblings": siblings(index, row),
        **neighbours,
    }


def _neighbours(index: Index, row: Row) -> dict[str, str | None]:
    rows = index.rows()
    place = next((i for i, other in enumerate(rows) if other.key == row.key), None)
    if place is None:
        return {"previous": None, "next": None}
    return {
        "previous": rows[place - 1].key if place > 0 else None,
        "next": rows[place + 1].key if place + 1 < len(rows) else None,
    }


def _columns(trace: dict[str, Any], pieces: Pieces | None) -> dict[str, Any]:
    ids, teacher = trace["token_ids"], trace["teacher_logprobs"]
    asked = teacher if teacher is not None else [None] * len(ids)
    marks = [
        _mark(trained, student, score)
        for trained, student, score in zip(trace["loss_mask"], trace["sampling_logprobs"], asked, strict=True)
    ]
    candidates = set(ids)
    for topk in (trace["teacher_topk"], trace["sampling_topk"]):
        if topk is not None:
            candidates.update(token for row in topk["token_ids"] if row for token in row)
    texts = pieces.of(candidates) if pieces else {}
    return {
        "ids": ids,
        "marks": marks,
        "student": _short(trace["sampling_logprobs"]),
        "teacher": _short(asked),
        "asked": teacher is not None,
        "versions": trace["policy_versions"],
        "segments": trace["segments"],
        "teacher_topk": _topk(trace["teacher_topk"]),
        "sampling_topk": _topk(trace["sampling_topk"]),
        "texts": [[token, text] for token, text in texts.items()],
        "special": pieces.special(candidates) if pieces else [],
    }


def _mark(trained: int, student: float | None, score: float | None) -> int:
    if not trained:
        return MARKS["masked"]
    if student is None or score is None:
        return MARKS["unscored"]
    return MARKS["unusable"] if min(student, score) <= IMPOSSIBLE else MARKS["scored"]


def _short(values: list[float | None]) -> list[float | None]:
    """To six digits after the point: what is shown has four. The raw line has them all."""
    return [None if value is None else round(value, 6) for value in values]


def _topk(topk: dict[str, Any] | None) -> list[list[tuple[int, float]] | None] | None:
    if topk is None:
        return None
    return [
        [(token, round(value, 4)) for token, value in zip(ids, values, strict=False)] if ids and values else None
        for ids, values in zip(topk["token_ids"], topk["logprobs"], strict=True)
    ]


def prompt_page(index: Index, row: Row, pieces: Pieces | None, turn: int) -> dict[str, Any]:
    """What the model read before a turn, decoded from its ids as a whole; `text` is null without a tokenizer.

    Raises:
        LookupError: there is no such turn, or its tokens are not known.
    """
    value = exact(index.raw(row))
    if not 0 <= turn < len(value["turns"]):
        raise LookupError(f"there is no turn {turn}")
    played = value["turns"][turn]
    if played["trace"] is None or played["start"] is None or not 0 <= played["trace"] < len(value["traces"]):
        raise LookupError(f"the tokens of turn {turn} are not known")
    ids = value["traces"][played["trace"]]["token_ids"][: played["start"]]
    return {
        "tokenizer": pieces.name if pieces else None,
        "tokens": len(ids),
        "text": pieces.whole(ids) if pieces else None,
    }
