"""The same candidates from each engine that a user could pick here: M of one prompt, and of 16 together.

SmolLM2-135M, prompts of 32 tokens of Wikipedia, 48 new tokens (16 where there are 16 prompts), temperature 1, nothing
truncated. Embedded (`TransformersProposal`), Transformers' `generate`, and two servers on loopback, asked by
`ServerProposal`: vLLM's CPU build and llama.cpp (by `xllamacpp`; its weights are the GGUF file's of 4 bits, the others'
are the same in float32). Engines in turn, one thread each, three times; medians. Beside seconds it takes processor
time, of client and server together, which a busy machine changes less.

Run: OMP_NUM_THREADS=1 python benchmarks/peers.py [--vllm PYTHON] [--save], which takes 17 minutes; PYTHON is that of
an environment with vLLM, such as `make test-engines` makes. With --save, cells that the file holds already are not
measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import finish, keep, resumed, table

from daemon_fast import ServerProposal, TransformersProposal
from daemon_fast.data.texts import read_texts
from daemon_fast.models import DEFAULT_MODEL, dequantise, load_language_model, locate

SIZES, NEW = (25, 8, 1), {1: 48, 16: 16}  # M; tokens by the number of prompts
ROUNDS = 3
PREFIX = 32  # tokens of a prompt
THREADS = torch.get_num_threads()
ENGINES = ("embedded", "generate", "llama.cpp", "vLLM")
KINDS = ("wall clock", "processor")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vllm", default=".venv-vllm/bin/python", help="Python of an environment with vLLM")
    return parser.parse_known_args()[0]


@dataclass(frozen=True)
class Server:
    url: str
    pid: int

    def cpu_seconds(self) -> float:
        """Processor time, of the process and of those that it started."""
        parents, ticks = {}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                parents[int(stat.parent.name)] = int(fields[1])
                ticks[int(stat.parent.name)] = int(fields[11]) + int(fields[12])
        own = {self.pid}
        while more := {pid for pid, parent in parents.items() if parent in own} - own:
            own |= more
        return sum(ticks[pid] for pid in own) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def running(command: list[str], ready: Callable[[str], str | None], **environment: str) -> Iterator[Server]:
    """A server in a process of its own. `ready` finds its address in what it has written, once it serves."""
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT)
        try:
            while True:
                written = Path(log.name).read_text(errors="replace")
                if (url := ready(written)) is not None:
                    break
                if process.poll() is not None:
                    raise SystemExit(f"{' '.join(command[:4])} ended:\n{written[-3000:]}")
                time.sleep(0.5)
            yield Server(url, process.pid)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()


def answers(url: str) -> str | None:
    """The address, if a server there says that it is well."""
    with contextlib.suppress(OSError):
        no_proxy = urllib.request.ProxyHandler({})
        urllib.request.build_opener(no_proxy).open(url.replace("/v1", "/health"), timeout=5)
        return url
    return None


def vllm(python: str, port: int = 8377) -> contextlib.AbstractContextManager[Server]:
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", dequantise(DEFAULT_MODEL)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", DEFAULT_MODEL, "--dtype", "float32"]
    command += ["--max-model-len", "512", "--max-num-seqs", "512", "--no-enable-chunked-prefill"]
    url = f"http://127.0.0.1:{port}/v1"
    return running(command, lambda _: answers(url), VLLM_CPU_KVCACHE_SPACE="4", OMP_NUM_THREADS=str(THREADS))


LLAMA = """
import sys, time, xllamacpp
slots, threads = int(sys.argv[2]), int(sys.argv[3])
options = xllamacpp.CommonParams()
options.model.path = sys.argv[1]
options.n_parallel, options.n_ctx = slots, slots * 256
options.port, options.hostnames, options.warmup, options.verbosity = 0, ["127.0.0.1"], False, 0
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(options)
print("SERVING", server.listening_address, flush=True)
while True:
    time.sleep(60)
