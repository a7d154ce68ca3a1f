"""Invented documents, and questions about them, for `bench.continual`: ships, their ports and their captains.

Each fact stands in plain documents and in dialogues that ask for it in several wordings. The questions that measure are
worded in a way that no dialogue is.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.medbrowse.registry import SYLLABLES


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fact about a ship."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    asked: str
    """Never trained on."""


KINDS = {
    "port": Kind(
        statements=("{ship} sails from {it}.", "The home port of {ship} is {it}.", "{ship} lies at {it}."),
        questions=(
            "Where does {ship} sail from?",
            "Name the home port of {ship}.",
            "Which port has {ship}?",
            "Port of {ship}?",
            "At which port does {ship} lie?",
        ),
        asked="What is the home port of {ship}?",
    ),
    "captain": Kind(
        statements=("{ship} is led by {it}.", "The captain of {ship} is {it}.", "{ship} has the master {it}."),
        questions=(
            "Who leads {ship}?",
            "Name the captain of {ship}.",
            "Which captain has {ship}?",
            "Captain of {ship}?",
            "Who is the master of {ship}?",
        ),
        asked="Who is the captain of {ship}?",
    ),
}
DOCUMENTS_A_SHIP = 4


@dataclass(frozen=True, slots=True)
class Files:
    """What `write` wrote."""

    documents: Path
    """For `distill.sft --data`."""
    questions: Path
    """Task JSONL, one of each fact."""


def write(folder: Path, *, num_ships: int, seed: int) -> Files:
    """Draw ships, ports and captains; write documents and dialogues, and the questions that measure."""
    rng = random.Random(f"ships-{seed}")
    ships = names(rng, num_ships, 3)
    facts = {kind: dict(zip(ships, names(rng, num_ships, 2), strict=True)) for kind in KINDS}
    files = Files(folder / "documents.jsonl", folder / "questions.jsonl")
    rows: list[Any] = []
    for ship in ships:
        for _ in range(DOCUMENTS_A_SHIP):
            said = [rng.choice(kind.statements).format(ship=ship, it=facts[name][ship]) for name, kind in KINDS.items()]
            rows.append({"text": " ".join(rng.sample(said, len(said)))})
        for name, kind in KINDS.items():
            for question in kind.questions:
                asked, answered = _user(question.format(ship=ship)), {"role": "assistant", "content": facts[name][ship]}
                rows.append({"messages": [asked, answered]})
    _lines(files.documents, rows)
    _lines(
        files.questions,
        (
            {
                "id": f"{name}-{ship}",
                "messages": [_user(kind.asked.format(ship=ship))],
                "metadata": {"answer": facts[name][ship]},
            }
            for name, kind in KINDS.items()
            for ship in ships
        ),
    )
    return files


def names(rng: random.Random, count: int, num_syllables: int) -> list[str]:
    """Distinct ones, none with a syllable twice."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.sample(SYLLABLES, num_syllables)).capitalize()] = None
    return list(found)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
