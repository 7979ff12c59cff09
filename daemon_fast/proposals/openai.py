"""Candidates from a server that speaks the OpenAI completions protocol: vLLM, SGLang, llama.cpp, TGI, ...

One request asks for all candidates of a prefix; several are under way at a time. The openai client waits out faults
that pass; what a reply lacks is asked for again, so that no prefix is lost and none answered twice.
"""

from __future__ import annotations

import itertools
import os
import queue
import random
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, TypeVar

import numpy as np

from daemon_fast.errors import EngineError, InvalidInput, require
from daemon_fast.models import load_tokenizer
from daemon_fast.proposals.base import Prefix, ProposalSettings, tokenize, vocabulary_fingerprint
from daemon_fast.proposals.candidates import Candidates

__all__ = ["ServerProposal"]

T = TypeVar("T")

FIRST_WAIT, MAX_WAIT = 0.5, 8.0  # seconds before the next attempt; each wait is twice the one before
CONNECT_TIMEOUT = 10.0  # a server that thinks for minutes still accepts connections at once
TOKEN_ID = "token_id:"  # what vLLM writes before an id where other servers write the token's text


class _Refused(EngineError):
    """The server understood the request and won't do that."""


@dataclass(frozen=True)
class _Drawn:
    """A candidate: its tokens, an end-of-text token that doesn't count included; no log-probabilities: unknown."""

    tokens: list[int]
    log_p: list[float] | None
    length: int
    text: str
    from_text: bool


