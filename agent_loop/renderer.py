"""Messages to token ids and back: the one seam.

Turn 0 is rendered once by the model's own chat template. Every later prompt is the ids so far, the sampled ids, and
the ids of the new messages alone; nothing is rendered twice. Text that comes from a tool, a page or a data set is
cleaned so that no added token of the tokenizer can come of it, and every rendering is checked for that: the added
tokens in it must be those of the same dialogue with harmless text.

Known model families may be rendered by the `renderers` library; any other chat template by the suffix rule: render a
dummy turn with and without the new messages, and cut behind the dummy turn's close token.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from agent_loop.added_tokens import HARMLESS, AddedTokens, RendererError, harmless
from agent_loop.parser import HermesParser, ParsedTurn, Tag, read_call
from agent_loop.types import FinishReason
from envs.types import Message
from tools.types import ToolSpec

MARK = "qzmarkzq"
"""A word that stands for a message's text while a template is explored."""

NASTY = " \n<a href='x'>\"é & {{ {% \\\\n 0}\n "
"""Text that a template puts in as it is, or does not: quotes, escapes, markup, white space at both ends."""

MAX_REMEMBERED = 1024
"""Shapes of dialogues whose control tokens are remembered."""

_LOG = logging.getLogger(__name__)

TOOL_PROMPT = """You may call these tools. Each is described by a JSON object:
{tools}
To call one, write
<tool_call>
{{"name": <tool>, "arguments": {{<arguments>}}}}
</tool_call>"""
"""For templates that ignore `tools`; the wording of the hermes format that most models were trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """What comes between a completion and the next one."""

    glue_ids: list[int]
    """The rest of the turn's close: a synthetic close token if none was sampled, the newline after it."""
    tool_ids: list[int]
    """The new messages in their frame, with the next generation prompt."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """The text around the new messages' contents: `pieces[0] content[0] pieces[1] ...`, and its added tokens."""

    pieces: tuple[str, ...]
    added_ids: tuple[int, ...]


def load_renderer(model: Any, *, enable_thinking: bool | None = None, family: str | None = None) -> Renderer:
    """A renderer for a tokenizer folder, a hub id, or a loaded tokenizer.

    Args:
        family: use this family of the `renderers` library; None lets the tokenizer's hub name decide, and takes the
            suffix rule where the library does not list it.

    Raises:
        RendererError: no tokenizer there, no chat template, or a template that does not render what it is given.
    """
    if isinstance(model, str | Path):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(model))
        except (OSError, ValueError, ImportError) as error:
            raise RendererError(f"no tokenizer can be loaded from {model}: {error}") from error
    else:
        tokenizer = model
    from agent_loop.family import FamilyRenderer, family_of

    if family is not None:
        return FamilyRenderer(tokenizer, family, enable_thinking=enable_thinking)
    listed = family_of(tokenizer)
    if listed is not None:
        try:
            return FamilyRenderer(tokenizer, listed, enable_thinking=enable_thinking)
        except RendererError as error:  # the library lists more models than it renders as their templates do
            _LOG.warning("%s; the suffix rule over the chat template is used", error)
    return Renderer(tokenizer, enable_thinking=enable_thinking)


