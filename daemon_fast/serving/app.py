"""The server: HTTP in front of `Batcher`, with its limits, logs and counts."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hmac
import json
import logging
import secrets
import socket
import sys
import time
import traceback
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import anyio
import uvicorn
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from daemon_fast.decode import Decoded, SIRDecoder
from daemon_fast.errors import DaemonFastError, EngineError, InvalidInput, LowEffectiveSampleSize
from daemon_fast.serving.batcher import Batcher, QueueFull
from daemon_fast.serving.protocol import ChatRequest, CompletionRequest, Refusal, Reply, model_card, parse

__all__ = ["Limits", "listen", "make_app", "serve"]

MOST_BYTES = 8 * 2**20  # of a body
SMALL_BYTES = 2**14  # of a body whose prompts are tokenized in no time
BODY_SECONDS = 30.0  # that a body may take to arrive
DISCARD_SECONDS = 3.0  # the rest of one that is refused
ROUTES = "/v1/completions, /v1/chat/completions, /v1/models, /health, /metrics"
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)

log = logging.getLogger("daemon_fast.serving")


@dataclass(frozen=True)
class Limits:
    """What a server does for its clients, at most.

    Attributes
    ----------
    max_waiting : prompts in the queue; past it requests are answered 429
    timeout : seconds from a request's arrival to its reply; past it 504
    api_key : that clients must send as a bearer token; None: none
    """

    max_waiting: int = 256
    timeout: float = 600.0
    api_key: str | None = None


class _ClientLeft(Exception):
    """Nobody waits for the reply."""


class _Counts:
    """What /metrics tells."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        doubling = (1, 2, 4, 8, 16, 32, 64)
        self.requests = Counter("daemon_requests", "Requests, by path and status.", ["path", "status"], registry=own)
        self.seconds = Histogram(
            "daemon_request_seconds", "From a request's arrival to its reply.", buckets=BUCKETS, registry=own
        )
        self.wait = Histogram("daemon_wait_seconds", "In the queue.", buckets=BUCKETS, registry=own)
        self.batch = Histogram("daemon_batch_prompts", "Prompts drawn together.", buckets=doubling, registry=own)
        self.ess = Histogram(
            "daemon_effective_sample_size", "Of each prompt's candidates.", buckets=doubling, registry=own
        )
        self.prompt_tokens = Counter("daemon_prompt_tokens", "Of prompts.", registry=own)
        self.candidate_tokens = Counter("daemon_candidate_tokens", "Of all candidates drawn.", registry=own)
        self.chosen_tokens = Counter("daemon_chosen_tokens", "Of the texts returned.", registry=own)
        self.waiting = Gauge("daemon_waiting_prompts", "In the queue now.", registry=own)
        ProcessCollector(registry=own)  # memory, processor time

    def add(self, reply: Reply, decoded: Decoded) -> None:
        self.wait.observe(decoded.seconds["wait"])
        for ess in decoded.ess.tolist():
            self.ess.observe(ess)
        self.prompt_tokens.inc(reply.usage.prompt_tokens)
        self.candidate_tokens.inc(reply.daemon["candidate_tokens"])
        self.chosen_tokens.inc(reply.daemon["chosen_tokens"])


