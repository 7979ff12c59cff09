"""What every engine that draws candidates meets: settings, the `Proposal` protocol, checks of prefixes."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from daemon_fast.arguments import integer, number
from daemon_fast.errors import InvalidInput, Problems
from daemon_fast.prompts import (
    Message,
    Messages,
    as_messages,
    chat_ids,
    check_text,
    end_of_answer,
    ids_behind,
    is_chat,
    prompt_ids,
)
from daemon_fast.proposals.candidates import Candidates
from daemon_fast.seeds import check_seed

__all__ = [
    "Prefix",
    "Prefixes",
    "Proposal",
    "ProposalSettings",
    "as_list",
    "ends",
    "eos_token_ids",
    "given_rows",
    "ids_behind",
    "prompt_ids",
    "seed_of_each",
    "token_ids",
    "tokenize",
    "vocabulary_fingerprint",
]

# A text or token ids to continue, or a chat to answer
Prefix = str | Sequence[int] | Sequence[Message]
Prefixes = Prefix | Sequence[Prefix] | Tensor  # one, or several; a tensor of ids is [P] or [N, P]


@dataclass(frozen=True)
class ProposalSettings:
    """How candidates are drawn: what a fitted mu holds for, so the artefact stores it.

    Attributes
    ----------
    model_id : Hugging Face id, path or embedded name of the language model
    vocabulary : fingerprint of its tokenizer (see `vocabulary_fingerprint`)
    num_candidates : M per prefix
    max_new_tokens, min_new_tokens : bounds on the length; below the minimum, end-of-text is not drawn
    temperature : > 0
    top_k : number of likeliest tokens kept, 0 for all
    top_p : probability mass kept, from the likeliest down, 1 for all
    min_p : tokens kept have at least this share of the likeliest one's probability, 0 for all
    count_eos : whether the end-of-text token itself belongs to the continuation and its length
    """

    model_id: str
    vocabulary: str
    num_candidates: int = 25
    max_new_tokens: int = 64
    min_new_tokens: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    count_eos: bool = False

    def __post_init__(self) -> None:
        problems = Problems()

        def settle(check: Callable[..., float], name: str, limit: str, within: Callable[[Any], bool]) -> None:
            with problems:
                object.__setattr__(self, name, check(name, getattr(self, name), limit, within))

        settle(integer, "num_candidates", ">= 1", lambda n: n >= 1)
        settle(integer, "max_new_tokens", ">= 1", lambda n: n >= 1)
        most = self.max_new_tokens if isinstance(self.max_new_tokens, int) else float("inf")
        settle(integer, "min_new_tokens", f"from 0 to max_new_tokens = {self.max_new_tokens}", lambda n: 0 <= n <= most)
        settle(number, "temperature", "positive and finite", lambda x: 0 < x < float("inf"))
        settle(integer, "top_k", ">= 0", lambda n: n >= 0)
        settle(number, "top_p", "in (0, 1]", lambda x: 0 < x <= 1)
        settle(number, "min_p", "from 0 to 1", lambda x: 0 <= x <= 1)
        if not isinstance(self.count_eos, bool):
            problems.found.append(InvalidInput(f"count_eos = {reprlib.repr(self.count_eos)} must be True or False"))
        problems.report()

    @property
    def truncates(self) -> bool:
        """Whether tokens are left out, so that some texts can't be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def sampling(self) -> dict[str, Any]:
        """All but the model: what a proposal of any engine is made with."""
        return {name: value for name, value in asdict(self).items() if name not in ("model_id", "vocabulary")}


