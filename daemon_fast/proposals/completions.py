"""What the reply of a completions server says, and whether it is what was asked for.

Servers differ in how they say things, and some don't do what they were asked. What can be read safely is; a reply that
breaks what was asked raises an error, and is never taken as a sample.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import nan
from typing import Any

from daemon_fast.errors import EngineError
from daemon_fast.proposals.base import ProposalSettings, ids_behind
from daemon_fast.proposals.candidates import BROKEN

__all__ = [
    "Drawn",
    "EndedEarly",
    "Reader",
    "Refused",
    "are_copies",
    "as_completion",
    "check_log_probs",
    "choices_of",
    "letters",
    "log_probs",
    "said",
    "token_ids",
]

TOKEN_ID = "token_id:"  # what vLLM writes before an id where other servers write the token's text

# What servers call an end by end-of-text, and one by max_tokens; OpenAI's names come first.
ENDED = {"stop", "eos", "eos_token", "end_of_text", "end_of_turn", "end_turn", "end", "stop_sequence", "stop_token"}
FULL = {"length", "max_tokens", "max_new_tokens", "max_length", "max_output_tokens"}
SPOILED = {
    "abort", "aborted", "cancelled", "content_filter", "error", "function_call", "refusal", "safety", "timeout",
    "tool_calls", "tool_use",
}  # fmt: skip

# What the message of a chat may hold beside an answer: thinking, by the names that servers give it, and others.
BESIDE_ANSWERS = ("reasoning_content", "reasoning", "thinking", "refusal", "tool_calls", "function_call", "audio")

# Texts that are tokenized again may have other numbers of tokens than were drawn: by a quarter, and two more.
DRIFT, DRIFT_TOKENS = 1.25, 2
UNLIKELY = math.log(1e-6)  # chance of copies among independent candidates, below which they are none
NATS = 1.0  # a token, where the server gives no log-probabilities: open-ended text has two or three
CERTAIN = 16  # tokens of an answer, its end included, that may have none at all
SURE = 0.2  # probability above which a token may be all that top-k and min-p leave


class Refused(EngineError):
    """The server understood the request and won't do that."""


class EndedEarly(EngineError):
    """A candidate is shorter than the minimum length that was asked for."""


@dataclass(frozen=True)
class Drawn:
    """A candidate.

    Attributes
    ----------
    tokens : an end-of-text token that doesn't count included
    log_p : None where unknown
    text : as the server gives it, if it does
    ended : whether end-of-text ended it
    from_text : whether tokens are those of the text tokenized again
    end_unknown : whether nothing tells how it ended
    """

    tokens: list[int]
    log_p: list[float] | None
    length: int
    ended: bool
    text: str | None
    from_text: bool
    end_unknown: bool


