"""MedBrowseComp (arXiv:2505.14963): questions over clinical trials that need several pages of the web to answer.

    python convert_dataset.py medbrowsecomp AIM-Harvard/MedBrowseComp --split 605 --out eval.jsonl
    python convert_dataset.py medbrowsecomp MedBrowseComp_50.csv --out eval.jsonl

It is a benchmark. `--purpose eval`, the default, takes every row. To train on it nevertheless, `--purpose train
--i-understand-this-is-a-test-set` takes the trials of four fifths of the ingredients and `--purpose held-out` those of
the others: 32 of 34 ingredients have one company, patent, exclusivity and price, so a split by row or trial leaks.

The data has no licence: none of it is here. Columns: prompt, gold, task_name, and in some copies split; the
repository's own files name the third differently and write prompts in quotes with a literal backslash and n for a new
line.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from envs.converters import OptionError
from envs.converters.rows import OnBadRow, Row, iter_rows
from envs.dataset import raise_error, task_from_row
from envs.jsonl import TaskError
from envs.medbrowse import comp_graders
from envs.medbrowse.graders import parse_date
from envs.types import Task

Purpose = Literal["eval", "train", "held-out"]
SPLIT_PREFIX = "MedBrowseComp_"
HELD_OUT_SHARE = 5
"""One ingredient in so many, by its hash, is held out of `--purpose train`."""
HOPS = ("Ingredient", "Applicant_Full_Name", "Patent_Expire_Date_Text", "Exclusivity_Date", "Open_on_Approval")
"""`task_name` by number of hops (arXiv:2505.14963, table 1)."""
MAY_LACK = ("Exclusivity_Date", "Open_on_Approval")
"""Types whose gold may be NA. Readers that take the text NA for a missing value leave null."""
SYSTEM = (
    "You answer questions of medicine from pages of the web.\n"
    "Find sources with the tools, read them, then call submit_answer once, in the format that the question asks for. "
    "Answer NA where there is nothing to find.\n"
)
_TRIAL = re.compile(r"NCT\d{8}")
_LESS = re.compile(r"\bless(?:er)?\s+effective\b|\bleast\s+effective\b", re.IGNORECASE)
_LETTER = re.compile(r"(?:start(?:s|ing)? with|letter start with)(?: the letter)?\s+\"?([A-Za-z])\b", re.IGNORECASE)


@dataclass
class _Question:
    """Rows with the same prompt: some copies ask twice, and not always with the same gold."""

    prompt: str
    kind: str
    where: str
    trial: str | None
    arm: tuple[str, str] | None
    """Trial, and which of its regimens is asked about: `more` or `less` effective. Each has its own ingredient."""
    golds: list[str] = field(default_factory=list)
    """As they stand in the file, each once; none if nobody gave one."""


def convert(
    source: str,
    *,
    split: str | None = None,
    system: str = SYSTEM,
    purpose: Purpose = "eval",
    i_understand_this_is_a_test_set: bool = False,
    on_bad_row: OnBadRow = raise_error,
) -> Iterator[Task]:
    """One task a question.

    Metadata: `answer` (null: nobody gave one, not graded), `accepted` (all golds), `gold` (as in the file),
    `question_type`, `hops`, `trial`, `ingredient`, `is_na`, and in `baselines` whether answers that take no browsing
    would be right: `constant`, the commonest of its type; `letter`, the commonest of type and first letter in other
    trials.

    Args:
        source: a CSV, JSON, JSONL or Parquet file, a folder with one, or the Hub's name.
        split: `50`, `605` or `CUA`, where the source has splits; of the Hub 605 unless given.

    Raises:
        TaskError: a bad row, or no file.
        OptionError: training without saying that it is a test set, or with rows that name no ingredient.
    """
    if purpose == "train" and not i_understand_this_is_a_test_set:
        raise OptionError(
            "MedBrowseComp is a benchmark: a student that trained on it can no longer be measured by it. To train all "
            "the same, on four fifths of its ingredients, add --i-understand-this-is-a-test-set; measure with "
            "--purpose held-out"
        )
    return _tasks(source, split, system, purpose, on_bad_row)


def _tasks(source: str, split: str | None, system: str, purpose: Purpose, on_bad_row: OnBadRow) -> Iterator[Task]:
    questions = _questions(source, split, on_bad_row)
    if not questions:
        raise TaskError(source, "holds no row of MedBrowseComp")
    ingredients = _ingredients(questions)
    if purpose != "eval" and not ingredients:
        raise OptionError(
            f"{source}: no row asks for an ingredient, so it cannot be split by ingredient: use --purpose eval"
        )
    baselines = _baselines(questions)
    for question, baseline in zip(questions, baselines, strict=True):
        ingredient = ingredients.get(question.arm) if question.arm is not None else None
        if purpose != "eval" and (ingredient is None or is_held_out(ingredient) != (purpose == "held-out")):
            continue
        yield _task(question, ingredient, baseline, system)


def held_out(source: str, *, split: str | None = None, on_bad_row: OnBadRow = raise_error) -> dict[str, Any]:
    """Which ingredients `--purpose train` leaves out, and whose trials they are; written beside the tasks."""
    found = _ingredients(_questions(source, split, on_bad_row))
    names = sorted(set(found.values()))
    return {
        "dataset": "medbrowsecomp",
        "held_out_ingredients": [name for name in names if is_held_out(name)],
        "train_ingredients": [name for name in names if not is_held_out(name)],
        "held_out_trials": sorted({trial for (trial, _), name in found.items() if is_held_out(name)}),
    }


def is_held_out(ingredient: str) -> bool:
    """By the name's hash, so that it is the same in all copies of the data."""
    name = comp_graders.ingredient_key(ingredient)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % HELD_OUT_SHARE == 0


