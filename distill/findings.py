"""What a check before training found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The answer to one check."""

    name: str
    level: Literal["ok", "warning", "error"]
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:7} {self.name}: {self.message}" + (f"\n        -> {self.remedy}" if self.remedy else "")


def ok(name: str, message: str) -> Finding:
    return Finding(name=name, level="ok", message=message)


def warning(name: str, message: str, remedy: str = "") -> Finding:
    return Finding(name=name, level="warning", message=message, remedy=remedy)


def error(name: str, message: str, remedy: str = "") -> Finding:
    return Finding(name=name, level="error", message=message, remedy=remedy)


class CheckFailed(Exception):
    """At least one check found an error."""

    def __init__(self, errors: Sequence[Finding]) -> None:
        super().__init__("the checks before the first step failed; nothing was trained\n" + "\n".join(map(str, errors)))
        self.errors = list(errors)
