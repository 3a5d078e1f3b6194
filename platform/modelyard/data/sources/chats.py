"""Conversations, written out by a tokenizer's chat template."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelyard.data.config import Chats
from modelyard.data.sources import Part, plan, read
from modelyard.data.sources.text import plan_json_lines, read_json_lines
from modelyard.errors import ConfigError, DataError

_ROLES = ("system", "user", "assistant", "tool")


@plan.register
def plan_chats(source: Chats) -> list[Part]:
    """Ranges of bytes, as for JSON Lines; the tokenizer must have a template.

    Raises:
        ConfigError: the folder holds no tokenizer, or one without a chat template.
    """
    _tokenizer(source.tokenizer)
    return plan_json_lines(source.paths)


@read.register
def read_chats(source: Chats, part: Part) -> Iterator[str]:
    """The text of each conversation, with the template's marks.

    Marks inside of messages are taken out, so that nobody can end his message and speak in another's name.

    Raises:
        DataError: a line holds no conversation; file, place and reason are named.
    """
    tokenizer = _tokenizer(source.tokenizer)
    marks = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    for where, row in read_json_lines(part):
        messages = _messages(row.get(source.messages_column), marks, where)
        try:
            yield str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template raises what it likes, e.g. for roles in the wrong order
            raise DataError(f"{where}: the chat template refuses the conversation: {error}") from error


def _messages(found: Any, marks: list[str], where: str) -> list[dict[str, str]]:
    if not isinstance(found, list) or not found:
        raise DataError(f"{where}: no list of messages", "set source.messages_column")
    messages = []
    for message in found:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in _ROLES or not isinstance(content, str):
            raise DataError(
                f"{where}: {str(message)[:80]!r} is no message", f"it needs a role ({', '.join(_ROLES)}) and content"
            )
        for mark in marks:
            content = content.replace(mark, "")
        messages.append({"role": role, "content": content})
    return messages


@functools.lru_cache(maxsize=2)
def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    if not Path(folder).expanduser().is_dir():
        raise ConfigError(f"source.tokenizer: the folder {folder!r} does not exist", "name the model's folder")
    tokenizer = AutoTokenizer.from_pretrained(Path(folder).expanduser(), local_files_only=True)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"source.tokenizer: the tokenizer in {folder!r} has no chat template",
            "use an instruct model's, or kind jsonl",
        )
    return tokenizer
