"""Graders of MedBrowseComp's questions, a type each, without a judge model.

The data set's golds are not what its prompts ask for: a day where a year is asked for, a price with the noise of
32-bit floats, a company with or without its legal form. A grader forgives the form, never the content. NA is a class of
its own: it is right where the gold is NA, and only there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import date

from envs.medbrowse.graders import normalise, parse_date, same_company, same_price

PREFIX = "medbrowsecomp/"
YEAR = f"{PREFIX}Patent_Expire_Year"
IDENTIFIER = f"{PREFIX}Identifier"
START_DATE = f"{PREFIX}Start_Date"
AUTHOR = f"{PREFIX}Author"

_NA_SPELLINGS = """
na, n a, nan, none, null, unlisted, not listed, not available, not applicable, no exclusivity, no exclusivity listed,
not publicly traded, private company
"""
_SALT_NAMES = """
acetate anhydrous besylate bromide calcium camsylate chloride citrate diacetate dihydrate dihydrochloride dimaleate
dimeglumine diphosphate disodium disoproxil ditosylate edisylate esylate fumarate gluconate hcl hemihydrate
hydrobromide hydrochloride hydrate lactate magnesium malate maleate meglumine mesylate monohydrate nitrate palmitate
pamoate phosphate potassium sodium succinate sulfate sulphate tartrate tosylate trihydrate tromethamine
"""
_NA = frozenset(text.strip() for text in _NA_SPELLINGS.split(","))
_SALTS = frozenset(_SALT_NAMES.split())
_LABELS = "final answer|answer|ingredient|company|date|year|price|ticker|name|nct|pmid|pubmed id"
_LABEL = re.compile(rf"^\s*(?:{_LABELS})\s*[:=]\s*", re.IGNORECASE)
_BIOLOGIC_SUFFIX = re.compile(r"-[a-z]{4}$")
"""Four letters without meaning that the FDA puts behind biologics' names (Guidance for Industry, 2017)."""
_TRADE_NAMES = """
america americas canada europe global holdings international intl labs laboratories laboratory north
oncology operations pharm pharma pharmaceutical pharmaceuticals pharms uk us usa
"""
_TRADE = frozenset(_TRADE_NAMES.split())
"""Words that the short names of one of the data set's files leave out."""
_ORDINAL = re.compile(r"\b(\d{1,2})(?:st|nd|rd|th)\b", re.IGNORECASE)
_SEPT = re.compile(r"\bsept\b", re.IGNORECASE)
_DAY = re.compile(
    r"\b(?:\d{4}-\d{1,2}-\d{1,2}|\d{1,2}[-/]\d{1,2}[-/]\d{4}"
    r"|[A-Za-z]{3,9}\.? \d{1,2},? \d{4}|\d{1,2} [A-Za-z]{3,9},? \d{4})\b"
)
_YEAR = re.compile(r"\b(?:19|20)\d{2}\b")
_MONTH = re.compile(r"(\d{4})-(\d{1,2})(?:-(\d{1,2}))?")


def is_na(text: str) -> bool:
    """Whether a text says that there is nothing."""
    return normalise(_bare(text)) in _NA


def grade(question_type: str, answer: str | None, expected: str) -> bool:
    """Whether an answer is right; no answer is wrong.

    Raises:
        KeyError: there is no grader for this type.
    """
    if answer is None:
        return False
    if is_na(expected) or is_na(answer):
        return is_na(expected) and is_na(answer)
    return COMP_GRADERS[question_type](_bare(answer), expected)


def plain_gold(question_type: str, gold: str) -> str:
    """A gold without what its file did to it: NA in one spelling, a price in cents."""
    if is_na(gold):
        return "NA"
    if question_type == f"{PREFIX}Open_on_Approval":
        try:
            return f"{float(gold.replace(',', '').lstrip('$')):.2f}"
        except ValueError:
            return gold
    return gold


def type_of_gold(gold: str) -> str:
    """The type of a question that only its gold tells: an identifier, a date, an author."""
    if re.fullmatch(r"NCT\d{8}|\d{5,9}", gold.strip()):
        return IDENTIFIER
    if _MONTH.fullmatch(gold.strip()):
        return START_DATE
    return AUTHOR


def ingredient_key(name: str) -> str:
    """An ingredient without salt and biologic suffix; of a combination all, sorted."""
    parts = re.split(r"\s*(?:;|,|\+|/|\band\b)\s*", _bare(name).casefold())
    return " + ".join(sorted(filter(None, (_substance(part) for part in parts))))


def same_ingredient(answer: str, expected: str) -> bool:
    """`Enzalutamide`, `INGREDIENT: enzalutamide`; salts and biologic suffixes do not matter."""
    return bool(ingredient_key(answer)) and ingredient_key(answer) == ingredient_key(expected)


