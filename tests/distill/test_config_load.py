"""Layers, provenance, and every mistake at once with its place."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import RunConfig
from distill.config_cli import main, schema_text
from distill.config_keys import all_keys, help_text, suggestion
from distill.config_load import (
    ConfigError,
    LoadedConfig,
    add_config_arguments,
    default_file,
    load_config,
    load_from_arguments,
)
from distill.resume import FREE_KEYS
from distill.toml_lines import key_lines

ROOT = Path(__file__).resolve().parents[2]
BASE = 'env = "e"\n[student]\nmodel = "s"\n[teacher]\nmodel = "t"\n'


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a file into an empty working directory and gives its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "a.toml") -> str:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write


def mistakes(*arguments: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(*arguments)
    return caught.value.messages


def test_later_layers_win_and_every_value_has_an_origin(toml: Any) -> None:
    a = toml(BASE + "[loss]\nrho = 3\nteacher_tau = 0.5\n[env_args]\nx = 1\ny = {z = 2}\n[student.lora]\nrank = 4\n")
    b = toml("[loss]\nteacher-tau = 0.25\n[env_args]\nx = 2\n[optim]\nbetas = [0.5, 0.6]\n", "b.toml")
    loaded = load_config([a, b], ["--loss.adv_tau=0", "--optim.lr", "1e-4", "--env_args.y.z", "3"])
    config, origin = loaded.config, loaded.provenance
    assert (config.loss.rho, config.loss.teacher_tau, config.optim.lr, config.optim.betas) == (
        3,
        0.25,
        1e-4,
        (0.5, 0.6),
    )
    assert config.env_args == {"x": 2, "y": {"z": 3}}
    assert config.student.lora is not None
    assert config.student.lora.rank == 4
    assert origin["loss.rho"] == "a.toml:7"
    assert origin["loss.teacher_tau"] == "b.toml:2"
    assert origin["optim.lr"] == "--optim.lr"
    assert origin["env_args.x"] == "b.toml:4"
    assert origin["env_args.y"] == "--env_args.y.z"
    assert origin["student.lora.alpha"] == "default"
    assert set(origin.values()) > {"default"}


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--steps", "7"], "steps", 7),
        (["--optim.lr=1e-3"], "optim.lr", 1e-3),
        (["--optim.lr", "1"], "optim.lr", 1.0),
        (["--run-id", "123"], "run_id", "123"),
        (["--run_id", '"123"'], "run_id", "123"),
        (["--student.gradient-checkpointing"], "student.gradient_checkpointing", True),
        (["--student.gradient_checkpointing", "--steps", "3"], "student.gradient_checkpointing", True),
        (["--skip_verification", "false"], "skip_verification", False),
        (["--optim.betas", "0.1,0.2"], "optim.betas", (0.1, 0.2)),
        (["--optim.betas=[0.1, 0.2]"], "optim.betas", (0.1, 0.2)),
        (["--check.skip", "a, b"], "check.skip", ("a", "b")),
        (["--check.skip", '["a"]'], "check.skip", ("a",)),
        (["--student.lora.target_modules", "q_proj,v_proj"], "student.lora.target_modules", ("q_proj", "v_proj")),
        (["--rollout.max_calls_per_tool.search", "4"], "rollout.max_calls_per_tool", {"search": 4}),
        (["--env_args.max-hops", "2"], "env_args", {"max_hops": 2}),
        (["--env_args.name", "a b"], "env_args", {"name": "a b"}),
        (["--teacher.system_prompt", "a = [b\nc"], "teacher.system_prompt", "a = [b\nc"),
        (["--teacher.system_prompt", "1\nmodel = 2"], "teacher.system_prompt", "1\nmodel = 2"),
        (["--student.max_context", "4096", "--student.max_context", "none"], "student.max_context", None),
        (["--student.lora.rank", "3", "--student.lora", "none"], "student.lora", None),
    ],
)
def test_flags(toml: Any, flags: list[str], key: str, value: Any) -> None:
    found: Any = load_config([toml(BASE)], flags).config
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


def test_overrides_may_be_values() -> None:
    overrides = {"env": "e", "student.model": "s", "teacher": {"model": "t"}, "loss.rho": 4.0}
    assert load_config([], overrides).config.loss.rho == 4.0


def test_all_mistakes_at_once_each_with_its_line(toml: Any) -> None:
    a = toml(
        """# a comment with [brackets] and "quotes"