class ServerProposal:
    """Draws candidates from the completions endpoint of a server.

    The API key is read from the environment variable OPENAI_API_KEY and goes nowhere but to the server.

    Parameters
    ----------
    base_url : such as "http://localhost:8000/v1"
    model_id : the model's Hugging Face id, folder, GGUF file or embedded name; its tokenizer is loaded from there, and
        artefacts record it
    served_model : the name under which the server serves the model; default: the only one that it serves
    log_probs : whether to ask for log-probabilities; without them all metrics but `ent` can be measured
    max_in_flight : requests under way at a time
    timeout : seconds that a reply may take
    max_retries : further attempts at a request that met a lost connection, a time-out, a reply cut short or empty, or
        the status 408, 409, 429 or 5xx; with waits that grow, or that the server's Retry-After sets
    **settings : the fields of `ProposalSettings`

    Raises
    ------
    EngineError
        The server can't be reached, or serves another model.
    ModelUnavailable
        The tokenizer can't be loaded.
    MissingPackage
        openai is not installed.

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
    candidate's log-probabilities are NaN.

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
        openai = require("openai", "candidates from a server need", "'daemon-fast[server]'")
        for name, value, valid in (
            ("max_in_flight", max_in_flight, max_in_flight >= 1),
            ("timeout", timeout, 0 < timeout < float("inf")),
            ("max_retries", max_retries, max_retries >= 0),
        ):
            if not valid:
                raise InvalidInput(f"{name} = {value} is out of range")
        self.base_url, self._log_probs = base_url, log_probs
        self._max_in_flight, self._max_retries = max_in_flight, max_retries
        self.tokenizer = load_tokenizer(model_id)
        self.settings = ProposalSettings(model_id, vocabulary_fingerprint(self.tokenizer), **settings)
        added = self.tokenizer.added_tokens_decoder.items()
        self._special = {*self.tokenizer.all_special_ids, *(i for i, token in added if token.special)}
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=openai.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT)),
            max_retries=max_retries,
        )
        self._knows_extensions = True
        self._warned: set[str] = set()
        self.served_model, self._context = self._served(served_model)

    def _served(self, model: str | None) -> tuple[str, int | None]:
        """Name of the model asked for, or of the only one served, and its context where the server tells."""
        entries = self._ask(lambda: self._client.models.with_raw_response.list(), "data")
        served = {str(entry.get("id")): entry for entry in entries}
        names = ", ".join(map(repr, served))
        if model is None and len(served) > 1:
            raise EngineError(f"{self.base_url} serves {names}: choose one by its name, served_model = ...")
        name = model or next(iter(served))
        if name not in served:
            raise EngineError(f"{self.base_url} does not serve {name!r}, but {names}")
        context = served[name].get("max_model_len")
        return name, context if isinstance(context, int) else None

    def detokenize(self, rows: Sequence[Sequence[int]]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    def tokenize(self, prefixes: Sequence[Prefix]) -> list[list[int]]:
        """Token ids of each prefix, checked against the context, where the server tells it.

        Raises
        ------
        InvalidInput
        """
        return tokenize(prefixes, self.tokenizer, len(self.tokenizer), self._context, self.settings.max_new_tokens)

    def propose(self, prefixes: Sequence[Prefix], seed: int) -> Candidates:
        """M candidates of each prefix.

        Parameters
        ----------
        prefixes : N strings or lists of token ids
        seed : the same seed gives the same ones again, as far as the server keeps to seeds; those that a reply lacked
            are drawn with another one

        Raises
        ------
        InvalidInput
            No prefixes, an empty one, or one too long for the model's context.
        EngineError
            The server can't be reached any more, refuses the request, gives no log-probabilities, does not keep to
            `min_new_tokens`, or has another vocabulary.
        """
        prefix_tokens = self.tokenize(prefixes)
        seed %= 2**64

        def draw(i: int) -> list[_Drawn]:
            drawn: list[_Drawn] = []
            for part in itertools.count():
                missing = self.settings.num_candidates - len(drawn)
                if not missing:
                    break
                # 30 bits: some servers hold a seed in 32, and add the candidate's number to it.
                own_seed = int(np.random.SeedSequence([seed, i, part]).generate_state(1)[0] >> 2)
                choices = self._draw({"prompt": prefix_tokens[i], "n": missing, "seed": own_seed})
                drawn += map(self._read, choices[:missing])
            return drawn

        rows = [row for drawn in self._map(draw, len(prefix_tokens)) for row in drawn]
        self._check_vocabulary(rows[: self.settings.num_candidates])
        if not self._knows_extensions:
            self._warn(
                f"{self.base_url} accepts only the fields that OpenAI defines: where it truncates or penalises by "
                "defaults of its own, these hold"
            )
        if any(row.from_text for row in rows):
            self._warn(
                f"{self.base_url} gives no token ids: texts are tokenized again, which may not be how they were drawn"
            )
        if self._log_probs and any(row.log_p is None for row in rows):
            self._warn(
                f"{self.base_url} gives some candidates fewer or more log-probabilities than tokens: these are NaN"
            )
        log_p = [row.log_p or [nan] * len(row.tokens) for row in rows] if self._log_probs else None
        lengths = [row.length for row in rows]
        return self._candidates([row.tokens for row in rows], log_p, lengths, prefix_tokens)

    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> Candidates:
        """Given continuations, one of each prefix, with the log-probabilities that the model gives them (M = 1).

        Parameters
        ----------
        prefixes, continuations : N lists of token ids each, none empty

        Returns
        -------
        Candidates
            Log-probabilities are NaN, with a warning, if the server gives none of a prompt (llama.cpp and TGI).

        Raises
        ------
        InvalidInput
            A text fills the model's context: vLLM wants room for one more token, though it draws none.
        EngineError
        """
        prefix_tokens = [list(map(int, prefix)) for prefix in prefixes]
        rows = [list(map(int, continuation)) for continuation in continuations]
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
                log_p = _log_probs(self._complete(body, {})[0])
            except _Refused as refused:
                return str(refused)
            if log_p is None or len(log_p) != len(texts[i]):
                return f"{self.base_url} returns none"
            return log_p[len(prefix_tokens[i]) :]

        results = self._map(prompt_log_p, len(texts)) if self._log_probs else []
        log_p = [result for result in results if not isinstance(result, str)]
        for reason in [result for result in results if isinstance(result, str)][:1]:
            self._warn(f"given texts have no log-probabilities: {reason}")
        known = log_p if len(log_p) == len(rows) else None
        return self._candidates(rows, known, [len(row) for row in rows], prefix_tokens)

    def _candidates(
        self,
        rows: list[list[int]],
        log_p: list[list[float]] | None,
        lengths: list[int],
        prefix_tokens: list[list[int]],
    ) -> Candidates:
        s = self.settings
        is_model = (s.temperature, s.top_k, s.top_p, s.min_p, s.min_new_tokens) == (1, 0, 1, 0, 0)
        log_q = log_p if is_model else None
        return Candidates.from_rows(rows, log_p, log_q, lengths, prefix_tokens, self.detokenize)

    def _draw(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Choices drawn as the settings say."""
        s = self.settings
        body = {
            **request,
            "max_tokens": s.max_new_tokens,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            **({"logprobs": 1} if self._log_probs else {}),
        }
        asked = {"top_k": s.top_k, "min_p": s.min_p, "min_tokens": s.min_new_tokens}
        needed = {name: value for name, value in asked.items() if value}
        # Also what is neutral is said: servers have defaults of their own (llama.cpp: top-k 40, min-p 0.05), or
        # take the model's (vLLM and SGLang: generation_config.json). Token ids: newer and older versions of vLLM.
        neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        if not self._knows_extensions:
            return self._complete(body, needed)
        try:
            return self._complete(body, {**neutral, **ids, **needed})
        except _Refused as refused:
            try:
                choices = self._complete(body, needed)
            except _Refused:
                raise refused from None
            self._knows_extensions = False
            return choices

    def _complete(self, body: dict[str, Any], extensions: dict[str, Any]) -> list[dict[str, Any]]:
        """The reply's choices, in order."""
        create = self._client.completions.with_raw_response.create
        choices = self._ask(lambda: create(model=self.served_model, **body, extra_body=extensions), "choices")
        return sorted(choices, key=lambda choice: choice.get("index") or 0)

    def _read(self, choice: dict[str, Any]) -> _Drawn:
        """A choice as a candidate.

        Raises
        ------
        EngineError
            It lacks what was asked for.
        """
        try:
            log_p, tokens = _log_probs(choice), _token_ids(choice)
            text, ended = str(choice["text"]), choice.get("finish_reason") == "stop"
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"{self.base_url} gives a choice that makes no sense: {type(error).__name__}: {error}"
            ) from error
        if self._log_probs and log_p is None:
            raise EngineError(
                f"{self.base_url} gives no log-probabilities: with log_probs = False all metrics but ent go without"
            )
        known = log_p if self._log_probs else None
        if from_text := tokens is None:
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        # Servers differ in whether the token that ended a candidate is among its tokens, and its log-probabilities.
        ends = bool(ended and tokens and tokens[-1] in self._special)
        if ended and not from_text and len(tokens) - ends < self.settings.min_new_tokens:
            raise EngineError(
                f"{self.base_url} ended a candidate after {len(tokens) - ends} tokens, though min_tokens = "
                f"{self.settings.min_new_tokens} was asked for: it needs min_new_tokens = 0"
            )
        lacks_end = ended and not ends and self.tokenizer.eos_token_id is not None
        if lacks_end and (self.settings.count_eos or (known is not None and len(known) == len(tokens) + 1)):
            tokens, ends = [*tokens, self.tokenizer.eos_token_id], True
        if known is not None and len(known) != len(tokens):
            known = None
        return _Drawn(tokens, known, len(tokens) - (ends and not self.settings.count_eos), text, from_text)

    def _check_vocabulary(self, rows: list[_Drawn]) -> None:
        """A server tells nothing of its vocabulary; but tokens that read otherwise there than here are of another one.

        Raises
        ------
        EngineError
        """
        given = [row for row in rows if not row.from_text and _letters(row.text)]
        here = self.detokenize([row.tokens for row in given]) if given else []
        other = [(row, text) for row, text in zip(given, here, strict=True) if _letters(row.text) != _letters(text)]
        # Half a character at the end, say, reads otherwise, too; but not in most texts.
        if 2 * len(other) > len(given):
            (row, text), name = other[0], self.settings.model_id
            raise EngineError(
                f"{self.base_url} reads the tokens {row.tokens[:4]} ... as {row.text[:40]!r}, the tokenizer of {name} "
                f"as {text[:40]!r}: {name} is not the model that the server serves"
            )

    def _ask(self, ask: Callable[[], Any], field: str) -> list[dict[str, Any]]:
        """The list that a reply has under `field`; a reply that has none, though its status is 200, is asked for again.

        Raises
        ------
        EngineError
        """
        import openai

        none = f"{self.base_url} gave no answer in {self._max_retries + 1} attempts"
        for attempt in range(self._max_retries + 1):
            if attempt:  # spread out, so that requests which failed together don't come back together
                time.sleep(min(MAX_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1))
            try:
                reply = ask().http_response.json()
                entries = reply.get(field) if isinstance(reply, dict) else None
                # vLLM that is told to stop answers with what it has so far.
                if found := [e for e in entries or [] if isinstance(e, dict) and e.get("finish_reason") != "abort"]:
                    return found
                problem = f"the reply has no {field}"
            except openai.APIStatusError as error:
                status, said = error.status_code, f"{error.status_code}: {self._message(error)}"
                if status in (408, 409, 429) or status >= 500:
                    raise EngineError(f"{none}: {said}") from None  # whose message may tell the key
                kind = _Refused if status in (400, 422) else EngineError
                raise kind(f"{self.base_url} answers {said}") from None
            except openai.APIConnectionError as error:
                said = " ".join(str(error.__cause__ or error).split()) or type(error.__cause__).__name__
                raise EngineError(f"{none}: {said}") from None
            except ValueError:
                problem = "the reply is no JSON"
        raise EngineError(f"{none}: {problem}")

    def _message(self, error: Any) -> str:
        """What the server says, in one line and without the key."""
        body = error.body
        if isinstance(body, dict):
            body = body.get("message") or body.get("detail") or body
        key = self._client.api_key
        text = " ".join(str(body or error.message).split())
        return text if key == "none" else text.replace(key, "***")

    def _map(self, work: Callable[[int], T], n: int) -> list[T]:
        """work(0), ..., work(n - 1), as many at a time as may be in flight."""
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
                threading.Thread(target=run, daemon=True).start()
            for _ in range(n):
                i, result = done.get()
                if isinstance(result, BaseException):
                    raise result
                results[i] = result
        finally:
            stop.set()
        return [results[i] for i in range(n)]

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)


def _letters(text: str) -> str:
    """Without white space, which some tokenizers drop at the beginning of a text."""
    return "".join(text.split())


def _log_probs(choice: dict[str, Any]) -> list[float] | None:
    given = choice.get("logprobs") or {}
    if (entries := given.get("content")) is not None:  # llama.cpp answers in the form that chats have
        return [float(entry["logprob"]) for entry in entries]
    values = given.get("token_logprobs")
    return None if values is None else [nan if value is None else float(value) for value in values]


def _token_ids(choice: dict[str, Any]) -> list[int] | None:
    """None where the server gives only text."""
    given = choice.get("logprobs") or {}
    ids = choice.get("token_ids")
    if ids is None and (entries := given.get("content")) is not None:
        ids = [entry.get("id") for entry in entries]
        ids = None if None in ids else ids
    names = given.get("tokens") or []
    if ids is None and names and all(name.startswith(TOKEN_ID) for name in names):
        ids = [name.removeprefix(TOKEN_ID) for name in names]
    return None if ids is None else [int(i) for i in ids]