@dataclass(frozen=True)
class Reader:
    """Reads choices as candidates.

    Attributes
    ----------
    url : of the server, for errors
    eos_token_ids : the tokens that end a text, whether the server knows it or not
    vocabulary : number of token ids
    log_probs : whether they were asked for
    """

    url: str
    tokenizer: Any
    eos_token_ids: Sequence[int]
    vocabulary: int
    settings: ProposalSettings
    log_probs: bool

    def read(self, choice: dict[str, Any], prefix: Sequence[int]) -> Drawn:
        """A choice as a candidate of a prefix.

        Raises
        ------
        EngineError
            It lacks what was asked for, or isn't what was asked for.
        EndedEarly
            It is too short.
        """
        try:
            log_p, tokens = log_probs(choice), token_ids(choice)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"{self.url} gives a choice that makes no sense: {type(error).__name__}: {error}"
            ) from error
        reason = _reason(choice)
        if reason in SPOILED:
            why = choice.get("error") or choice.get("refusal")
            raise EngineError(
                f"{self.url} ended a candidate with finish_reason = {reason!r}{f' ({said(why)})' if why else ''}: "
                "that is no sample of the model"
            )
        if self._lost_tokens(choice, tokens, reason):
            return self._of_text(choice, prefix, None, reason)
        if log_p is None and choice.get("text") == "" and reason in ENDED:
            log_p = []  # so some servers give those of the empty answer
        if self.log_probs and log_p is None:
            raise EngineError(
                f"{self.url} gives no log-probabilities: with log_probs = False all metrics but ent go without"
            )
        check_log_probs(log_p or [], self.url)
        known = log_p if self.log_probs else None
        if tokens is None:
            return self._of_text(choice, prefix, known, reason)
        return self._of_tokens(tokens, known, reason, choice.get("text"))

    def _lost_tokens(self, choice: dict[str, Any], tokens: list[int] | None, reason: str | None) -> bool:
        """Whether the choice tells only some tokens. llama.cpp lets one with part of a character's bytes wait for the
        next, and gives both as that one; at the end of a candidate, it gives none."""
        given, text = choice.get("logprobs") or {}, choice.get("text")
        entries = given.get("content") or []
        if isinstance(text, str) and text.endswith(BROKEN) and reason in FULL and (entries or not given):
            return tokens is None or len(tokens) < self.settings.max_new_tokens
        return any(
            entry.get("token") and isinstance(entry.get("id"), int) and not self._shows(entry["id"], entry["token"])
            for entry in entries
        )

    def _shows(self, token: int, text: str) -> bool:
        """Whether a token by itself reads so; special tokens are shown by some servers, and not by others."""
        if token not in self._pieces:
            self._pieces[token] = {
                letters(self.tokenizer.decode([token], skip_special_tokens=skip)) for skip in (True, False)
            }
        return letters(text) in self._pieces[token]

    @cached_property
    def _pieces(self) -> dict[int, set[str]]:
        return {}

    def _of_tokens(self, tokens: list[int], log_p: list[float] | None, reason: str | None, text: Any) -> Drawn:
        s = self.settings
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
            bad = next(token for token in tokens if not 0 <= token < self.vocabulary)
            raise EngineError(
                f"{self.url} gives token {bad}, outside the vocabulary of {self.vocabulary}: {s.model_id} is not "
                "the model that the server serves"
            )
        if len(tokens) > s.max_new_tokens:
            raise EngineError(
                f"{self.url} gives {len(tokens)} tokens, though max_tokens = {s.max_new_tokens} was asked for"
            )
        drawn = len(tokens)
        n = min((tokens.index(end) + 1 for end in self.eos_token_ids if end in tokens), default=None)
        if n is not None and n < drawn:  # where a server draws on behind an end of text, that is another text
            log_p = log_p[:n] if log_p is not None and len(log_p) == drawn else log_p
            tokens, text = tokens[:n], None
        # Servers differ in whether the token that ended a candidate is among its tokens, and its log-probabilities. A
        # token tells more than a reason: some say "eos_token", "length" or nothing.
        full = len(tokens) == s.max_new_tokens
        ended = n is not None or (bool(tokens) and self._ends(tokens[-1]) and (reason in ENDED or not full))
        if not ended and not full and reason not in ENDED:
            raise EngineError(
                f"{self.url} ended a candidate after {len(tokens)} tokens, with finish_reason = {reason!r}: neither "
                f"an end-of-text token nor max_tokens = {s.max_new_tokens} ended it"
            )
        self._check_minimum(len(tokens) - ended, s.min_new_tokens if ended or not full else 0)
        stopped = ended or reason in ENDED
        tokens, log_p, ended = self._with_end(tokens, log_p, reason in ENDED, ended)
        shown = text if isinstance(text, str) else None
        return Drawn(tokens, _fitting(log_p, tokens), self._length(tokens, ended), stopped, shown, False, False)

    def _of_text(
        self, choice: dict[str, Any], prefix: Sequence[int], log_p: list[float] | None, reason: str | None
    ) -> Drawn:
        text, s = choice.get("text"), self.settings
        if not isinstance(text, str):
            chats = ": it answers as a chat, and daemon_fast continues texts" if "message" in choice else ""
            raise EngineError(
                f"{self.url} gives a choice with neither token ids nor a text (text = {said(text)}){chats}"
            )
        if reason is not None and reason not in ENDED | FULL:
            raise EngineError(
                f"{self.url} ended a candidate with finish_reason = {reason!r}, and gives no token ids that would tell "
                "whether it is whole"
            )
        tokens = ids_behind(prefix, text, self.tokenizer)
        # Log-probabilities count the tokens that were drawn, a token that ended the candidate mostly included.
        drawn = len(tokens) if log_p is None else len(log_p)
        slack = DRIFT * s.max_new_tokens + DRIFT_TOKENS if log_p is None else s.max_new_tokens
        if drawn > slack:
            raise EngineError(f"{self.url} gives {drawn} tokens, though max_tokens = {s.max_new_tokens} was asked for")
        if reason in FULL and (not text or drawn < (s.max_new_tokens if log_p is not None else s.max_new_tokens / 2)):
            what = f"a text of {drawn} tokens" if text else "an empty text"
            raise EngineError(
                f"{self.url} ended a candidate with finish_reason = {reason!r}, but gives {what}, though max_tokens = "
                f"{s.max_new_tokens} was asked for"
            )
        stopped = reason in ENDED or (reason is None and drawn < s.max_new_tokens)
        least = s.min_new_tokens if log_p is not None else (s.min_new_tokens - DRIFT_TOKENS) / DRIFT
        if stopped and drawn < least:
            self._check_minimum(drawn, s.min_new_tokens)
        tokens = tokens[: s.max_new_tokens]
        ended = stopped and bool(tokens) and self._ends(tokens[-1])
        tokens, log_p, ended = self._with_end(tokens, log_p, stopped, ended)
        return Drawn(tokens, _fitting(log_p, tokens), self._length(tokens, ended), stopped, text, True, reason is None)

    def _with_end(
        self, tokens: list[int], log_p: list[float] | None, stopped: bool, ended: bool
    ) -> tuple[list[int], list[float] | None, bool]:
        """With the end-of-text token that the server left out, where it counts or log-probabilities are known: its own
        is NaN if they are those of the other tokens."""
        s, eos = self.settings, self.tokenizer.eos_token_id
        lacks_end = stopped and not ended and eos is not None and len(tokens) < s.max_new_tokens
        if lacks_end and log_p is not None and len(log_p) == len(tokens):
            log_p = [*log_p, nan]
        if lacks_end and (s.count_eos or (log_p is not None and len(log_p) == len(tokens) + 1)):
            return [*tokens, eos], log_p, True
        return tokens, log_p, ended

    def _length(self, tokens: list[int], ended: bool) -> int:
        return len(tokens) - (ended and not self.settings.count_eos)

    def _check_minimum(self, n: int, least: int) -> None:
        if n < least:
            raise EndedEarly(
                f"{self.url} ended a candidate after {n} tokens, though min_tokens = {least} was asked for: it needs "
                "min_new_tokens = 0"
            )

    def _ends(self, token: int) -> bool:
        """Whether a text may end by this token: servers know more of them than a tokenizer tells."""
        return token in self.eos_token_ids or (token in self._special and token != self.tokenizer.unk_token_id)

    @cached_property
    def _special(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return {*self.tokenizer.all_special_ids, *(i for i, token in added if token.special)}


def choices_of(reply: dict[str, Any]) -> list[dict[str, Any]]:
    """A reply's choices in order; of those with one index the first, since the others may be the same one again."""
    entries = reply.get("choices")
    choices = [entry for entry in (entries if isinstance(entries, list) else []) if isinstance(entry, dict)]
    first: dict[int, dict[str, Any]] = {}
    for choice in choices:
        if not isinstance(index := choice.get("index"), int):
            return choices
        first.setdefault(index, choice)
    return [first[index] for index in sorted(first)]


def as_completion(choice: dict[str, Any], url: str) -> dict[str, Any]:
    """A choice of a chat with its answer as a text, as completions have it.

    Raises
    ------
    EngineError
        There is more, or other, than an answer.
    """
    message = choice.get("message")
    if not isinstance(message, dict):
        raise EngineError(f"{url} gives a choice without a message")
    name = next((name for name in BESIDE_ANSWERS if message.get(name)), None)
    if name is not None:
        raise EngineError(
            f"{url} answers with {name} ({said(message[name])[:60]!r}): only what the model writes as an answer is a "
            "sample of it; switch off thinking, or how the server parses it, and tools"
        )
    content = message.get("content")
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else part for part in content]
        if others := [kind for kind in kinds if kind != "text"]:
            raise EngineError(f"{url} answers with a part of type {said(others[0])[:60]!r}: only text is a sample")
        content = "".join(str(part.get("text")) for part in content)
    if content is None and _reason(choice) in ENDED:
        content = ""  # so some servers give the empty answer
    return {**choice, "text": content}


