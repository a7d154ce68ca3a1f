"""convert_dataset.py and its readers, run as a user does; the Hub's reader over a data set on this disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import convert_dataset
from envs.converters import OptionError, names
from envs.converters.pubmedqa import page_html
from envs.converters.rows import hub_rows, iter_rows
from envs.converters.table import convert
from envs.dataset import TaskError, read_tasks

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"q": "one, two", "gold": "NA", "n": "007"}, {"q": 'a "b"\nc', "gold": "null", "n": ""}]


def source(folder: Path, kind: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    """The rows as a file of that kind."""
    import csv

    file = folder / f"data.{kind}"
    if kind in ("csv", "tsv"):
        with open(file, "w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "json":
        file.write_text(json.dumps(rows, indent=1))
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def run(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = convert_dataset.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_tasks_and_na_stays_na(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tasks.jsonl"
    data = source(tmp_path, kind)
    code, text, _ = run(
        data, "--prompt", "q", "--answer", "gold", "--metadata", "n", "--system", "S", "--out", out, capsys=capsys
    )
    assert code == 0
    assert "2 tasks, 0 bad rows" in text
    first, second = read_tasks(out)
    assert first.messages == ({"role": "system", "content": "S"}, {"role": "user", "content": "one, two"})
    assert first.metadata == {"n": "007", "answer": "NA"}
    assert second.messages[1]["content"] == 'a "b"\nc'
    assert second.metadata == {"n": "", "answer": "null"}


def test_a_template_names_columns_and_nothing_else(tmp_path: Path) -> None:
    data = source(tmp_path, "jsonl", [{"q": "why {x}?", "n": 3, "none": None}])
    (task,) = convert(str(data), prompt="{{Q}} {q} ({n})")
    assert task.messages[0]["content"] == "{Q} why {x}? (3)"
    with pytest.raises(OptionError, match=r"no column 'q.__class__'.*The columns are: q, n, none"):
        list(convert(str(data), prompt="{q.__class__}"))
    with pytest.raises(TaskError, match="column 'none' is in the prompt, but holds null"):
        list(convert(str(data), prompt="{none}"))


def test_a_prompt_column_may_hold_a_dialogue(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (task,) = convert(str(source(tmp_path, "json", [{"chat": chat}])), prompt="chat", system="S")
    assert [m["content"] for m in task.messages] == ["S", "a", "b", "c"]


def test_a_field_of_a_column_is_named_with_a_dot(tmp_path: Path) -> None:
    rows = [{"q": "a", "gold": {"truth": "1"}, "x.y": "2"}, {"q": "b", "gold": None, "x.y": "3"}]
    data = str(source(tmp_path, "jsonl", rows[:1]))
    (task,) = convert(data, prompt="q", answer="gold.truth", metadata=["x.y"])
    assert task.metadata == {"answer": "1", "x.y": "2"}
    with pytest.raises(OptionError, match=r"'gold.trut' \(did you mean 'gold.truth'\?\).*: q, gold, x.y, gold.truth"):
        list(convert(data, prompt="q", answer="gold.trut"))
    with pytest.raises(TaskError, match=r"has no column 'gold\.truth', which earlier rows have"):
        list(convert(str(source(tmp_path, "jsonl", rows)), prompt="q", answer="gold.truth"))


def test_unknown_columns_are_listed_with_a_close_match(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = source(tmp_path, "csv"), tmp_path / "tasks.jsonl"
    code, _, err = run(data, "--prompt", "q", "--answer", "gol", "--metadata", "zz", "--out", out, capsys=capsys)
    assert code == 2
    assert "no column 'gol' (did you mean 'gold'?); no column 'zz'. The columns are: q, gold, n" in err
    assert not out.exists()


def test_bad_rows_fail_with_their_line_or_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data.csv", tmp_path / "tasks.jsonl"
    data.write_bytes(b'q,gold\n"two\nlines",1\nonly one\n\xff,2\nlast,3\n,4\nx"y"z,5\n"a"b,6\nend,7\n')
    code, _, err = run(data, "--prompt", "q", "--answer", "gold", "--out", out, capsys=capsys)
    assert code == 4
    assert f"{data}:4: has 1 fields, but the header has 2\nnothing was written" in err
    assert not out.exists()
    code, text, _ = run(
        data, "--prompt", "q", "--answer", "gold", "--out", out, "--on-bad-row", "skip", "--json", capsys=capsys
    )
    summary = json.loads(text)
    assert code == 0
    assert (summary["tasks"], summary["bad_rows"]) == (4, 4)
    assert [b["where"] for b in summary["bad"]] == [f"{data}:{n}" for n in (4, 5, 7, 9)]
    assert [t.metadata["answer"] for t in read_tasks(out)] == ["1", "3", "5", "7"]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.json", '[{"q": 1}, {"q": 2', ":1:19: not JSON: the file ends in the middle"),
        ("a.json", '[{"q": 1}\n{"q": 2}]', ":2: not JSON: wanted ','"),
        ("a.json", '[{"q": 1},\n3]', ":2: a row must be an object, found a number"),
        ("a.json", '[{"q": NaN}]', ":1: not JSON: NaN"),
        ("a.json", "3", "wanted an array of objects"),
        ("a.jsonl", '{"q": 1}\n{"q"\n', ":2:5: not JSON"),
        ("a.csv", "q,q\n1,2\n", ":1: the column 'q' stands twice"),
        ("a.csv", "", "the file is empty"),
        ("a.csv", "q\n", "gave no task"),
        ("a.parquet", "no", "not a Parquet file"),
        ("a.xyz", "q\n1\n", "unknown kind of file"),
        ("a.csv", b"\x1f\x8b12", "gzip"),
    ],
)
def test_damaged_sources_end_with_code_4(
    tmp_path: Path, name: str, data: str | bytes, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    code, _, err = run(file, "--prompt", "q", "--out", tmp_path / "tasks.jsonl", capsys=capsys)
    assert code == 4
    assert says in err
    assert [f.name for f in tmp_path.iterdir()] == [name]


def test_what_is_inside_decides_not_the_ending(tmp_path: Path) -> None:
    for name, data in (("a.json", '{"q": "1"}\n{"q": "2"}\n'), ("a.jsonl", '[{"q": "1"},\n {"q": "2"}]')):
        (tmp_path / name).write_text(data)
        assert [row.values for row in iter_rows(str(tmp_path / name))] == [{"q": "1"}, {"q": "2"}]


def test_an_object_of_objects_keeps_its_keys(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"k1": {"q": 1},\n "k2": {"q": 2}}')
    rows = list(iter_rows(str(tmp_path / "a.json")))
    assert [row.values for row in rows] == [{"_key": "k1", "q": 1}, {"_key": "k2", "q": 2}]
    assert rows[1].where.endswith("a.json:2")


def test_splits_are_files_of_a_folder_or_values_of_a_column(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"q": 1}\n')
    (tmp_path / "my-test.jsonl").write_text('{"q": 2, "split": "b"}\n{"q": 3, "split": "c"}\n')
    assert [r.values["q"] for r in iter_rows(str(tmp_path), split="train")] == [1]
    assert [r.values["q"] for r in iter_rows(str(tmp_path / "my-test.jsonl"), split="c")] == [3]
    with pytest.raises(OptionError, match=r"no file of split 'dev' in my-test\.jsonl, train\.jsonl"):
        iter_rows(str(tmp_path), split="dev")
    with pytest.raises(OptionError, match="no column 'split'"):
        list(iter_rows(str(tmp_path / "train.jsonl"), split="dev"))
    with pytest.raises(OptionError, match="several data files"):
        iter_rows(str(tmp_path))


def test_shuffle_is_fixed_by_the_seed_and_the_limit_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = source(tmp_path, "jsonl", [{"q": str(i)} for i in range(100)])

    def prompts(*flags: object) -> list[str]:
        out = tmp_path / "tasks.jsonl"
        assert run(data, "--prompt", "q", "--out", out, *flags, capsys=capsys)[0] == 0
        return [task.messages[-1]["content"] for task in read_tasks(out)]

    plain = prompts()
    assert plain == [str(i) for i in range(100)]
    assert prompts("--shuffle", "--seed", 1) == prompts("--shuffle", "--seed", 1) != plain
    assert sorted(prompts("--shuffle", "--seed", 2)) == sorted(plain)
    assert prompts("--limit", 3) == plain[:3]
    assert prompts("--shuffle", "--limit", 3) != plain[:3]


def test_the_wrong_command_ends_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = source(tmp_path, "csv"), tmp_path / "tasks.jsonl"
    for arguments, says in (
        ((data, "--out", out), "--prompt is missing"),
        (("gsm9k", data, "--out", out), "no converter 'gsm9k' (did you mean 'gsm8k'?)"),
        (("gsm8k", "--out", out), "is a converter and needs a source"),
        (("gsm8k", data, "--prompt", "q", "--out", out), "the converter gsm8k takes no --prompt"),
        ((data, "--prompt", "q", "--out", out, "--pages", out), "the converter table makes no pages"),
        ((data, "--prompt", "q", "--out", data), "is the source itself"),
        ((data, "--prompt", "q", "--out", tmp_path / "no" / "x"), "there is no folder"),
        ((data, "--prompt", "q", "--subset", "main", "--out", out), "--subset is for data sets of the Hub"),
    ):
        code, _, err = run(*arguments, capsys=capsys)
        assert (code, says in err) == (2, True), err
    for arguments in (("a", "b", "c", "--out", out), (data, "--limit", 0, "--out", out)):
        with pytest.raises(SystemExit) as caught:
            convert_dataset.main([str(a) for a in arguments])
        assert caught.value.code == 2
    capsys.readouterr()


def test_a_missing_source_says_what_was_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(tmp_path / "no.csv", "--prompt", "q", "--out", tmp_path / "t.jsonl", capsys=capsys)
    assert code == 4
    assert "no.csv: there is no such file" in err


def test_hub_data_sets_are_streamed_and_na_stays_na(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    source(tmp_path / "set", "csv").rename(tmp_path / "set" / "test.csv")
    rows = list(hub_rows(str(tmp_path / "set"), split="test"))
    assert [row.values["gold"] for row in rows] == ["NA", "null"]
    with pytest.raises(TaskError, match="as a Hub data set it cannot be read"):
        list(hub_rows(str(tmp_path / "set"), split="dev"))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_memory_does_not_grow_with_the_source(tmp_path: Path, kind: str) -> None:
    data = tmp_path / f"data.{kind}"
    filler = "x" * 1900
    with open(data, "w") as file:
        file.write({"csv": "q,gold\n", "json": "[\n", "jsonl": ""}[kind])
        for i in range(10_000):
            row = f"{i} {filler},{i}\n" if kind == "csv" else json.dumps({"q": f"{i} {filler}", "gold": i})
            file.write(row if kind == "csv" else row + ("\n" if kind == "jsonl" else ",\n" if i < 9_999 else "]\n"))
    assert data.stat().st_size > 19_000_000
    out = tmp_path / "tasks.jsonl"
    tracemalloc.start()
    try:
        arguments = [str(data), "--prompt", "q", "--answer", "gold", "--out", str(out), "--shuffle", "--json"]
        assert convert_dataset.main(arguments) == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000
    assert out.read_bytes().count(b"\n") == 10_000


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    began = time.monotonic()
    code = "import sys, convert_dataset\ntry: convert_dataset.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'pydantic') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"
    assert time.monotonic() - began < 3  # 0.1 s alone; the bar of 0.7 s is in bench/, this machine is shared


def test_converters_are_found() -> None:
    assert names() == ["gsm8k", "medbrowsecomp", "pubmedqa", "table"]


# Named converters


def test_gsm8k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = source(
        tmp_path,
        "jsonl",
        [
            {"question": "q1", "answer": "so\n#### 1,234"},
            {"question": "q2", "answer": "#### -0.5"},
            {"question": "q3", "answer": "5"},
        ],
    )
    out = tmp_path / "tasks.jsonl"
    code, text, _ = run("gsm8k", data, "--out", out, "--on-bad-row", "skip", capsys=capsys)
    assert code == 0
    assert f"skipped {data}:3: the answer does not end with '#### <number>'" in text
    assert [t.metadata["answer"] for t in read_tasks(out)] == ["1234", "-0.5"]


PAPER = {
    "QUESTION": "Does <b>X</b> help?",
    "CONTEXTS": ["We did & measured.", "It fell."],
    "LABELS": ["METHODS", "RESULTS"],
    "MESHES": ["Humans"],
    "YEAR": None,
    "final_decision": "maybe",
    "LONG_ANSWER": "The conclusion is secret.",
}


def test_pubmedqa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    papers = {"1": PAPER, "2": {**PAPER, "final_decision": "perhaps"}, "3": {**PAPER, "final_decision": "yes"}}
    (tmp_path / "ori_pqal.json").write_text(json.dumps(papers))
    out, pages = tmp_path / "tasks.jsonl", tmp_path / "pages.jsonl"
    assert run("pubmedqa", tmp_path, "--out", out, capsys=capsys)[0] == 4
    code, _, err = run("pubmedqa", tmp_path, "--split", "test", "--out", out, capsys=capsys)
    assert code == 4
    assert "test_ground_truth.json: there is no such file" in err
    (tmp_path / "test_ground_truth.json").write_text('{"3": "yes"}')
    skip = ("--on-bad-row", "skip")
    assert run("pubmedqa", tmp_path, "--split", "dev", "--out", out, capsys=capsys)[0] == 2
    assert run("pubmedqa", tmp_path, "--split", "test", "--out", out, *skip, capsys=capsys)[0] == 0
    assert [t.id for t in read_tasks(out)] == ["pubmedqa/3"]
    assert run("pubmedqa", tmp_path, "--split", "train", "--out", out, "--pages", pages, *skip, capsys=capsys)[0] == 0
    (task,) = read_tasks(out)
    assert task.metadata == {
        "answer": "maybe", "question_type": "pubmedqa", "pmid": "1", "year": None, "dataset": "pubmedqa",
    }  # fmt: skip
    assert "Does <b>X</b> help?" in task.messages[-1]["content"]
    stored = [json.loads(line) for line in pages.read_text().splitlines()]
    assert [page["url"] for page in stored] == [f"https://pubmed.ncbi.nlm.nih.gov/{n}/" for n in (1, 3)]


def test_a_page_shows_the_abstract_and_not_its_end() -> None:
    from tools.html import html_to_text

    html = page_html({"_key": "1", **PAPER})
    assert "secret" not in html
    assert "maybe" not in html
    text = html_to_text(html, "https://pubmed.ncbi.nlm.nih.gov/1/").text
    for there in ("Does <b>X</b> help?", "Methods", "We did & measured.", "It fell.", "Humans", "year not given"):
        assert there in text.replace("\\", "")
    for noise in ("Trending", "Clipboard", "Similar articles", "Policies", "window.ncbi"):
        assert noise not in text


@pytest.mark.shared_data
def test_the_real_data_sets(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, pages = tmp_path / "tasks.jsonl", tmp_path / "pages.jsonl"
    ids = {}
    for split in ("train", "test"):
        assert run("gsm8k", shared_data / "gsm8k", "--split", split, "--out", out, capsys=capsys)[0] == 0
        tasks = read_tasks(out)
        assert len(tasks) == {"train": 7473, "test": 1319}[split]
        assert all(float(t.metadata["answer"]) is not None for t in tasks)
        code, _, _ = run(
            "pubmedqa", shared_data / "pubmedqa", "--split", split, "--out", out, "--pages", pages, capsys=capsys
        )
        assert code == 0
        ids[split] = {t.id for t in read_tasks(out)}
        assert len(ids[split]) == 500
    assert not ids["train"] & ids["test"]
    papers = json.loads((shared_data / "pubmedqa" / "ori_pqal.json").read_text())
    bodies = [json.loads(line)["body"] for line in pages.read_text().splitlines()]
    assert len(bodies) == 1000
    assert not any(p["LONG_ANSWER"] in body for p, body in zip(papers.values(), bodies, strict=True))
