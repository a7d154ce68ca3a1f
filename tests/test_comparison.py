"""docs/comparison.md keeps to what is here: each cell of our column names a file, function or test that is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "comparison.md"
PACKAGES = ("tools", "envs", "agent_loop", "distill")
SYSTEMS = ("ours", "prime-rl", "verl", "TRL", "tinker", "verifiers", "rnow")
REFERENCE = re.compile(r"`([\w./-]+(?:/[\w.-]+|\.md|LICENSE)|LICENSE)(?:::([\w.]+))?`")


def names_in(file: Path) -> set[str]:
    """Functions, classes, `Class.member` and assigned names of a Python file, wherever they stand."""
    found: set[str] = set()

    def walk(node: ast.AST, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = owner
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.update({child.name, f"{owner}{child.name}"})
                inner = f"{child.name}." if isinstance(child, ast.ClassDef) else owner
            elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                found.update({child.target.id, f"{owner}{child.target.id}"})
            walk(child, inner)

    walk(ast.parse(file.read_text()), "")
    return found


def rows_of(text: str) -> dict[int, list[str]]:
    """The cells of each numbered row, one a system, in the order of `SYSTEMS`."""
    rows: dict[int, list[str]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| ") and cells[0].isdigit():
            assert int(cells[0]) not in rows, f"row {cells[0]} stands twice"
            rows[int(cells[0])] = cells[2:]
    return rows


def notes_of(text: str) -> dict[int, dict[str, str]]:
    """What each note says of each system. Systems that share a sentence (`**a**, **b**: ...`) share its text."""
    notes: dict[int, dict[str, str]] = {}
    for paragraph in text.partition("## Notes")[2].split("\n\n"):
        if not (head := re.match(r"\s*\*\*(\d+)\*\* ", paragraph)):
            continue
        parts = re.split(r"\*\*([^*]+)\*\*", paragraph[head.end() :])[1:]
        said: dict[str, str] = {}
        waiting: list[str] = []
        for system, words in zip(parts[::2], parts[1::2], strict=True):
            waiting.append(system)
            if words.strip(" ,\n?") not in ("", "and"):
                said.update(dict.fromkeys(waiting, words.strip()))
                waiting = []
        notes[int(head[1])] = said
    return notes


def faults_of(text: str) -> Iterator[str]:
    rows, notes = rows_of(text), notes_of(text)
    if list(rows) != list(range(1, len(rows) + 1)) or set(rows) != set(notes):
        yield f"rows {list(rows)} and notes {sorted(notes)} do not agree"
        return
    for number, cells in rows.items():
        if len(cells) != len(SYSTEMS):
            yield f"row {number} has {len(cells)} cells"
            continue
        for system, cell in zip(SYSTEMS, cells, strict=True):
            needs_none = cell == "–" or (system == "rnow" and cell == "?")
            if not cell or (not needs_none and system not in notes[number]):
                yield f"row {number}: nothing says where the cell of {system} is from"
        yield from (f"row {number}: {fault}" for fault in faults_of_ours(notes[number].get("ours", "")))


def faults_of_ours(words: str) -> Iterator[str]:
    references = REFERENCE.findall(words)
    absent = re.findall(r"absent\s+`(\w+)`", words)
    if not references:
        yield "our cell names no file"
    for path, name in references:
        if not (ROOT / path).exists():
            yield f"{path} is not there"
        elif name and name not in names_in(ROOT / path):
            yield f"{path} has no {name}"
    for word in absent:
        for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
            if "migrate" not in file.parts and word in file.read_text().lower():
                yield f"{file.relative_to(ROOT)} has {word}: is the cell still true?"


def test_every_cell_says_where_it_is_from_and_ours_is_there() -> None:
    text = PAGE.read_text()
    assert len(rows_of(text)) >= 30
    assert not list(faults_of(text))


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("`distill/check.py::compare_vocabularies`", "`distill/check.py::compare_words`", "has no compare_words"),
        ("`distill/fsdp.py::SeveralRanks`", "`distill/fsdp_two.py`", "fsdp_two.py is not there"),
        ("**ours** `distill/trackers.py::open_tracker`.", "**ours** three.", "names no file"),
        ("**TRL** `report_to`.", "", "the cell of TRL is from"),
        ("absent `megatron`", "absent `collate`", "is the cell still true?"),
        ("**7** **ours**", "**ours**", "do not agree"),
    ],
)
def test_what_is_not_there_is_found(old: str, new: str, fault: str) -> None:
    wherever_lines_end = r"\s+".join(re.escape(word) for word in old.split())
    text, count = re.subn(wherever_lines_end, new, PAGE.read_text(), count=1)
    assert count == 1
    assert any(fault in found for found in faults_of(text))


def test_measured_figures_are_those_of_the_bench() -> None:
    section = PAGE.read_text().partition("## Measured side by side")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if re.match(r"\| [^|]*\w", line)]
    measured = (ROOT / "bench" / "README.md").read_text().splitlines()
    assert lines
    assert not [line for line in lines if line not in measured]