def log_probs(choice: dict[str, Any]) -> list[float] | None:
    given = choice.get("logprobs") or {}
    if (entries := given.get("content")) is not None:  # llama.cpp answers in the form that chats have
        values: list[Any] | None = [entry["logprob"] for entry in entries]
    else:
        values = given.get("token_logprobs")
    if values is None:
        return None
    # What was drawn can't be impossible.
    return [nan if value is None or value == -math.inf else float(value) for value in values]


def check_log_probs(log_p: Sequence[float], url: str) -> None:
    """Raise EngineError for what is no log-probability; rounding may leave it next to 0."""
    if above := [x for x in log_p if x > 1e-3]:
        raise EngineError(f"{url} gives {above[0]} as a log-probability: it must be at most 0")


def token_ids(choice: dict[str, Any]) -> list[int] | None:
    """None where the server gives only text."""
    given = choice.get("logprobs") or {}
    ids = choice.get("token_ids")
    if ids is None and (entries := given.get("content")) is not None:
        ids = [entry.get("id") for entry in entries]
        ids = None if None in ids else ids
    names = given.get("tokens") or [entry.get("token") for entry in given.get("content") or []]
    if ids is None and names and all(isinstance(name, str) and name.startswith(TOKEN_ID) for name in names):
        ids = [int(name.removeprefix(TOKEN_ID)) for name in names]
    if ids is None or (not ids and choice.get("text")):
        return None
    return list(map(operator.index, ids))


