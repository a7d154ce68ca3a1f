"""Arithmetic as a tool. The expression is parsed, never evaluated as code."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

from tools.tool import tool
from tools.types import ToolErrorKind, ToolFailure

MAX_CHARS = 200
MAX_BITS = 512
"""Of any number on the way: `9**9**9` is refused before it is computed."""
_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@tool(parallel_safe=True, idempotent=True)
async def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: numbers, + - * / // % ** and brackets, such as (48 + 24) / 2.
    """
    return calculate(expression)


def calculate(expression: str) -> str:
    """The value, as a person writes it: no ".0" behind a whole number, at most 12 significant digits.

    Commas between digits and `$` are left out; `×` and `÷` are read as signs, `^` as power.

    Raises:
        ToolFailure: not an expression, or a value that is no finite number of at most 512 bits.
    """
    text = expression.strip().removesuffix("=").replace("$", "").replace("×", "*").replace("÷", "/").replace("^", "**")
    text = "".join(
        c for i, c in enumerate(text) if not (c == "," and text[i - 1 : i].isdigit() and text[i + 1 : i + 2].isdigit())
    )
    if not text.strip() or len(text) > MAX_CHARS:
        raise _bad(expression, f"wanted an expression of 1 to {MAX_CHARS} characters")
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError:
        raise _bad(expression, "wanted numbers, + - * / // % ** and brackets") from None
    except ZeroDivisionError:
        raise _bad(expression, "division by zero") from None
    except (OverflowError, RecursionError, MemoryError, ValueError):
        raise _bad(expression, "the value is too large") from None
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _bad(expression, "the value is too large")
        if value.is_integer() and abs(value) < 1e15:
            value = int(value)
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, power = _value(left), _value(right)
            if abs(power) * math.log2(max(2.0, abs(base))) > MAX_BITS:
                raise OverflowError
            result = base**power
            if isinstance(result, complex):
                raise ValueError
            return _bounded(result)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](_value(left), _value(right)))
    raise SyntaxError


def _bounded(value: float) -> float:
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise OverflowError
    return value


def _bad(expression: str, why: str) -> ToolFailure:
    return ToolFailure(f"cannot compute {expression[:80]!r}: {why}", ToolErrorKind.INVALID_ARGUMENTS)
