"""Candidates from a server that speaks OpenAI's protocol of completions, or of chats: vLLM, SGLang, llama.cpp, TGI, ...

One request asks for all candidates of a prefix; several are under way at a time. Faults that pass are waited out, and
what a reply lacks is asked for again, so that no prefix is lost and none answered twice. What a server refuses is asked
for in a simpler way, and that is remembered.
"""

from __future__ import annotations

import contextvars
import json
import os
import queue
import random
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from math import isnan, nan
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from daemon_fast import stop
from daemon_fast.arguments import integer, number
from daemon_fast.errors import EngineError, InvalidInput, require
from daemon_fast.memory import check_candidates
from daemon_fast.models import load_tokenizer
from daemon_fast.prompts import Messages, is_chat
from daemon_fast.proposals.base import (
    Prefix,
    ProposalSettings,
    as_list,
    ends,
    eos_token_ids,
    given_rows,
    prompt_ids,
    seed_of_each,
    tokenize,
    vocabulary_fingerprint,
)
from daemon_fast.proposals.candidates import Candidates
from daemon_fast.proposals.completions import (
    Drawn,
    EndedEarly,
    Reader,
    Refused,
    are_copies,
    as_completion,
    check_log_probs,
    choices_of,
    letters,
    log_probs,
    said,
    token_ids,
)

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

__all__ = ["ServerProposal"]

T = TypeVar("T")

# Seconds before the next attempt, each wait twice the one before, unless the server says how long: at most so long.
FIRST_WAIT, MAX_WAIT, MAX_RETRY_AFTER = 0.5, 8.0, 600.0
NO_ROUTE = (404, 405, 410, 501)
NO_JSON = "the reply is no JSON"
PASSING = (408, 409, 429)  # and 5xx


class _NoRoute(EngineError):
    """The server knows no such address; or what is there is something else."""


class _NothingYet(Exception):
    """A reply that lacks what it should hold: the next one may have it."""


@dataclass(frozen=True)
class _Prompt:
    """A prefix.

    Attributes
    ----------
    given : a text, token ids or a chat
    tokens : its token ids
    text : one of the same tokens, which is sent where token ids are refused; None if there is none, and of a chat
    """

    given: str | list[int] | Messages
    tokens: list[int]
    text: str | None


@dataclass(frozen=True)
class _Dialect:
    """What a server takes; all of it, until it refuses some.

    Attributes
    ----------
    extensions : fields beyond those that OpenAI defines, where they are neutral
    completions : the address /completions; without it, prompts that are chats go to /chat/completions as messages
    token_prompts : prompts of token ids, and not only texts; without them, chats go there as messages, too
    max_tokens : the field of that name; newer chat models call it max_completion_tokens
    seeds : a seed
    counts : the field n
    most : candidates of one request
    ignore_eos : a minimum length is had by never drawing end-of-text, since min_tokens is ignored
    """

    extensions: bool = True
    completions: bool = True
    token_prompts: bool = True
    max_tokens: bool = True
    seeds: bool = True
    counts: bool = True
    most: int = sys.maxsize
    ignore_eos: bool = False

    def sends_messages(self, prompt: _Prompt) -> bool:
        return is_chat(prompt.given) and not (self.completions and self.token_prompts)

    def simpler(self, n: int, prompt: _Prompt) -> Iterator[_Dialect]:
        """What may be tried where a request for n candidates was refused; last, the least that can be asked for."""
        only_tokens = self.token_prompts and prompt.text is None and not is_chat(prompt.given)
        if self.extensions:
            yield replace(self, extensions=False)
        if self.completions and self.token_prompts and not only_tokens:
            yield replace(self, token_prompts=False)
        if self.sends_messages(prompt) and self.max_tokens:
            yield replace(self, max_tokens=False)
        n = min(n, self.most)
        while n > 1:
            n //= 2
            yield replace(self, most=n)
        if self.counts:
            yield replace(self, most=1, counts=False)
        if self.seeds:
            yield replace(self, seeds=False)
        least = replace(self, extensions=False, token_prompts=only_tokens, most=1)
        for fewer in (least, replace(least, counts=False), replace(least, counts=False, seeds=False)):
            if fewer != self:
                yield fewer


