"""The invented registry, its pages and its tasks."""

from __future__ import annotations

import re

import pytest

from envs.medbrowse.registry import SITE, Registry
from envs.medbrowse.tasks import MAX_HOPS, QUESTION_TYPES, make_task, make_tasks
from tools.html import html_to_text


@pytest.mark.parametrize("num_chains", [2, 6])
def test_text_of_every_page_is_what_its_html_gives(num_chains: int) -> None:
    for seed in range(20):
        for page in Registry.generate(seed, num_chains=num_chains).pages.values():
            read = html_to_text(page.html, page.url)
            assert (page.title, page.text) == (read.title, read.text)
            assert "<nav>" in page.html
            assert "Most read" not in page.text


def test_a_registry_is_fixed_by_its_seed_and_links_stay_inside() -> None:
    registry = Registry.generate("x", num_chains=6)
    assert registry == Registry.generate("x", num_chains=6)
    assert registry != Registry.generate("y", num_chains=6)
    assert len(registry.pages) == 36
    for page in registry.pages.values():
        for path in re.findall(r"\]\(/(\w+)\)", page.text):
            assert SITE + path in registry.pages


def test_names_and_trials_of_the_splits_are_disjoint() -> None:
    def entities(split: str) -> set[str]:
        registries = [Registry.generate(seed, split=split, num_chains=4) for seed in range(400)]  # type: ignore[arg-type]
        trials = [trial for registry in registries for trial in registry.trials]
        ingredients = [trial.more_effective for trial in trials]
        stems = {name[:4] for i in ingredients for name in (i.name, i.applicant.name)}
        return stems | {trial.nct_id for trial in trials}

    train, test = entities("train"), entities("test")
    assert len(train) > 1000
    assert len(test) > 500
    assert not train & test


def test_no_number_or_first_syllable_stands_for_two_things() -> None:
    for seed in range(50):
        registry = Registry.generate(seed)
        ingredients = [trial.more_effective for trial in registry.trials]
        names = [name[:2] for i in ingredients for name in (i.name, i.applicant.name)]
        assert len(names) == len(set(names))
        pairs = [t.nct_id[k : k + 2] for t in registry.trials for k in (3, 5, 7, 9)]
        pairs += [n for i in ingredients for n in (*i.market_day.open.split("."), *i.market_day.close.split("."))]
        assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize("arguments", [{"num_chains": 1}, {"num_chains": 7}, {"split": "eval"}])
def test_bad_registries_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Registry.generate(0, **arguments)  # type: ignore[arg-type]


def test_tasks_are_self_contained_and_of_all_types() -> None:
    tasks = make_tasks(3, 10, split="test")
    assert [task.metadata["question_type"] for task in tasks[:5]] == [kind.name for kind in QUESTION_TYPES]
    assert len({task.id for task in tasks}) == 10
    for task in tasks:
        origin = task.metadata["registry"]
        kind = next(kind for kind in QUESTION_TYPES if kind.name == task.metadata["question_type"])
        registry = Registry.generate(origin["seed"], split=origin["split"], num_chains=origin["num_chains"])
        trial = next(trial for trial in registry.trials if trial.nct_id in task.messages[-1]["content"])
        assert task.metadata["answer"] == kind.answer(trial.more_effective)
        assert make_task(origin["seed"], kind=kind, split="test") == task
        assert task.metadata["answer"] not in task.messages[-1]["content"]


def test_max_hops() -> None:
    assert {task.metadata["hops"] for task in make_tasks(0, 20, max_hops=2)} == {1, 2}
    for hops in (0, MAX_HOPS + 1):
        with pytest.raises(ValueError, match="max_hops"):
            make_tasks(0, 1, max_hops=hops)
