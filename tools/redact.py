"""Takes secrets and file system paths out of text that a model will read."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

MIN_SECRET_CHARS = 8
REDACTED = "[redacted]"
PATH_MARK = "[path]"

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
_ROOTS = ("/home", "/root", "/Users", "/tmp", "/var", "/usr", "/etc", "/private", "/proc", "/opt", "/mnt", "/srv", "~")  # noqa: S108


def secret_values(given: Iterable[str] = (), environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Values to be redacted, the longest first: what is given, and every environment variable whose name contains
    KEY, TOKEN, SECRET or PASSWORD and whose value has at least `MIN_SECRET_CHARS` characters."""
    environment = os.environ if environment is None else environment
    values = {value for value in given if value}
    values |= {v for k, v in environment.items() if len(v) >= MIN_SECRET_CHARS and _SECRET_NAME.search(k)}
    # A secret with quotes or line breaks looks otherwise inside JSON.
    values |= {json.dumps(value, ensure_ascii=False)[1:-1] for value in values}
    return tuple(sorted(values, key=lambda value: (-len(value), value)))


def redact(text: str, secrets: Iterable[str]) -> str:
    """Text with every secret value replaced. To be applied before a text is cut: half a secret is not found."""
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    return text


def scrub_paths(text: str) -> str:
    """Text without paths of this machine: what begins with a folder of this process or of operating systems, Windows
    drives and file URLs. Paths of web sites (`/trial/NCT1`, `https://host/home`) stay."""
    return _paths().sub(PATH_MARK, text)


def _paths() -> re.Pattern[str]:
    if not _compiled:
        own = {str(Path.cwd()), str(Path.home()), sys.prefix, sys.base_prefix, tempfile.gettempdir()}
        roots = sorted({*_ROOTS, *(root for root in own if len(root) > 1)}, key=lambda root: (-len(root), root))
        folders = "|".join(map(re.escape, roots))
        rest = r"[^\s'\"<>|,;:)\]]*"
        _compiled.append(
            re.compile(rf"file://{rest}|(?<![\w.:/~-])(?:{folders})(?=[/\\]){rest}|(?<!\w)[A-Za-z]:\\{rest}")
        )
    return _compiled[0]


_compiled: list[re.Pattern[str]] = []
