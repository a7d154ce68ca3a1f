"""Several sources and teachers: their configuration, the order of their tasks, their weights and their contexts."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import gradients_of, make_episodes, of_sources, run_config, tiny_model

from agent_loop.episodes import episode_from_json, episode_to_json
from agent_loop.renderer import Renderer, load_renderer
from agent_loop.types import Episode
from distill.batch import collate, items_of
from distill.config import LossConfig, RunConfig, TauScheduleConfig
from distill.config_load import ConfigError, load_config
from distill.config_rules import problems_of
from distill.cost import gpus_of
from distill.environment import make_env
from distill.metrics import rollout_metrics
from distill.plan import plan
from distill.resume import FREE_KEYS, changes_between, load_resumed
from distill.sources import of_source
from distill.student import Student
from distill.tasks import TaskMixture, TaskSource
from distill.teacher_context import ContextError, TeacherContext, read_examples
from distill.types import TeacherError
from envs.jsonl import TaskError
from envs.types import Task
from tests.runs.conftest import ROOT, save_tokenizer

SOURCES: dict[str, Any] = {"math": {"env": "gsm8k", "teacher": "strong"}, "web": {}}
TEACHERS: dict[str, Any] = {"strong": {"model": "big"}}


def config(**changes: Any) -> RunConfig:
    values = {
        "env": "medbrowse",
        "env_args": {"max_hops": 2},
        "student": {"model": "s"},
        "teacher": {"model": "t"},
        "sources": SOURCES,
        "teachers": TEACHERS,
    }
    return RunConfig.model_validate(values | changes)


# Configuration


def test_sources_take_what_they_do_not_say_from_the_run() -> None:
    found = config().all_sources
    assert [(name, s.env, s.env_args, s.teacher) for name, s in found.items()] == [
        ("math", "gsm8k", {}, "strong"),
        ("web", "medbrowse", {"max_hops": 2}, None),
    ]
    assert [(name, t.model) for name, t in config().all_teachers.items()] == [("strong", "big"), ("", "t")]
    (own,) = config(sources={}, teachers={}, tasks={"train": "a.jsonl", "eval": "b.jsonl"}).all_sources.items()
    assert own[0] == ""
    assert (own[1].env, own[1].env_args, own[1].tasks, own[1].eval_tasks) == (
        "medbrowse", {"max_hops": 2}, "a.jsonl", "b.jsonl",
    )  # fmt: skip


def test_a_run_needs_no_environment_where_each_source_has_one() -> None:
    values = config().model_dump(exclude={"env"})
    values["sources"]["web"]["env"] = "reasoning"
    assert RunConfig.model_validate(values).env == "gsm8k"
    values["sources"]["web"]["env"] = None
    with pytest.raises(ValueError, match="env"):
        RunConfig.model_validate(values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teachers": {}}, "sources.math.teacher is 'strong', but there is no [teachers.strong]; there are none"),
        ({"teachers": TEACHERS | {"idle": {"model": "x"}}}, "teachers.idle is the teacher of no source"),
        ({"sources": {}}, "teachers.strong is the teacher of no source"),
        ({"sources": SOURCES | {"turn_3": {}}}, "sources.turn_3 would be the metric teacher_kl/turn_3"),
        ({"sources": SOURCES | {"p50": {}}}, "sources.p50 would be the metric teacher_kl/p50"),
        ({"sources": {k: v | {"share": 0.0} for k, v in SOURCES.items()}}, "sources.math.share is 0 in all sources"),
        ({"tasks": {"train": "x.jsonl"}}, "tasks.train is for a run without [sources]; give sources.NAME.tasks"),
        ({"tasks": {"eval": "x.jsonl"}}, "tasks.eval is for a run without [sources]; give sources.NAME.eval_tasks"),
        ({"loss": {"type": "full"}}, "loss.type \"full\" takes one teacher"),
        ({"episodes": "x.jsonl"}, "sources are played, but a run on stored episodes plays nothing"),
        ({"sources": {"a": {"teacher": "strong"}}}, "teacher.model is about [teacher], which no source has"),
        ({"teachers": {"strong": {}}}, "teachers.strong.model not given, so the teacher would be the student itself"),
        (
            {"sources": {}, "teachers": {}, "loss": {"source_balance": 0.5}},
            "loss.source_balance weighs sources against one another",
        ),
        (
            {
                "teachers": {"strong": {"model": "m", "server": {"gpus": [1]}}},
                "teacher": {"model": "t", "server": {"gpus": [1]}},
            },
            "teacher.server.gpus shares GPU 1 with teachers.strong.server.gpus",
        ),
        (
            {"teachers": {"strong": {"model": "m", "api_key_env": "KEY"}}},
            "teachers.strong.api_key_env names a key, but there is no teachers.strong.base_url",
        ),
        (
            {"teachers": {"strong": {"on_student_server": True}}},
            "teachers.strong.on_student_server needs the student as a LoRA adapter",
        ),
        (
            {"teachers": {"strong": {"system_prompt": "It is {x}.", "prompt_fields": ["answer"]}}},
            "teachers.strong.prompt_fields names 'answer', but teachers.strong.system_prompt has no {answer}",
        ),
    ],
)  # fmt: skip
def test_what_cannot_hold_together(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are looked for below
        config(**changes)
    found = [f"{p.keys[0]} {p.message}" for p in caught.value.errors()[0]["ctx"]["error"].problems]  # type: ignore[attr-defined]
    assert [text for text in found if text.startswith(words)], found


def test_teachers_that_differ_in_their_words_alone_are_served_once() -> None:
    server = {"gpus": [1, 2], "data_parallel": 2}
    both = config(
        teacher={"model": "t", "server": server},
        teachers={"strong": {"model": "t", "server": server, "system_prompt": "x", "timeout_s": 5.0}},
    )
    assert list(both.places_of_teachers) == ["strong"]
    assert gpus_of(both, machine_has_gpu=True, trainer_gpus=1) == {"trainer": 1, "teacher": 2}
    apart = config(
        teacher={"base_url": "http://a/v1", "model": "t"}, teachers={"strong": {"model": "t", "server": server}}
    )
    assert list(apart.places_of_teachers) == ["strong", ""]
    assert gpus_of(apart, machine_has_gpu=True, trainer_gpus=1)["teacher"] is None
    known = config(**(apart.model_dump() | {"cost": {"teacher_gpus": 4}}))
    assert gpus_of(known, machine_has_gpu=True, trainer_gpus=1)["teacher"] == 6


def test_files_and_flags_reach_the_tables_and_mistakes_name_them(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(
        'env = "medbrowse"\n[student]\nmodel = "s"\n[teacher]\nmodel = "t"\n[sources.web]\n[sources.math]\n'
        'env-args = { a = 1 }\nteacher = "strong"\n[teachers.strong]\nbase-url = "http://x/v1"\n'
    )
    loaded = load_config([file], ["--sources.math.share", "3", "--teachers.strong.server", "none"])
    assert loaded.config.sources["math"].share == 3.0
    assert loaded.config.sources["math"].env_args == {"a": 1}
    assert loaded.provenance["sources.math.env_args.a"] == f"{file}:8"
    assert loaded.provenance["sources.math.share"] == "--sources.math.share"
    assert loaded.provenance["teachers.strong.base_url"] == f"{file}:11"
    assert loaded.provenance["sources.web.share"] == "default"
    file.write_text(
        file.read_text() + 'model = 3\n[sources.a-b]\n[sources.third]\nshar = 2\nshare = -1\nteacher = "strnog"\n'
    )
    with pytest.raises(ConfigError) as caught:
        load_config([file], ["--sources.math.tasc", "x"])
    assert [message.removeprefix(f"{file}:") for message in caught.value.messages] == [
        "15: unknown key 'sources.third.shar'. Did you mean 'sources.third.share'?",
        "--sources.math.tasc: unknown key. Did you mean 'sources.math.tasks'?",
        "13: sources.a-b: letters, digits and '_' only, a letter first: it becomes part of names of metrics and files; "
        'found the string "a-b"',
        "16: sources.third.share: wanted number >= 0; found the integer -1",
        '12: teachers.strong.model: wanted string, or "none"; found the integer 3',
        "17: sources.third.teacher is 'strnog', but there is no [teachers.strnog]; there are strong",
    ]


def test_a_resumed_run_may_move_its_teachers_and_not_change_its_sources(tmp_path: Path) -> None:
    earlier = config(teachers={"strong": {"model": "m", "base_url": "http://a/v1"}})
    (tmp_path / "config.json").write_text(json.dumps(earlier.model_dump(mode="json")))
    said: list[str] = []
    moved = load_resumed(tmp_path, [], ["--teachers.strong.base_url", "http://b/v1"], allowed=(), say=said.append)
    assert moved.config.teachers["strong"].base_url == ("http://b/v1",)
    assert said == ['changed for the rest of the run: teachers.strong.base_url: ["http://a/v1"] -> ["http://b/v1"]']
    with pytest.raises(ConfigError, match=r"sources\.math\.share: 1\.0 -> 2\.0"):
        load_resumed(tmp_path, [], ["--sources.math.share", "2"], allowed=(), say=said.append)
    allowed = load_resumed(
        tmp_path, [], ["--sources.math.share", "2"], allowed=("sources.math.share",), say=said.append
    )
    assert [c.key for c in changes_between(earlier, allowed.config)] == ["sources.math.share"]
    assert "teachers.NAME.server" in FREE_KEYS


def test_the_documented_example_is_a_run(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "concepts.md").read_text().partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "two.toml").write_text(text)
    found = load_config([tmp_path / "two.toml"]).config
    assert list(found.places_of_teachers) == [""]
    assert list(found.all_teachers) == ["", "told"]
    for name, words in (("short", "33% of the tasks"), ("long", "67% of the tasks")):
        assert f"source        {name}, {words}: medbrowse: " in plan(found)
    answers = [task.metadata["answer"] for task in make_env(found, "long", verify=False).default_tasks("train", 9)]
    assert all(answers)


# The order of tasks


def tasks_of(name: str, count: int) -> list[Task]:
    return [of_source(Task(id=f"t{i}", messages=({"role": "user", "content": "?"},)), name) for i in range(count)]


def test_tasks_are_taken_by_share_and_any_cut_goes_on_the_same() -> None:
    tasks = {"a": tasks_of("a", 7), "b": tasks_of("b", 3), "c": tasks_of("c", 5), "held_out": []}
    shares = {"a": 3.0, "b": 1.0, "c": 0.5, "held_out": 0.0}

    def mixture(cursor: int = 0) -> TaskMixture:
        return TaskMixture(tasks, shares, seed=4, cursor=cursor)

    whole = mixture()
    taken = whole.take(180)
    assert Counter(task.source for task in taken) == {"a": 120, "b": 40, "c": 20}
    for stop in range(1, 181):
        counts = Counter(task.source for task in taken[:stop])
        assert all(abs(counts[name] - stop * share / 4.5) < 1 for name, share in shares.items())
    for cut in (1, 5, 16, 99):
        first, rest = mixture(), mixture(cut)
        assert first.take(cut) + rest.take(180 - cut) == taken
        assert rest.cursor == 180
    # Within a source, an epoch has each of its tasks once.
    of_a = [task.id for task in taken if task.source == "a"]
    assert all(len(set(of_a[i : i + 7])) == 7 for i in range(0, 119, 7))
    assert whole.epochs() == {"epoch/a": 120 / 7, "epoch/b": 40 / 3, "epoch/c": 4.0}
    assert {task.id for task in taken[:4]} <= {f"{n}/t{i}" for n in "abc" for i in range(7)}


def test_one_source_has_the_order_of_a_run_without_the_table() -> None:
    tasks = tasks_of("", 9)
    alone = TaskMixture({"": tasks}, {"": 1.0}, seed=3)
    assert alone.take(20) == TaskSource(tasks, seed=3).take(20)
    assert alone.epochs() == {"epoch": 20 / 9}


def test_a_share_without_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match="no tasks"):
        TaskMixture({"a": []}, {"a": 1.0}, seed=0)
    with pytest.raises(ValueError, match="no share"):
        TaskMixture({"a": []}, {"a": 0.0}, seed=0)


def test_an_episode_says_its_source_and_one_without_sources_does_not() -> None:
    (episode,) = of_sources(make_episodes(1), "math")
    line = episode_to_json(episode)
    assert line["task"]["source"] == "math"
    assert episode_from_json(json.loads(json.dumps(line))).task.source == "math"
    plain = episode_to_json(make_episodes(1)[0])
    assert "source" not in plain["task"]
    assert episode_from_json(plain).task.source == ""


# Weights and metrics


@pytest.mark.parametrize("turn_balance", [0.0, 0.6])
@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
def test_source_weights_are_those_counted_by_hand(balance: float, turn_balance: float) -> None:
    episodes = of_sources(make_episodes(9, seed=3), "a", "b", "b")
    shares = {"a": 3.0, "b": 1.0, "absent": 5.0}
    options: dict[str, Any] = {"turn_balance": turn_balance}
    plain = collate(items_of(episodes, **options), packed=False)
    batch = collate(items_of(episodes, source_balance=balance, shares=shares, **options), packed=False)
    count = batch.num_trained
    assert float(batch.weights_N.sum()) == pytest.approx(count)
    of_row = [episodes[i].task.source for i in batch.episodes_N.tolist()]
    sums: dict[str, float] = defaultdict(float)
    before: dict[str, float] = defaultdict(float)
    for source, weight, without in zip(of_row, batch.weights_N.tolist(), plain.weights_N.tolist(), strict=True):
        sums[source] += weight
        before[source] += without
    for source, share in (("a", 0.75), ("b", 0.25)):
        assert sums[source] == pytest.approx((1 - balance) * before[source] + balance * share * count, rel=1e-5)
    ratio = batch.weights_N / plain.weights_N
    assert len(np.unique(ratio.numpy().round(4))) == (1 if balance == 0 else 2)


def test_the_loss_of_a_balanced_step_is_the_sum_over_sources_whatever_the_split() -> None:
    def episodes() -> list[Episode]:
        return of_sources(make_episodes(8, seed=1), "a", "b", "b", "b")

    found, losses, metrics = {}, {}, {}
    for balance, tokens in ((0.0, 10_000), (1.0, 10_000), (1.0, 40)):
        student = Student(
            tiny_model(), run_config(loss={"source_balance": balance}, optim={"micro_batch_tokens": tokens})
        )
        metrics[balance, tokens] = student.train_step(episodes(), step=1)
        losses[balance, tokens] = metrics[balance, tokens]["loss"]
        found[balance, tokens] = torch.cat([g.flatten() for g in gradients_of(student).values()])
    torch.testing.assert_close(found[1.0, 10_000], found[1.0, 40], rtol=1e-4, atol=1e-7)
    assert losses[1.0, 10_000] == pytest.approx(losses[1.0, 40], rel=1e-5)
    difference = found[1.0, 40] - found[0.0, 10_000]
    assert float(difference.norm() / found[0.0, 10_000].norm()) > 0.01
    # By hand: each source's episodes alone, each divided by its own tokens, then weighed by the shares 3 to 1.
    alone = {}
    for source in "ab":
        student = Student(tiny_model(), run_config())
        alone[source] = student.train_step([e for e in episodes() if e.task.source == source], step=1)["loss"]
    assert alone["a"] is not None
    assert alone["b"] is not None
    assert losses[1.0, 40] == pytest.approx(0.75 * alone["a"] + 0.25 * alone["b"], rel=1e-4)
    for line in metrics.values():  # what is counted is not weighed
        tokens = Counter({s: sum(e.traces[0].num_trained for e in episodes() if e.task.source == s) for s in "ab"})
        assert line["train/token_share/a"] == pytest.approx(tokens["a"] / tokens.total())
        mean = sum((line[f"teacher_kl/{s}"] or 0.0) * tokens[s] for s in "ab") / tokens.total()
        assert line["teacher_kl"] == pytest.approx(mean, rel=1e-5)


def test_a_run_of_one_source_has_no_metrics_by_source() -> None:
    line = Student(tiny_model(), run_config()).train_step(make_episodes(3), step=1)
    assert not [name for name in line if "token_share" in name or name == "loss/teacher_tau"]


def test_rewards_are_told_by_source() -> None:
    episodes = of_sources(make_episodes(4), "a", "b")
    for episode, reward in zip(episodes, (1.0, 0.0, 1.0, 1.0), strict=True):
        episode.reward, episode.rewards = reward, {"success": reward}
    metrics = rollout_metrics(episodes)
    found = {name: value for name, value in metrics.items() if name.startswith("reward")}
    assert found == {
        "reward": 0.75, "reward/success": 0.75, "reward/a/success": 1.0, "reward/b/success": 0.5
    }  # fmt: skip


# The schedule of teacher_tau


def test_the_schedule_goes_where_it_is_sent() -> None:
    linear = LossConfig(teacher_tau=1.0, teacher_tau_schedule=TauScheduleConfig(end=0.2, over=4))
    assert [linear.at(step).teacher_tau for step in range(1, 8)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    cosine = LossConfig(teacher_tau=0.0, teacher_tau_schedule=TauScheduleConfig(end=1.0, over=10, shape="cosine"))
    values = [cosine.at(step).teacher_tau for step in range(1, 12)]
    assert values[0] == 0.0
    assert values[5] == pytest.approx(0.5)
    assert values[10] == pytest.approx(1.0)
    steps = [b - a for a, b in pairwise(values)]
    assert min(steps) > 0
    assert steps[0] < steps[4] / 3
    assert LossConfig().at(7) == LossConfig()


def test_the_value_in_force_is_what_the_loss_uses_and_says() -> None:
    schedule = {"end": 0.5, "over": 2}
    for step, tau in ((1, 1.0), (2, 0.75), (3, 0.5), (9, 0.5)):
        scheduled, fixed = (
            Student(tiny_model(), run_config(loss=loss))
            for loss in ({"teacher_tau_schedule": TauScheduleConfig.model_validate(schedule)}, {"teacher_tau": tau})
        )
        found = scheduled.train_step(make_episodes(4), step=step)
        wanted = fixed.train_step(make_episodes(4), step=step)
        assert found["loss/teacher_tau"] == pytest.approx(tau)
        assert found["loss"] == pytest.approx(wanted["loss"])
        for name, gradient in gradients_of(scheduled).items():
            torch.testing.assert_close(gradient, gradients_of(fixed)[name])


def test_a_teacher_that_comes_in_later_is_no_teacher_without_weight() -> None:
    later = config(loss={"teacher_tau": 0.0, "teacher_tau_schedule": {"end": 1.0, "over": 500}})
    assert not list(problems_of(later))
    assert any("the run ends before" in note for note in later.notes())
    with pytest.raises(ValueError, match="nothing would be learnt"):
        config(loss={"teacher_tau": 0.0, "teacher_tau_schedule": {"end": 0.0, "over": 5}})


# What only the teacher sees


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return load_renderer(path)


@pytest.fixture
def examples(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any) -> Path:
        path = tmp_path / "examples.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


USER = {"role": "user", "content": "add 1 and 2"}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
DIALOGUE = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "3"},
    {"role": "assistant", "content": "3"},
]


def task(**changes: Any) -> Task:
    values: dict[str, Any] = {"messages": ({"role": "user", "content": "add 4 and 5"},), "id": "t"}
    return Task(**(values | changes))


def test_the_teachers_opening(renderer: Renderer, examples: Callable[..., Path]) -> None:
    path = examples({"messages": DIALOGUE}, "", {"messages": [USER, {"role": "assistant", "content": "3"}]})
    context = TeacherContext(renderer=renderer, system_prompt="T", examples=read_examples(path))
    own = task(messages=({"role": "system", "content": "S"}, *task().messages))
    for given, first in ((task(), "T"), (own, "T\n\nS")):
        found = context.messages(given)
        assert [m["role"] for m in found] == [
            "system", "user", "assistant", "tool", "assistant", "user", "assistant", "user"
        ]  # fmt: skip
        assert (found[0]["content"], found[-1]["content"]) == (first, "add 4 and 5")
    alone = TeacherContext(renderer=renderer, examples=read_examples(path)).messages(task())
    assert alone[0]["role"] == "user"
    assert len(alone) == 7


def test_the_context_takes_the_place_of_the_prompts_head_in_a_trace_of_many_turns(
    renderer: Renderer, examples: Callable[..., Path]
) -> None:
    context = TeacherContext(
        renderer=renderer, system_prompt="the numbers", examples=read_examples(examples({"messages": DIALOGUE}))
    )
    for given in (task(), task(messages=({"role": "system", "content": "add"}, *task().messages))):
        (episode,) = make_episodes(1)
        trace = episode.traces[0]
        prompt = renderer.render_prompt(given.messages, ())
        trace.token_ids = [*prompt, *trace.token_ids]
        head, skipped = context.head(given, trace)
        teachers = renderer.render_prompt(context.messages(given), ())
        assert [*head, *trace.token_ids[skipped : len(prompt)]] == teachers
        assert context.extra_tokens([given]) == len(teachers) - len(prompt) == len(head) - skipped
        trace.token_ids[0] += 1
        if skipped:
            with pytest.raises(TeacherError, match="does not begin with the task's prompt"):
                context.head(given, trace)


def test_facts_of_the_task_are_put_in_once_and_as_they_are(renderer: Renderer) -> None:
    context = TeacherContext(
        renderer=renderer,
        system_prompt="{answer} {why} {other} {0} {answer.__class__} {{answer}}",
        prompt_fields=("answer", "why"),
    )
    facts = {"answer": "{why} 100% \\1 {0.__class__}", "why": ["a", 2], "other": "never"}
    assert context.prompt_for(task(metadata=facts)) == (
        '{why} 100% \\1 {0.__class__} ["a", 2] {other} {0} {answer.__class__} {{why} 100% \\1 {0.__class__}}'
    )
    for lacking in ({"answer": "x"}, {"answer": "x", "why": None}):
        with pytest.raises(ContextError, match="task 't' has no 'why' in its metadata"):
            context.prompt_for(task(metadata=lacking))


def test_the_longest_fact_is_counted(renderer: Renderer) -> None:
    context = TeacherContext(renderer=renderer, system_prompt="it is {answer}", prompt_fields=("answer",))
    short, long = task(metadata={"answer": "1"}), task(metadata={"answer": "the numbers 12 and 7 " * 9})
    assert context.extra_tokens([short]) < context.extra_tokens([short, long, short])
    assert context.extra_tokens([long]) == context.extra_tokens([short, long])
    with pytest.raises(ContextError):
        context.extra_tokens([long, task()])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"messages": DIALOGUE}, "{"], r":2:2: "),
        ([{"messages": DIALOGUE, "id": "x"}], r":1: wanted an object .*found the keys 'messages', 'id'"),
        (["[]"], r":1: wanted an object .*found an array"),
        ([{"messages": []}], r":1: messages is empty"),
        ([{"messages": [USER]}], r":1: an example goes from a user's message to the assistant's answer, found user"),
        ([{"messages": DIALOGUE[1:]}], r":1: an example goes from"),
        ([{"messages": DIALOGUE[:2]}], r":1: the last message calls a tool"),
        ([{"messages": [{"role": "system", "content": "x"}, *DIALOGUE]}], r":1: an example has no system message"),
        ([{"messages": [USER, {"role": "assistant"}]}], r":1: messages\[1\].content must be a string"),
        ([""], "no dialogue"),
    ],
)
def test_an_example_that_is_none_is_refused_with_file_and_line(
    examples: Callable[..., Path], rows: list[Any], words: str
) -> None:
    with pytest.raises(TaskError, match=words) as caught:
        read_examples(examples(*rows))
    assert "examples.jsonl" in str(caught.value)
