from __future__ import annotations

import asyncio

import pytest

from tools.calculator import calculate, calculator
from tools.toolbox import Toolbox
from tools.types import ToolCall, ToolErrorKind, ToolFailure


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(48 + 24) / 2", "36"),
        ("1 / 3", "0.333333333333"),
        ("$1,800 / 100 =", "18"),
        ("2 ^ 10", "1024"),
        ("3 × 4 ÷ 6", "2"),
        ("-5 // 2", "-3"),
        ("7 % 4", "3"),
        ("0.1 + 0.2", "0.3"),
        ("2 ** 0.5", "1.41421356237"),
        ("12345678901234567890 * 10", "123456789012345678900"),
    ],
)
def test_values(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("", "1 to 200"),
        ("1" * 201, "1 to 200"),
        ("1 / 0", "zero"),
        ("9 ** 9 ** 9", "too large"),
        ("10 ** 400", "too large"),
        ("1e308 * 10", "too large"),
        ("(-8) ** 0.5", "too large"),
        ("__import__('os')", "wanted numbers"),
        ("a + 1", "wanted numbers"),
        ("[1][0]", "wanted numbers"),
        ("'a' * 3", "wanted numbers"),
        ("True + 1", "wanted numbers"),
        ("1 if 1 else 2", "wanted numbers"),
        ("(" * 100 + ")" * 100, "wanted numbers"),
        ("1 +", "wanted numbers"),
        ("\x00", "cannot compute"),
    ],
)
def test_refusals(expression: str, why: str) -> None:
    with pytest.raises(ToolFailure, match=why):
        calculate(expression)


def test_as_a_tool() -> None:
    box = Toolbox([calculator])
    calls = [ToolCall(id=e, name="calculator", arguments={"expression": e}, raw="") for e in ("2*3", "x")]
    good, bad = asyncio.run(box.run(calls, metadata={}, state={}))
    assert good.content == "6"
    assert bad.error is not None
    assert bad.error.kind is ToolErrorKind.INVALID_ARGUMENTS