"""


def llama(slots: int = max(SIZES)) -> contextlib.AbstractContextManager[Server]:
    def ready(written: str) -> str | None:
        return written.split("SERVING ")[1].split()[0] + "/v1" if "SERVING " in written else None

    return running([sys.executable, "-c", LLAMA, locate(DEFAULT_MODEL), str(slots), str(THREADS)], ready)


class Generate:
    """Transformers' own, with the same settings."""

    def __init__(self, model: Any, tokenizer: Any, m: int, new: int) -> None:
        self._model, self._m, self._new = model, m, new
        tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
        self._tokenizer = tokenizer

    def propose(self, prompts: list[str], _seed: int) -> Any:
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True)
        return self._model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=self._m,
            min_new_tokens=self._new, max_new_tokens=self._new, pad_token_id=self._tokenizer.pad_token_id,
        )  # fmt: skip


def prompts_of(tokenizer: Any, count: int) -> list[str]:
    """Texts of 32 tokens."""
    found = []
    for text in read_texts("wikipedia"):
        ids = tokenizer(text)["input_ids"][:PREFIX]
        again = tokenizer.decode(ids)
        if len(ids) == PREFIX and tokenizer(again)["input_ids"] == ids:
            found.append(again)
        if len(found) == count:
            return found
    raise SystemExit(f"there are {len(found)} texts of {PREFIX} tokens")


def main() -> None:
    os.environ["NO_PROXY"] = "127.0.0.1"
    cells = resumed("peers")
    todo = [(n, m) for n in NEW for m in SIZES if (n, m) not in {(c["prompts"], c["m"]) for c in cells}]
    with contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        if todo:
            model, tokenizer = load_language_model()
            texts = prompts_of(tokenizer, 400)
            TransformersProposal(model, tokenizer, num_candidates=1, max_new_tokens=1).propose(
                texts[:1], 0
            )  # its trial
            servers["llama.cpp"] = stack.enter_context(llama())
            if Path(python := options().vllm).exists():
                servers["vLLM"] = stack.enter_context(vllm(python))
        for n, m in todo:
            settings = {"num_candidates": m, "max_new_tokens": NEW[n], "min_new_tokens": NEW[n]}
            engines: dict[str, Any] = {
                "embedded": TransformersProposal(model, tokenizer, model_id=DEFAULT_MODEL, **settings),
                "generate": Generate(model, tokenizer, m, NEW[n]),
            }
            for name, server in servers.items():
                engines[name] = ServerProposal(server.url, DEFAULT_MODEL, max_in_flight=16, **settings)
            used: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
            for i in range(ROUNDS):
                for name, engine in engines.items():
                    begin, before = time.perf_counter(), cpu_seconds(servers.get(name))
                    engine.propose([texts[(17 * i + k) % len(texts)] for k in range(n)], i)
                    used[name].append((time.perf_counter() - begin, cpu_seconds(servers.get(name)) - before))
            cells.append({"prompts": n, "m": m, "new": NEW[n]})
            for which, kind in enumerate(KINDS):
                cells[-1][kind] = {name: statistics.median(pair[which] for pair in own) for name, own in used.items()}
            print(cells[-1], flush=True)
            keep("peers", cells)
    rows = []
    for c in sorted(cells, key=lambda c: (c["prompts"], c["m"])):
        for kind in KINDS:
            own = c[kind]
            least = min(own, key=own.__getitem__)
            rows.append([c["prompts"], c["m"], c["new"], kind, *(own.get(name, "-") for name in ENGINES), least])
    text = table(["prompts", "M", "new tokens", "seconds", *ENGINES, "least"], rows)
    finish("peers", f"# The same candidates from each engine\n\nOne thread\n\n{text}", cells)


def cpu_seconds(server: Server | None) -> float:
    """Processor time of this process, and of a server's."""
    return time.process_time() + (0.0 if server is None else server.cpu_seconds())


if __name__ == "__main__":
    main()
