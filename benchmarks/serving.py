"""What `daemon-fast serve` costs and brings: requests a second and latency at 1, 8 and 64 clients.

SmolLM2-135M, prompts of 32 tokens, M = 25. Each part asks two servers in turn, from a process of its own whose clients
send their next request when they have the last one's reply. Beside times it takes the processor time of the server
asked, which a busy machine changes less. All run on one thread.

- embedded, 8 tokens: prompts that wait together drawn together, 8 at most, against one at a time. Also counts the texts
  that are the same in both, as they should be but for what a logit rounded otherwise turns.
- replayed, 48 tokens: a server that answers at once, as vLLM does, with candidates drawn before; itself asked for
  n = 25 texts, and through serve, with log-probabilities and without. The difference is what serve adds.
- llama.cpp (by `xllamacpp`), 8 tokens: a real server, in the same two ways.

Run: OMP_NUM_THREADS=1 python benchmarks/serving.py [--save]; with --save, parts that the file holds already are not
measured again.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import finish, keep, resumed, table
from peers import Server, answers, llama, prompts_of, running

from daemon_fast import Energy, TransformersProposal, metrics
from daemon_fast.models import DEFAULT_MODEL, load_language_model, load_tokenizer
from daemon_fast.proposals.load import EngineSpec

M, NEW, REPLAYED_TOKENS = 25, 8, 48
CLIENTS = (1, 8, 64)
METRICS = ["sr_2", "sr_3", "sr_4", "tr_8", "tr_16", "tr_32"]
Pair = tuple[str, str]


def loaded(url: str, requests: list[dict[str, Any]], clients: int) -> dict[str, Any]:
    """What the clients of `load.py` see."""
    given = json.dumps({"url": url, "requests": requests, "clients": clients})
    command = [sys.executable, str(Path(__file__).with_name("load.py"))]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def replay(port: int) -> None:
    """Serve the same candidates to each request, at once, in the form that vLLM has."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    model, tokenizer = load_language_model()
    settings = {"num_candidates": M, "max_new_tokens": REPLAYED_TOKENS, "min_new_tokens": REPLAYED_TOKENS}
    drawn = TransformersProposal(model, tokenizer, **settings).propose(prompts_of(tokenizer, 1), 0)
    plain = [{"index": i, "text": text, "finish_reason": "length"} for i, text in enumerate(drawn.texts)]
    with_ids = [{**c, "token_ids": row} for c, row in zip(plain, drawn.tokens.tolist(), strict=True)]
    whole = []
    for choice, log_p in zip(with_ids, drawn.token_log_p.tolist(), strict=True):
        names = [f"token_id:{i}" for i in choice["token_ids"]]
        top = [{name: x} for name, x in zip(names, log_p, strict=True)]
        told = {"tokens": names, "token_logprobs": log_p, "top_logprobs": top, "text_offset": [0] * len(names)}
        whole.append({**choice, "logprobs": told})
    replies = [json.dumps({"id": "x", "choices": choices}).encode() for choices in (plain, with_ids, whole)]

    async def complete(http: Request) -> Response:
        body = await http.body()
        kind = 2 if b'"logprobs"' in body else 1 if b'"return_token_ids"' in body else 0
        return Response(replies[kind], media_type="application/json")

    async def models(_: Request) -> Response:
        return JSONResponse({"data": [{"id": DEFAULT_MODEL, "max_model_len": 512}]})

    async def health(_: Request) -> Response:
        return Response("ok")

    routes = [Route("/v1/completions", complete, methods=["POST"]), Route("/v1/models", models)]
    uvicorn.run(Starlette(routes=[*routes, Route("/health", health)]), port=port, log_level="error")


def serving(energy: Path, *more: str) -> contextlib.AbstractContextManager[Server]:
    command = [sys.executable, "-m", "daemon_fast", "serve", "--energy", str(energy), "--port", "0", *more]

    def ready(written: str) -> str | None:
        return (
            written.split(" at ")[1].split(": ")[0]
            if written.startswith("serving ") or "\nserving " in written
            else None
        )

    return running(command, ready, PYTHONUNBUFFERED="1")


def artefact(folder: str, new: int) -> Path:
    settings = EngineSpec().settings(num_candidates=M, max_new_tokens=new, min_new_tokens=new)
    mu = torch.full((len(METRICS),), 2.0, dtype=torch.float64)
    path = Path(folder, f"energy-{new}.json")
    Energy(metrics.parse(METRICS), mu, torch.zeros(len(METRICS)), settings).save(path)
    return path


