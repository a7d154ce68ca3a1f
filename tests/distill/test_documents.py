"""`distill.sft --data`: documents and dialogues; what of them is trained on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent_loop.episodes import EpisodeWriter
from agent_loop.renderer import Renderer, load_renderer
from agent_loop.types import Episode
from distill.demonstrations import demonstrations
from distill.documents import read_data
from distill.rundir import read_jsonl
from distill.sft import main
from distill.tiny.tokenizer import build_tokenizer
from tests.runs.conftest import save_model, save_tokenizer

TEXT = "The ferry to Orvo leaves at nine. Ça va.\n"
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "When does it leave?"},
    {"role": "assistant", "content": "At nine."},
    {"role": "user", "content": "And on Sundays?"},
    {"role": "assistant", "content": "At ten."},
]


@pytest.fixture(scope="module")
def tiny() -> Renderer:
    return load_renderer(build_tokenizer())


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def taken(renderer: Renderer, path: Path, max_tokens: int | None = None) -> list[Episode]:
    found = demonstrations(
        read_data([path], renderer, max_tokens=max_tokens), renderer, lambda _: (), only_success=True
    )
    assert (found.num_masked, found.num_cut, found.left_out.total()) == (0, 0, 0)
    return found.episodes


def trained(renderer: Renderer, episode: Episode) -> str:
    [trace] = episode.traces
    return renderer.decode([i for i, m in zip(trace.token_ids, trace.loss_mask, strict=True) if m])


def test_all_of_a_document_is_trained_on_and_its_end(tiny: Renderer, tmp_path: Path) -> None:
    [episode] = taken(tiny, written(tmp_path / "d.jsonl", {"text": TEXT}))
    [trace] = episode.traces
    assert tiny.decode(trace.token_ids) == TEXT + tiny.tokenizer.eos_token
    assert trace.loss_mask == [False] + [True] * (len(trace) - 1)
    assert trace.sampling_logprobs == [None] * len(trace)


def test_a_long_document_becomes_pieces_that_hold_it_all(tiny: Renderer, tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", {"text": TEXT * 5})
    [whole] = taken(tiny, path)
    pieces = taken(tiny, path, max_tokens=16)
    assert max(len(piece.traces[0]) for piece in pieces) == 16
    assert [i for piece in pieces for i in piece.traces[0].token_ids] == whole.traces[0].token_ids
    assert len({piece.id for piece in pieces}) == len(pieces) > 5


def test_control_tokens_in_a_document_are_letters(tiny: Renderer, tmp_path: Path) -> None:
    [episode] = taken(tiny, written(tmp_path / "d.jsonl", {"text": "a <|im_end|><|im_start|>assistant\nb <tool_call>"}))
    *ids, last = episode.traces[0].token_ids
    assert last == tiny.tokenizer.eos_token_id
    assert not set(ids) & set(tiny.added_token_ids)


def test_every_turn_of_the_assistant_is_trained_on(tiny: Renderer, tmp_path: Path) -> None:
    [episode] = taken(tiny, written(tmp_path / "d.jsonl", {"messages": DIALOGUE}))
    assert trained(tiny, episode) == "At nine.<|im_end|>At ten.<|im_end|>"
    whole = tiny.tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    assert tiny.decode(episode.traces[0].token_ids) == whole


def test_a_call_in_a_dialogue_is_written_as_the_template_writes_it(tiny: Renderer, tmp_path: Path) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "search", "arguments": '{"query": "Orvo"}'}}
    messages = [
        {"role": "user", "content": "Orvo?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "name": "search", "content": "a port"},
        {"role": "assistant", "content": "A port."},
    ]
    [episode] = taken(tiny, written(tmp_path / "d.jsonl", {"messages": messages}))
    said = '<tool_call>{"name": "search", "arguments": {"query": "Orvo"}}</tool_call><|im_end|>A port.<|im_end|>'
    assert trained(tiny, episode) == said


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "messages": DIALOGUE}, "wanted"),
        ({"prompt": "a"}, "found prompt"),
        (["a"], "found an array"),
        ({"text": " "}, "text must be a string with something in it"),
        ({"messages": []}, "messages must be an array"),
        ({"messages": DIALOGUE[:2]}, "the last message must be the assistant's, found role 'user'"),
        ({"messages": DIALOGUE[2:]}, "messages is empty; a task needs at least a user message"),
        ({"messages": [*DIALOGUE[:2], {"role": "assistant", "content": 3}]}, "messages[2].content must be a string"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any, message: str) -> None:
    save_model(tmp_path / "model", seed=0)
    path = written(tmp_path / "d.jsonl", {"text": TEXT}, row)
    assert main(["--data", str(path), "--student", str(tmp_path / "model"), "--out", str(tmp_path / "run")]) == 4
    error = capsys.readouterr().err
    assert f"{path}:2" in error
    assert message in error
    assert not (tmp_path / "run").exists()


def test_there_must_be_something(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--student", "s", "--out", str(tmp_path / "run")])
    assert "give --episodes, --data or both" in capsys.readouterr().err


def test_documents_dialogues_and_episodes_are_learnt_together(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", seed=0)
    save_tokenizer(model)
    renderer = load_renderer(model)
    data = written(tmp_path / "d.jsonl", *[{"text": TEXT}] * 6, *[{"messages": DIALOGUE}] * 6)
    recorded = taken(renderer, written(tmp_path / "more.jsonl", {"messages": DIALOGUE[:3]}))[0]
    recorded.reward = 1.0
    writer = EpisodeWriter(tmp_path / "episodes.jsonl")
    writer.append(recorded)
    writer.close()
    run = tmp_path / "run"
    command = ["--data", str(data), "--episodes", str(tmp_path / "episodes.jsonl"), "--only-success"]
    command += ["--student", str(model), "--out", str(run), "--epochs", "10", "--batch-size", "13", "--lr", "1e-2"]
    assert main(command) == 0
    record = json.loads((run / "run.json").read_text())
    assert (record["num_episodes"], record["data"], record["left_out"]) == (13, [str(data)], {})
    lines = read_jsonl(run / "metrics.jsonl")
    assert lines[-1]["nll"] < 0.7 * lines[0]["nll"]
