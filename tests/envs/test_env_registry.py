"""Environments by name. What is registered stays in the process, so each test has ids of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import pytest

import envs
from envs.registry import EnvEntry, RegistryError, load
from envs.tool_env import ToolEnv
from envs.types import Limits, Task

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "tests" / "plugin_package"


class Plain(ToolEnv):
    def __init__(self, *, greeting: str = "hello", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.greeting = greeting

    def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> Sequence[Task]:
        return (Task(id="t", messages=({"role": "user", "content": self.greeting},)),)


class Strange(ToolEnv):
    def __init__(self, **kwargs: Any) -> None:
        raise TypeError("a bug of its own")


def python(code: str, *paths: Path) -> Any:
    """Run code in a process of its own; its standard output is JSON."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths)))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_class_by_name() -> None:
    envs.register("reg_class", Plain)
    env = envs.make("reg_class", limits=Limits(max_turns=3))
    assert isinstance(env, Plain)
    assert (env.env_id, env.limits.max_turns) == ("reg_class", 3)
    entry = envs.spec("reg_class")
    assert entry.source == "registered"
    assert entry.entry_point.endswith("test_env_registry:Plain")


def test_defaults_of_the_constructor() -> None:
    envs.register("reg/polite", Plain, greeting="good day")
    assert envs.make("reg/polite").default_tasks()[0].messages[0]["content"] == "good day"
    assert envs.make("reg/polite", greeting="hi").default_tasks()[0].messages[0]["content"] == "hi"


def test_gymnasium_makes_it_too() -> None:
    envs.register("reg_gym", Plain)
    env: Any = gymnasium.make("reg_gym", greeting="hey")
    assert isinstance(env, Plain)  # no wrapper in the way of areset and astep
    observation, _ = env.reset(seed=1)
    assert observation[0]["content"] == "hey"
    spec: Any = env.spec
    assert json.loads(spec.to_json())["id"] == "reg_gym"
    several = gymnasium.make_vec("reg_gym", num_envs=2, vectorization_mode="sync")
    observations, _ = several.reset(seed=1)
    assert [messages[0]["content"] for messages in observations] == ["hello", "hello"]
    several.close()


def test_gymnasium_finds_ours_in_a_fresh_process() -> None:
    code = """
import json, gymnasium
first = gymnasium.make("envs.registry:medbrowse")
print(json.dumps([type(first).__name__, gymnasium.make("medbrowse").env_id]))
"""
    assert python(code) == ["MedBrowseEnv", "medbrowse"]


def test_the_package_offers_what_an_environment_is_written_with() -> None:
    code = """
import json, sys, envs
heavy = [m for m in ("gymnasium", "numpy", "pydantic", "tools.tool") if m in sys.modules]
offered = {name: getattr(envs, name).__name__ for name in envs._PUBLIC}
print(json.dumps([heavy, offered]))
"""
    heavy, offered = python(code)
    assert heavy == []
    assert offered == {name: name for name in offered}
    assert {"AssistantMessage", "Limits", "StopReason", "Task", "ToolEnv", "make", "register", "tool"} <= set(offered)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = envs.nothing


def test_an_entry_point_is_imported_when_it_is_made() -> None:
    envs.register("reg_lazy", "no_such_module:Env")
    with pytest.raises(RegistryError, match=r"'reg_lazy' \(registered, no_such_module:Env\) cannot be imported"):
        envs.make("reg_lazy")
    envs.register("reg_nameless", "envs.types:NoSuchEnv")
    with pytest.raises(RegistryError, match="has no attribute 'NoSuchEnv'"):
        envs.make("reg_nameless")
    envs.register("reg_record", "envs.types:Task")
    with pytest.raises(RegistryError, match=r"is not a subclass of envs\.tool_env\.ToolEnv"):
        envs.make("reg_record")


def test_an_unknown_name_is_guessed() -> None:
    with pytest.raises(RegistryError, match=r"no environment 'medbrows'. Did you mean 'medbrowse'"):
        envs.make("medbrows")
    with pytest.raises(RegistryError, match=r"Known: .*medbrowse.*A folder's path"):
        envs.make("xyzzy")


