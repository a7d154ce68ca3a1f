"""The tiny models' tokenizer: a real `PreTrainedTokenizerFast` of about 700 tokens.

Any text is kept, byte by byte; what the invented registry writes often is one token: its syllables, its stems, pairs of
digits, page ids, and the fixed parts of its pages, questions and tool calls. Text is cut greedily into the longest
tokens (`WordPiece` with an empty prefix, over byte-level characters). Short episodes and copies that are token by token
unambiguous are what lets a model of 160 thousand parameters learn the job in a minute.

Nothing outside this folder knows of it: its chat template, renderer and parser are those of any model.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING

from envs.medbrowse.layout import layouts
from envs.medbrowse.registry import COMPANY_SUFFIXES, MONTHS, NOT_LISTED, STEMS, SYLLABLES
from envs.medbrowse.tasks import QUESTION_TYPES, SYSTEM, question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CONTROL_TOKENS = (PAD, START, END)
"""Special: skipped when text is decoded for people."""
MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Added tokens whose text is read by the parser."""

CHAT_TEMPLATE = (
    "{%- if tools or messages[0].role == 'system' -%}<|im_start|>{{ 'system\n' }}"
    "{%- if messages[0].role == 'system' -%}{{ messages[0].content }}{%- endif -%}"
    "{%- if tools -%}Tools:{%- for tool in tools -%}{{ ' ' + (tool.function or tool).name }}{%- endfor -%}{%- endif -%}"
    "<|im_end|>{%- endif -%}"
    "{%- for message in messages -%}{%- if not (loop.first and message.role == 'system') -%}"
    "<|im_start|>{{ message.role + '\n' }}"
    "{%- if message.reasoning_content -%}<think>{{ message.reasoning_content }}</think>{%- endif -%}"
    "{{ message.content or '' }}"
    "{%- for call in message.tool_calls or [] -%}{%- set f = call.function or call -%}"
    "<tool_call>{{ {'name': f.name, 'arguments': f.arguments} | tojson }}</tool_call>{%- endfor -%}"
    "<|im_end|>{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>{{ 'assistant\n' }}{%- endif -%}"
)
"""ChatML without line ends between messages, tools by name only. Every message is rendered by itself, so a dialogue's
rendering is a prefix of that of its continuation."""

MAX_PIECE = 200
"""Longest run of characters that is cut as one; bounds the time that long lines take."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer. The same one at every call."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = dict.fromkeys(_in_byte_level(text) for text in phrases())
    vocabulary = {
        token: i for i, token in enumerate(dict.fromkeys((*CONTROL_TOKENS, *MARKUP_TOKENS, *alphabet, *words)))
    }
    raw = Tokenizer(
        models.WordPiece(
            vocabulary, unk_token=PAD, continuing_subword_prefix="", max_input_chars_per_word=8 * MAX_PIECE
        )
    )
    lines = pre_tokenizers.Split(Regex(rf"[^\n]{{1,{MAX_PIECE}}}\n?|\n"), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([lines, byte_level])
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL_TOKENS])
    raw.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def phrases() -> list[str]:
    """Texts of more than one byte that are one token each, none of them across a line end."""
    syllables = chain(SYLLABLES, (s.capitalize() for s in SYLLABLES))
    numbers = (f"{n:02d}" for n in range(100))
    pages = (f"p{n}" for n in range(10, 100))
    months = (f"{month} " for month in MONTHS)
    names = (*STEMS, *COMPANY_SUFFIXES, NOT_LISTED, ", 20", "NCT")
    fixed = chain(_calls(), _questions(), _pages())
    cut = (line for text in fixed for line in text.splitlines(keepends=True))
    return [text for text in chain(syllables, numbers, pages, months, names, cut) if len(text.encode()) > 1]


def _calls() -> list[str]:
    """A call's JSON around its argument, the frames of roles and the names of tools."""
    heads = [
        '{"name": "search", "arguments": {"query": "NCT',
        '{"name": "search", "arguments": {"query": "',
        '{"name": "browse", "arguments": {"url": "/',
        '{"name": "submit_answer", "arguments": {"answer": "',
        '{"name": "find", "arguments": {"text": "',
    ]
    roles = [f"{role}\n" for role in ("system", "user", "assistant", "tool")]
    tools = ["Tools:", *(f" {name}" for name in ("search", "browse", "find", "submit_answer"))]
    return [*heads, '"}}', *roles, *tools]


def _questions() -> list[str]:
    texts = [SYSTEM]
    for kind in QUESTION_TYPES:
        texts += re.split("NCT|#", question(kind, "NCT#"))
    return texts


def _pages() -> list[str]:
    """The parts of pages and search results between their values."""
    from envs.medbrowse.demos import NO_HITS

    literals = [" /", NO_HITS, "\n"]
    for layout in layouts().values():
        for template in (layout.title_template, layout.text_template):
            literals += template.literals
    return literals


def _in_byte_level(text: str) -> str:
    """The characters that stand for the text's bytes in a byte-level vocabulary."""
    table = _byte_characters()
    return "".join(table[byte] for byte in text.encode())


def _byte_characters() -> list[str]:
    """GPT-2's `bytes_to_unicode`: printable bytes are themselves, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(0x100)]
