"""Graders: what is forgiven and what is not."""

from __future__ import annotations

import pytest

from envs.medbrowse.graders import GRADERS, grade
from envs.medbrowse.tasks import QUESTION_TYPES

RIGHT = [
    ("Ingredient", "enzalutamide", "ENZALUTAMIDE"),
    ("Ingredient", " Enzalutamide. ", "ENZALUTAMIDE"),
    ("Applicant_Full_Name", "Astellas Pharma US, Inc.", "ASTELLAS PHARMA US INC"),
    ("Applicant_Full_Name", "Astellas Pharma US", "ASTELLAS PHARMA US INC"),
    ("Applicant_Full_Name", "Société Générale S.A.", "SOCIETE GENERALE"),
    ("Patent_Expire_Date_Text", "2027-08-13", "Aug 13, 2027"),
    ("Patent_Expire_Date_Text", "August 13, 2027.", "Aug 13, 2027"),
    ("Patent_Expire_Date_Text", "2027", "2027"),
    ("Exclusivity_Date", "11-17-2026", "Nov 17, 2026"),
    ("Exclusivity_Date", "n/a", "NA"),
    ("Exclusivity_Date", "not listed", "NA"),
    ("Open_on_Approval", "$46.73", "46.72999954223633"),
    ("Open_on_Approval", "1,046.70 USD", "1046.7"),
    ("Open_on_Approval", "NOT LISTED", "Not_Listed"),
    ("choice", "Yes.", "yes"),
    ("pubmedqa", "maybe", "maybe"),
]
WRONG = [
    ("Ingredient", "Enzalutamid", "ENZALUTAMIDE"),
    ("Ingredient", "", "ENZALUTAMIDE"),
    ("Applicant_Full_Name", "Inc", "ASTELLAS PHARMA US INC"),
    ("Applicant_Full_Name", "Astellas", "ASTELLAS PHARMA US INC"),
    ("Patent_Expire_Date_Text", "Aug 14, 2027", "Aug 13, 2027"),
    ("Patent_Expire_Date_Text", "2027", "Aug 13, 2027"),
    ("Exclusivity_Date", "NA", "Nov 17, 2026"),
    ("Exclusivity_Date", "Nov 17, 2026", "NA"),
    ("Open_on_Approval", "46.72 or 48.10", "46.72"),
    ("Open_on_Approval", "47.20", "46.72"),
    ("Open_on_Approval", "NA", "46.72"),
    ("Open_on_Approval", "nothing", "46.72"),
    ("choice", "yes or no", "yes"),
    ("choice", "it depends", "maybe"),
    ("choice", "", "yes"),
]


@pytest.mark.parametrize(("kind", "answer", "expected"), RIGHT)
def test_right(kind: str, answer: str, expected: str) -> None:
    assert grade(kind, answer, expected)


@pytest.mark.parametrize(("kind", "answer", "expected"), WRONG)
def test_wrong(kind: str, answer: str, expected: str) -> None:
    assert not grade(kind, answer, expected)


def test_no_answer_is_wrong_and_an_unknown_type_is_an_error() -> None:
    assert not grade("choice", None, "yes")
    assert {kind.name for kind in QUESTION_TYPES} <= GRADERS.keys()
    with pytest.raises(ValueError, match=r"'essay'.*choice"):
        grade("essay", "a", "a")
