"""The OpenAI protocol: what a request may ask for, what is refused and why, and the replies.

Candidates are always drawn and weighed as the artefact was fitted: that is what mu holds for. What a request limits,
`max_tokens` and `stop`, is cut from the chosen text.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from openai.types import Completion, CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from daemon_fast.decode import Decoded
from daemon_fast.energy import Energy
from daemon_fast.prompts import is_chat
from daemon_fast.proposals.base import ProposalSettings, as_list
from daemon_fast.proposals.candidates import texts_behind

__all__ = ["ChatRequest", "CompletionRequest", "Refusal", "Reply", "model_card", "parse"]

MOST_SAMPLES = 128  # n, as OpenAI bounds it
MOST_STOPS = 16
# What may be asked for, since it is what happens anyway; of other values the reason of the refusal.
WITHOUT_PLACE: dict[str, tuple[Sequence[Any], str]] = {
    "best_of": ((1,), "the artefact sets how many candidates are drawn"),
    "echo": ((False,), "the prompt is not repeated"),
    "suffix": (("",), "texts are continued, not filled in"),
    "logprobs": ((False,), "log-probabilities are not returned"),
    "top_logprobs": ((), "log-probabilities are not returned"),
    "prompt_logprobs": ((), "log-probabilities are not returned"),
    "frequency_penalty": ((0,), "it would draw from another distribution than mu was fitted for"),
    "presence_penalty": ((0,), "it would draw from another distribution than mu was fitted for"),
    "repetition_penalty": ((1,), "it would draw from another distribution than mu was fitted for"),
    "logit_bias": (({},), "it would draw from another distribution than mu was fitted for"),
    "ignore_eos": ((False,), "it would draw from another distribution than mu was fitted for"),
    "tools": (([],), "no tools are called"),
    "tool_choice": (("none", "auto"), "no tools are called"),
    "parallel_tool_calls": ((True, False), "no tools are called"),
    "functions": (([],), "no functions are called"),
    "function_call": (("none", "auto"), "no functions are called"),
    "response_format": (({"type": "text"},), "only text is drawn"),
    "modalities": ((["text"],), "only text is drawn"),
    "audio": ((), "only text is drawn"),
    "prediction": ((), "texts are drawn, not predicted"),
    "reasoning_effort": (("none",), "the model's text is returned as it is"),
    "verbosity": ((), "the artefact sets how long texts are"),
    "web_search_options": ((), "nothing is looked up"),
    "store": ((False,), "nothing is stored"),
}
# What the artefact sets; and other names and values of "as it is".
FITTED = {name: name for name in ("temperature", "top_p", "top_k", "min_p")} | {"min_tokens": "min_new_tokens"}
# Of no consequence for what is drawn.
IGNORED = {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "user"}


class Refusal(Exception):
    """A request that can't be answered, as OpenAI's protocol says it.

    Attributes
    ----------
    status : of HTTP
    kind : "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
    param : the field that is wrong
    headers : of the reply
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code, self.headers = status, kind, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # of lengths: nothing to hide, a text comes as one


class Message(BaseModel):
    """One of a chat. `content` : a string, or parts of text."""

    model_config = ConfigDict(extra="allow", strict=True)  # clients send back what they got: `refusal`, null

    role: str
    content: Any
    name: str | None = None


class Request(BaseModel):
    """What both kinds of requests may ask for; other fields are in `model_extra`."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    n: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None  # as OpenAI's
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def limit(self) -> int | None:
        """Tokens of a text, at most."""
        return self.max_tokens

    def stops(self) -> list[str]:
        """Before the first of these, a text ends."""
        stops = [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            raise Refusal("stop must be a string or a list of strings, none empty", param="stop")
        if len(stops) > MOST_STOPS:
            raise Refusal(f"stop has {len(stops)} strings; at most {MOST_STOPS} are taken", param="stop")
        return stops


class CompletionRequest(Request):
    prompt: Any

    def prompts(self) -> list[Any]:
        """Texts and lists of token ids, to continue as they are, whatever mu was fitted to."""
        listed = as_list(self.prompt)
        if any(map(is_chat, listed)):
            raise Refusal("prompt holds a chat: send it as messages to /v1/chat/completions", param="prompt")
        return listed


class ChatRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def prompts(self) -> list[Any]:
        """The chat, which the tokenizer's template writes."""
        return [[_message(i, message) for i, message in enumerate(self.messages)]]


