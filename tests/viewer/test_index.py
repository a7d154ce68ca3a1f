"""Index, rows and search on files of every kind (B14, B15)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent_loop.episodes import BadLine, read_episodes
from agent_loop.summary import gaps_of
from agent_loop.types import Episode
from agent_loop.view.index import Index
from agent_loop.view.search import BadQuery, find
from tests.viewer.conftest import hostile, line, marks


@pytest.fixture
def index(run: Path, tmp_path: Path) -> Any:
    found = Index([run], tmp_path / "cache")
    yield found
    found.close()


def test_rows_say_what_the_exact_reader_says(index: Index, run: Path) -> None:
    episodes = [e for path in sorted((run / "episodes").iterdir()) for e in read_episodes(path)]
    assert len(index.rows()) == len(episodes) == 10
    for row, episode in zip(index.rows(), episodes, strict=True):
        assert isinstance(episode, Episode)
        assert (row.turns, row.sampled, row.tokens) == (len(episode.turns), episode.num_sampled, 300)
        gaps = [g for t in episode.traces for g in gaps_of(t) if g is not None and abs(g) < 9000]
        assert row.kl == pytest.approx(sum(gaps) / len(gaps))
        assert row.kl_max is not None
        assert abs(row.kl_max) == max(map(abs, gaps))
        assert len(index.raw(row)) == row.length
    assert index.rows()[7].unusable == 1
    assert index.rows()[7].kl_max == 30.0


BAD = [
    b"{", b"[]", b"null", b"\xff\xfe{}", b'{"schema_version": 2}', b"[" * 100_000, b'{"schema_version": 1}', b"\x00",
]  # fmt: skip


def broken(key: str, value: Any) -> bytes:
    def change(episode: dict[str, Any]) -> None:
        episode["traces"][0][key] = value

    return line(1, change)


BAD_TRACES = [
    broken("token_ids", [1, 2]), broken("token_ids", [-1] * 300), broken("loss_mask", [2] * 300),
    broken("teacher_logprobs", [-0.5]), broken("sampling_logprobs", ["x"] * 300),
    line(1).replace(b'"teacher_logprobs": [null', b'"teacher_logprobs": [NaN'),
]  # fmt: skip


def test_a_bad_line_is_one_marked_row_and_the_others_are_fine(tmp_path: Path) -> None:
    bad = [*BAD, *BAD_TRACES]
    parts = b"\r\n" + b"".join(line(i) + raw.rstrip(b"\n") + b"\n" for i, raw in enumerate(bad))
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(b"\n" + parts + line(99)[:-40])
    index = Index([path], tmp_path / "cache")
    problems = [row for row in index.rows() if row.problem is not None]
    assert len(index.rows()) - len(problems) == len(bad)
    assert len(problems) == len(bad) + 1
    assert "no end" in (problems[-1].problem or "")
    exact = {item.line_number: item.reason for item in read_episodes(path) if isinstance(item, BadLine)}
    assert {row.line for row in problems} == set(exact)
    index.close()


def test_unknown_fields_lone_surrogates_and_foreign_order(tmp_path: Path) -> None:
    def change(value: dict[str, Any]) -> None:
        value["from_the_future"] = {"a": 1}
        value["task"]["messages"][0]["content"] = "\ud800 lone"

    value = json.loads(line(1, change))
    moved = json.dumps({"traces": value.pop("traces"), **value}).encode() + b"\n"
    (tmp_path / "e.jsonl").write_bytes(line(1, change) + moved)
    index = Index([tmp_path / "e.jsonl"], tmp_path / "cache")
    assert [row.problem for row in index.rows()] == [None, None]
    assert len(find(index, "user:lone").rows) == 2
    index.close()


def test_the_cache_is_used_rebuilt_and_never_in_the_run(run: Path, tmp_path: Path) -> None:
    before = sorted(run.rglob("*"))
    first = Index([run], tmp_path)
    rows = first.rows()
    first.close()
    second = Index([run], tmp_path)
    assert second.rows() == rows
    second.close()
    [database] = tmp_path.glob("*.sqlite")
    database.write_bytes(b"no database" * 1000)
    third = Index([run], tmp_path)
    assert third.rows() == rows
    third.close()
    assert sorted(run.rglob("*")) == before


def test_appended_lines_are_read_once_and_a_rewritten_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_bytes(line(0) + line(1)[:50])
    index = Index([path], tmp_path / "cache")
    assert [row.problem is None for row in index.rows()] == [True, False]
    keys = [row.key for row in index.rows()]
    with path.open("ab") as file:
        file.write(line(1)[50:] + line(2))
    assert index.refresh()
    assert [row.id for row in index.rows()] == ["1/t0/0", "1/t1/0", "1/t2/0"]
    assert [row.key for row in index.rows()][:2] == keys
    assert not index.refresh()
    path.write_bytes(line(5))
    assert index.refresh()
    assert [row.id for row in index.rows()] == ["1/t5/0"]
    index.close()


def test_a_link_out_of_the_run_is_no_file_of_it(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_bytes(line(1))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.jsonl").write_bytes(line(2))
    (tmp_path / "run" / "b.jsonl").symlink_to(tmp_path / "secret.jsonl")
    index = Index([tmp_path / "run"], tmp_path / "cache")
    assert [row.file for row in index.rows()] == ["a.jsonl"]
    index.close()


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("", 10), ("step:1", 6), ("step>1", 4), ("is:failed", 1), ("-is:failed", 9), ("tools:search", 9),
        ("tool:zebrafish", 1), ("user:zebrafish", 0), ("ZEBRAFISH", 1), ('tool:"zebrafish answer"', 1), ("tool:ÜNÏ", 1),
        ("漢字", 1), ("tool:timeout", 1), ("user:question step:1", 6), ("tool_errors>0", 1), ("id:/t0/", 2),
        ("unusable>0", 1), ("kl>100", 0), ("loss_mask", 0),
    ],
)  # fmt: skip
def test_queries(index: Index, query: str, count: int) -> None:
    assert len(find(index, query).rows) == count


@pytest.mark.parametrize("query", ["colour:red", "step:x", "-tool:x"])
def test_a_query_that_cannot_be_understood(index: Index, query: str) -> None:
    with pytest.raises(BadQuery):
        find(index, query)


def test_order_and_time(index: Index) -> None:
    values = [row.kl for row in find(index, "", sort="-kl").rows if row.kl is not None]
    assert values == sorted(values, reverse=True)
    assert find(index, "anything", budget_s=0).searched == 0
    with pytest.raises(BadQuery):
        find(index, "", sort="__class__")


def test_hostile_and_marked_lines_are_episodes(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_bytes(line(1, hostile) + line(2, marks))
    assert all(isinstance(item, Episode) for item in read_episodes(tmp_path / "e.jsonl"))
