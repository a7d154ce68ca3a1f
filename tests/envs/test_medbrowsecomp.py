"""MedBrowseComp's converter on invented rows of its shape, with each fault of its files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import convert_dataset
from envs.converters.medbrowsecomp import convert, held_out, is_held_out
from envs.dataset import read_tasks
from envs.medbrowse.comp_graders import PREFIX, YEAR, grade, ingredient_key, is_na

NAMES = (
    "Abelumab",
    "Borixil",
    "Cestrol",
    "Dunavir",
    "Ebaxone",
    "Fomatine",
    "Gulipram",
    "Hexodine",
    "Idaricept",
    "Jolexa",
)


def rows(names: tuple[str, ...] = NAMES) -> list[dict[str, Any]]:
    """Five hops a trial: the registry is invented."""
    found = []
    for number, name in enumerate(names):
        trial = f"NCT9900000{number}"
        first = (
            f"For clinical trial {trial}. Among the more effective regimen ingredients; find which is the ingredient "
            f"with the first letter start with {name[0]}\n return only the name"
        )
        later = f"First, for clinical trial {trial}, find the one that starts with the letter {name[0]}.\n\nThen, find "
        found += [
            {"prompt": first, "gold": name.upper(), "task_name": "Ingredient"},
            {"prompt": f"{later} its company.", "gold": f"{name} PHARMA INC", "task_name": "Applicant_Full_Name"},
            {"prompt": f"{later} its patent: YYYY", "gold": "Aug 13, 2031", "task_name": "Patent_Expire_Date_Text"},
            {"prompt": f"{later} its exclusivity: MM-DD-YYYY", "gold": "NA", "task_name": "Exclusivity_Date"},
            {"prompt": f"{later} the price", "gold": "46.72999954223633", "task_name": "Open_on_Approval"},
        ]
    return found


def write_csv(path: Path, lines: list[dict[str, Any]]) -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_csv(tmp_path / "MedBrowseComp_605.csv", rows())


def test_every_row_is_a_task(source: str) -> None:
    tasks = list(convert(source))
    assert len(tasks) == 50
    of = {task.metadata["task_name"]: task.metadata for task in tasks[:5]}
    assert of["Ingredient"]["answer"] == "ABELUMAB"
    assert of["Patent_Expire_Date_Text"]["question_type"] == YEAR
    assert (of["Exclusivity_Date"]["answer"], of["Exclusivity_Date"]["is_na"]) == ("NA", True)
    assert (of["Open_on_Approval"]["answer"], of["Open_on_Approval"]["gold"]) == ("46.73", ["46.72999954223633"])
    assert [task.metadata["hops"] for task in tasks[:5]] == [1, 2, 3, 4, 5]
    assert {task.metadata["ingredient"] for task in tasks[:5]} == {"ABELUMAB"}
    assert tasks[0].id.startswith("medbrowsecomp/Ingredient/NCT99000000-")
    assert len({task.id for task in tasks}) == 50
    assert "Answer NA where there is nothing" in tasks[0].messages[0]["content"]


def test_what_takes_no_browsing_is_told(source: str) -> None:
    """One gold for all trials of a type is what the constant answer gets; a letter of one trial helps no other."""
    told = {task.metadata["task_name"]: task.metadata["baselines"] for task in convert(source)}
    assert told["Exclusivity_Date"] == {"constant": 1.0, "letter": 0.0}
    assert told["Ingredient"] == {"constant": 0.0, "letter": 0.0}


def test_who_guesses_a_year_guesses_no_day(tmp_path: Path) -> None:
    """Two days of one year beside a day that stands twice: the year is the commonest."""
    golds = ("Jan 1, 2030", "Jan 1, 2030", "May 1, 2031", "May 2, 2031", "May 3, 2031")
    lines = [
        {"prompt": f"NCT9900000{i}: in the format YYYY", "gold": gold, "task_name": "Patent_Expire_Date_Text"}
        for i, gold in enumerate(golds)
    ]
    told = [task.metadata["baselines"] for task in convert(write_csv(tmp_path / "a.csv", lines))]
    assert told == [{"constant": float(gold.endswith("2031"))} for gold in golds]


def test_a_letter_that_two_trials_share_helps(tmp_path: Path) -> None:
    twice = rows(("Abelumab", "Abelumab"))
    told = [task.metadata["baselines"] for task in convert(write_csv(tmp_path / "a.csv", twice))]
    assert all(baseline["letter"] == 1.0 for baseline in told)


def test_a_cell_written_as_a_literal(tmp_path: Path) -> None:
    """The file of 50: quotes and backslash-n inside the cell, and other names."""
    lines = [
        {"prompt": '"For clinical trial NCT99000001,\\n find it"', "gold": "Abelumab",
         "Applicant_Full_Name_prompt": "Ingredient"},
        {"prompt": '"For clinical trial NCT99000001,\\n YYYY"', "gold": "Aug 13, 2031",
         "Applicant_Full_Name_prompt": "Patent_Expire_Date_Text_prompt"},
    ]  # fmt: skip
    tasks = list(convert(write_csv(tmp_path / "a.csv", lines)))
    assert tasks[0].messages[1]["content"] == "For clinical trial NCT99000001,\n find it"
    assert [task.metadata["task_name"] for task in tasks] == ["Ingredient", "Patent_Expire_Date_Text"]


@pytest.mark.parametrize("gold", [None, "NA", "Not_Listed", "NOT LISTED", float("nan")])
def test_what_readers_make_of_na(tmp_path: Path, gold: Any) -> None:
    path = tmp_path / "a.jsonl"
    value = gold if gold is None or isinstance(gold, str) else None
    path.write_text(json.dumps({"prompt": "NCT99000001", "gold": value, "task_name": "Open_on_Approval"}) + "\n")
    (task,) = convert(str(path))
    assert (task.metadata["answer"], task.metadata["is_na"]) == ("NA", True)


def test_questions_asked_twice_accept_each_gold(tmp_path: Path) -> None:
    lines = [
        {"prompt": "Find the second author", "gold": "Roe J", "task_name": "author"},
        {"prompt": "Find the second author", "gold": "Poe K", "task_name": "author"},
        {"prompt": "Find the start", "gold": "2031-05", "task_name": "start_date"},
        {"prompt": "Find the trial", "gold": "NCT99000001", "task_name": "id"},
        {"prompt": "Find another author", "gold": "", "task_name": "author"},
    ]
    tasks = list(convert(write_csv(tmp_path / "cua.csv", lines)))
    assert len(tasks) == 4
    assert tasks[0].metadata["accepted"] == ["Roe J", "Poe K"]
    assert [task.metadata["question_type"].removeprefix(PREFIX) for task in tasks[:3]] == [
        "Author",
        "Start_Date",
        "Identifier",
    ]
    assert tasks[3].metadata["answer"] is None  # nobody knows it: not graded


def test_training_on_it_needs_a_word(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train.jsonl"
    assert convert_dataset.main(["medbrowsecomp", source, "--purpose", "train", "--out", str(out)]) == 2
    assert "--i-understand-this-is-a-test-set" in capsys.readouterr().err
    assert not out.exists()


def test_no_ingredient_is_on_both_sides(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "--i-understand-this-is-a-test-set"
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    assert convert_dataset.main(["medbrowsecomp", source, "--purpose", "train", said, "--out", str(train)]) == 0
    assert convert_dataset.main(["medbrowsecomp", source, "--purpose", "held-out", "--out", str(test)]) == 0
    assert "held out: " in capsys.readouterr().out
    sides = [{task.metadata["ingredient"] for task in read_tasks(path)} for path in (train, test)]
    assert not sides[0] & sides[1]
    assert all(sides)
    assert sides[0] | sides[1] == {name.upper() for name in NAMES}
    told = json.loads(Path(f"{train}.held_out.json").read_text())
    assert told == held_out(source)
    assert set(told["held_out_ingredients"]) == sides[1]
    assert len(told["held_out_trials"]) == len(sides[1])


def test_copies_of_an_ingredient_fall_on_one_side() -> None:
    assert ingredient_key("Borixil HCl") == ingredient_key("BORIXIL")
    assert is_held_out("Borixil hydrochloride") == is_held_out("BORIXIL")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,gold\na,b\n", "missing: task_name; found: prompt, gold. Is it the right file?"),
        ("question,answer\na,b\n", "missing: prompt, gold, task_name"),
        ("prompt,gold,task_name\n,b,Ingredient\n", "the prompt is empty"),
        ("prompt,gold,task_name\na,b,\n", "task_name is empty"),
        ("prompt,gold,task_name\n", "no row of MedBrowseComp"),
        ("", "empty"),
    ],
)
def test_files_that_are_something_else(
    tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert convert_dataset.main(["medbrowsecomp", str(path), "--out", str(tmp_path / "o.jsonl")]) == 4
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o.jsonl").exists()


def test_a_split_has_a_short_name_and_a_long_one(tmp_path: Path) -> None:
    """As a file of a folder and as a column."""
    write_csv(tmp_path / "MedBrowseComp_605.csv", rows())
    write_csv(tmp_path / "MedBrowseComp_50.csv", rows(NAMES[:2]))
    column = tmp_path / "all.jsonl"
    named = [row | {"split": f"MedBrowseComp_{50 if i < 10 else 605}"} for i, row in enumerate(rows())]
    column.write_text("".join(json.dumps(row) + "\n" for row in named))
    for split in ("50", "MedBrowseComp_50"):
        assert len(list(convert(str(tmp_path), split=split))) == 10
        assert len(list(convert(str(column), split=split))) == 10


def test_two_prompts_of_one_trial_and_type_are_two_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file of 50 asks for the less effective regimen too."""
    both = [
        {"prompt": f"NCT99000001: the {side} effective one", "gold": gold, "task_name": "Ingredient"}
        for side, gold in (("more", "Borixil"), ("less", "Cestrol"))
    ]
    out = tmp_path / "o.jsonl"
    assert convert_dataset.main(["medbrowsecomp", write_csv(tmp_path / "a.csv", both), "--out", str(out)]) == 0
    assert [task.metadata["answer"] for task in read_tasks(out)] == ["Borixil", "Cestrol"]
    assert [task.metadata["ingredient"] for task in read_tasks(out)] == ["Borixil", "Cestrol"]
    assert "2 tasks" in capsys.readouterr().out


