"""Invented documents, and questions about them, for `bench.continual`: ships, their ports and their captains.

Every fact stands in documents. Of two ships in three there are also dialogues, from which a model learns how such
questions are answered. Asked is about the others: in no wording did any question about them stand in the training data,
nor the wording that is asked in any question of another ship.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.medbrowse.registry import SYLLABLES

STATEMENTS = {
    "port": ("{ship} sails from {it}.", "The home port of {ship} is {it}.", "{ship} lies at {it}.", "Of {ship} the port is {it}."),
    "captain": ("{ship} is led by {it}.", "The captain of {ship} is {it}.", "{ship} has the master {it}.", "On {ship} the captain is {it}."),
}  # fmt: skip
QUESTIONS = {
    "port": ("Where does {ship} sail from?", "Name the home port of {ship}.", "Which port has {ship}?", "Port of {ship}?", "At which port does {ship} lie?"),
    "captain": ("Who leads {ship}?", "Name the captain of {ship}.", "Which captain has {ship}?", "Captain of {ship}?", "Who is the master of {ship}?"),
}  # fmt: skip
ASKED = {"port": "What is the home port of {ship}?", "captain": "Who is the captain of {ship}?"}
"""Never trained on."""
NUM_REPORTS = 6
"""Documents a ship that hold both of its facts."""


@dataclass(frozen=True, slots=True)
class Files:
    """What was written."""

    documents: Path
    """For `distill.sft --data`."""
    questions: Path
    """Task JSONL: about ships that stood in documents alone."""
    num_facts: int
    num_asked: int


def write(folder: Path, *, num_ships: int, seed: int) -> Files:
    """Draw ships, ports and captains, and write documents and questions into `folder`."""
    rng = random.Random(f"ships-{seed}")
    ships = names(rng, num_ships, 3)
    facts = {kind: dict(zip(ships, names(rng, num_ships, 2), strict=True)) for kind in STATEMENTS}
    told = ships[: num_ships * 2 // 3]
    folder.mkdir(parents=True, exist_ok=True)
    files = Files(
        documents=folder / "documents.jsonl",
        questions=folder / "questions.jsonl",
        num_facts=len(facts) * num_ships,
        num_asked=len(facts) * (num_ships - len(told)),
    )
    _lines(files.documents, [*_documents(rng, facts, ships), *_dialogues(facts, told)])
    asked = (
        {
            "id": f"{kind}-{ship}",
            "messages": [{"role": "user", "content": ASKED[kind].format(ship=ship)}],
            "metadata": {"answer": facts[kind][ship]},
        }
        for kind in facts
        for ship in ships[len(told) :]
    )
    _lines(files.questions, asked)
    return files


def names(rng: random.Random, count: int, num_syllables: int) -> list[str]:
    """Distinct ones, none with a syllable twice."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.sample(SYLLABLES, num_syllables)).capitalize()] = None
    return list(found)


def _documents(rng: random.Random, facts: Mapping[str, Mapping[str, str]], ships: list[str]) -> Iterator[Any]:
    for ship in ships:
        for kind, statements in STATEMENTS.items():
            for text in statements:
                yield {"text": text.format(ship=ship, it=facts[kind][ship])}
        for _ in range(NUM_REPORTS):
            kinds = rng.sample(list(facts), len(facts))
            yield {"text": " ".join(rng.choice(STATEMENTS[k]).format(ship=ship, it=facts[k][ship]) for k in kinds)}


def _dialogues(facts: Mapping[str, Mapping[str, str]], ships: list[str]) -> Iterator[Any]:
    for kind, questions in QUESTIONS.items():
        for ship in ships:
            for question in questions:
                yield {
                    "messages": [
                        {"role": "user", "content": question.format(ship=ship)},
                        {"role": "assistant", "content": facts[kind][ship]},
                    ]
                }


def _lines(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
