"""Task files: what is read, what is refused, and where the message points."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.dataset import (
    TaskError,
    UniqueIds,
    content_id,
    iter_tasks,
    read_tasks,
    task_from_row,
    task_to_row,
    write_tasks,
)
from envs.types import Task

GOOD = '{"messages": [{"role": "user", "content": "%s"}]}'


def write(path: Path, data: str | bytes) -> Path:
    file = path / "tasks.jsonl"
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return file


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_bom_crlf_blank_lines_and_a_missing_last_line_end_are_accepted(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" + (GOOD % "a").encode() + b"\r\n\r\n  \n" + (GOOD % "b \xe2\x80\xa8").encode("latin-1")
    tasks = read_tasks(write(tmp_path, data))
    assert [t.messages[0]["content"] for t in tasks] == ["a", "b \u2028"]


@pytest.mark.parametrize(
    ("line", "place", "says"),
    [
        ("{bad", ":2:2", "not JSON"),
        ('{"messages": [{"role": "user", "content": "x"}], "a": NaN}', ":2", "NaN is not a JSON number"),
        ('{"messages": [{"role": "user", "content": "x"}], "metadata": {"a": 1e999}}', ":2", "metadata.a is inf"),
        ('{"messages": [{"role": "user", "content": "x", "role": "user"}]}', ":2", "'role' stands twice"),
        ('{"message": []}', ":2", "unknown key 'message' (did you mean 'messages'?)"),
        ("{}", ":2", "messages must be an array, found nothing"),
        ('{"messages": []}', ":2", "messages is empty"),
        ("[1]", ":2", "a row must be an object, found an array"),
        ("null", ":2", "a row must be an object, found null"),
        ('{"messages": "hi"}', ":2", 'messages must be an array, found a string ("hi")'),
        ('{"messages": [{"role": "usr", "content": "x"}]}', ":2", "messages[0].role must be one of"),
        (
            '{"messages": [{"role": "user", "content": 3}]}',
            ":2",
            "messages[0].content must be a string, found a number",
        ),
        ('{"messages": [{"role": "user", "content": "x", "contnt": 1}]}', ":2", "did you mean 'content'"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', ":2", "the last message must be the user's"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', ":2", "needs the tool_call_id"),
        (GOOD % "x\\u0000", ":2", "messages[0].content holds a NUL"),
        (GOOD % "x\\ud800", ":2", "lone surrogate (\\ud800)"),
        (GOOD % "x\0", ":2:45", "not JSON"),
        ('{"messages": [{"role": "user", "content": "x"}], "id": 3}', ":2", "id must be a string"),
        ('{"messages": [{"role": "user", "content": "x"}], "id": "first"}', ":2", "'first' was used by an earlier row"),
        ('{"messages": [{"role": "user", "content": "x"}], "rewards": [1]}', ":2", "rewards must be a list of names"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": ["a", "a"]}', ":2", "tools has a name twice"),
        ('{"messages": [{"role": "user", "content": "x"}], "metadata": null}', ":2", "metadata must be an object"),
        ('{"a": %s}' % ("[" * 100_000), ":2", "nested too deeply"),
        ('{"messages": [], "metadata": {"a": ' + "[" * 60 + "]" * 60 + "}}", ":2", "nested more than 50 deep"),
        ('{"messages": [], "metadata": {"a": 1%s}}' % ("0" * 5000), ":2", "integer string conversion"),
    ],
    ids=lambda value: value if len(value) < 50 else "long",
)
def test_a_bad_row_is_named_by_place_and_the_others_survive(tmp_path: Path, line: str, place: str, says: str) -> None:
    first = '{"messages": [{"role": "user", "content": "a"}], "id": "first"}'
    file = write(tmp_path, f"{first}\n{line}\n{GOOD % 'b'}\n")
    with pytest.raises(TaskError) as caught:
        read_tasks(file)
    assert str(caught.value).startswith(f"{file}{place}: ")
    assert says in str(caught.value)
    assert [t.messages[0]["content"] for t in read_tasks(file, on_bad_row="skip")] == ["a", "b"]


def test_bytes_that_are_not_utf8_are_one_bad_row(tmp_path: Path) -> None:
    file = write(tmp_path, (GOOD % "a").encode() + b'\n{"messages": "\xff"}\n' + (GOOD % "b").encode())
    with pytest.raises(TaskError, match=r":2:15: not UTF-8: byte 0xff"):
        read_tasks(file)
    assert len(read_tasks(file, on_bad_row="skip")) == 2


def test_a_torn_last_line_says_so(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD % "a" + "\n" + (GOOD % "b")[:-9])
    with pytest.raises(TaskError, match="ends here without a line end"):
        read_tasks(file)


def test_skipped_rows_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path, "x\ny\n" + GOOD % "a")
    read_tasks(file, on_bad_row="skip")
    assert f"skipped 2 bad rows, kept 1; the first: {file}:1:1: not JSON" in caplog.text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "there are only blank lines"),
        (gzip.compress(b"{}"), "gzip-compressed"),
        (b"PAR1....", "Parquet"),
        ("{}".encode("utf-16"), "UTF-16"),
        (b"x\ny\n", "all 2 rows are bad"),
    ],
)
def test_a_file_that_is_no_task_file_is_never_skipped_over(tmp_path: Path, data: bytes, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        read_tasks(write(tmp_path, data), on_bad_row="skip")


def test_missing_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="there is no such file"):
        read_tasks(tmp_path / "none.jsonl")
    with pytest.raises(TaskError, match="is a directory"):
        read_tasks(tmp_path)


def test_limit_stops_before_later_faults(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD % "a" + "\nbad\n")
    assert len(read_tasks(file, limit=1)) == 1
    with pytest.raises(ValueError, match="at least 1"):
        list(iter_tasks(file, limit=0))


def test_ids_are_hashes_of_the_content_and_unique(tmp_path: Path) -> None:
    tasks = read_tasks(write(tmp_path, "\n".join([GOOD % "a", GOOD % "a", GOOD % "b", GOOD % "a"])))
    first = tasks[0].id
    assert first == content_id(tasks[0])
    assert len(first) == 16
    assert [t.id for t in tasks] == [first, f"{first}-2", tasks[2].id, f"{first}-3"]
    assert tasks[2].id != first


def test_unique_ids_grow() -> None:
    ids = UniqueIds()
    for i in range(5000):
        ids.claim(Task(messages=(), id=f"t{i}"), "here")
    for i in (0, 511, 512, 4999):
        with pytest.raises(TaskError, match="used by an earlier row"):
            ids.claim(Task(messages=(), id=f"t{i}"), "here")


def test_tool_calls_of_examples_are_read_in_both_shapes() -> None:
    for arguments in ({"a": 1}, '{"a": 1}'):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [*user("q"), {"role": "assistant", "content": None, "tool_calls": [call]}]
        messages += [{"role": "tool", "tool_call_id": "c", "content": "r"}, *user("and?")]
        task = task_from_row({"messages": messages}, "here")
        assert task.messages[1]["content"] == ""
        assert task.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    call["function"] = {"name": "f", "arguments": "{"}
    with pytest.raises(
        TaskError, match=r"messages\[1\].tool_calls\[0\].function.arguments is a string, but not of JSON"
    ):
        task_from_row({"messages": messages}, "here")


text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.tuples(text, st.dictionaries(text, json_values, max_size=3)), min_size=1, max_size=5))
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    tasks = [
        Task(messages=({"role": "user", "content": content},), metadata=metadata, tools=("a",), rewards=("r",))
        for content, metadata in rows
    ]
    file = tmp_path_factory.mktemp("t") / "tasks.jsonl"
    assert write_tasks(file, tasks) == len(tasks)
    read = read_tasks(file)
    assert [task_to_row(t) | {"id": ""} for t in read] == [task_to_row(t) | {"id": ""} for t in tasks]
    assert len({t.id for t in read}) == len(tasks)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD % "old")
    bad = Task(messages=({"role": "user", "content": "x"},), metadata={"a": float("nan")})
    with pytest.raises(TaskError, match=r"task 2: metadata\.a is nan"):
        write_tasks(file, [Task(messages=({"role": "user", "content": "x"},)), bad])
    assert [f.name for f in tmp_path.iterdir()] == ["tasks.jsonl"]
    assert read_tasks(file)[0].messages[0]["content"] == "old"
    with pytest.raises(OSError, match="not a plain file"):
        write_tasks("/dev/null", [])


def test_a_written_line_is_one_json_object(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    write_tasks(file, [Task(messages=({"role": "user", "content": "a\nb\u2028c"},), metadata={"k": "ü"})])
    (line,) = file.read_bytes().splitlines()
    assert json.loads(line)["metadata"] == {"k": "ü"}
