"""Secrets and paths stay out of what a model reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.redact import redact, scrub_paths, secret_values


def test_secrets_come_from_the_environment_by_name() -> None:
    environment = {
        "HF_TOKEN": "hf_0123456789",
        "OPENAI_API_KEY": "sk-abcdefgh",
        "db_password": "correct horse",
        "MY_SECRET": "short",
        "HOME": "/home/somebody",
        "TOKENIZERS_PARALLELISM": "false",
    }
    assert secret_values(["abc"], environment) == ("correct horse", "hf_0123456789", "sk-abcdefgh", "abc")
    assert secret_values(["", "x"], {}) == ("x",)


def test_the_longest_secret_goes_first() -> None:
    secrets = secret_values(["password", "password-and-more"], {})
    assert redact("password-and-more password", secrets) == "[redacted] [redacted]"


def test_a_secret_is_found_inside_json() -> None:
    secret = 'a"b\nc\\d'
    secrets = secret_values([secret], {})
    assert redact(json.dumps({"key": secret}), secrets) == '{"key": "[redacted]"}'


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("/trial/NCT1 and /drug/x?y=1", "/trial/NCT1 and /drug/x?y=1"),
        ("https://host.test/home/x/y", "https://host.test/home/x/y"),
        ("and/or 1/2 ~5", "and/or 1/2 ~5"),
        ("/home/me/x.py", "[path]"),
        ("(/usr/lib/python3/x.py:3)", "([path]:3)"),
        ("~/.ssh/id_rsa", "[path]"),
        ("file:///etc/passwd!", "[path]"),
        (r"C:\Users\me\x and D:\y", "[path] and [path]"),
        (f"{Path.cwd()}/tools/x.py", "[path]"),
    ],
)
def test_paths_of_this_machine_go_paths_of_sites_stay(text: str, scrubbed: str) -> None:
    assert scrub_paths(text) == scrubbed
