"""Model families that the `renderers` library knows: their dialogue formats and tool-call grammars, kept by others.

Used for a tokenizer whose hub name the library lists, or where a family is asked for by name. What comes out is held to
the same rules as the suffix rule's: the first prompt must equal the chat template's own ids, earlier ids stay as they
are, and no text becomes a control token (the library encodes a literal `<|im_end|>` in a tool result as that token; the
base class cleans the text before it gets there and checks the ids after).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from agent_loop.added_tokens import harmless
from agent_loop.parser import WANTED, ParsedTurn
from agent_loop.renderer import Extension, Renderer, RendererError
from agent_loop.types import ClassSpan, FinishReason, TokenClass
from envs.types import AssistantMessage, Message
from tools.types import ToolCall, ToolSpec

HERMES_FAMILIES = ("qwen3",)
"""Families whose calls `HermesParser` reads; it names what is wrong with a malformed one."""


def family_of(tokenizer: Any) -> str | None:
    """The library's name for a tokenizer's family, by its hub name; None if it lists none."""
    from renderers.base import MODEL_RENDERER_MAP

    return MODEL_RENDERER_MAP.get(getattr(tokenizer, "name_or_path", ""))


class FamilyRenderer(Renderer):
    """A renderer whose ids come from `renderers`.

    Args:
        family: the library's name of it, such as `qwen3`, `llama-3`, `glm-5`.

    Raises:
        RendererError: the library's first prompt is not the chat template's.
    """

    _family: Any = None

    def __init__(self, tokenizer: Any, family: str, *, enable_thinking: bool | None = None) -> None:
        import renderers

        super().__init__(tokenizer, enable_thinking=enable_thinking)
        options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        config = renderers.config_from_name(family, **options)
        self._family = renderers.create_renderer(tokenizer, config)
        self._name = family
        self._known: dict[str, tuple[int, ...]] = {}
        self.stop_token_ids = tuple(sorted({*self.stop_token_ids, *self._family.get_stop_token_ids()}))
        probe: list[Message] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
        if self._render_ids(probe, ()) != super()._render_ids(probe, ()):
            raise RendererError(f"the {family!r} renderer and the tokenizer's own chat template make different prompts")

    def extend(
        self,
        completion_ids: Sequence[int],
        finish_reason: FinishReason,
        new_messages: Sequence[Message],
        *,
        has_reasoning: bool = False,
    ) -> Extension | None:
        prompt = super()._render_ids([{"role": "user", "content": "hi"}], ())
        before = [*prompt, *completion_ids]
        bridged = self._family.bridge_to_next_turn(prompt, list(completion_ids), [dict(m) for m in new_messages])
        if bridged is None:
            return None
        ids = list(bridged.token_ids)
        if ids[: len(before)] != before:
            raise RendererError(f"the {self._name!r} renderer changed ids that were already there")
        suffix = ids[len(before) :]
        glue = _num_of_no_message(bridged.message_indices[len(before) :])
        self._guard.check(suffix[glue:], self._expected_of(new_messages))
        return Extension(glue_ids=suffix[:glue], tool_ids=suffix[glue:])

    def _expected_of(self, new_messages: Sequence[Message]) -> tuple[int, ...]:
        """The control tokens of harmless messages of the same shape, in their frame."""
        plain = [harmless(m) for m in new_messages]
        key = json.dumps(plain)
        if key not in self._known:
            prompt = super()._render_ids([{"role": "user", "content": "hi"}], ())
            bridged = self._family.bridge_to_next_turn(prompt, [self.close_id], plain)
            start = len(prompt) + 1
            start += _num_of_no_message(bridged.message_indices[start:])
            self._known[key] = self._guard.found_in(bridged.token_ids[start:])
        return self._known[key]

    def parse(self, completion_ids: Sequence[int], turn: int, finish_reason: FinishReason) -> ParsedTurn:
        if self._name in HERMES_FAMILIES:
            return super().parse(completion_ids, turn, finish_reason)
        parsed = self._family.parse_response(list(completion_ids))
        calls, spans = [], []
        for index, call in enumerate(parsed.tool_calls):
            good = call.status == "ok" and call.name and isinstance(call.arguments, dict)
            calls.append(
                ToolCall(
                    id=f"call_{turn}_{index}",
                    name=call.name or "",
                    arguments=call.arguments if good else None,
                    raw=call.raw,
                    parse_error=None if good else f"the call cannot be read ({call.status}); {WANTED}",
                )
            )
            if call.token_span is not None:
                spans.append(call.token_span)
        message = AssistantMessage(
            content=parsed.content,
            reasoning=parsed.reasoning_content or None,
            tool_calls=tuple(calls),
            finished=finish_reason == "stop",
        )
        return ParsedTurn(
            message=message, token_classes=_classes(spans, len(completion_ids)), text=self.decode(completion_ids)
        )

    def _render_ids(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        if self._family is None:  # the base class explores the template before the family is there
            return super()._render_ids(messages, tools)
        specs = [self._guard.clean_value(tool.to_openai()) for tool in tools]
        return list(
            self._family.render_ids([dict(m) for m in messages], tools=specs or None, add_generation_prompt=True)
        )


def _num_of_no_message(owners: Sequence[int]) -> int:
    """How many tokens come before the first that belongs to a message: the rest of the turn's close."""
    return sum(1 for _ in takewhile(lambda owner: owner < 0, owners))


def _classes(calls: Sequence[tuple[int, int]], length: int) -> tuple[ClassSpan, ...]:
    """Calls where the library says they are, answer everywhere else."""
    found: list[ClassSpan] = []
    position = 0
    for start, end in sorted(calls):
        if start > position:
            found.append(ClassSpan(token_class=TokenClass.ANSWER, start=position, end=start))
        found.append(ClassSpan(token_class=TokenClass.CALL, start=max(start, position), end=end))
        position = end
    if position < length:
        found.append(ClassSpan(token_class=TokenClass.ANSWER, start=position, end=length))
    return tuple(found)
