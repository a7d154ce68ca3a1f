"""The documentation: its commands are what the real parsers take, its links and paths lead somewhere."""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distill.config_load import default_file, load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("*/README.md")),
    *sorted(ROOT.glob("*/*/README.md")),
]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
OURS = ("agent_loop", "bench", "distill", "envs", "tools")
THEIRS = ("pip", "pytest", "venv")
WITH_KEYS = ("distill.run", "distill.check", "distill.sft", "distill.config")
"""They take a run's keys as flags, which their parsers leave over."""
STARTER = "torch.distributed.run"
BASE = 'env = "medbrowse"\n[student]\nmodel = "M"\n[teacher]\nmodel = "T"\ntop_k = 8\n'
"""What a file of the reader's own would say."""


@dataclass(frozen=True)
class Command:
    place: str
    """`docs/serving.md:12`"""
    words: tuple[str, ...]
    """After `python`."""
    in_prose: bool
    """It names a command, maybe without what it needs."""

    def __str__(self) -> str:
        return f"{self.place} {shlex.join(self.words)}"


class Parsed(Exception):
    """What a command's own parser made of its words: the values, and the words that it left over."""


def commands_of(file: Path) -> Iterator[Command]:
    """Every `python -m ...` and `python convert_dataset.py ...`: in blocks to the end of the line, with its continued
    and quoted ones, in prose to the closing backtick."""
    text = file.read_text()
    if file.suffix == ".toml":
        text = "\n".join(re.sub(r"^# +", "", line) if line.startswith("#") else "" for line in text.splitlines())
    text = re.sub(r"\\\n\s*(?:# +)?", lambda found: " " * len(found[0]), text)
    for found in re.finditer(r"python3? (?=-m [a-z]|convert_dataset\.py)", text):
        line_start = text.rfind("\n", 0, found.start()) + 1
        in_prose = text.count("`", line_start, found.start()) % 2 == 1 or "`" in text[found.end() :].split("\n")[0]
        place = f"{file.relative_to(ROOT)}:{file.read_text()[: found.start()].count(chr(10)) + 1}"
        rest = text[found.end() :]
        line = rest.partition("`")[0] if in_prose else _whole_line(rest)
        for words in _alternatives(_plain(shlex.split(line, comments=True))):
            yield Command(place, tuple(words), in_prose)


def _whole_line(rest: str) -> str:
    """To the end of the line on which all quotes are closed."""
    end = rest.find("\n")
    while True:
        try:
            shlex.split(rest[: end if end != -1 else None], comments=True)
            return rest[: end if end != -1 else None]
        except ValueError:
            assert end != -1, f"a quotation is not closed: {rest[:200]}"
            end = rest.find("\n", end + 1)


def _plain(words: Sequence[str]) -> list[str]:
    """Without the second of two commands, brackets around what may be left out, and dots for what the reader adds."""
    kept: list[str] = []
    for word in words:
        plain = word.rstrip(";")
        if plain == ">":
            break
        if re.fullmatch(r"\[[a-z]+\]", plain):  # what may follow, in words
            continue
        if plain.count("[") != plain.count("]") or re.fullmatch(r"\[.*\]", plain):
            plain = plain.strip("[]")
        if plain != "..." or (kept and kept[-1].startswith("--")):
            kept.append(plain)
        if word.endswith(";"):
            break
    return kept


def _alternatives(words: Sequence[str]) -> Iterator[list[str]]:
    """One command for each of `a|b|c`."""
    for number, word in enumerate(words):
        if re.fullmatch(r"\w+(\|\w+)+", word):
            for one in word.split("|"):
                yield [*words[:number], one, *words[number + 1 :]]
            return
    yield list(words)