steps = "100"
temperature = 0.7
[student]
model = "s"
"max-context" = 100
api_key = "sk-aaaaaaaaaaaaaaaaaaaaaaa"
[teacher]
model = \"\"\"
[not.a.table]
x = 1
\"\"\"
base_url = "localhost:8000/v1"
[trainer.loss]
taw = 2
[loss]
type = "topk"
teacher_taw = 1.0
[rollout]
max_episode_tokens = 4000
max_calls_per_tool = { search = -1 }
[optim]
lr = "1e-5"
betas = [0.9,
  2.0]
"""
    )
    b = toml("[loss]\nrho = \n", "b.toml")
    found = mistakes(
        [a, b, "none.toml"],
        ["--losss.rho", "3", "--seed", "--eval.at_start", "maybe", "--optim.lr=sk-aaaaaaaaaaaaaaaaaaaaaaa"],
    )
    expected = [
        "a.toml:3: unknown key 'temperature'. Did you mean 'rollout.temperature'?",
        "a.toml:7: unknown key 'student.api_key'. Did you mean 'student.api_key_env'?",
        "a.toml:15: unknown key 'trainer.loss.taw'. [loss] has type, teacher_tau, adv_tau, ",
        "a.toml:18: unknown key 'loss.teacher_taw'. Did you mean 'loss.teacher_tau'?",
        "b.toml:2:7: not TOML: Invalid value",
        "none.toml: there is no such file. Shipped in configs/: ",
        "--losss.rho: unknown key. Did you mean 'loss.rho'?",
        "--seed: a value is missing.",
        "env is not set; set it in a file or with --env.",
        'a.toml:2: steps: wanted integer >= 1; found the string "100" (without the quotes)',
        "a.toml:13: teacher.base_url: wanted an http:// or https:// address",
        "a.toml:21: rollout.max_calls_per_tool.search: wanted ",
        "--optim.lr: wanted number > 0 and <= 1; found something like a key (not shown)",
        "a.toml:24: optim.betas: wanted array of 2 number >= 0 and < 1; found the number 2.0",
        '--eval.at_start: wanted boolean; found the string "maybe"',
        'a.toml:17: teacher.top_k is 0, but loss.type "topk" needs',
        "a.toml:20: rollout.max_episode_tokens is 4000, more than student.max_context (100)",
        "a.toml:6: rollout.max_turn_tokens is 1024: with student.max_context 100 no room",
    ]
    assert len(found) == len(expected)
    for line in expected:
        assert any(f.startswith(line) for f in found), f"{line!r} not in\n" + "\n".join(found)
    assert "sk-aaa" not in "".join(found)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a = 1\na = 2\n", "a.toml:2:6: not TOML: Cannot overwrite a value"),
        ("[loss]\nrho = 2\nrh", "a.toml:3: not TOML"),
        (b"env = '\xff'", "a.toml: not UTF-8 at byte 7"),
        ("x" * (2**20 + 1), "a.toml is larger than 1 MiB"),
        ("x = 1" + "0" * 5000, "a.toml: Exceeds the limit"),
        ("x = " + "[" * 100_000, "a.toml: "),
        ("[loss]\nteacher_tau = 1\nteacher-tau = 2\n", "a.toml:3: 'loss.teacher_tau' is set twice"),
        ('loss = "x"\n' + BASE, "a.toml:1: loss: wanted table; found the string"),
        ("[[loss]]\nrho = 2\n", "a.toml:1: loss: wanted table; found the array"),
        ("[env]\nx = 1\n", "a.toml:1: env: wanted string; found the table"),
        ("steps = 99999999999999999999999999\n" + BASE, "a.toml:1: steps"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "bytes",
)
def test_faults_of_files(toml: Any, text: str | bytes, says: str) -> None:
    found = mistakes([toml(text)])
    assert any(f.startswith(says) for f in found), found


def test_a_folder_and_a_json_file(toml: Any) -> None:
    assert "is a folder" in mistakes(["."])[0]
    assert "a.json:1:2: not JSON" in mistakes([toml("{", "a.json")])[0]
    text = load_config([toml(BASE)]).config.model_dump_json()
    assert load_config([toml(text, "config.json")]).config == load_config(["a.toml"]).config


def test_windows_line_ends_and_bom_keep_lines(toml: Any) -> None:
    found = mistakes([toml(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode() + b"\r\nzzzz = 1\r\n")])
    assert found == ("a.toml:7: unknown key 'teacher.zzzz'. [teacher] has " + found[0].partition(" has ")[2],)


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        ("loss.teacher_taw", "'loss.teacher_tau'"),
        ("lr", "'optim.lr'"),
        ("trainer.optim.lr", "'optim.lr'"),
        ("learning_rate", "'optim.lr'"),
        ("trainer.loss.teacher_tau", "'loss.teacher_tau'"),
        ("orchestrator.buffer.skip_verification", "'skip_verification'"),
        ("teacher.path", "'teacher.model'"),
        ("rolout.max_turns", "'rollout.max_turns'"),
        ("max-turns", "'rollout.max_turns'"),
        ("studnet", "'student'"),
        ("kl_penalty_coef", "'loss.teacher_tau'"),
    ],
)
def test_suggestions_search_the_whole_tree(unknown: str, meant: str) -> None:
    assert suggestion(unknown).startswith(f" Did you mean {meant}")


def test_nothing_near_gives_no_suggestion() -> None:
    assert suggestion("zzzzqqqq") == ""


def test_flags_that_stand_alone(toml: Any) -> None:
    assert "'7' stands alone" in mistakes([toml(BASE)], ["7"])[0]
    assert "--: " not in mistakes(["a.toml"], ["--"])[0]


names = st.text("abc-_", min_size=1, max_size=3) | st.text(" \"'.#[]=é\\\n\t", min_size=1, max_size=3)
values = st.recursive(
    st.integers() | st.text(" \"'#[]{}=\\\nab", max_size=8) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
tables = st.recursive(
    st.dictionaries(names, values, max_size=3),
    lambda inner: st.dictionaries(names, values | inner, max_size=3),
    max_leaves=6,
)


@given(tables, st.booleans())
def test_line_numbers_are_those_of_the_keys(tree: dict[str, Any], multiline: bool) -> None:
    lines: list[str] = []
    expected: dict[tuple[str, ...], int] = {}

    def literal(value: Any) -> str:
        if isinstance(value, list):
            return "[" + ",\n  # ] comment\n".join(map(literal, value)) + "]"
        if isinstance(value, str):
            escaped = json.dumps(value)
            return f'""{escaped}""'.replace("\\n", "\n") if multiline and "\\" not in value else escaped
        return json.dumps(value)

    def write(table: dict[str, Any], path: tuple[str, ...]) -> None:
        if path:
            expected[path] = "\n".join(lines).count("\n") + 2 if lines else 1
            lines.append("[" + " . ".join(map(json.dumps, path)) + "] # [x]")
        for name, value in table.items():
            if not isinstance(value, dict):
                expected[(*path, name)] = "\n".join(lines).count("\n") + 2 if lines else 1
                lines.append(f"{json.dumps(name)} = {literal(value)} # = '")
        for name, value in table.items():
            if isinstance(value, dict):
                write(value, (*path, name))

    write(tree, ())
    text = "\n".join(lines)
    assert tomllib.loads(text) is not None
    found = key_lines(text)
    assert {key: found[key] for key in expected} == expected


# What the commands use


def from_arguments(flags: list[str]) -> tuple[LoadedConfig, list[str]]:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--allow-change", type=lambda text: text.split(","), default=[])
    said: list[str] = []
    arguments, rest = parser.parse_known_args(flags)
    return load_from_arguments(arguments, rest, said.append), said


def test_the_default_file_is_chosen_by_the_environment_and_said(tmp_path: Path) -> None:
    loaded, said = from_arguments(["--env", "medbrowse", "--steps", "3"])
    assert loaded.config.student.model.startswith("builtin:")
    assert loaded.config.steps == 3
    assert said[0].startswith("no --config given: using ")
    assert "medbrowse_cpu.toml" in said[0]
    with pytest.raises(ConfigError, match=r"student\.model is not set"):
        from_arguments(["--env", str(tmp_path)])
    with pytest.raises(ConfigError, match="Did you mean 'medbrowse'"):
        from_arguments(["--env", "medbrows"])
    with pytest.raises(ConfigError, match="env is not set"):
        from_arguments([])


def test_with_gpus_the_default_file_is_the_one_for_gpus() -> None:
    names = [default_file(["--env", "medbrowse"], on_gpus=on_gpus) for on_gpus in (True, False)]
    assert [file.name for file in names if file] == ["medbrowse.toml", "medbrowse_cpu.toml"]


def test_a_resumed_run_keeps_its_configuration(toml: Any) -> None:
    text = load_config([toml(BASE)]).config.model_dump_json()
    toml(text, "config.json")
    loaded, said = from_arguments(["--resume", "."])
    assert (loaded.config.env, said) == ("e", [])
    loaded, said = from_arguments(["--resume", ".", "--steps", "200", "--eval.every", "5"])
    assert loaded.config.steps == 200
    assert said == [f"changed for the rest of the run: {c}" for c in ("steps: 100 -> 200", "eval.every: 0 -> 5")]
    assert [(c.key, c.old, c.new) for c in loaded.changes] == [("steps", 100, 200), ("eval.every", 0, 5)]


def test_other_keys_of_a_resumed_run_change_only_if_that_is_allowed(toml: Any) -> None:
    toml(load_config([toml(BASE)]).config.model_dump_json(), "config.json")
    flags = ["--resume", "checkpoints/step_000010", "--optim.lr", "0.1", "--student.lora.rank", "8", "--seed", "1"]
    with pytest.raises(ConfigError) as refused:
        from_arguments(flags)
    *listed, last = refused.value.messages
    assert "--optim.lr: optim.lr: 1e-05 -> 0.1" in listed
    assert "--seed: seed: 0 -> 1" in listed
    assert "--student.lora.rank: student.lora.rank: null -> 8" in listed
    assert "--allow-change" in last
    with pytest.raises(ConfigError) as refused:
        from_arguments([*flags, "--allow-change", "student.lora,seed"])
    assert [m.split(":")[0] for m in refused.value.messages[:-1]] == ["--optim.lr"]
    loaded, _ = from_arguments([*flags, "--allow-change", "student.lora,seed,optim"])
    assert loaded.config.optim.lr == 0.1


def test_keys_that_a_resumed_run_may_change_exist() -> None:
    assert set(FREE_KEYS) <= set(all_keys())


def test_notes_are_said(toml: Any) -> None:
    _, said = from_arguments(["--config", toml(BASE), "--rollout.temperature", "0.5"])
    assert said[0].startswith("note: rollout.temperature is 0.5")


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda f: f.stem)
def test_every_shipped_configuration_is_valid(file: Path) -> None:
    loaded = load_config([file])
    assert loaded.config.notes() == []
    assert load_config([file.stem]).config == loaded.config


def test_help_names_every_key_with_type_and_default() -> None:
    text = help_text()
    for key in all_keys().values():
        assert (f"[{key.name}]" if "section" in key.shape else f"--{key.name}  {key.type_text}") in text


def test_the_schema_accepts_the_shipped_files_and_no_unknown_key() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(schema_text()))
    assert validator.is_valid({"env": "e", "student": {"model": "m", "max_context": "none"}})
    assert not validator.is_valid({"env": "e", "student": {"model": "m", "max_context": "nine"}})
    for file in (ROOT / "configs").glob("*.toml"):
        validator.validate(tomllib.loads(file.read_text()))
    assert not validator.is_valid({"env": "e", "student": {"model": "s", "modle": 1}})


def test_show(toml: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--config", toml(BASE), "--steps", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["steps", "=", "3", "#", "--steps"] for line in lines)
    assert any(line.split() == ["student.model", "=", '"s"', "#", "a.toml:3"] for line in lines)
    assert main(["show", "--config", "a.toml", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["env"] == {"value": "e", "origin": "a.toml:1"}
    assert main(["show", "--config", "a.toml", "--stepz", "3"]) == 2
    assert capsys.readouterr().err == "error: --stepz: unknown key. Did you mean 'steps'?\n"


def test_what_show_prints_is_a_configuration(toml: Any, capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", "--config", toml(BASE), "--loss.rho", "5"])
    shown = capsys.readouterr().out
    printed = "\n".join(line for line in shown.splitlines() if " = {}" not in line)
    again = load_config([toml(printed, "b.toml")]).config
    assert again == load_config(["a.toml"], ["--loss.rho", "5"]).config


def test_the_command_line_as_a_process() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "distill.config"]
    docs = subprocess.run([*command, "docs"], capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert docs.stdout == (ROOT / "docs" / "configuration.md").read_text()
    bad = subprocess.run([*command, "show", "--nope", "1"], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert bad.returncode == 2
    assert "--nope: unknown key." in bad.stderr


def test_the_models_can_be_rebuilt_from_their_own_dump() -> None:
    config = load_config(["medbrowse"]).config
    assert RunConfig.model_validate(config.model_dump()) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