def _questions(source: str, split: str | None, on_bad_row: OnBadRow) -> list[_Question]:
    found: dict[tuple[str, str], _Question] = {}
    for row in iter_rows(source, split=_split_name(source, split), on_bad_row=on_bad_row):
        try:
            prompt, kind, gold = _read(row)
        except TaskError as error:
            on_bad_row(error)
            continue
        match = _TRIAL.search(prompt)
        trial = match[0] if match is not None else None
        arm = (trial, "less" if _LESS.search(prompt) else "more") if trial is not None else None
        question = found.setdefault((kind, prompt), _Question(prompt, kind, row.where, trial, arm))
        if gold is not None and gold not in question.golds:
            question.golds.append(gold)
    return list(found.values())


def _split_name(source: str, split: str | None) -> str | None:
    """A split as the source names it: `605` or `MedBrowseComp_605`; files in a folder have the number as a word."""
    path = Path(source)
    if path.is_dir():
        return split.removeprefix(SPLIT_PREFIX) if split is not None else None
    if split is None:
        return None if path.exists() or path.suffix else f"{SPLIT_PREFIX}605"  # the Hub has no split `train`
    return SPLIT_PREFIX + split.removeprefix(SPLIT_PREFIX)


def _read(row: Row) -> tuple[str, str, str | None]:
    """Prompt, question type and gold of a row.

    Raises:
        TaskError: it is no row of this data set.
    """
    values = row.values
    missing = [name for name in ("prompt", "gold") if name not in values]
    others = [name for name in values if name not in ("prompt", "gold", "split")]
    kind_column = "task_name" if "task_name" in values else next((n for n in others if n.endswith("_prompt")), None)
    if missing or kind_column is None:
        wanted = ", ".join([*missing, *(["task_name"] if kind_column is None else [])])
        raise TaskError(
            row.where,
            f"MedBrowseComp has the columns prompt, gold and task_name; missing: {wanted}; found: {', '.join(values)}. "
            "Is it the right file? Any other table: convert_dataset.py FILE --prompt COLUMN --answer COLUMN",
        )
    prompt, kind, gold = values["prompt"], values[kind_column], values["gold"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise TaskError(row.where, "the prompt is empty")
    if not isinstance(kind, str) or not kind.strip():
        raise TaskError(row.where, f"{kind_column} is empty")
    kind = kind.strip().removesuffix("_prompt")
    if gold is None or (isinstance(gold, float) and gold != gold):
        gold = "NA" if kind in MAY_LACK else ""
    gold = str(gold).strip()
    return _decoded(prompt), kind, gold or None


def _decoded(cell: str) -> str:
    """A prompt that was written as a literal: in quotes, with the two characters backslash and n for a new line."""
    text = cell.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    return text.replace("\\n", "\n").replace('\\"', '"').strip()


def _ingredients(questions: Sequence[_Question]) -> dict[tuple[str, str], str]:
    """Ingredient by trial and regimen, from the questions that ask for it."""
    return {q.arm: q.golds[0] for q in questions if q.kind == "Ingredient" and q.arm is not None and q.golds}


def _type_of(question: _Question) -> str:
    """The name of the grader."""
    if question.kind in HOPS:
        if question.kind == "Patent_Expire_Date_Text" and "YYYY" in question.prompt and "MM" not in question.prompt:
            return comp_graders.YEAR  # the gold is a day all the same
        return f"{comp_graders.PREFIX}{question.kind}"
    return comp_graders.type_of_gold(question.golds[0] if question.golds else "")


def _task(question: _Question, ingredient: str | None, baselines: dict[str, bool | None], system: str) -> Task:
    kind = _type_of(question)
    accepted = list(dict.fromkeys(comp_graders.plain_gold(kind, gold) for gold in question.golds))
    hops = HOPS.index(question.kind) + 1 if question.kind in HOPS else None
    metadata = {
        "answer": accepted[0] if accepted else None,
        "accepted": accepted,
        "gold": question.golds,
        "question_type": kind,
        "task_name": question.kind,
        "hops": hops,
        "trial": question.trial,
        "ingredient": ingredient,
        "is_na": bool(accepted) and all(comp_graders.is_na(gold) for gold in accepted),
        "baselines": {name: float(right) for name, right in baselines.items() if right is not None},
        "dataset": "medbrowsecomp",
    }
    digest = hashlib.sha256(question.prompt.encode()).hexdigest()[:8]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question.prompt}]
    name = digest if question.trial is None else f"{question.trial}-{digest}"
    row = {"messages": messages, "metadata": metadata, "id": f"medbrowsecomp/{question.kind}/{name}"}
    return task_from_row(row, question.where)


