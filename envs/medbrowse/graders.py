"""Graders, one a question type. Used only where verification is on.

An answer is what `submit_answer` was called with. Case, blanks and outer punctuation never matter; what else is
forgiven depends on the type. Golden answers "NA" stay text and are matched by "NA" and its usual spellings only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from datetime import date, datetime

PRICE_TOLERANCE = 0.005
"""Relative, or half a cent if that is more: prices are told in rounded dollars."""

_US_SUFFIXES = ("inc", "incorporated", "corp", "corporation", "co", "company", "ltd", "limited", "llc", "lp", "plc")
_OTHER_SUFFIXES = ("ag", "sa", "se", "gmbh", "nv", "bv", "spa", "ab", "as", "kk")
_SUFFIXES = frozenset((*_US_SUFFIXES, *_OTHER_SUFFIXES))
_NOT_AVAILABLE = frozenset(("na", "n a", "none", "not listed", "not available", "no exclusivity"))
_DATE_FORMATS = ("%b %d, %Y", "%B %d, %Y", "%Y-%m-%d", "%m-%d-%Y", "%m/%d/%Y", "%d %b %Y", "%d %B %Y", "%b %d %Y")
_CHOICES = ("yes", "no", "maybe")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")


def normalise(text: str) -> str:
    """Lower case, without accents, punctuation and doubled blanks."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(re.sub(r"[^\w]+|_", " ", plain.casefold()).split())


def is_not_available(text: str) -> bool:
    return normalise(text) in _NOT_AVAILABLE


def same_name(answer: str, expected: str) -> bool:
    """Equal after `normalise`."""
    return normalise(answer) == normalise(expected)


def same_company(answer: str, expected: str) -> bool:
    """Equal but for legal forms at the end: `Astellas Pharma US, Inc.` is `ASTELLAS PHARMA US`."""
    return _company(answer) == _company(expected)


def same_date(answer: str, expected: str) -> bool:
    """The same day in any usual notation. A bare year answers a golden year only."""
    if is_not_available(expected) or is_not_available(answer):
        return is_not_available(expected) and is_not_available(answer)
    wanted, given = parse_date(expected), parse_date(answer)
    return wanted == given if wanted is not None else same_name(answer, expected)


def same_price(answer: str, expected: str) -> bool:
    """Equal within `PRICE_TOLERANCE`; a currency sign or name beside the number is allowed, a second number is not."""
    if is_not_available(expected) or is_not_available(answer):
        return is_not_available(expected) and is_not_available(answer)
    wanted, given = _price(expected), _price(answer)
    if wanted is None or given is None:
        return False
    return abs(wanted - given) <= max(0.005, PRICE_TOLERANCE * abs(wanted)) + 1e-9


def same_choice(answer: str, expected: str) -> bool:
    """yes, no or maybe: the answer's first word, and no other choice in it."""
    words = normalise(answer).split()
    found = {word for word in words if word in _CHOICES}
    return bool(words) and found == {words[0]} == {normalise(expected)}


GRADERS: Mapping[str, Callable[[str, str], bool]] = {
    "Ingredient": same_name,
    "Applicant_Full_Name": same_company,
    "Patent_Expire_Date_Text": same_date,
    "Exclusivity_Date": same_date,
    "Open_on_Approval": same_price,
    "choice": same_choice,
    "pubmedqa": same_choice,
}
"""(answer, expected) -> right or wrong, by the task's `question_type`."""


def grade(question_type: str, answer: str | None, expected: str) -> bool:
    """Whether an answer is right; no answer is wrong.

    Raises:
        ValueError: there is no grader for this question type.
    """
    if question_type not in GRADERS:
        raise ValueError(f"no grader for question_type {question_type!r}; there are: {', '.join(sorted(GRADERS))}")
    return answer is not None and GRADERS[question_type](answer, expected)


def parse_date(text: str) -> date | None:
    """The day that a text names and nothing else; None if it names none."""
    plain = " ".join(text.strip().strip(".").split())
    for notation in _DATE_FORMATS:
        try:
            return datetime.strptime(plain, notation).date()
        except ValueError:
            continue
    return None


def _company(name: str) -> tuple[str, ...]:
    words = normalise(name.replace(".", "")).split()
    while len(words) > 1 and words[-1] in _SUFFIXES:
        words.pop()
    return tuple(words)


def _price(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[0].replace(",", "")) if len(numbers) == 1 else None
