"""Questions over an invented registry, in the five types of MedBrowseComp (arXiv:2505.14963).

    hop  question type             pages to read
    1    Ingredient                trial
    2    Applicant_Full_Name       trial, ingredient
    3    Patent_Expire_Date_Text   trial, ingredient, Orange Book entry
    4    Exclusivity_Date          trial, ingredient, Orange Book entry
    5    Open_on_Approval          trial, ingredient, market day

A task is self-contained: its metadata names the registry that it is asked of, and the environment draws that registry
again from its seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from envs.medbrowse.registry import Ingredient, Registry, Split
from envs.types import Task

SYSTEM = (
    "You answer questions from the web pages of a registry.\n"
    "Find a page with search, open it and its links with browse, then call submit_answer once.\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionType:
    name: str
    """Name of the type in MedBrowseComp (`task_name`)."""
    hops: int
    ask: str
    """Second line of the question."""
    answer: Callable[[Ingredient], str]


QUESTION_TYPES = (
    QuestionType(
        name="Ingredient",
        hops=1,
        ask="Which ingredient is it? Answer with its name.",
        answer=lambda i: i.name,
    ),
    QuestionType(
        name="Applicant_Full_Name",
        hops=2,
        ask="Which company is its applicant? Answer with the full name.",
        answer=lambda i: i.applicant.name,
    ),
    QuestionType(
        name="Patent_Expire_Date_Text",
        hops=3,
        ask="When does its patent expire? Answer with the date.",
        answer=lambda i: i.orange_book.patent_expires,
    ),
    QuestionType(
        name="Exclusivity_Date",
        hops=4,
        ask="When does its exclusivity end? Answer with the date, or NA if there is none.",
        answer=lambda i: i.orange_book.exclusivity,
    ),
    QuestionType(
        name="Open_on_Approval",
        hops=5,
        ask="At which price did the share of its applicant open on the day of its approval?",
        answer=lambda i: i.market_day.open,
    ),
)
MAX_HOPS = len(QUESTION_TYPES)


@cache
def question_type(name: str) -> QuestionType:
    """
    Raises:
        KeyError: no type has this name.
    """
    return {kind.name: kind for kind in QUESTION_TYPES}[name]


def question(kind: QuestionType, nct_id: str) -> str:
    """The user's message. The first line is the same for all types, as in MedBrowseComp."""
    return f"For clinical trial {nct_id}, take the ingredient of the more effective arm.\n{kind.ask}"


def make_task(
    seed: str | int, *, kind: QuestionType, split: Split = "train", num_chains: int = 2, with_system: bool = True
) -> Task:
    """The task of a registry seed and a question type; the trial follows from the seed."""
    registry = Registry.generate(seed, split=split, num_chains=num_chains)
    rng = random.Random(f"question/{split}/{seed}/{kind.name}")
    trial = rng.choice(registry.trials)
    metadata: dict[str, Any] = {
        "dataset": "medbrowse",
        "registry": {"seed": registry.seed, "split": split, "num_chains": num_chains},
        "question_type": kind.name,
        "hops": kind.hops,
        "trial": trial.nct_id,
        "answer": kind.answer(trial.more_effective),
    }
    system = ({"role": "system", "content": SYSTEM},) if with_system else ()
    return Task(
        messages=(*system, {"role": "user", "content": question(kind, trial.nct_id)}),
        metadata=metadata,
        id=f"medbrowse/{split}/{registry.seed}/{kind.hops}",
    )


def make_tasks(
    seed: str | int,
    num_tasks: int,
    *,
    split: Split = "train",
    max_hops: int = MAX_HOPS,
    num_chains: int = 2,
    kinds: Sequence[QuestionType] | None = None,
) -> list[Task]:
    """Tasks of one split, question types in turn, a registry each.

    Raises:
        ValueError: `max_hops` is outside 1 to 5, or what `Registry.generate` refuses.
    """
    if not 1 <= max_hops <= MAX_HOPS:
        raise ValueError(f"max_hops must be 1 to {MAX_HOPS}, got {max_hops}")
    chosen = kinds if kinds is not None else QUESTION_TYPES[:max_hops]
    return [
        make_task(f"{seed}-{i}", kind=chosen[i % len(chosen)], split=split, num_chains=num_chains)
        for i in range(num_tasks)
    ]