def are_copies(drawn: Sequence[Drawn], settings: ProposalSettings, vocabulary: int) -> bool:
    """Whether more of one prefix's candidates are equal than can be by chance."""
    rows = {tuple(one.tokens): one for one in drawn}
    counts = Counter(tuple(one.tokens) for one in drawn)
    return any(
        math.log(math.comb(len(drawn), k)) + (k - 1) * _log_chance(rows[row], settings, vocabulary) < UNLIKELY
        for row, k in counts.items()
        if k > 1
    )


def _log_chance(one: Drawn, settings: ProposalSettings, vocabulary: int) -> float:
    """At least the log-probability that the settings draw this candidate, the minimum length aside."""
    s = settings
    if s.top_k == 1:
        return 0.0
    known = [x for x in one.log_p or () if not math.isnan(x)]
    unknown = len(one.tokens) - len(known)
    total = -NATS * max(0, unknown - CERTAIN * one.ended) * min(1.0, s.temperature)
    for x in known:
        p = math.exp(min(x, 0.0))
        if (s.top_k or s.min_p) and p > SURE:
            continue
        # q, at the temperature, is at most what it is if others share the rest evenly (below 1) or one has it (above).
        # Servers may give log-probabilities that are at the temperature already: then q = p.
        power, own = 1 / s.temperature, max(x, -1e4) / s.temperature
        others = power * math.log1p(-p) + min(0.0, 1 - power) * math.log(vocabulary) if p < 1 else -math.inf
        q = 1 / (1 + math.exp(min(700.0, others - own)))
        total += math.log(min(1.0, max(p, q, 1e-300) / s.top_p))
    return total


def letters(text: str) -> str:
    """Without white space, which some tokenizers drop at the beginning of a text."""
    return "".join(text.split())


def _fitting(log_p: list[float] | None, tokens: list[int]) -> list[float] | None:
    return log_p if log_p is not None and len(log_p) == len(tokens) else None


def _reason(choice: dict[str, Any]) -> str | None:
    reason = choice.get("finish_reason")
    if isinstance(reason, dict):
        reason = reason.get("type")
    return None if reason is None else str(reason).lower()


def said(value: Any) -> str:
    """What a server says, in one line."""
    if isinstance(value, dict):
        value = value.get("message") or value.get("detail") or value
    return "null" if value is None else " ".join(str(value).split())[:300]
