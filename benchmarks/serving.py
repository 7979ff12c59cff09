"""What `daemon-fast serve` costs and brings: requests a second and latency at 1, 8 and 64 clients.

SmolLM2-135M, prompts of 32 tokens, M = 25 candidates of 16 tokens. Each part asks two servers in turn, from a process
of its own whose clients send their next request when they have the last one's reply. Beside times it takes the
processor time of the server, which a busy machine changes less; all run on one thread:

- embedded: prompts that wait together drawn together, 8 at most, against one at a time. Also counts the texts that are
  the same in both, as they should be but for what a logit rounded otherwise turns.
- replayed: a server that answers at once with what vLLM once answered, asked itself for n = 25 texts, and through
  serve. The difference of the two is what serve adds.
- vLLM: a real one, in the same two ways. Both need --vllm (see peers.py).

Run: OMP_NUM_THREADS=1 python benchmarks/serving.py [--vllm PYTHON] [--save]; with --save, parts that the file holds
already are not measured again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, finish, machine, table
from peers import Server, answers, options, prompts_of, running, vllm

from daemon_fast import Energy, metrics
from daemon_fast.models import DEFAULT_MODEL, load_tokenizer
from daemon_fast.proposals.load import EngineSpec

M, NEW = 25, 16
CLIENTS = (1, 8, 64)
METRICS = ["sr_2", "sr_3", "sr_4", "tr_8", "tr_16", "tr_32"]
Pair = tuple[str, str]


async def load(url: str, requests: list[dict[str, Any]], clients: int) -> dict[str, Any]:
    """Seconds of each request, of all of them, and what was replied."""
    import httpx2

    seconds, texts, todo = [0.0] * len(requests), [""] * len(requests), iter(enumerate(requests))

    async with httpx2.AsyncClient(timeout=3600, trust_env=False, limits=httpx2.Limits(max_connections=clients)) as http:

        async def client() -> None:
            for i, request in todo:
                begin = time.perf_counter()
                reply = await http.post(f"{url}/completions", json=request)
                seconds[i] = time.perf_counter() - begin
                texts[i] = reply.raise_for_status().json()["choices"][0]["text"]

        begin = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return {"seconds": seconds, "whole": time.perf_counter() - begin, "texts": texts}


def loaded(url: str, requests: list[dict[str, Any]], clients: int) -> dict[str, Any]:
    """`load`, in a process of its own."""
    given = json.dumps({"url": url, "requests": requests, "clients": clients})
    command = [sys.executable, __file__, "--load"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def replay(port: int, behind: str) -> None:
    """Serve what a server behind answered to the first request of each kind, at once."""
    import urllib.request

    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    kept: dict[Any, bytes] = {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    async def answer(http: Request) -> Response:
        body = await http.body()
        kind = (http.url.path, b'"logprobs"' in body)
        if kind not in kept:
            asked = urllib.request.Request(
                behind.removesuffix("/v1") + http.url.path, body or None, {"Content-Type": "application/json"}
            )
            kept[kind] = opener.open(asked, timeout=600).read()
        return Response(kept[kind], media_type="application/json")

    routes = [Route("/v1/{path:path}", answer, methods=["GET", "POST"]), Route("/health", lambda _: Response("ok"))]
    uvicorn.run(Starlette(routes=routes), port=port, log_level="error")


def serving(energy: Path, *more: str) -> contextlib.AbstractContextManager[Server]:
    command = [sys.executable, "-m", "daemon_fast", "serve", "--energy", str(energy), "--port", "0", *more]

    def ready(written: str) -> str | None:
        return (
            written.split(" at ")[1].split(": ")[0]
            if written.startswith("serving ") or "\nserving " in written
            else None
        )

    return running(command, ready, PYTHONUNBUFFERED="1")


def artefact(folder: str) -> Path:
    settings = EngineSpec().settings(num_candidates=M, max_new_tokens=NEW, min_new_tokens=NEW)
    mu = torch.full((len(METRICS),), 2.0, dtype=torch.float64)
    path = Path(folder, "energy.json")
    Energy(metrics.parse(METRICS), mu, torch.zeros(len(METRICS)), settings).save(path)
    return path


class Part:
    """Two servers, and what each is asked for."""

    def __init__(
        self, names: Pair, servers: tuple[Server, Server], ask: Callable[[str, str, int], dict[str, Any]]
    ) -> None:
        self._names, self._servers, self._ask = names, servers, ask

    def measure(self, prompts: list[str], clients: int, requests: int, rounds: int) -> dict[str, Any]:
        """Both in turn: p50 and p99 of a request in ms, requests a second, processor time of a request in ms."""
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in self._names}
        for i in range(rounds):
            for name, server in zip(self._names, self._servers, strict=True):
                chosen = [(prompts[(i * requests + k) % len(prompts)], i * requests + k) for k in range(requests)]
                bodies = [self._ask(name, prompt, seed) for prompt, seed in chosen]
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
        pairs = zip(*([text for run in runs[name] for text in run["texts"]] for name in self._names), strict=True)
        found["same texts"] = sum(a == b for a, b in pairs)
        return found


def through_serve(_name: str, prompt: str, seed: int) -> dict[str, Any]:
    return {"model": DEFAULT_MODEL, "prompt": prompt, "seed": seed}


def either(name: str, prompt: str, seed: int) -> dict[str, Any]:
    """Of the engine itself, the same 25 texts, as who picks one by himself asks for them."""
    if "serve" in name:
        return through_serve(name, prompt, seed)
    extra = {"min_tokens": NEW, "max_tokens": NEW, "temperature": 1.0, "n": M}
    return {**through_serve(name, prompt, seed), **extra}


EMBEDDED: Pair = ("one at a time", "batches of 8")
REPLAYED: Pair = ("replayed, itself", "replayed, through serve")
VLLM: Pair = ("vLLM, itself", "vLLM, through serve")


def main() -> None:
    os.environ["NO_PROXY"] = "127.0.0.1"
    path, cells = RESULTS / "serving.json", []
    if "--save" in sys.argv and path.exists():
        saved = json.loads(path.read_text())
        cells = saved["figures"] if saved["machine"] == machine() else []
    prompts = prompts_of(load_tokenizer(), 400)

    def measured(names: Pair, clients: int) -> bool:
        return any(names[0] in cell and cell["clients"] == clients for cell in cells)

    def measure(part: Part, names: Pair, clients: int, requests: int, rounds: int) -> None:
        if not measured(names, clients):
            cells.append(part.measure(prompts, clients, requests, rounds))
            print(json.dumps(cells[-1]), flush=True)
            if "--save" in sys.argv:
                path.write_text(json.dumps({"machine": machine(), "figures": cells}, indent=2) + "\n")

    python = options().vllm
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        energy = artefact(folder)
        if not all(measured(EMBEDDED, clients) for clients in CLIENTS):
            with serving(energy, "--batch-size", "1") as alone, serving(energy, "--batch-size", "8") as together:
                part = Part(EMBEDDED, (alone, together), through_serve)
                part.measure(prompts, 1, 1, 1)  # warms up
                for clients in CLIENTS:
                    measure(part, EMBEDDED, clients, {1: 4, 8: 16, 64: 64}[clients], 1)
        if Path(python).exists() and not all(measured(p, c) for p in (REPLAYED, VLLM) for c in CLIENTS):
            real = stack.enter_context(vllm(python))
            command = [sys.executable, __file__, "--replay", "8378", real.url]
            replayed = stack.enter_context(running(command, lambda _: answers("http://127.0.0.1:8378/v1")))
            lean = ("--engine-args", '{"log_probs": false}')  # these metrics need none
            through = stack.enter_context(serving(energy, "--engine", replayed.url, *lean))
            part = Part(REPLAYED, (replayed, through), either)
            part.measure(prompts, 1, 1, 1)  # which vLLM answers
            for clients in CLIENTS:
                measure(part, REPLAYED, clients, {1: 100, 8: 200, 64: 320}[clients], 5)
            through = stack.enter_context(serving(energy, "--engine", real.url, *lean))
            part = Part(VLLM, (real, through), either)
            part.measure(prompts, 1, 1, 1)
            for clients in CLIENTS:
                measure(part, VLLM, clients, {1: 4, 8: 16, 64: 64}[clients], 1)
    report(cells)


def report(cells: list[dict[str, Any]]) -> None:
    rows = []
    for names in (EMBEDDED, REPLAYED, VLLM):
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
    if "--load" in sys.argv:
        print(json.dumps(asyncio.run(load(**json.load(sys.stdin)))))
    elif "--replay" in sys.argv:
        at = sys.argv.index("--replay")
        replay(int(sys.argv[at + 1]), sys.argv[at + 2])
    else:
        main()