class _Server:
    """Answers requests."""

    def __init__(self, decoder: SIRDecoder, one_by_one: bool, names: list[str], limits: Limits) -> None:
        self.decoder, self.names, self.limits = decoder, names, limits
        self.counts, self.started = _Counts(), int(time.time())
        self.batcher = Batcher(decoder, one_by_one, limits.max_waiting, self.counts.batch.observe)
        self.counts.waiting.set_function(lambda: self.batcher.waiting)

    # ---- endpoints --------------------------------------------------------------------------------------------------

    async def completions(self, http: HTTPRequest, noted: dict[str, Any]) -> Response:
        return await self._answer(http, CompletionRequest, noted)

    async def chat(self, http: HTTPRequest, noted: dict[str, Any]) -> Response:
        return await self._answer(http, ChatRequest, noted)

    async def models(self, _http: HTTPRequest, _noted: dict[str, Any]) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self.names]})

    async def model(self, http: HTTPRequest, _noted: dict[str, Any]) -> Response:
        name = http.path_params["name"]
        if name not in self.names:
            raise Refusal(f"the model {name[:100]!r} does not exist", 404, param="model", code="model_not_found")
        return JSONResponse(self._card(name))

    async def health(self, _http: HTTPRequest, _noted: dict[str, Any]) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(self, _http: HTTPRequest, _noted: dict[str, Any]) -> Response:
        return Response(generate_latest(self.counts.registry), media_type=CONTENT_TYPE_LATEST)

    def _card(self, name: str) -> dict[str, Any]:
        return model_card(name, self.decoder.energy, self.started)

    async def _answer(
        self, http: HTTPRequest, kind: type[CompletionRequest | ChatRequest], noted: dict[str, Any]
    ) -> Response:
        until = time.monotonic() + self.limits.timeout
        body = await _body(http)
        request = parse(kind, body, self.decoder.proposal.settings, self.names)
        # 53: also JavaScript keeps all of them. A negative seed is its remainder, as this library has none.
        seed = secrets.randbits(53) if request.seed is None else request.seed % 2**63
        aside = _aside if len(body) > SMALL_BYTES else _at_once
        prompts, lengths = await aside(self._prompts, request)
        noted.update(prompts=len(prompts), prompt_tokens=sum(lengths), n=request.n or 1, stream=bool(request.stream))
        try:
            future = self.batcher.submit(prompts, request.n or 1, seed)
        except QueueFull as full:
            raise Refusal(
                str(full), 429, "rate_limit_error", code="queue_full", headers={"Retry-After": str(full.retry_after)}
            ) from None
        except InvalidInput as error:
            raise Refusal(str(error), param="prompt") from None
        decoded = await self._decoded(http, future, until)
        noted["wait_seconds"] = round(decoded.seconds["wait"], 4)
        reply, parts = await aside(self._written, request, seed, decoded)
        self.counts.add(reply, decoded)
        noted.update(candidate_tokens=reply.daemon["candidate_tokens"], chosen_tokens=reply.daemon["chosen_tokens"])
        if request.stream:
            return StreamingResponse(
                _each(parts), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        return Response(parts[0], media_type="application/json")

    def _written(
        self, request: CompletionRequest | ChatRequest, seed: int, decoded: Decoded
    ) -> tuple[Reply, list[str]]:
        """A reply, and what is sent of it: all of it, before anything is, so that what fails has its status."""
        reply = Reply(request, self.decoder.energy, seed, decoded)
        if not request.stream:
            return reply, [reply.whole()]
        return reply, list(reply.events(bool(request.stream_options and request.stream_options.include_usage)))

    def _prompts(self, request: CompletionRequest | ChatRequest) -> tuple[list[Any], list[int]]:
        """Prompts, and how many tokens each has: what can't be drawn from is refused before it waits."""
        try:
            prompts = request.prompts()
            return prompts, [len(row) for row in self.decoder.proposal.tokenize(prompts)]
        except InvalidInput as error:
            raise Refusal(str(error), param="messages" if isinstance(request, ChatRequest) else "prompt") from error

    async def _decoded(self, http: HTTPRequest, future: Future[Decoded], until: float) -> Decoded:
        """What the batcher gives, unless the client leaves or time is over before: then what waits is not drawn."""
        drawn, left = asyncio.wrap_future(future), asyncio.ensure_future(_disconnected(http))
        try:
            remaining = max(0.0, until - time.monotonic())
            both: set[asyncio.Future[Any]] = {drawn, left}
            await asyncio.wait(both, timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
            if drawn.done():
                return drawn.result()
            if left.done():
                raise _ClientLeft
            raise Refusal(f"no reply within {self.limits.timeout:g} s", 504, "server_error", code="timeout")
        except EngineError as error:
            raise Refusal(f"the engine failed: {error}", 502, "server_error", code="engine_error") from error
        except DaemonFastError as error:  # prompts were checked before: it is not the client's doing
            raise Refusal(str(error), 500, "server_error", code=type(error).__name__) from error
        finally:
            future.cancel()  # at once: that of `drawn` comes to it when the reply is on its way
            drawn.cancel()
            left.cancel()

    # ---- around each endpoint ---------------------------------------------------------------------------------------

    def endpoint(
        self, answer: Callable[[HTTPRequest, dict[str, Any]], Awaitable[Response]]
    ) -> Callable[[HTTPRequest], Awaitable[Response]]:
        """With the key checked, errors in the protocol's form, a line in the log, and counts."""

        async def answered(http: HTTPRequest) -> Response:
            begin, path = time.monotonic(), http.scope["route"].path
            noted: dict[str, Any] = {"id": secrets.token_hex(8), "method": http.method, "path": path}
            level, status = logging.INFO, 499
            try:
                self._check_key(http)
                response = await answer(http, noted)
            except Refusal as refusal:
                await _discard(http)
                response = _refused(refusal)
                noted["error"] = refusal.code or refusal.kind
                if refusal.__cause__ is not None:
                    noted["cause"] = type(refusal.__cause__).__name__
                level = logging.ERROR if refusal.status >= 500 else level
            except (_ClientLeft, ClientDisconnect):
                response = Response(status_code=499)  # as nginx calls it; nobody reads it
            except Exception as error:
                response = _refused(Refusal("the server failed; its log says where", 500, "server_error"))
                # Not what it says: that may hold a text.
                noted.update(error=type(error).__name__, at=_places(error))
                level = logging.ERROR
            else:
                level = logging.DEBUG if path in ("/health", "/metrics") else level
            status = response.status_code
            response.headers["X-Request-ID"] = noted["id"]
            seconds = time.monotonic() - begin
            if path.endswith("/completions"):
                self.counts.seconds.observe(seconds)
            self.counts.requests.labels(path, status).inc()
            log.log(level, "request", extra={"fields": {**noted, "status": status, "seconds": round(seconds, 4)}})
            return response

        return answered

    def _check_key(self, http: HTTPRequest) -> None:
        key = self.limits.api_key
        # Not the path of http.url, which is made of what the client says the host is, too.
        if key is None or not http.scope["path"].startswith("/v1/"):
            return
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        # Starlette reads each byte of a header as a character.
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), key.encode()):
            raise Refusal(
                "no valid API key was given: send the header Authorization: Bearer KEY", 401, "authentication_error",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip


# What takes long is done on another thread, so that it keeps nobody waiting; a change of threads takes some time, too.
_aside: Any = asyncio.to_thread


async def _at_once(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


async def _body(http: HTTPRequest) -> bytes:
    """The body, within its bounds of size and time."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(f"the content type is {kind[:60]!r}: it must be application/json", 415)
    body = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for chunk in http.stream():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise Refusal(f"the body has more than {MOST_BYTES} bytes", 413, headers={"Connection": "close"})
    except TimeoutError:
        raise Refusal(
            f"the body did not arrive within {BODY_SECONDS:g} s", 408, headers={"Connection": "close"}
        ) from None
    http.state.read = True
    return bytes(body)


async def _discard(http: HTTPRequest) -> None:
    """Read what is left of a body that is refused: a connection closed before might take the reply with it."""
    with contextlib.suppress(TimeoutError):
        with anyio.fail_after(DISCARD_SECONDS):
            while not getattr(http.state, "read", False):
                message = await http.receive()
                http.state.read = message["type"] == "http.disconnect" or not message.get("more_body")


async def _each(parts: list[str]) -> AsyncIterator[str]:
    for part in parts:
        yield part


async def _disconnected(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _refused(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


def _places(error: BaseException) -> list[str]:
    """Where in the code an error arose, innermost first."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames][:8]


def make_app(decoder: SIRDecoder, one_by_one: bool, names: list[str], limits: Limits) -> Starlette:
    """An ASGI application. When it ends, what waits is drawn first.

    Parameters
    ----------
    decoder : its batch_size is how many prompts are drawn at a time
    one_by_one : whether in a call each, side by side (see `Batcher`)
    names : of the model, for clients
    """
    server = _Server(decoder, one_by_one, names, limits)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        server.batcher.close()

    async def no_route(http: HTTPRequest, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        path = http.scope["path"][:100]
        what = f"{http.method} is not for {path}" if status == 405 else f"there is no {path}"
        headers = error.headers if isinstance(error, HTTPException) else None
        server.counts.requests.labels("other", status).inc()
        return _refused(Refusal(f"{what}; there are {ROUTES}", status, headers=headers))

    routes = [
        Route("/v1/completions", server.endpoint(server.completions), methods=["POST"]),
        Route("/v1/chat/completions", server.endpoint(server.chat), methods=["POST"]),
        Route("/v1/models", server.endpoint(server.models)),
        Route("/v1/models/{name:path}", server.endpoint(server.model)),
        Route("/health", server.endpoint(server.health)),
        Route("/metrics", server.endpoint(server.metrics)),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: no_route})


# ---- the process ----------------------------------------------------------------------------------------------------


class _JSONLines(logging.Formatter):
    """An object a line: time, level, event, and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:  # of uvicorn's; what it says may hold a text
            fields = {**fields, "error": type(record.exc_info[1]).__name__, "at": _places(record.exc_info[1])}
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {"time": f"{now}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        return json.dumps({**entry, "event": record.getMessage(), **fields}, ensure_ascii=False)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: any that is free.

    Raises
    ------
    InvalidInput
        It can't.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # The protocol by name: only then does asyncio send at once what fills no packet. Else a reply's end comes 40 ms
        # late, when the client has confirmed the packet before.
        listening = socket.socket(family, kind, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen()
        except BaseException:
            listening.close()
            raise
        return listening
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInput(f"host = {host!r}, port = {port}: can't be listened at: {reason}") from error


def serve(app: Starlette, listening: socket.socket, timeout: float) -> None:
    """Serve until SIGTERM or SIGINT; then what was asked for before is answered, within `timeout` seconds.

    Writes a line of JSON for each request to standard error, without texts and keys.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JSONLines())
    for name in ("daemon_fast.serving", "uvicorn", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING if name == "uvicorn" else logging.INFO)
    warnings.simplefilter("ignore", LowEffectiveSampleSize)  # each reply tells its own
    logging.captureWarnings(True)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=int(timeout) + 1
    )
    # What was loaded stays: without it a full collection takes 100 ms less, which else a request in hundreds waits.
    gc.freeze()
    uvicorn.Server(config).run(sockets=[listening])