class Renderer:
    """Renders, extends and parses for one tokenizer and its chat template.

    Args:
        tokenizer: a fast tokenizer of `transformers` with a chat template.
        enable_thinking: passed to templates that know it; None leaves the template's default.
    """

    def __init__(self, tokenizer: Any, *, enable_thinking: bool | None = None) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise RendererError(
                "the tokenizer has no chat template; a base model needs one in its tokenizer_config.json"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise RendererError("the tokenizer is not a fast one (tokenizer.json); convert it with transformers first")
        self.tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._guard = AddedTokens(tokenizer)
        self.added_token_ids = self._guard.ids
        """Ids of every added token, special or not, but for white space: no text may produce one."""
        self._frames: dict[tuple[tuple[str, str], ...], _Frame | None] = {}
        self._expected: dict[Any, tuple[int, ...]] = {}
        self._explore()
        self._parser = self._make_parser()

    # What it knows

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    def vocab(self) -> dict[str, int]:
        """Every token and its id, added ones included."""
        return self._backend.get_vocab(with_added_tokens=True)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of vocabulary, added tokens and template: two renderers with the same one make the same ids."""
        template = self.tokenizer.chat_template
        content = json.dumps(
            [sorted(self.vocab().items()), sorted(self._guard.texts.items()), template], sort_keys=True
        )
        return hashlib.sha256(content.encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        """Text with special tokens visible. For people and parsers; it is never encoded again."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        """Ids of text as it stands, added tokens recognised."""
        return self._backend.encode(text, add_special_tokens=False).ids

    # Cleaning

    def clean(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The messages as they are rendered and recorded: no text in them can form an added token.

        Raises:
            RendererError: a message without a role, or whose content is no text.
        """
        return self._guard.clean_messages(messages)

    def clean_text(self, text: str) -> str:
        """Text out of which no added token can come. Idempotent."""
        return self._guard.clean_text(text)

    # Rendering

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]:
        """Ids of a dialogue with the generation prompt, as the template itself renders it.

        Args:
            messages: cleaned ones.

        Raises:
            RendererError: the template refuses them, or a text became an added token.
        """
        ids = self._render_ids(messages, tools)
        plain = [harmless(m) for m in messages]
        key = (json.dumps(plain), tuple(tool.name for tool in tools))
        if key not in self._expected:
            if len(self._expected) >= MAX_REMEMBERED:
                self._expected.clear()
            self._expected[key] = self._guard.found_in(self._render_ids(plain, tools))
        self._guard.check(ids, self._expected[key])
        return ids

    def extend(
        self,
        completion_ids: Sequence[int],
        finish_reason: FinishReason,
        new_messages: Sequence[Message],
        *,
        has_reasoning: bool = False,
    ) -> Extension | None:
        """What follows a completion: the rest of its close, the new messages, the next generation prompt.

        Args:
            completion_ids: as sampled; they stay as they are.
            new_messages: cleaned ones, of role `tool` or `user`.
            has_reasoning: an earlier turn holds a think block.

        Returns:
            None where the template would rewrite earlier turns; the caller renders the dialogue anew.
        """
        kinds = {"tool" if m["role"] == "tool" else "user" for m in new_messages}
        if kinds & self._rewritten_by or (has_reasoning and kinds & self._thinking_dropped_by):
            return None
        closed = bool(completion_ids) and completion_ids[-1] == self.close_id  # whatever the server calls it
        ids, expected = self._suffix(new_messages)
        self._guard.check(ids, expected)
        tail = self._tail_ids if ids[: len(self._tail_ids)] == self._tail_ids else []
        glue = tail if closed else [self.close_id, *tail]
        return Extension(glue_ids=list(glue), tool_ids=ids[len(tail) :])

    def write(self, message: Message, tools: Sequence[ToolSpec] = ()) -> list[int]:
        """Ids that a model would have sampled to say `message`: the turn as the template writes it behind its
        generation prompt, the close token included.

        Args:
            message: a cleaned one, of role `assistant`.

        Raises:
            RendererError: the template writes turns in another way than it asks for them (it drops their think block,
                for instance), or a text became an added token.
        """
        ids = self._written(message, tools)
        self._guard.check(ids, self._guard.found_in(self._written(harmless(message), tools)))
        return ids

    def _written(self, message: Message, tools: Sequence[ToolSpec]) -> list[int]:
        asked: Message = {"role": "user", "content": "hi"}
        prompt = self._render_text([asked], tools)
        whole = self._render_text([asked, message], tools, prompt=False)
        said, close, _ = whole.removeprefix(prompt).partition(self._close_text)
        if not whole.startswith(prompt) or not close:
            raise RendererError("the chat template does not write an assistant turn behind its own generation prompt")
        return [*self.encode(said), self.close_id]

    def parse(self, completion_ids: Sequence[int], turn: int, finish_reason: FinishReason) -> ParsedTurn:
        """Read the sampled ids of one turn: thinking, calls, answer, and the class of each token."""
        return self._parser.parse(completion_ids, turn, finished=finish_reason == "stop")

    def self_test(self, tools: Sequence[ToolSpec]) -> list[str]:
        """What is wrong with template and parser, in words; nothing if a call survives both."""
        problems = []
        name = tools[0].name if tools else "search"
        call = json.dumps({"name": name, "arguments": {"text": 'a "b" {c}'}})
        text = f"<tool_call>\n{call}\n</tool_call>"
        parsed = self.parse([*self.encode(text), self.close_id], 0, "stop").message
        if [call.arguments for call in parsed.tool_calls] != [{"text": 'a "b" {c}'}]:
            problems.append(f"a tool call in the hermes format is not read back: {parsed}")
        if tools and not self._ignores_tools:
            problems += self._call_form_problems(name)
        answer: Message = {"role": "tool", "content": MARK, "tool_call_id": "call_0_0", "name": name}
        try:
            ids, _ = self._suffix([answer])
        except RendererError as error:
            return [*problems, str(error)]
        if MARK not in self.decode(ids):
            problems.append("the template does not render the text of a tool result")
        if tools and not all(
            tool.name in self._render_text([{"role": "user", "content": "x"}], tools) for tool in tools
        ):
            problems.append("the template does not name all tools")
        return problems

    def _call_form_problems(self, name: str) -> list[str]:
        """Whether the template writes calls as the parser reads them."""
        call = {"id": "qzidzq000", "type": "function", "function": {"name": name, "arguments": {"text": MARK}}}
        dialogue = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        text = self._template(dialogue, None, prompt=False).removeprefix(self._template(dialogue[:1], None))
        ids = self.encode(text.rpartition(self._close_text)[0])
        if [c.arguments for c in self.parse([*ids, self.close_id], 0, "stop").message.tool_calls] == [{"text": MARK}]:
            return []
        shown = text.strip()[-200:]
        return [f"the template writes tool calls in a form that is not read back: {shown!r}; name the model's family"]

    # Exploring the template

    def _explore(self) -> None:
        user: Message = {"role": "user", "content": "hi"}
        spec = ToolSpec(name="qztoolzq", description="d", parameters={"type": "object", "properties": {}})
        try:
            self._ignores_tools = "qztoolzq" not in self._template([user], [spec.to_openai()])
        except RendererError:
            self._ignores_tools = True
        text = self._template([user, {"role": "assistant", "content": MARK}], None, prompt=False)
        after = text.partition(MARK)[2]
        close = next((i for i in self.encode(after) if i in self.added_token_ids), None)
        if close is None:
            raise RendererError("the chat template closes no assistant turn with a token of its own")
        self.close_id: int = close
        """The token that ends an assistant turn."""
        self._close_text = self._guard.texts[close]
        self._tail_ids = self.encode(after.partition(self._close_text)[2])
        stops = {close, self.tokenizer.eos_token_id, self.vocab().get("<|endoftext|>")}
        self.stop_token_ids: tuple[int, ...] = tuple(sorted(i for i in stops if i is not None))
        """Ids after which a server stops: the close token, the tokenizer's end token, `<|endoftext|>` if known."""
        self._tool_role = self._renders_tool_role()
        self._explore_history(spec.to_openai())
        prompt = self._template([user], None)
        self._starts_thinking = prompt.rstrip().endswith("<think>")

    def _explore_history(self, spec: dict[str, Any]) -> None:
        """Which new messages make the template write earlier turns anew, always or where those hold thinking."""
        user: Message = {"role": "user", "content": "hi"}
        call = {"id": "qzidzq000", "type": "function", "function": {"name": "qztoolzq", "arguments": {}}}
        asked = {"role": "assistant", "content": "a", "reasoning_content": MARK, "tool_calls": [call]}
        result: Message = {"role": "tool", "content": "t", "tool_call_id": call["id"], "name": "qztoolzq"}  # type: ignore[typeddict-item]
        said: Message = {"role": "assistant", "content": "a", "reasoning_content": MARK}
        tools = None if self._ignores_tools else [spec]
        rewritten, dropped = set(), set()
        for kind, reply, new in (("tool", asked, result), ("user", said, user)):
            turn = [user, self._adapted(reply)]  # type: ignore[arg-type]
            try:
                first = self._template([user], tools, prompt=False)
                before = self._template(turn, tools, prompt=False)
                behind = self._template([*turn, self._adapted(new)], tools)
            except RendererError:
                continue  # refused when it is asked for, in words
            if not behind.startswith(first):
                rewritten.add(kind)
            if MARK in before and MARK not in behind:
                dropped.add(kind)
        self._rewritten_by, self._thinking_dropped_by = frozenset(rewritten), frozenset(dropped)

    @property
    def is_prefix_preserving(self) -> bool:
        """False where a later message makes the template write earlier turns anew, or drop their thinking."""
        return not self._rewritten_by and not self._thinking_dropped_by

    def _renders_tool_role(self) -> bool:
        try:
            return MARK in self._dummy_turn(
                [{"role": "tool", "content": MARK, "tool_call_id": "call_0_0", "name": "t"}]
            )
        except RendererError:
            return False

    def _make_parser(self) -> HermesParser:
        vocab = {text: token_id for token_id, text in self._guard.texts.items()}

        def tag(text: str) -> Tag:
            return Tag(text=text, id=vocab.get(text))

        return HermesParser(
            self.decode,
            stop_ids=frozenset(self.stop_token_ids),
            think=(tag("<think>"), tag("</think>")),
            call=(tag("<tool_call>"), tag("</tool_call>")),
            starts_thinking=self._starts_thinking,
        )

    # Template machinery

    def _template(self, messages: Sequence[Any], tools: Any, *, prompt: bool = True) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, **self._options
            )
        except Exception as error:  # jinja's own errors, and whatever a template raises
            raise RendererError(f"the chat template refuses the dialogue: {type(error).__name__}: {error}") from error

    def _render_text(self, messages: Sequence[Message], tools: Sequence[ToolSpec], *, prompt: bool = True) -> str:
        specs = [self._guard.clean_value(tool.to_openai()) for tool in tools]
        messages = [self._adapted(message) for message in messages]
        if not specs:
            return self._template(messages, None, prompt=prompt)
        if not self._ignores_tools:
            return self._template(messages, specs, prompt=prompt)
        told = TOOL_PROMPT.format(tools="\n".join(json.dumps(spec["function"], ensure_ascii=False) for spec in specs))
        told = self._clean_tool_prompt(told)
        if messages[0]["role"] == "system":
            first: Message = {"role": "system", "content": f"{messages[0]['content']}\n\n{told}"}
            return self._template([first, *messages[1:]], None, prompt=prompt)
        return self._template([{"role": "system", "content": told}, *messages], None, prompt=prompt)

    def _clean_tool_prompt(self, text: str) -> str:
        # Our own wording names the tags; where they are added tokens the model is told of them in letters all the same.
        return text if "<tool_call>" not in self._guard.texts.values() else self.clean_text(text)

    def _render_ids(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        return self.encode(self._render_text(messages, tools))

    def _adapted(self, message: Message) -> Message:
        """The message as this template can take it."""
        if message["role"] == "tool" and not self._tool_role:
            return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        if message.get("tool_calls") and self._ignores_tools:
            calls = [json.dumps(c["function"], ensure_ascii=False) for c in message["tool_calls"]]
            text = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
            return {"role": "assistant", "content": f"{message['content']}\n{text}".strip()}
        return message

    def _dummy_turn(self, new_messages: Sequence[Message]) -> str:
        """What the template puts behind the close token of an assistant turn that `new_messages` answer."""
        calls = [
            {
                "id": m.get("tool_call_id", "call_0_0"),
                "type": "function",
                "function": {"name": m.get("name", "t"), "arguments": {}},
            }
            for m in new_messages
            if m["role"] == "tool"
        ]
        dummy: dict[str, Any] = {"role": "assistant", "content": "qzdummyzq"}
        if calls and not self._ignores_tools:
            dummy["tool_calls"] = calls
        text = self._template([{"role": "user", "content": "hi"}, dummy, *new_messages], None)
        behind = text.partition("qzdummyzq")[2]
        _, close, suffix = behind.partition(self._close_text)
        if not close:
            raise RendererError("the chat template does not close an assistant turn that tools answer")
        return suffix

    def _suffix(self, new_messages: Sequence[Message]) -> tuple[list[int], tuple[int, ...]]:
        """Ids of the new messages behind a close token, and the added tokens that must be among them."""
        messages = [self._adapted(message) for message in new_messages]
        key = tuple((m["role"], m.get("name", "")) for m in new_messages)
        if key not in self._frames:
            self._frames[key] = self._explore_frame(messages)
        frame = self._frames[key]
        contents = [m["content"] for m in messages]
        if frame is not None and all(contents):
            text = frame.pieces[0] + "".join(c + p for c, p in zip(contents, frame.pieces[1:], strict=True))
            return self.encode(text), frame.added_ids
        plain = [self._adapted({**m, "content": HARMLESS}) for m in new_messages]
        expected = self._guard.found_in(self.encode(self._dummy_turn(plain)))
        return self.encode(self._dummy_turn(messages)), expected

    def _explore_frame(self, messages: Sequence[Message]) -> _Frame | None:
        """The text around the contents, if the template puts tool results in as they are; None if it does more."""
        if any(m["role"] != "tool" for m in messages):
            return None
        marks = [f"{MARK}{i}{MARK}" for i in range(len(messages))]
        named: list[Message] = [{**m, "tool_call_id": f"qzidzq{i:03}"} for i, m in enumerate(messages)]
        try:
            text = rest = self._dummy_turn([{**m, "content": mark} for m, mark in zip(named, marks, strict=True)])
            nasty = self._dummy_turn([{**m, "content": NASTY} for m in named])
        except RendererError:
            return None
        pieces = []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                return None
            pieces.append(before)
        pieces.append(rest)
        if "qzidzq" in text or NASTY.join(pieces) != nasty:  # it shows the call's id, or quotes or trims the text
            return None
        return _Frame(tuple(pieces), self._guard.found_in(self.encode(HARMLESS.join(pieces))))


__all__ = ["Extension", "ParsedTurn", "Renderer", "RendererError", "load_renderer", "read_call"]