def test_registering_twice() -> None:
    envs.register("reg_twice", Plain)
    envs.register("reg_twice", Plain)
    with pytest.raises(RegistryError, match=r"'reg_twice' is taken by .*Plain"):
        envs.register("reg_twice", "other_module:Other")
    with pytest.raises(RegistryError, match="taken"):
        envs.register("reg_twice", Plain, greeting="other")


@pytest.mark.parametrize("bad", ["", "a/b/c", "a b", "../x", "a/", "ä", "CartPole.v1"])
def test_bad_ids(bad: str) -> None:
    with pytest.raises(RegistryError, match="wanted name or owner/name"):
        envs.register(bad, Plain)


def test_gymnasiums_own_names_are_not_hidden() -> None:
    with pytest.raises(RegistryError, match="one of Gymnasium's own"):
        envs.register("CartPole-v1", Plain)


def test_bad_entry_points() -> None:
    with pytest.raises(RegistryError, match=r"'module:Class', found 'module.Class'"):
        envs.register("reg_bad", "module.Class")
    with pytest.raises(RegistryError, match="not a subclass"):
        envs.register("reg_bad", dict)  # type: ignore[arg-type]


def test_an_unknown_argument_is_named() -> None:
    envs.register("reg_args", Plain)
    with pytest.raises(RegistryError, match=r"'colour'.*Plain takes: greeting, limits, tasks, skip_verification"):
        envs.make("reg_args", colour="red")


def test_a_budget_for_a_tool_that_is_not_there() -> None:
    with pytest.raises(RegistryError, match="'serch', which MedBrowseEnv does not have; did you mean 'search'"):
        envs.make("medbrowse", limits=Limits(max_calls_per_tool={"serch": 3}))


def test_a_bug_in_a_constructor_stays_a_bug() -> None:
    envs.register("reg_strange", Strange)
    with pytest.raises(TypeError, match="a bug of its own"):
        envs.make("reg_strange")


def test_plugins_are_listed_without_import() -> None:
    code = (
        "import sys, json, envs; e = envs.list_envs(); "
        "print(json.dumps({'sources': {x.id: x.source for x in e}, "
        "'imported': [m for m in sys.modules if m.startswith('sample_plugin') or m == 'envs.medbrowse.env']}))"
    )
    found = python(code, PLUGINS)
    assert found["sources"] == {
        "counting": "plug-in",
        "gsm8k": "built-in",
        "medbrowse": "built-in",
        "reasoning": "built-in",
        "sample/broken": "plug-in",
        "sample/missing": "plug-in",
        "sample/wrong": "plug-in",
    }
    assert found["imported"] == []


def test_only_the_plugin_asked_for_is_imported() -> None:
    code = (
        "import sys, json, envs; env = envs.make('counting'); "
        "print(json.dumps({'id': env.env_id, 'tools': [s.name for s in env.tool_specs], "
        "'imported': [m for m in sys.modules if m.startswith('sample_plugin')]}))"
    )
    assert python(code, PLUGINS) == {"id": "counting", "tools": ["count"], "imported": ["sample_plugin"]}


def test_a_broken_plugin_says_why() -> None:
    code = """
import json, envs
from envs.registry import RegistryError
said = {}
for name in ("sample/broken", "sample/missing", "sample/wrong"):
    try:
        envs.make(name)
    except RegistryError as error:
        said[name] = str(error)
print(json.dumps(said))
"""
    said = python(code, PLUGINS)
    assert "cannot be imported: RuntimeError: this plug-in is broken" in said["sample/broken"]
    assert "no attribute 'NoSuchEnv'" in said["sample/missing"]
    assert "not a subclass of" in said["sample/wrong"]


def test_two_packages_of_one_name(tmp_path: Path) -> None:
    info = tmp_path / "other_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[distill_gym.envs]\ncounting = other_plugin:OtherEnv\n")
    code = "import json, envs; print(json.dumps({e.id: e.problem for e in envs.list_envs()}))"
    problems = python(code, PLUGINS, tmp_path)
    assert problems["medbrowse"] == ""
    assert "two packages offer it" in problems["counting"]


def test_a_known_problem_stops_before_the_import() -> None:
    entry = EnvEntry(id="x", entry_point="m:C", source="plug-in", problem="two packages offer it")
    with pytest.raises(RegistryError, match="two packages offer it"):
        load(entry)
