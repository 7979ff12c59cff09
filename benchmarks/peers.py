"""The same candidates from each engine that a user could pick here: M of 48 tokens, of one prompt and of 16 together.

SmolLM2-135M, prompts of Wikipedia, temperature 1, nothing truncated. Embedded (`TransformersProposal`), Transformers'
`generate`, and two servers on loopback, asked by `ServerProposal`: vLLM's CPU build and llama.cpp (by `xllamacpp`; its
weights are the GGUF file's of 8 bits, the others' are the same in float32). Engines in turn in every round, medians.
Run: OMP_NUM_THREADS=2 python benchmarks/peers.py [--vllm PYTHON] [--save]; PYTHON is that of an environment with vLLM,
such as `make test-engines` makes. With --save, cells that the file holds already are not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, finish, machine, table

from daemon_fast import ServerProposal, TransformersProposal
from daemon_fast.data.texts import read_texts
from daemon_fast.models import DEFAULT_MODEL, dequantise, load_language_model, locate

SIZES, PROMPTS, NEW = (1, 8, 25), (1, 16), 48
ROUNDS = {1: 3, 16: 1}
PREFIX = 32  # tokens of a prompt
THREADS = torch.get_num_threads()
ENGINES = ("embedded", "generate", "llama.cpp", "vLLM")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vllm", default=".venv-vllm/bin/python", help="Python of an environment with vLLM")
    return parser.parse_known_args()[0]


@contextlib.contextmanager
def running(command: list[str], ready: Callable[[str], str | None], **environment: str) -> Iterator[str]:
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
            yield url
        finally:
            process.terminate()
            process.wait(60)


def answers(url: str) -> str | None:
    """The address, if a server there says that it is well."""
    with contextlib.suppress(OSError):
        no_proxy = urllib.request.ProxyHandler({})
        urllib.request.build_opener(no_proxy).open(url.replace("/v1", "/health"), timeout=5)
        return url
    return None


def vllm(python: str, port: int = 8377) -> contextlib.AbstractContextManager[str]:
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


def llama(slots: int = max(SIZES)) -> contextlib.AbstractContextManager[str]:
    def ready(written: str) -> str | None:
        return written.split("SERVING ")[1].split()[0] + "/v1" if "SERVING " in written else None

    return running([sys.executable, "-c", LLAMA, locate(DEFAULT_MODEL), str(slots), str(THREADS)], ready)


class Generate:
    """Transformers' own, with the same settings."""

    def __init__(self, model: Any, tokenizer: Any, m: int) -> None:
        self._model, self._m = model, m
        tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
        self._tokenizer = tokenizer

    def propose(self, prompts: list[str], _seed: int) -> Any:
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True)
        return self._model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=self._m,
            min_new_tokens=NEW, max_new_tokens=NEW, pad_token_id=self._tokenizer.pad_token_id,
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
    path, cells = RESULTS / "peers.json", []
    if "--save" in sys.argv and path.exists():
        saved = json.loads(path.read_text())
        cells = saved["figures"] if saved["machine"] == machine() else []
    todo = [(n, m) for n in PROMPTS for m in SIZES if (n, m) not in {(c["prompts"], c["m"]) for c in cells}]
    with contextlib.ExitStack() as stack:
        if todo:
            model, tokenizer = load_language_model()
            texts = prompts_of(tokenizer, 400)
            urls = {"llama.cpp": stack.enter_context(llama())}
            if Path(python := options().vllm).exists():
                urls["vLLM"] = stack.enter_context(vllm(python))
        for n, m in todo:
            settings = {"num_candidates": m, "max_new_tokens": NEW, "min_new_tokens": NEW}
            engines: dict[str, Any] = {
                "embedded": TransformersProposal(model, tokenizer, model_id=DEFAULT_MODEL, **settings),
                "generate": Generate(model, tokenizer, m),
            }
            for name, url in urls.items():
                engines[name] = ServerProposal(url, DEFAULT_MODEL, max_in_flight=16, **settings)
            times: dict[str, list[float]] = {name: [] for name in engines}
            for i in range(-1, ROUNDS[n]):  # a first, of one prompt, that is not counted
                for name, engine in engines.items():
                    begin = time.perf_counter()
                    engine.propose([texts[(17 * i + k) % len(texts)] for k in range(1 if i < 0 else n)], i + 1)
                    if i >= 0:
                        times[name].append(time.perf_counter() - begin)
            seconds = {name: statistics.median(values) for name, values in times.items()}
            print(n, m, seconds, flush=True)
            cells.append({"prompts": n, "m": m, "seconds": seconds, "all": times})
            if "--save" in sys.argv:
                path.write_text(json.dumps({"machine": machine(), "figures": cells}, indent=2) + "\n")
    rows = []
    for c in sorted(cells, key=lambda c: (c["prompts"], c["m"])):
        s = c["seconds"]
        fastest = min(s, key=s.__getitem__)
        rows.append([c["prompts"], c["m"], *(s.get(name, "-") for name in ENGINES), fastest])
    finish(
        "peers",
        f"# The same candidates from each engine\n\nSeconds for M candidates of {NEW} tokens of each prompt, {THREADS} "
        f"threads\n\n{table(['prompts', 'M', *ENGINES, 'fastest'], rows)}",
        cells,
    )


if __name__ == "__main__":
    main()