def same_applicant(answer: str, expected: str) -> bool:
    """The same company but for legal forms. One file's golds are short (`ASTELLAS` for ASTELLAS PHARMA US INC): an
    answer may be fuller by words of the trade, never shorter."""
    if same_company(answer, expected):
        return True
    given, wanted = normalise(answer).split(), normalise(expected).split()
    rest = " ".join(word for word in given[len(wanted) :] if word not in _TRADE)
    return given[: len(wanted)] == wanted and same_company(f"{expected} {rest}", expected)


def same_day(answer: str, expected: str) -> bool:
    """The same day in any usual notation, and no other day beside it."""
    days = _days(answer)
    return days == {parse_date(expected)} and None not in days


def same_year(answer: str, expected: str) -> bool:
    """The year of the gold, which is a day; the answer may be the day, but then it must be that one."""
    if _days(answer):
        return same_day(answer, expected) or (parse_date(expected) is None and _years(answer) == _years(expected))
    return bool(_years(answer)) and _years(answer) == _years(expected)


def same_opening_price(answer: str, expected: str) -> bool:
    """The price within half a percent; a ticker and the day may stand beside it, a second number may not."""
    return same_price(_DAY.sub(" ", _plain_days(answer)), expected)


def same_identifier(answer: str, expected: str) -> bool:
    """The number, once: `PMID 12345678`, `NCT01234567`."""
    found = set(re.findall(r"\d{5,9}", answer))
    return found == set(re.findall(r"\d{5,9}", expected))


def same_start(answer: str, expected: str) -> bool:
    """As exact as the gold, which is a month or a day."""
    gold = _MONTH.fullmatch(expected.strip())
    days = _days(answer)
    if gold is None:
        return normalise(answer) == normalise(expected)
    year, month, wanted_day = int(gold[1]), int(gold[2]), gold[3]
    if len(days) > 1:
        return False
    day = next(iter(days), None)
    if day is not None:
        return (day.year, day.month) == (year, month) and (wanted_day is None or day.day == int(wanted_day))
    given = _month_of(answer)
    return wanted_day is None and given == (year, month)


def same_author(answer: str, expected: str) -> bool:
    """The same family name, and given names that do not contradict: `Smith JA`, `John A. Smith`, `J. Smith`."""
    mine, theirs = normalise(answer).split(), normalise(expected).split()
    if not mine or not theirs or len(mine) > 6:
        return False
    if sorted(mine) == sorted(theirs):
        return True
    family = max(theirs, key=len)
    if family not in mine:
        return False
    given = [_initials(word) for word in theirs if word != family]
    said = [_initials(word) for word in mine if word != family]
    first, other = "".join(given), "".join(said)
    return bool(other) and (first.startswith(other) or other.startswith(first))


COMP_GRADERS: Mapping[str, Callable[[str, str], bool]] = {
    f"{PREFIX}Ingredient": same_ingredient,
    f"{PREFIX}Applicant_Full_Name": same_applicant,
    f"{PREFIX}Patent_Expire_Date_Text": same_day,
    YEAR: same_year,
    f"{PREFIX}Exclusivity_Date": same_day,
    f"{PREFIX}Open_on_Approval": same_opening_price,
    IDENTIFIER: same_identifier,
    START_DATE: same_start,
    AUTHOR: same_author,
}
"""(answer, gold) -> right or wrong, where neither is NA."""


def _bare(text: str) -> str:
    """Without the label that prompts ask for, quotes and a full stop."""
    return _LABEL.sub("", text).strip().strip("\"'`*").strip().removesuffix(".").strip()


def _substance(name: str) -> str:
    words = _BIOLOGIC_SUFFIX.sub("", name.strip()).split()
    while len(words) > 1 and words[-1].strip("().") in _SALTS:
        words.pop()
    return normalise(" ".join(words))


def _plain_days(text: str) -> str:
    """Days as `_DAY` reads them: `Sept. 5th, 2031` is `Sep 5, 2031`."""
    return _SEPT.sub("Sep", _ORDINAL.sub(r"\1", text))


def _days(text: str) -> set[date | None]:
    """Days that a text names; None among them for one that is none (`02-31-2031`)."""
    found = (match[0].replace(".", "") for match in _DAY.finditer(_plain_days(text)))
    return {parse_date(day.replace(",", "") if day[0].isdigit() else day) for day in found}


def _years(text: str) -> set[str]:
    return set(_YEAR.findall(text))


def _month_of(text: str) -> tuple[int, int] | None:
    match = _MONTH.fullmatch(text.strip())
    if match is not None:
        return int(match[1]), int(match[2])
    year = _YEAR.search(text)
    named = parse_date(f"{_YEAR.sub('', text).strip(' ,')} 1, {year[0]}") if year is not None else None
    return (named.year, named.month) if named is not None else None


def _initials(word: str) -> str:
    """`JA` stays, `john` is `j`: two or three letters in a row are initials where the gold is written so."""
    return word if len(word) <= 2 else word[0]