def test_other_converters_have_no_purpose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt\na\n")
    assert (
        convert_dataset.main([str(path), "--prompt", "prompt", "--purpose", "train", "--out", str(tmp_path / "o")]) == 2
    )
    assert "takes no --purpose" in capsys.readouterr().err


# Graders


@pytest.mark.parametrize(
    ("kind", "answer", "gold", "right"),
    [
        ("Ingredient", "INGREDIENT: borixil", "BORIXIL", True),
        ("Ingredient", "Borixil mesylate", "BORIXIL", True),
        ("Ingredient", "belimab-abcd", "BELIMAB", True),
        ("Ingredient", "cestrol and borixil", "BORIXIL; CESTROL", True),
        ("Ingredient", "borixil, or maybe cestrol", "BORIXIL", False),
        ("Ingredient", "unknown", "BORIXIL", False),
        ("Ingredient", "", "BORIXIL", False),
        ("Applicant_Full_Name", "COMPANY: Borix Pharma US, Inc.", "BORIX PHARMA US INC", True),
        ("Applicant_Full_Name", "Borix", "BORIX PHARMA US INC", False),
        ("Applicant_Full_Name", "Borix Pharma US, Inc.", "BORIX", True),
        ("Applicant_Full_Name", "Borix Pharmaceuticals International LLC", "BORIX PHARMA", False),
        ("Applicant_Full_Name", "Borix Vascular Inc", "BORIX", False),
        ("Applicant_Full_Name", "Borix or Cestra", "BORIX", False),
        ("Applicant_Full_Name", "Pharma Borix", "BORIX", False),
        ("Exclusivity_Date", "November 17th, 2026", "Nov 17, 2026", True),
        ("Exclusivity_Date", "17 November, 2026", "Nov 17, 2026", True),
        ("Exclusivity_Date", "Sept. 5, 2026", "Sep 5, 2026", True),
        ("Exclusivity_Date", "02-31-2026", "Nov 17, 2026", False),
        ("Exclusivity_Date", "2026", "Nov 17, 2026", False),
        ("Open_on_Approval", "BRX: 46.73 (Aug 31st, 2012)", "46.73", True),
        ("Open_on_Approval", "46.73 USD", "Not_Listed", False),
        ("Start_Date", "2031-05-03 or 2031-05-04", "2031-05", False),
        ("Author", "", "Roe JA", False),
        ("Identifier", "", "91234567", False),
        ("Patent_Expire_Year", "2031", "Aug 13, 2031", True),
        ("Patent_Expire_Year", "DATE: 2031.", "Aug 13, 2031", True),
        ("Patent_Expire_Year", "August 13, 2031", "Aug 13, 2031", True),
        ("Patent_Expire_Year", "August 14, 2031", "Aug 13, 2031", False),
        ("Patent_Expire_Year", "2031 or 2032", "Aug 13, 2031", False),
        ("Patent_Expire_Year", "NA", "Aug 13, 2031", False),
        ("Exclusivity_Date", "11-17-2026", "Nov 17, 2026", True),
        ("Exclusivity_Date", "It ends on 2026-11-17", "Nov 17, 2026", True),
        ("Exclusivity_Date", "11-18-2026", "Nov 17, 2026", False),
        ("Exclusivity_Date", "Nov 17, 2026 or Nov 18, 2026", "Nov 17, 2026", False),
        ("Exclusivity_Date", "Not listed", "NA", True),
        ("Exclusivity_Date", "Nov 17, 2026", "NA", False),
        ("Open_on_Approval", "BRX, $46.73", "46.72999954223633", True),
        ("Open_on_Approval", "BRX opened at 46.8 on 2012-08-31", "46.73", True),
        ("Open_on_Approval", "46.73 or 50.10", "46.73", False),
        ("Open_on_Approval", "52", "46.73", False),
        ("Open_on_Approval", "N/A", "Not_Listed", True),
        ("Identifier", "PMID: 91234567", "91234567", True),
        ("Identifier", "NCT99000001", "NCT99000001", True),
        ("Identifier", "NCT99000001, NCT99000002", "NCT99000001", False),
        ("Start_Date", "2031-05", "2031-05", True),
        ("Start_Date", "May 3, 2031", "2031-05", True),
        ("Start_Date", "May 2031", "2031-05", True),
        ("Start_Date", "2031-05", "2031-05-03", False),
        ("Start_Date", "2031-06-01", "2031-05", False),
        ("Author", "John A. Roe", "Roe JA", True),
        ("Author", "Roe J", "Roe JA", True),
        ("Author", "Roe K", "Roe JA", False),
        ("Author", "Roe", "Roe JA", False),
    ],
)  # fmt: skip
def test_the_form_is_forgiven_and_the_content_is_not(kind: str, answer: str, gold: str, right: bool) -> None:
    assert grade(f"{PREFIX}{kind}", answer, gold) is right


def test_no_answer_is_wrong_even_where_na_is_right() -> None:
    assert not grade(f"{PREFIX}Exclusivity_Date", None, "NA")
    assert [is_na(text) for text in ("n/a", "Not_Listed.", "Nadolol")] == [True, True, False]