def _message(i: int, message: Message) -> dict[str, Any]:
    where = f"messages.{i}"
    if more := [name for name, value in (message.model_extra or {}).items() if value is not None]:
        raise Refusal(f"{where}.{more[0][:100]} is not supported: only text is read", param=f"{where}.{more[0][:100]}")
    if message.role not in ("system", "developer", "user", "assistant"):
        raise Refusal(
            f"{where}.role is {message.role[:40]!r}: it must be system, developer, user or assistant",
            param=f"{where}.role",
        )
    # Templates know no "developer", which is what OpenAI's later models call "system".
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": message.content, **({} if message.name is None else {"name": message.name})}


def parse(
    kind: type[CompletionRequest | ChatRequest], body: bytes, settings: ProposalSettings, served: Sequence[str]
) -> Any:
    """A request of this kind.

    Parameters
    ----------
    served : names of the model

    Raises
    ------
    Refusal
        Names the field.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise Refusal(f"the body is no JSON: {first['msg']}") from None
        param = ".".join(map(str, first["loc"])) or None
        raise Refusal(f"{param or 'the body'}: {first['msg']}", param=param) from None
    if request.model not in served:
        raise Refusal(
            f"the model {request.model[:100]!r} does not exist; there is {' or '.join(map(repr, served))}", 404,
            param="model", code="model_not_found",
        )  # fmt: skip
    for name, value in (request.model_extra or {}).items():
        _check_extra(name, value, settings)
    if request.stream_options is not None and not request.stream:
        raise Refusal("stream_options is for stream = true", param="stream_options")
    request.stops()
    return request


def _check_extra(name: str, value: Any, settings: ProposalSettings) -> None:
    """Refuse a field that DAEMON has no place for, unless it asks for what happens anyway."""
    if value is None or name in IGNORED:
        return
    if name in FITTED:
        fitted = getattr(settings, FITTED[name])
        as_it_is = (fitted, -1) if name == "top_k" and fitted == 0 else (fitted,)
        if not any(_same(value, own) for own in as_it_is):
            raise Refusal(
                f"{name} = {_short(value)} is not what the artefact was fitted for: leave it out, or give {fitted}",
                param=name, code="unsupported_value",
            )  # fmt: skip
    elif name in WITHOUT_PLACE:
        neutral, why = WITHOUT_PLACE[name]
        if not any(_same(value, own) for own in neutral):
            raise Refusal(f"{name} = {_short(value)} is not supported: {why}", param=name, code="unsupported_value")
    else:
        raise Refusal(f"unknown field: {name[:100]}", param=name[:100], code="unknown_parameter")


def _same(value: Any, own: Any) -> bool:
    """Equal, and both a truth value or neither: 0 is no False."""
    return isinstance(value, bool) == isinstance(own, bool) and bool(value == own)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- replies --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    text: str
    finish_reason: str


class Reply:
    """What was chosen for a request, in the protocol's forms.

    Under `daemon` it says what the protocol has no name for: the seed (drawn by the server if the request gave
    none; of a negative one, it plus 2^63, by which `SIRDecoder` draws the same);
    `num_candidates` of each prompt; `candidate_tokens`, which `usage.completion_tokens` counts, and `chosen_tokens`,
    which it doesn't, of the texts returned; and of each prompt the candidates' `weights`, their effective sample size
    `ess`, `log_z`, `index`: which of them the choices are, and the `metrics` of each choice.
    """

    def __init__(self, request: CompletionRequest | ChatRequest, energy: Energy, seed: int, decoded: Decoded) -> None:
        self._chat, self._model = isinstance(request, ChatRequest), request.model
        self._id, self._created = f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}", int(time.time())
        candidates, rows = decoded.candidates, [(i, row) for i, own in enumerate(decoded.tokens) for row in own]
        limit, stops = request.limit(), request.stops()
        cut = [(i, row[:limit]) for i, row in rows]
        texts = texts_behind(candidates.prefix_tokens, cut, candidates.detokenize)
        self._choices = []
        for text, (_, row), (_, whole), ended in zip(texts, cut, rows, _ended(decoded), strict=True):
            end = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
            stopped = end is not None or (ended and len(row) == len(whole))
            self._choices.append(_Choice(text[:end], "stop" if stopped else "length"))
        prompt_tokens, drawn = sum(map(len, candidates.prefix_tokens)), int(candidates.lengths.sum())
        self.usage = CompletionUsage(
            prompt_tokens=prompt_tokens, completion_tokens=drawn, total_tokens=prompt_tokens + drawn
        )
        index, features = decoded.index.tolist(), decoded.features.tolist()
        self.daemon: dict[str, Any] = {
            "seed": seed,
            "num_candidates": candidates.shape[1],
            "candidate_tokens": drawn,
            "chosen_tokens": sum(len(row) for _, row in cut),
            "prompts": [
                {
                    "ess": ess, "log_z": log_z, "weights": weights, "index": own,
                    "metrics": [dict(zip(energy.names, row, strict=True)) for row in of_own],
                }
                for ess, log_z, weights, own, of_own in zip(
                    decoded.ess.tolist(), decoded.log_z.tolist(), decoded.weights.tolist(), index, features, strict=True
                )
            ],
        }  # fmt: skip

    def whole(self) -> str:
        """The reply as one JSON object."""
        choices: list[dict[str, Any]] = []
        for i, c in enumerate(self._choices):
            message = {"role": "assistant", "content": c.text, "refusal": None}
            shown: dict[str, Any] = {"message": message} if self._chat else {"text": c.text}
            choices.append({"index": i, **shown, "finish_reason": c.finish_reason, "logprobs": None})
        kind, name = (ChatCompletion, "chat.completion") if self._chat else (Completion, "text_completion")
        return self._json(kind, name, choices, usage=self.usage, daemon=self.daemon)

    def events(self, include_usage: bool) -> Iterator[str]:
        """Server-sent events. A text comes as one, since it is there as one: after the choice."""
        kind: Any = ChatCompletionChunk if self._chat else Completion
        name = "chat.completion.chunk" if self._chat else "text_completion"
        usage: dict[str, Any] = {"usage": None} if include_usage else {}
        for i, c in enumerate(self._choices):
            chunks: list[tuple[dict[str, Any], str | None]] = [({"text": c.text}, c.finish_reason)]
            if self._chat:
                opening = {"delta": {"role": "assistant", "content": c.text}}
                chunks = [(opening, None), ({"delta": {}}, c.finish_reason)]
            for shown, reason in chunks:
                last = {"daemon": self.daemon} if reason and i == len(self._choices) - 1 else {}
                choice = {"index": i, **shown, "finish_reason": reason, "logprobs": None}
                yield _event(self._json(kind, name, [choice], **usage, **last))
        if include_usage:
            yield _event(self._json(kind, name, [], usage=self.usage))
        yield _event("[DONE]")

    def _json(self, kind: Any, name: str, choices: list[dict[str, Any]], **fields: Any) -> str:
        common = {"id": self._id, "object": name, "created": self._created, "model": self._model, "choices": choices}
        text: str = kind.model_validate({**common, **fields}).model_dump_json(exclude_unset=True)
        return text


def _ended(decoded: Decoded) -> list[bool]:
    """Of each choice, whether end-of-text ended it; where the engine doesn't tell, it is cut at the maximum length."""
    ended = decoded.candidates.ended
    if ended is None:
        return [False] * decoded.index.numel()
    return [bool(own) for own in ended.reshape(decoded.weights.shape).gather(1, decoded.index).flatten()]


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def model_card(name: str, energy: Energy, started: int) -> dict[str, Any]:
    """What /v1/models says of the model."""
    card = Model(id=name, object="model", created=started, owned_by="daemon_fast")
    fitted_to = "texts" if energy.chat_template is None else "chats"
    fitted = {"fitted_to": fitted_to, "metrics": energy.names, **energy.proposal_settings.sampling()}
    return {**card.model_dump(), "daemon": fitted}