class Proposal(Protocol):
    """Draws candidates.

    Attributes
    ----------
    settings : how
    tokenizer : of Transformers; or None if prefixes are token ids, and there are no texts
    eos_token_ids : the tokens that end a text
    """

    settings: ProposalSettings
    tokenizer: Any
    eos_token_ids: list[int]

    def propose(self, prefixes: Sequence[Prefix], seed: int | Sequence[int]) -> Candidates:
        """M candidates of each prefix; the same seed gives the same ones again.

        A string, a flat list of token ids, a tensor [P] or a list of messages (a chat, to answer) is one prefix.

        Parameters
        ----------
        seed : of all random numbers; or N seeds, one of each prefix, which then gets the candidates that it would get
            alone with this seed, whatever else is drawn with it, as far as the engine rounds the same way in both

        Raises
        ------
        InvalidInput
            No prefixes, an empty one, one too long for the model's context, or what is no text, token ids or chat; not
            as many seeds as prefixes.
        """
        ...

    def tokenize(self, prefixes: Sequence[Prefix]) -> list[list[int]]:
        """Token ids of prefixes, with the same checks."""
        ...

    def detokenize(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Texts of token ids."""
        ...

    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> Candidates:
        """Given continuations, one of each prefix, with the log-probabilities that the model gives them (M = 1).

        A continuation that ended has the end-of-text token as its last.
        """
        ...


def as_list(prefixes: Prefixes) -> list[str | list[int] | Messages]:
    """The prefixes one by one: a string, a flat list of token ids, a tensor [P] or a list of messages is one; a tensor
    [N, P] is N.

    Raises
    ------
    InvalidInput
        What is no text, token ids or chat: dictionaries, floats, booleans, None.
    """
    if isinstance(prefixes, str):
        return [prefixes]
    items = _items(prefixes, "prefixes", "a string, a list of token ids, a chat, or a list of these")
    if is_chat(items):
        return [as_messages(items, "prefix 0")]
    if items and not any(map(_holds_items, items)):
        return [token_ids(items, "prefixes")]
    return [_one(item, f"prefix {i}") for i, item in enumerate(items)]


def _one(item: Any, name: str) -> str | list[int] | Messages:
    if isinstance(item, str):
        return item
    if hasattr(item, "tolist"):  # an array or tensor, also one of messages
        item = item.tolist()
    return as_messages(item, name) if is_chat(item) else token_ids(item, name)


def some_token_ids(ids: Any, name: str) -> list[int]:
    """One token id or several, as a list."""
    return token_ids(ids if _holds_items(ids) else [ids], name)


def token_ids(ids: Iterable[Any], name: str) -> list[int]:
    """Token ids of any integer type, of a list, array or tensor, as a list of int; `name` is that of errors.

    Raises
    ------
    InvalidInput
        Anything else.
    """
    row = _items(ids, name, "a list of token ids")
    for t, token in enumerate(row):
        if type(token) is int:
            continue
        value = token if _holds_items(token) or not hasattr(token, "item") else token.item()
        if isinstance(value, Mapping):
            _refuse_mapping(value, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidInput(f"{name} has {reprlib.repr(value)} at position {t}: a token id is an integer")
        row[t] = value
    return row


def _items(value: Any, name: str, expected: str) -> list[Any]:
    if isinstance(value, Mapping):
        _refuse_mapping(value, name)
    if isinstance(value, str | bytes) or not _holds_items(value):
        raise InvalidInput(f"{name} = {reprlib.repr(value)} must be {expected}")
    return value.tolist() if hasattr(value, "tolist") else list(value)


def _holds_items(value: Any) -> bool:
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0  # a number may be a tensor without dimensions


def _refuse_mapping(value: Mapping[Any, Any], name: str) -> None:
    hints = {"role": ": a chat is a list of messages", "messages": ": give its ['messages']"}
    hints["input_ids"] = ": give its ['input_ids']"
    hint = next((hint for key, hint in hints.items() if key in value), "")
    raise InvalidInput(f"{name} has a {type(value).__name__} in place of a text or token ids{hint}")


def tokenize(
    prefixes: Prefixes, tokenizer: Any, vocab_size: int, context: int | None, max_new_tokens: int
) -> list[list[int]]:
    """Token ids of prefixes, each of which can be continued by a model of this vocabulary and context.

    Parameters
    ----------
    prefixes : strings, lists of token ids or chats, or one of them (see `as_list`)
    tokenizer : a Transformers tokenizer, or None if all prefixes are token ids
    context : tokens that the model can hold; None: any number

    Raises
    ------
    InvalidInput
        No prefixes, an empty one, one too long, a token outside the vocabulary, a chat that the tokenizer's template
        refuses, or what is no text, token ids or chat.
    """
    listed = as_list(prefixes)
    if len(listed) == 0:
        raise InvalidInput("there are no prefixes")
    rows = []
    for i, prefix in enumerate(listed):
        row = _ids(prefix, tokenizer, f"prefix {i}")
        rows.append(row)
        if not row:
            raise InvalidInput(f"prefix {i} is empty: a language model needs at least one token to continue")
        if context is not None and len(row) + max_new_tokens > context:
            raise InvalidInput(
                f"prefix {i} has {len(row)} tokens; with max_new_tokens = {max_new_tokens} it exceeds the model's "
                f"context of {context}"
            )
        if bad := [token for token in row if not 0 <= token < vocab_size]:
            raise InvalidInput(f"prefix {i} has token {bad[0]}, outside the vocabulary of {vocab_size}")
    return rows


def seed_of_each(seed: int | Sequence[int], num_prefixes: int) -> list[tuple[int, int]]:
    """A seed and a number for each prefix, to make its random numbers of: of one seed the numbers are 0 to N - 1; of
    one seed each they are 0, as of a prefix alone.

    Raises
    ------
    InvalidInput
        Not as many seeds as prefixes, or one that is no integer from 0 to 2^63 - 1.
    """
    if not isinstance(seed, Sequence) or isinstance(seed, str):
        check_seed(seed)
        return [(int(seed), i) for i in range(num_prefixes)]
    if len(seed) != num_prefixes:
        raise InvalidInput(f"seed has {len(seed)} seeds for {num_prefixes} prefixes: give one, or one for each")
    for own in seed:
        check_seed(own)
    return [(int(own), 0) for own in seed]


def _ids(prefix: str | list[int] | Messages, tokenizer: Any, name: str) -> list[int]:
    chat = is_chat(prefix)
    if tokenizer is None and (chat or isinstance(prefix, str)):
        kind = "chat" if chat else "string"
        raise InvalidInput(f"{name} is a {kind}, and this proposal was made without a tokenizer: give token ids")
    if isinstance(prefix, str):
        check_text(prefix, name)
        return prompt_ids(prefix, tokenizer)
    return chat_ids(as_messages(prefix, name), tokenizer, name) if chat else token_ids(prefix, name)


def given_rows(
    prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], vocab_size: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of given texts, one continuation of each prefix.

    Raises
    ------
    InvalidInput
        None, not as many of both, an empty one, or a token outside the vocabulary.
    """
    if len(prefixes) == 0 or len(prefixes) != len(continuations):
        raise InvalidInput(
            f"there are {len(prefixes)} prefixes and {len(continuations)} continuations: give one for each"
        )
    both = []
    for name, given in (("prefix", prefixes), ("continuation", continuations)):
        rows = [token_ids(row, f"{name} {i}") for i, row in enumerate(given)]
        for i, row in enumerate(rows):
            if len(row) == 0:
                raise InvalidInput(f"{name} {i} is empty: it has no log-probability")
            if bad := [token for token in row if not 0 <= token < vocab_size]:
                raise InvalidInput(f"{name} {i} has token {bad[0]}, outside the vocabulary of {vocab_size}")
        both.append(rows)
    return both[0], both[1]


def eos_token_ids(configured: int | Sequence[int] | None, tokenizer: Any) -> list[int]:
    """The tokens that end a text: those of the model's generation config, else the tokenizer's; and the one by which
    the tokenizer's chat template ends an answer, which some configs lack."""
    ids = getattr(tokenizer, "eos_token_id", None) if configured is None else configured
    known = [] if ids is None else some_token_ids(ids, "eos_token_id")
    end = None if tokenizer is None else end_of_answer(tokenizer)
    return known if end is None or end in known else [*known, end]


def ends(rows: Sequence[Sequence[int]], eos: Sequence[int], count_eos: bool) -> tuple[Tensor, Tensor]:
    """[R] bool, which rows of what was drawn end with an end-of-text token; [R] int64, how many of its tokens count."""
    ended = torch.tensor([len(row) > 0 and row[-1] in eos for row in rows], dtype=torch.bool, device="cpu")
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device="cpu")
    return ended, lengths if count_eos else lengths - ended.long()


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Size and hash of a tokenizer's vocabulary: token metrics of one vocabulary mean nothing in another."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    digest = hashlib.sha256()
    for token, index in entries:
        digest.update(f"{index}\0{token}\0".encode())
    return f"{len(entries)}-{digest.hexdigest()[:16]}"