def measured(
    prompts: list[str], names: Pair, servers: tuple[Server, Server], ask: Callable[..., Any], clients: int,
    requests: int, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """Both servers in turn: p50 and p99 of a request in ms, requests a second, processor time of a request in ms."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for i in range(rounds):
        for name, server in zip(names, servers, strict=True):
            seeds = range(i * requests, (i + 1) * requests)
            bodies = [ask(name, prompts[seed % len(prompts)], seed) for seed in seeds]
            before = server.cpu_seconds()
            run = loaded(server.url, bodies, clients)
            runs[name].append({**run, "cpu": server.cpu_seconds() - before})
    found: dict[str, Any] = {"clients": clients, "requests": requests * rounds}
    for name, own in runs.items():
        seconds = sorted(s for run in own for s in run["seconds"])
        found[name] = {
            "p50": 1e3 * statistics.median(seconds),
            "p99": 1e3 * seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))],
            "rate": statistics.median(requests / run["whole"] for run in own),
            "cpu": 1e3 * statistics.median(run["cpu"] for run in own) / requests,
        }
    pairs = zip(*([text for run in runs[name] for text in run["texts"]] for name in names), strict=True)
    found["same texts"] = sum(a == b for a, b in pairs)
    return found


def through_serve(_name: str, prompt: str, seed: int) -> dict[str, Any]:
    return {"model": DEFAULT_MODEL, "prompt": prompt, "seed": seed}


def either(name: str, prompt: str, seed: int) -> dict[str, Any]:
    """Of the engine itself, M texts, as who picks one by himself asks for them."""
    if "serve" in name:
        return through_serve(name, prompt, seed)
    extra = {"n": M, "max_tokens": NEW, "ignore_eos": True, "temperature": 1.0, "top_k": 0, "min_p": 0.0}
    return {**through_serve(name, prompt, seed), **extra}


EMBEDDED: Pair = ("one at a time", "batches of 8")
REPLAYED: Pair = ("replayed, itself", "replayed, through serve")
LEAN: Pair = ("replayed, itself again", "replayed, through serve, no log-probs")
LLAMA: Pair = ("llama.cpp, itself", "llama.cpp, through serve")
PAIRS = (EMBEDDED, REPLAYED, LEAN, LLAMA)


def main() -> None:
    os.environ["NO_PROXY"] = "127.0.0.1"
    cells = resumed("serving")
    prompts = prompts_of(load_tokenizer(), 400)

    def todo(names: Pair) -> list[int]:
        done = {cell["clients"] for cell in cells if names[0] in cell}
        return [clients for clients in CLIENTS if clients not in done]

    def measure(
        names: Pair, servers: tuple[Server, Server], ask: Callable[..., Any], requests: Sequence[int], rounds: int
    ) -> None:
        measured(prompts, names, servers, ask, 1, 1, 1)  # warms up
        for clients in todo(names):
            count = requests[CLIENTS.index(clients)]
            cells.append(measured(prompts, names, servers, ask, clients, count, rounds))
            print(json.dumps(cells[-1]), flush=True)
            keep("serving", cells)

    with tempfile.TemporaryDirectory() as folder:
        energy, longer = artefact(folder, NEW), artefact(folder, REPLAYED_TOKENS)
        if todo(REPLAYED) or todo(LEAN):
            command, url = [sys.executable, __file__, "--replay", "8378"], "http://127.0.0.1:8378/v1"
            with running(command, lambda _: answers(url)) as itself:
                with serving(longer, "--engine", url) as through:
                    measure(REPLAYED, (itself, through), either, (60, 160, 320), 3)
                with serving(longer, "--engine", url, "--engine-args", '{"log_probs": false}') as through:
                    measure(LEAN, (itself, through), either, (60, 160, 320), 3)
        if todo(EMBEDDED):
            with serving(energy, "--batch-size", "1") as alone, serving(energy, "--batch-size", "8") as together:
                measure(EMBEDDED, (alone, together), through_serve, (3, 16, 64), 1)
        if todo(LLAMA):
            with llama(M) as itself, serving(energy, "--engine", itself.url) as through:
                measure(LLAMA, (itself, through), either, (3, 16, 64), 1)
    report(cells)


def report(cells: list[dict[str, Any]]) -> None:
    rows = []
    for names in PAIRS:
        for c in cells:
            if names[0] in c:
                a, b = (c[name] for name in names)
                figures = [a["p50"], b["p50"], b["p50"] - a["p50"], a["p99"], b["p99"], a["rate"], b["rate"]]
                same = f"{c['same texts']} of {c['requests']}" if names is EMBEDDED else "-"
                ratios = [b["rate"] / a["rate"], a["cpu"], b["cpu"]]
                rows.append([f"{names[0]} / {names[1]}", c["clients"], *figures, *ratios, same])
    head = [
        "a / b",
        "clients",
        "p50 a",
        "p50 b",
        "b - a",
        "p99 a",
        "p99 b",
        "a, 1/s",
        "b, 1/s",
        "b / a",
        "cpu a",
        "cpu b",
    ]
    text = "p50, p99 and processor time of a request in ms; requests a second"
    finish("serving", f"# daemon-fast serve\n\n{text}\n\n{table([*head, 'same texts'], rows)}", cells)


if __name__ == "__main__":
    if "--replay" in sys.argv:
        at = sys.argv.index("--replay")
        replay(int(sys.argv[at + 1]))
    else:
        main()