class ServerProposal:
    """Draws candidates from the completions endpoint of a server, or answers of a chat from that of chats.

    The API key is read from the environment variable OPENAI_API_KEY and goes nowhere but to the server.

    Parameters
    ----------
    base_url : such as "http://localhost:8000/v1"
    model_id : the model's Hugging Face id, folder, GGUF file or embedded name; its tokenizer is loaded from there, and
        artefacts record it
    served_model : the name under which the server serves the model, also one that its list lacks, such as an alias;
        default: the only one that it serves
    log_probs : whether to ask for log-probabilities; without them all metrics but `ent` can be measured
    max_in_flight : requests under way at a time
    timeout : seconds that a reply may take
    max_retries : further attempts at a request that met a lost connection, a time-out, a reply cut short or empty, or
        the status 408, 409, 429 or 5xx; with waits that grow, or that the server's Retry-After sets, seconds or a date,
        up to 600 seconds: a longer one is an EngineError
    **settings : the fields of `ProposalSettings`

    Raises
    ------
    EngineError
        The server can't be reached, or doesn't tell which of several models is meant.
    ModelUnavailable
        The tokenizer can't be loaded.
    MissingPackage
        pydantic_core, which parses replies, is not installed.

    Notes
    -----
    `token_log_p` is what the server gives for drawn tokens, taken to be at temperature 1. That is what vLLM (unless
    started with --logprobs-mode processed_logprobs or the like) and llama.cpp give; SGLang only if the environment
    variable SGLANG_RETURN_ORIGINAL_LOGPROB is set, or at temperature 1.

    vLLM on a CPU must be started with --no-enable-chunked-prefill: version 0.32 dies of a request with a seed whose
    prompt it takes in parts.

    `token_log_q` is known only where the proposal is the model itself: temperature 1, nothing truncated, and
    min_new_tokens = 0.

    Token ids come from vLLM and llama.cpp. Other servers give only text, which is tokenized again; a warning says so.
    That isn't always how the model wrote it: token metrics may differ a little, and where the count differs, the
    candidate's log-probabilities are NaN. So is that of an end-of-text token for which a server gives none, and with it
    the candidate's log p.

    A server that refuses `n` candidates at once, or gives copies of one, is asked for fewer at a time, each request
    with a seed of its own; one that refuses token ids is sent texts, if they have the same tokens; one that has no
    /models needs `served_model`. llama.cpp knows no min_tokens: there, where min_new_tokens = max_new_tokens,
    ignore_eos takes its place (end-of-text is never drawn, which is the same); other minima are refused. Its slots
    (--parallel) bound n. It leaves out tokens that hold part of a character: candidates that have such are read from
    their text, and their log-probabilities are NaN.

    A chat is sent as the token ids that the tokenizer's template makes of it. To a server that has no completions, or
    takes only texts, it is sent as messages: then the server's own template is what makes them a prompt, and a warning
    says so. Texts and token ids need completions.

    A reply that isn't what was asked for is an error, not a sample: tokens outside the vocabulary or more than
    max_tokens, candidates that a filter or a limit of the server's own cut short, copies whatever the seed; of chats
    also thinking that stands apart from the answer, refusals and calls of tools.

    Examples
    --------
    >>> proposal = ServerProposal("http://localhost:8000/v1", "Qwen/Qwen3-0.6B", num_candidates=25, temperature=0.97)
    >>> proposal.propose(["The Roman Empire was"], seed=0).texts[0]
    """

    def __init__(
        self,
        base_url: str,
        model_id: str,
        *,
        served_model: str | None = None,
        log_probs: bool = True,
        max_in_flight: int = 8,
        timeout: float = 600.0,
        max_retries: int = 5,
        **settings: Any,
    ) -> None:
        self._from_json = require("pydantic_core", "candidates from a server need", "'daemon-fast[server]'").from_json
        max_in_flight = integer("max_in_flight", max_in_flight, ">= 1", lambda n: n >= 1)
        timeout = number("timeout", timeout, ">= 0.001 and finite", lambda x: 1e-3 <= x < float("inf"))
        max_retries = integer("max_retries", max_retries, ">= 0", lambda n: n >= 0)
        require("urllib3", "candidates from a server need", "'daemon-fast[server]'")
        from daemon_fast.proposals.connections import Connections

        self._key = os.environ.get("OPENAI_API_KEY") or "none"
        if not (self._key.isascii() and self._key.isprintable()):
            raise InvalidInput("OPENAI_API_KEY holds a line break, or a character that is not ASCII")
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        self._connections = Connections(base_url, headers, timeout)
        self.base_url = base_url = self._connections.address
        self._log_probs = log_probs
        self._max_in_flight, self._max_retries = max_in_flight, max_retries
        self.tokenizer = load_tokenizer(model_id)
        self.settings = ProposalSettings(model_id, vocabulary_fingerprint(self.tokenizer), **settings)
        self.eos_token_ids = eos_token_ids(None, self.tokenizer)
        self._vocabulary = 1 + max(self.tokenizer.get_vocab().values())
        self._reader = Reader(base_url, self.tokenizer, self.eos_token_ids, self._vocabulary, self.settings, log_probs)
        self._dialect, self._settling = _Dialect(), threading.Lock()
        self._warned: set[str] = set()
        self.served_model, self._context = self._served(served_model)

    def _served(self, model: str | None) -> tuple[str, int | None]:
        """Name of the model asked for, or of the only one served, and its context where the server tells."""
        try:
            entries = self._ask("GET", "/models", None, _models_of)
            why = "its list is empty"
        except (_NoRoute, Refused) as error:
            entries, why = [], str(error).removeprefix(f"{self.base_url} ")
        if not entries:  # not every server has a list
            if model is None:
                raise EngineError(
                    f"{self.base_url} does not tell which models it serves ({why}): name one, served_model = ..."
                )
            return model, None
        served = {str(entry["id"]): entry for entry in entries}
        names = ", ".join(map(repr, served))
        if model is None and len(served) > 1:
            raise EngineError(f"{self.base_url} serves {names}: choose one by its name, served_model = ...")
        name = model or next(iter(served))
        if name not in served:  # an alias, or "x" for Ollama's "x:latest"
            self._warn(
                f"{self.base_url} does not list {name!r} among its models ({names}): it is asked for all the same"
            )
        facts = served.get(name) or (entries[0] if len(served) == 1 else {})
        if facts.get("owned_by") == "llamacpp":
            self._dialect = replace(self._dialect, ignore_eos=self._may_ignore_eos())
        context = facts.get("max_model_len") or (facts.get("meta") or {}).get("n_ctx")  # vLLM, llama.cpp
        return name, context if isinstance(context, int) else None

    def _may_ignore_eos(self) -> bool:
        """Whether never to draw end-of-text is what the minimum length asks for."""
        return self.settings.min_new_tokens == self.settings.max_new_tokens

    def detokenize(self, rows: Sequence[Sequence[int]]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    def tokenize(self, prefixes: Sequence[Prefix]) -> list[list[int]]:
        """Token ids of each prefix, checked against the context, where the server tells it.

        Raises
        ------
        InvalidInput
        """
        return tokenize(prefixes, self.tokenizer, self._vocabulary, self._context, self.settings.max_new_tokens)

    def propose(self, prefixes: Sequence[Prefix], seed: int | Sequence[int]) -> Candidates:
        """M candidates of each prefix.

        Parameters
        ----------
        prefixes : N strings, lists of token ids or chats
        seed : the same seed gives the same ones again, as far as the server keeps to seeds; those that a reply lacked
            are drawn with another one. Or N seeds, one of each prefix.

        Raises
        ------
        InvalidInput
            No prefixes, an empty one, or one too long for the model's context.
        EngineError
            The server can't be reached any more, refuses the request, gives no log-probabilities, does not keep to
            `min_new_tokens`, or has another vocabulary.
        """
        prefix_tokens = self.tokenize(prefixes)
        check_candidates(self.settings, len(prefix_tokens))
        given = as_list(prefixes)
        prompts = [_Prompt(*one, self._text(*one)) for one in zip(given, prefix_tokens, strict=True)]
        drawn = self._settle(prompts, seed_of_each(seed, len(prompts)))
        rows = [row for own in drawn for row in own]
        self._check_vocabulary(drawn[0])
        self._tell(prompts, rows)
        log_p = [row.log_p or [nan] * len(row.tokens) for row in rows] if self._log_probs else None
        lengths, ended = [row.length for row in rows], [row.ended for row in rows]
        known = None if any(row.end_unknown for row in rows) else ended
        return self._candidates([row.tokens for row in rows], log_p, lengths, prefix_tokens, known)

    def _text(self, given: str | list[int] | Messages, tokens: list[int]) -> str | None:
        """A text of the same tokens, if there is one."""
        if isinstance(given, str) or is_chat(given):
            return given if isinstance(given, str) else None
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text if text and prompt_ids(text, self.tokenizer) == tokens else None

    def _settle(self, prompts: list[_Prompt], seeds: list[tuple[int, int]]) -> list[list[Drawn]]:
        """Candidates of each prompt, all drawn in one way. A server that ignores part of what it was asked is asked in
        another, for all of them: what it gave till then isn't what was asked for."""
        while True:
            try:
                drawn = self._draw_all(prompts, seeds)
            except EndedEarly as early:
                if self._dialect.ignore_eos or not self._may_ignore_eos():
                    raise
                before, self._dialect = self._dialect, replace(self._dialect, ignore_eos=True)
                try:
                    return self._settle(prompts, seeds)
                except (EndedEarly, Refused):
                    self._dialect = before
                    raise early from None
            copied = [own for own in drawn if are_copies(own, self.settings, self._vocabulary)]
            if not copied:
                return drawn
            if self._dialect.most == 1:
                tokens = max(len(one.tokens) for one in copied[0])
                raise EngineError(
                    f"{self.base_url} gives equal candidates of up to {tokens} tokens, more than chance allows at "
                    f"temperature = {self.settings.temperature}, though each was asked for with a seed of its own: it "
                    "seems to ignore temperature or seed"
                )
            self._dialect = replace(self._dialect, most=1)
            self._warn(
                f"{self.base_url} gives equal candidates where several are asked for with one seed: they are asked for "
                "one by one"
            )

    def _draw_all(self, prompts: list[_Prompt], seeds: list[tuple[int, int]]) -> list[list[Drawn]]:
        """M candidates of each prompt: what the replies of one round lack, the next round asks for with other seeds."""
        m = self.settings.num_candidates
        drawn: list[list[Drawn]] = [[] for _ in prompts]
        sizes, parts = [m] * len(prompts), [0] * len(prompts)
        while True:
            jobs = []
            for i, own in enumerate(drawn):
                size = min(sizes[i], self._dialect.most)
                for begin in range(len(own), m, size):
                    # 30 bits: some servers hold a seed in 32, and add the candidate's number to it.
                    own_seed = int(np.random.SeedSequence([*seeds[i], parts[i]]).generate_state(1)[0] >> 2)
                    jobs.append((i, min(size, m - begin), own_seed))
                    parts[i] += 1
            if not jobs:
                return drawn
            came = [0] * len(prompts)
            for (i, n, _), choices in zip(jobs, self._round(prompts, jobs), strict=True):
                drawn[i] += [self._reader.read(choice, prompts[i].tokens) for choice in choices[:n]]
                came[i] = max(came[i], len(choices))
            sizes = [min(size, n) if n else size for size, n in zip(sizes, came, strict=True)]

    def _round(self, prompts: list[_Prompt], jobs: list[tuple[int, int, int]]) -> list[list[dict[str, Any]]]:
        """Choices of each job: the number of its prompt, how many, and the seed."""

        def work(j: int) -> list[dict[str, Any]]:
            i, n, seed = jobs[j]
            return self._draw(prompts[i], n, seed)

        return self._map(work, len(jobs))

    def _tell(self, prompts: list[_Prompt], rows: list[Drawn]) -> None:
        """Warn of what the server lacks."""
        as_messages = [self._dialect.sends_messages(prompt) for prompt in prompts]
        if not self._dialect.extensions:
            self._warn(
                f"{self.base_url} accepts only the fields that OpenAI defines: where it truncates or penalises by "
                "defaults of its own, these hold"
            )
        if any(as_messages):
            self._warn(
                f"{self.base_url} puts chats in its own template, which can't be seen: it may not be the tokenizer's"
            )
        if not self._dialect.token_prompts and not all(as_messages):
            self._warn(
                f"{self.base_url} takes only texts as prompts: it tokenizes them itself, which may not be as here"
            )
        if not self._dialect.seeds:
            self._warn(f"{self.base_url} takes no seed: the same candidates can't be drawn again")
        if any(row.from_text for row in rows):
            which = "" if all(row.from_text for row in rows) else " of candidates with characters split between tokens"
            self._warn(
                f"{self.base_url} gives no token ids{which}: texts are tokenized again, which may not be how they were "
                "drawn"
            )
        if any(row.end_unknown for row in rows):
            self._warn(f"{self.base_url} does not say how candidates ended: some may have been cut short")
        if self._log_probs and any(row.log_p is None or any(map(isnan, row.log_p)) for row in rows):
            self._warn(f"{self.base_url} lacks log-probabilities of some candidates' tokens: these are NaN")

    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> Candidates:
        """Given continuations, one of each prefix, with the log-probabilities that the model gives them (M = 1).

        Parameters
        ----------
        prefixes, continuations : N lists of token ids each, none empty; a continuation that ended has the end-of-text
            token as its last

        Returns
        -------
        Candidates
            Log-probabilities are NaN, with a warning, if the server gives none of a prompt (llama.cpp and TGI).

        Raises
        ------
        InvalidInput
            No texts, an empty one, a token outside the vocabulary; or a text fills the model's context: vLLM wants room
            for one more token, though it draws none.
        EngineError
        """
        prefix_tokens, rows = given_rows(prefixes, continuations, self._vocabulary)
        texts = [p + row for p, row in zip(prefix_tokens, rows, strict=True)]
        for i, text in enumerate(texts):
            if self._context is not None and len(text) >= self._context:
                raise InvalidInput(
                    f"text {i} has {len(text)} tokens, prefix included: the server scores fewer than its context of "
                    f"{self._context}"
                )

        def prompt_log_p(i: int) -> list[float] | str:
            body = {"prompt": texts[i], "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 1.0}
            try:
                choice = self._complete(body, {})[0]
                log_p, ids = log_probs(choice), token_ids(choice)
            except (Refused, _NoRoute) as error:
                return str(error)
            except (AttributeError, KeyError, TypeError, ValueError):
                return f"{self.base_url} returns what makes no sense"
            if log_p is None or len(log_p) != len(texts[i]) or (ids is not None and ids != texts[i]):
                return f"{self.base_url} returns none"
            check_log_probs([x for x in log_p if not isnan(x)], self.base_url)
            return log_p[len(prefix_tokens[i]) :]

        # The first one tells whether a server does this at all: the others wait for it.
        results = [prompt_log_p(0)] if self._log_probs else []
        if results and not isinstance(results[0], str):
            results += self._map(lambda i: prompt_log_p(i + 1), len(texts) - 1)
        log_p = [result for result in results if not isinstance(result, str)]
        for reason in [result for result in results if isinstance(result, str)][:1]:
            self._warn(f"given texts have no log-probabilities: {reason}", stacklevel=3)
        if any(isnan(x) for row in log_p for x in row):
            self._warn("given texts lack log-probabilities of some tokens: these are NaN", stacklevel=3)
        known = log_p if len(log_p) == len(rows) else None
        ended, lengths = ends(rows, self.eos_token_ids, self.settings.count_eos)
        return self._candidates(rows, known, lengths.tolist(), prefix_tokens, ended.tolist())

    def _candidates(
        self,
        rows: list[list[int]],
        log_p: list[list[float]] | None,
        lengths: list[int],
        prefix_tokens: list[list[int]],
        ended: list[bool] | None,
    ) -> Candidates:
        s = self.settings
        is_model = (s.temperature, s.top_k, s.top_p, s.min_p, s.min_new_tokens) == (1, 0, 1, 0, 0)
        log_q = log_p if is_model else None
        return Candidates.from_rows(rows, log_p, log_q, lengths, prefix_tokens, self.detokenize, ended)

    def _draw(self, prompt: _Prompt, n: int, seed: int) -> list[dict[str, Any]]:
        """Choices drawn as the settings say, n at most."""
        while True:
            dialect = self._dialect
            try:
                return self._complete(*self._request(prompt, n, seed, dialect))
            except Refused as refused:
                with self._settling:
                    if self._dialect == dialect:
                        return self._simplify(prompt, n, seed, refused)
            except _NoRoute as missing:
                if dialect.sends_messages(prompt):
                    raise EngineError(f"{missing}; it needs {self.base_url}/chat/completions") from None
                if not is_chat(prompt.given):
                    raise EngineError(
                        f"{missing}; it needs {self.base_url}/completions to continue a text or token ids: a server "
                        "that only chats is given chats"
                    ) from None
                with self._settling:
                    if self._dialect == dialect:
                        self._dialect = replace(dialect, completions=False)
            # Now it is known, or another request has found meanwhile, what the server takes.

    def _simplify(self, prompt: _Prompt, n: int, seed: int, refused: Refused) -> list[dict[str, Any]]:
        """Choices asked for in the first way that the server takes, from now on.

        One thing is left out at a time. It stays so where the request is then refused for another reason: that part is
        mended.
        """
        dialect, reason, chats_lack = self._dialect, refused, ""
        while True:
            for simpler in dialect.simpler(n, prompt):
                try:
                    choices = self._complete(*self._request(prompt, n, seed, simpler))
                except Refused as other:
                    if _core(other) != _core(reason):
                        dialect, reason = simpler, other
                        break
                except _NoRoute:
                    chats_lack = f" (nor is there {self.base_url}/chat/completions, for messages)"
                except EngineError:
                    raise reason from None  # what was asked for is refused; how this attempt fails is of no interest
                else:
                    self._dialect = simpler
                    return choices
            else:
                if dialect.token_prompts and prompt.text is None and not is_chat(prompt.given):
                    raise Refused(
                        f"{reason} (a text in place of the token ids {prompt.tokens[:4]} ... was not tried: tokenized "
                        "again, it has others)"
                    )
                raise Refused(f"{reason}{chats_lack}")

    def _request(self, prompt: _Prompt, n: int, seed: int, dialect: _Dialect) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fields that OpenAI defines, and others."""
        s = self.settings
        if dialect.sends_messages(prompt):
            sent: dict[str, Any] = {"messages": prompt.given}
            log_probs: dict[str, Any] = {"logprobs": True, "top_logprobs": 1}  # llama.cpp's default would be 20
        else:
            sent = {"prompt": prompt.tokens if dialect.token_prompts else prompt.text}
            log_probs = {"logprobs": 1}
            if sent["prompt"] is None:
                raise EngineError(
                    f"{self.base_url} takes only texts as prompts, and there is none for the token ids "
                    f"{prompt.tokens[:4]} ...: tokenized again, it has others"
                )
        body = {
            **sent,
            **({"n": min(n, dialect.most)} if dialect.counts else {}),
            **({"seed": seed} if dialect.seeds else {}),
            ("max_tokens" if dialect.max_tokens else "max_completion_tokens"): s.max_new_tokens,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            **(log_probs if self._log_probs else {}),
        }
        asked = {"top_k": s.top_k, "min_p": s.min_p, "min_tokens": s.min_new_tokens, "ignore_eos": dialect.ignore_eos}
        needed = {name: value for name, value in asked.items() if value}
        # Also what is neutral is said: servers have defaults of their own (llama.cpp: top-k 40, min-p 0.05), or
        # take the model's (vLLM and SGLang: generation_config.json). Token ids: newer and older versions of vLLM.
        neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        return body, {**neutral, **ids, **needed} if dialect.extensions else needed

    def _complete(self, body: dict[str, Any], extensions: dict[str, Any]) -> list[dict[str, Any]]:
        """The reply's choices, in order; those of a chat in the form of completions."""
        chats = "messages" in body
        path = "/chat/completions" if chats else "/completions"
        asked = {"model": self.served_model, **body, **extensions}
        try:
            choices = self._ask("POST", path, json.dumps(asked).encode(), self._completed)
        except _NoRoute as error:
            # That there is no such model comes as 404, too.
            if re.search("model", str(error).removeprefix(self.base_url), re.IGNORECASE) and "chat" not in str(error):
                raise EngineError(str(error)) from None
            raise
        return [as_completion(choice, self.base_url) for choice in choices] if chats else choices

    def _completed(self, reply: Any) -> list[dict[str, Any]]:
        """Choices of a reply to a request for completions."""
        if fault := _fault_of(reply):
            self._raise_fault(fault)
        choices = choices_of(reply) if isinstance(reply, dict) else []
        # vLLM that is told to stop answers with what it has so far.
        if found := [choice for choice in choices if choice.get("finish_reason") != "abort"]:
            return found
        told = reply.get("message") or reply.get("detail") if isinstance(reply, dict) else None
        lacks = f"the reply has no choices{f', but says: {self._without_key(said(told))}' if told else ''}"
        raise _NothingYet("a reply was aborted" if choices else lacks)

    def _raise_fault(self, fault: Any) -> None:
        """Raise what a server says under status 200, as if it came under the status that it should have."""
        fault = fault if isinstance(fault, dict) else {"message": fault}
        code, text = fault.get("code"), self._without_key(said(fault))
        status = int(code) if isinstance(code, int) or str(code).isdigit() else None
        kind = f"{fault.get('type')} {code}".lower()
        if (
            status in PASSING
            or (status or 0) >= 500
            or re.search("rate_?limit|overload|timeout|unavail|server|internal", kind)
        ):
            raise _NothingYet(text)
        if status in (None, 400, 422):
            raise Refused(f"{self.base_url} answers an error: {text}")
        raise (_NoRoute if status in NO_ROUTE else EngineError)(f"{self.base_url} answers {status}: {text}")

    def _check_vocabulary(self, rows: list[Drawn]) -> None:
        """A server tells nothing of its vocabulary; but tokens that read otherwise there than here are of another one.

        Raises
        ------
        EngineError
        """
        given = [(row, row.text) for row in rows if not row.from_text and row.text]
        longest = max(given, key=lambda its: len(its[0].tokens), default=None)
        if longest is None or (letters(longest[1]) and not self._read_otherwise([longest])):
            return
        given = [(row, text) for row, text in given if letters(text)]
        other = self._read_otherwise(given) if given else []
        # Half a character at the end, say, reads otherwise, too; but not in most texts.
        if 2 * len(other) > len(given):
            (row, there, text), name = other[0], self.settings.model_id
            raise EngineError(
                f"{self.base_url} reads the tokens {row.tokens[:4]} ... as {there[:40]!r}, the tokenizer of {name} "
                f"as {text[:40]!r}: {name} is not the model that the server serves"
            )

    def _read_otherwise(self, given: list[tuple[Drawn, str]]) -> list[tuple[Drawn, str, str]]:
        """Of candidates and their texts, those whose tokens the tokenizer reads as another text, and this."""
        here = self.detokenize([row.tokens for row, _ in given])
        return [(*its, text) for its, text in zip(given, here, strict=True) if letters(its[1]) != letters(text)]

    def _ask(self, method: str, path: str, body: bytes | None, read: Callable[[Any], T]) -> T:
        """What `read` finds in the reply; where that is nothing, though its status is 200, it is asked for again.

        Raises
        ------
        EngineError
        """
        none = f"{self.base_url} gave no answer in {self._max_retries + 1} attempts"
        problem, told = "", None
        for attempt in range(self._max_retries + 1):
            if attempt:  # spread out, so that requests which failed together don't come back together
                wait = min(MAX_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
                stop.current().sleep(wait if told is None else told)
            told = None
            try:
                reply = self._connections.send(method, path, body)
            except OSError as error:
                problem = str(error)
                continue
            if not 200 <= reply.status < 300:
                problem, told = f"{reply.status}: {self._message(reply)}", _retry_after(reply.headers)
                if reply.status in NO_ROUTE:
                    raise _NoRoute(f"{self.base_url} answers {problem}")
                if reply.status not in PASSING and reply.status < 500:
                    kind = Refused if reply.status in (400, 422) else EngineError
                    raise kind(f"{self.base_url} answers {problem}")
                if told is not None and told > MAX_RETRY_AFTER:
                    raise EngineError(
                        f"{self.base_url} answers {problem}; it wants to be asked again in {told:.0f} seconds, and "
                        f"{MAX_RETRY_AFTER:.0f} at most are waited"
                    )
                continue
            try:
                return read(self._parsed(reply))
            except _NothingYet as error:
                problem = str(error)
            except ValueError:
                problem = NO_JSON
        raise (_NoRoute if problem == NO_JSON else EngineError)(f"{none}: {problem}")

    def _parsed(self, reply: BaseHTTPResponse) -> Any:
        """JSON of a reply. Log-probabilities of 25 candidates of 48 tokens take Python's own parser a millisecond."""
        try:
            return self._from_json(reply.data)
        except ValueError:
            pass
        try:
            return json.loads(reply.data)  # which takes half a character for one
        except RecursionError:
            raise ValueError("too deep") from None

    def _message(self, reply: BaseHTTPResponse) -> str:
        """What the server says of a request that it did not answer, in one line and without the key."""
        if 300 <= reply.status < 400:
            return f"it has moved to {said(reply.headers.get('Location'))}"
        try:
            told = self._parsed(reply)
        except ValueError:
            told = reply.data.decode(errors="replace")
        if isinstance(told, dict) and told.get("error"):
            told = told["error"]
        return self._without_key(said(told or reply.reason))

    def _without_key(self, text: str) -> str:
        return text if self._key == "none" else text.replace(self._key, "***")

    def _map(self, work: Callable[[int], T], n: int) -> list[T]:
        """work(0), ..., work(n - 1), as many at a time as may be in flight."""
        if n == 1:
            return [work(0)]
        todo, done = iter(range(n)), queue.SimpleQueue[tuple[int, T | BaseException]]()
        taking, stop = threading.Lock(), threading.Event()

        def run() -> None:
            while not stop.is_set():
                with taking:
                    i = next(todo, None)
                if i is None:
                    return
                try:
                    done.put((i, work(i)))
                except BaseException as error:
                    done.put((i, error))

        results: dict[int, T] = {}
        try:
            # Daemons, not an executor: that one waits for requests in flight, also after an interruption.
            for _ in range(min(n, self._max_in_flight)):
                threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
            for _ in range(n):
                i, result = done.get()
                if isinstance(result, BaseException):
                    raise result
                results[i] = result
        finally:
            stop.set()
        return [results[i] for i in range(n)]

    def _warn(self, message: str, stacklevel: int = 4) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=stacklevel)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds after which the server wants to be asked again, if it says so, as a number or as a date of its clock."""
    told = headers.get("Retry-After", "")
    try:
        seconds = float(told)
    except ValueError:
        try:
            then = parsedate_to_datetime(told).timestamp()
            now = parsedate_to_datetime(headers["Date"]).timestamp() if "Date" in headers else time.time()
        except ValueError:  # nothing
            return None
        seconds = then - now
    return seconds if seconds > 0 else None


def _fault_of(reply: Any) -> Any:
    """What a reply says in place of an answer: OpenAI's form, or that of older versions of vLLM and of SGLang."""
    if not isinstance(reply, dict):
        return None
    return reply if reply.get("object") == "error" else reply.get("error")


def _core(refused: Refused) -> str:
    """A server's reason without the numbers of this request."""
    return re.sub(r"\d+", "", str(refused))


def _models_of(reply: Any) -> list[dict[str, Any]]:
    """The models that a reply lists: OpenAI's form, or a bare list."""
    entries = reply.get("data") if isinstance(reply, dict) else reply
    if not isinstance(entries, list):
        fault = _fault_of(reply)
        raise _NoRoute(f"answers no list{f', but {said(fault)}' if fault else ''}")
    named = [{"id": entry} if isinstance(entry, str) else entry for entry in entries]
    return [entry for entry in named if isinstance(entry, dict) and entry.get("id")]