ALL = [command for file in (*PAGES, *CONFIGS) for command in commands_of(file)]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", ALL, ids=str)
def test_a_documented_command_is_one(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = list(command.words)
    if words[:2] == ["-m", STARTER]:
        words = started_by_torch(words[2:])
    if words[0] == "-m" and words[1] in THEIRS:
        return
    assert words[0] == "convert_dataset.py" or words[1].partition(".")[0] in OURS, f"an unknown program: {command}"
    if command.in_prose and len(words) == 2:
        assert importlib.util.find_spec(words[1])
        return
    try:
        values, rest = parsed(words, monkeypatch)
    except SystemExit:
        said = capsys.readouterr().err
        assert command.in_prose, f"{command}\n{said}"
        assert "the following arguments are required" in said, f"{command}\n{said}"
        return
    if words[1] in WITH_KEYS:
        files = [name if (ROOT / name).is_file() or "/" not in name else None for name in getattr(values, "config", [])]
        (tmp_path / "base.toml").write_text(BASE)
        shipped = [str(name) for name in files if name and ((ROOT / name).is_file() or not name.endswith(".toml"))]
        own = default_file(rest, on_gpus=False) if "config" in values and not values.config else None
        load_config([*shipped] or [own or tmp_path / "base.toml"], rest)
    else:
        assert not rest, f"{command}: the parser does not know {rest}"


def started_by_torch(words: list[str]) -> list[str]:
    """The program that torch's own parser finds behind its options."""
    from torch.distributed.run import parse_args

    values = parse_args(words)
    assert values.module
    return ["-m", values.training_script, *values.training_script_args]


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[argparse.Namespace, list[str]]:
    """Start the program and stop it where its parser has answered.

    Raises:
        SystemExit: the parser refused.
    """
    inside: list[bool] = []

    def stopping(method: Any) -> Any:
        def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
            if inside:  # a parser of a verb, or the same parser's other method
                return method(self, *args, **kwargs)
            inside.append(True)
            result = method(self, *args, **kwargs)
            raise Parsed(*(result if isinstance(result, tuple) else (result, [])))

        return parse

    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
    monkeypatch.setattr(sys, "argv", words if words[0] != "-m" else words[1:])
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except Parsed as found:
        values, rest = found.args
        return values, rest
    raise AssertionError(f"{words} has no parser")


def test_the_commands_were_found() -> None:
    assert len(ALL) > 80
    by_module = {command.words[1] for command in ALL}
    assert {
        "distill.run",
        "distill.sft",
        "distill.import_config",
        "agent_loop.view",
        "tools.pages",
        STARTER,
    } <= by_module


def test_extras_and_targets_that_are_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = 0
    for page in PAGES:
        text = page.read_text()
        for extra in re.findall(r"pip install [^\n`]*'\.\[([\w,-]+)\]'", text):
            named += 1
            assert set(extra.split(",")) <= set(extras), page
        for target in re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE):
            named += 1
            assert target in targets, page
    assert named > 10


def headings(page: Path) -> set[str]:
    """Their anchors, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_images_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`|^    .*?$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} is no part of the repository"
        assert not anchor or anchor in headings(target), f"{page.name}: {link}: {sorted(headings(target))}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "comparison.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_files_that_are_named_are_there(page: Path) -> None:
    """`distill/gateway.py` and its like, and what is named in them; tests also by the path from their folder.
    The comparison names other projects' files too; tests/test_comparison.py has ours."""
    pattern = r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|md|toml|json))(?:::(\w+))?`"
    for name, test in re.findall(pattern, page.read_text()):
        found = [file for start in ("", "tests", "tests/runs") if (file := ROOT / start / name).is_file()]
        if name.partition("/")[0] not in (*OURS, "configs", "docs", "tests") and not test.startswith("test_"):
            continue  # another project's
        assert found, f"{page.name}: {name}"
        written = rf"^\s*(?:async )?(?:def|class) {test}\b|^{test}\b"
        assert not test or re.search(written, found[0].read_text(), re.MULTILINE), f"{page.name}: {name}::{test}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        for link in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text()):
            if not link.startswith("http"):
                waiting.append((page.parent / link).resolve())
    assert {page for page in PAGES if page.parent.name == "docs"} <= seen
