"""The added tokens of a tokenizer, and the guard that no text becomes one of them.

A tool result, a page, a row of a data set or an error text that formed `<|im_end|>` would close a turn that is not its
own. So text is cleaned before it is rendered, and every rendering is held against the same dialogue with harmless text:
the added tokens must be the same, in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from envs.types import Message
from tools.clean import forbidden_pattern, neutralise

HARMLESS = "x"

NUM_CLEANING_ROUNDS = 8

_LONE_SURROGATE = re.compile("[\\ud800-\\udfff]")


class RendererError(Exception):
    """A chat template that cannot be used, or text that would have become a control token."""


class AddedTokens:
    """
    Args:
        tokenizer: a fast tokenizer of `transformers`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self.texts = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
        # Some tokenizers have runs of spaces or newlines among them (Gemma): no turn is closed or forged by those.
        blank = {token_id for token_id, text in self.texts.items() if not text.strip()}
        self.ids = frozenset(self.texts) - blank
        """Ids of every added token, special or not, but for white space: no text may produce one."""
        self._forbidden = forbidden_pattern(text for i, text in self.texts.items() if i not in blank)
        self._normalises = self._backend.normalizer is not None and any(
            token.normalized or token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()
        )

    def clean_messages(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The messages as they are rendered and recorded: no text in them can form an added token.

        Raises:
            RendererError: a message without a role, or whose content is no text.
        """
        return tuple(self._clean_message(index, message) for index, message in enumerate(messages))

    def _clean_message(self, index: int, message: Message) -> Message:
        role, content = message.get("role"), message.get("content")
        if role == "assistant" and content is None:
            content = ""  # the OpenAI shape of a message that is all calls
        if not isinstance(role, str) or not isinstance(content, str):
            found = f"content is {type(content).__name__}" if isinstance(role, str) else f"role is {role!r}"
            raise RendererError(f"message {index} ({role}): {found}; role and content must be text")
        return self.clean_value({**message, "content": content})

    def clean_text(self, text: str) -> str:
        """Text out of which no added token can come. Idempotent.

        Raises:
            RendererError: the tokenizer makes an added token out of it whatever is put between its letters.
        """
        if not text.isascii():
            text = _LONE_SURROGATE.sub("\ufffd", text)
        text = neutralise(text, self._forbidden)
        if not self._normalises:
            return text
        for _ in range(NUM_CLEANING_ROUNDS):  # a normaliser may make an added token out of other letters
            encoding = self._backend.encode(text, add_special_tokens=False)
            spans = [span for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i in self.ids]
            if not spans:
                return text
            for start, end in reversed(spans):
                found = text[start:end].lstrip()  # a token may take the white space before it along
                start = end - len(found)
                text = text[:start] + (f"{found[0]} {found[1:]}" if len(found) > 1 else "\ufffd") + text[end:]
        raise RendererError(f"the tokenizer makes a control token out of {text[:80]!r} whatever is put between")

    def clean_value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.clean_text(value)
        if isinstance(value, dict):
            return {self.clean_text(key): self.clean_value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.clean_value(item) for item in value]
        return value

    def found_in(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(i for i in ids if i in self.ids)

    def check(self, ids: Sequence[int], expected: tuple[int, ...]) -> None:
        found = self.found_in(ids)
        if found != expected:
            extra = sorted(self.texts[i] for i in set(found) - set(expected) or set(found))
            shown = ", ".join(map(repr, extra[:5]))
            raise RendererError(f"a message's text became a control token: {shown}; it was not cleaned")


def harmless(message: Message) -> Message:
    """The message with the same shape and no text of anybody's."""
    plain: dict[str, Any] = {"role": message["role"], "content": HARMLESS if message["content"].strip() else ""}
    if message.get("reasoning_content"):
        plain["reasoning_content"] = HARMLESS
    if message.get("tool_calls"):
        plain["tool_calls"] = [
            {
                "id": f"qzidzq{i:03}",
                "type": "function",
                "function": {
                    "name": HARMLESS,
                    "arguments": {f"x{k}": HARMLESS for k, _ in enumerate(_arguments(call))},
                },
            }
            for i, call in enumerate(message["tool_calls"])
        ]
    if message["role"] == "tool":
        plain |= {"name": HARMLESS, "tool_call_id": "qzidzq000"}
    return plain  # type: ignore[return-value]


def _arguments(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"].get("arguments")
    return arguments if isinstance(arguments, dict) else {}