def _baselines(questions: Sequence[_Question]) -> list[dict[str, bool | None]]:
    """Whether answers that take no browsing are right; None where they cannot be told."""
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    by_letter: dict[tuple[str, str], list[tuple[str | None, str]]] = defaultdict(list)
    letters = []
    for question in questions:
        letter = _LETTER.search(question.prompt)
        letters.append(letter[1].upper() if letter is not None else None)
        if question.golds:
            gold = _guess(_type_of(question), question.golds[0])
            by_type[question.kind][gold] += 1
            if letters[-1] is not None:
                by_letter[question.kind, letters[-1]].append((question.trial, gold))
    found = []
    for question, first in zip(questions, letters, strict=True):
        others = Counter(
            gold for trial, gold in by_letter.get((question.kind, first or ""), ()) if trial != question.trial
        )
        guesses = {"constant": by_type[question.kind], "letter": others if first is not None else None}
        found.append({name: _is_right(question, counts) for name, counts in guesses.items()})
    return found


def _guess(kind: str, gold: str) -> str:
    """What a guesser would say for a gold: only the year where only the year is asked for."""
    day = parse_date(gold) if kind == comp_graders.YEAR else None
    return str(day.year) if day is not None else comp_graders.plain_gold(kind, gold)


def _is_right(question: _Question, guesses: Counter[str] | None) -> bool | None:
    if guesses is None or not question.golds:
        return None
    if not guesses:
        return False
    kind = _type_of(question)
    return any(comp_graders.grade(kind, guesses.most_common(1)[0][0], gold) for gold in question.golds)
