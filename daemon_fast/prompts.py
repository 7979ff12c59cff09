"""Prompts as token ids: texts, and chats by the tokenizer's template, and how an answer ends there.

Without torch, so that the command line can tell what is wrong with its data at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import dropwhile
from typing import Any, TypeGuard

from daemon_fast.errors import InvalidInput

__all__ = [
    "Message", "Messages", "answer_ids", "as_messages", "chat_ids", "check_text", "end_of_answer", "fingerprint",
    "ids_behind", "is_chat", "no_template", "prompt_ids", "user",
]  # fmt: skip

Message = dict[str, Any]  # "role" and "content", both strings, and what else a template reads
Messages = list[Message]

ASSISTANT = "assistant"
TAIL = 8  # tokens of a prefix that mostly suffice to see how what follows it reads
# What templates come to with messages that they weren't written for, beside Jinja's own errors.
_REFUSALS = (TypeError, ValueError, KeyError, IndexError, AttributeError)


def is_chat(value: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether this is one chat: a sequence of messages, each an object with a role."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and isinstance(value[0], Mapping)
        and "role" in value[0]
    )


def user(text: str) -> Messages:
    """The chat of one message of a user's."""
    return [{"role": "user", "content": text}]


def as_messages(chat: Sequence[Any], name: str) -> Messages:
    """A chat's messages, whose contents are strings; `name` is that of errors.

    A content that is a list of parts, as OpenAI's clients send it, is the text of its parts, a line each.

    Raises
    ------
    InvalidInput
        What is no message, or holds anything but text.
    """
    messages = []
    for i, message in enumerate(chat):
        where = f"{name}, message {i}"
        if not isinstance(message, Mapping):
            raise InvalidInput(f"{where} is a {type(message).__name__}: a message has a role and a content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise InvalidInput(f"{where} has role = {role!r}: it must be a string, such as 'user'")
        if isinstance(content, Sequence) and not isinstance(content, str | bytes):
            content = "\n".join(_text_of(part, where) for part in content)
        if content is None and message.get("tool_calls"):  # as OpenAI's clients send it
            content = ""
        if not isinstance(content, str):
            raise InvalidInput(f"{where} has a content of type {type(content).__name__}: only text can be continued")
        check_text(content, where)
        # Columns give null for what a message lacks, which templates would take for its presence.
        given = {key: value for key, value in message.items() if value is not None}
        messages.append({**given, "content": content})
    return messages


def check_text(text: str, name: str) -> None:
    """That a string is text: a lone surrogate, half of a character, is one that no tokenizer reads.

    Raises
    ------
    InvalidInput
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{name} has the lone surrogate {text[error.start]!r} at position {error.start}: half a character"
        ) from error


def _text_of(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str) or part.get("type", "text") not in ("text", "input_text", "output_text"):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise InvalidInput(f"{where} has a part of type {kind!r}: only text can be continued")
    return text


def chat_ids(messages: Messages, tokenizer: Any, name: str) -> list[int]:
    """Token ids of a chat up to where the assistant's answer begins, by the tokenizer's own template.

    Raises
    ------
    InvalidInput
        The tokenizer has no template; the template refuses the messages; or there is nothing to answer, as the
        assistant has spoken last.
    """
    if messages[-1]["role"] == ASSISTANT:
        raise InvalidInput(f"{name} ends with a message of the assistant's: there is nothing to answer")
    return _rendered(messages, tokenizer, name, add_generation_prompt=True)


def answer_ids(prompt: list[int], messages: Messages, answer: str, tokenizer: Any, name: str) -> list[int] | None:
    """Token ids of an answer as the template writes it behind the messages, and what follows it there.

    None where the template writes the messages otherwise once they are answered: then the answer has no place behind
    the prompt.

    Parameters
    ----------
    prompt : token ids of the messages, see `chat_ids`
    """
    whole = _rendered([*messages, {"role": ASSISTANT, "content": answer}], tokenizer, name)
    return whole[len(prompt) :] if whole[: len(prompt)] == prompt else None


def prompt_ids(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text that a model shall continue: without the end of text that some tokenizers append."""
    ids: list[int] = tokenizer(text)["input_ids"]
    if len(ids) < 2 or ids[-1] not in getattr(tokenizer, "all_special_ids", ()):
        return ids
    own = tokenizer(text, add_special_tokens=False)["input_ids"]  # which may itself end in a special token
    starts = range(len(ids) - len(own) + 1) if own else []
    end = next((i + len(own) for i in starts if ids[i : i + len(own)] == own), None)
    if end is not None:
        return ids[:end]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def ids_behind(prefix: Sequence[int], text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text that follows a prefix: alone, some tokenizers would put a space before it."""

    def ids(of: str) -> list[int]:
        found: list[int] = tokenizer(of, add_special_tokens=False)["input_ids"]
        return found

    for before in (tokenizer.decode(list(prefix[-TAIL:]), skip_special_tokens=True), "\n", "."):
        first, both = ids(before), ids(before + text)
        if both[: len(first)] == first:
            return both[len(first) :]
    return ids(text)


def end_of_answer(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind an answer; None without a template, or if it puts none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    try:
        ids = answer_ids(chat_ids(user("a"), tokenizer, "chat"), user("a"), "b", tokenizer, "chat")
        if ids is None:  # written otherwise once it is answered: then behind the question
            ids = answer_ids(_rendered(user("a"), tokenizer, "chat"), user("a"), "b", tokenizer, "chat")
    except InvalidInput:
        return None
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    special.discard(tokenizer.unk_token_id)  # which the letter may be
    behind = dropwhile(lambda i: i in special, ids or ())  # what some templates put before an answer, too
    return next((i for i in behind if i in special), None)


def no_template(tokenizer: Any, name: str) -> str:
    """What is wrong with a chat where the tokenizer can't make a prompt of it."""
    return (
        f"{name} is a chat, and the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template: take a "
        "model that was made to chat, set tokenizer.chat_template, or give a text"
    )


def fingerprint(tokenizer: Any) -> str | None:
    """Hash of the tokenizer's chat template; None if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):  # several by name: the one that `apply_chat_template` takes unless told
        template = template.get("default", repr(sorted(template)))
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()[:16]


def _rendered(messages: Messages, tokenizer: Any, name: str, **options: bool) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InvalidInput(no_template(tokenizer, name))
    from jinja2 import TemplateError

    try:
        ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    except (TemplateError, *_REFUSALS) as error:
        roles = ", ".join(message["role"] for message in messages[:6])
        raise InvalidInput(
            f"{name}: the chat template refuses messages of the roles {roles}{', ...' if len(messages) > 6 else ''}: "
            f"{' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    return ids
