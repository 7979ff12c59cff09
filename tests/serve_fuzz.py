"""Requests as no client sends them, against a server: each gets an answer that makes sense, and the server goes on.

`python tests/serve_fuzz.py [N]` sends N (10,000) to a server of its own over a tiny model, in between what real clients
ask for, and tells what came back and what the server's memory did. With --sound, all are such as clients send them.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import tiny
import torch

MODEL = "tiny"
STATUSES = {200, 307, 400, 404, 405, 408, 413, 415, 429}
SECONDS = 60.0  # for a reply
VALUES = (
    None, True, False, 0, 1, -1, 2, 17, 2**31, 2**63, -(2**70), 10**300, 0.5, -0.0, 1e300, "", "w1", "w1 w2", "\x00",
    "ü", "\ud83d\ude00", "x" * 3000, [], [1], [[1, 2], [3]], [None], ["w1", 5], [[]], {}, {"role": "user"}, {"a": [1]},
)  # fmt: skip
FIELDS = (
    "model", "prompt", "messages", "n", "seed", "max_tokens", "max_completion_tokens", "stop", "stream", "temperature",
    "stream_options", "top_p", "logit_bias", "tools", "logprobs", "echo", "best_of", "user", "response_format", "what",
)  # fmt: skip
TYPES = ("text/plain", "", "application/\xff")  # beside the right one


def body(chance: random.Random) -> bytes:
    """Of a request: right, almost right, or nothing like it."""
    chat = chance.random() < 0.4
    asked = {"model": MODEL, "seed": chance.randrange(1000)}
    asked |= {"messages": [{"role": "user", "content": tiny.text(3, 1)}]} if chat else {"prompt": tiny.text(4, 2)}
    for _ in range(chance.choice((0, 0, 0, 1, 2, 3))):
        asked[chance.choice(FIELDS)] = chance.choice(VALUES)
    if chance.random() < 0.1:
        asked.pop(chance.choice(list(asked)))
    data = json.dumps(asked, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    kind = chance.randrange(20)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    if kind == 1:
        return chance.randbytes(chance.randrange(300))
    if kind == 2:
        at = chance.randrange(len(data))
        return data[:at] + chance.randbytes(1) + data[at + 1 :]
    if kind == 3:
        depth = chance.choice((10, 1000, 4000))
        return b'{"model":"tiny","prompt":' + b"[" * depth + b"]" * depth + b"}"
    if kind == 4:
        return chance.choice((b"NaN", b"null", b"[]", b'"w1"', b'{"prompt": NaN}', b"1" * 5000, b"", b"\xef\xbb\xbf{}"))
    return data


def raw(chance: random.Random) -> tuple[bytes, bool]:
    """A request as bytes, and whether it is one that HTTP knows."""
    data = body(chance)
    path = chance.choice(("/v1/completions", "/v1/chat/completions")) if chance.random() < 0.9 else "/v1/what%20"
    method = "POST" if chance.random() < 0.95 else chance.choice(("GET", "PUT", "DELETE", "OPTIONS"))
    content_type = "application/json" if chance.random() < 0.95 else chance.choice(TYPES)
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nConnection: close\r\n"
    kind = chance.randrange(20)
    if kind == 0:
        return chance.randbytes(chance.randrange(1, 200)) + b"\r\n\r\n", False
    if kind == 1:
        return head.encode("latin-1") + b"Content-Length: -5\r\n\r\n" + data, False
    if kind == 2:
        return head.encode("latin-1") + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + data, False
    if kind == 3:  # and more is never sent
        return head.encode("latin-1") + f"Content-Length: {len(data) + 10}\r\n\r\n".encode() + data, False
    return head.encode("latin-1") + f"Content-Length: {len(data)}\r\n\r\n".encode() + data, True


async def send(host: str, port: int, chance: random.Random, make: Callable[[random.Random], tuple[bytes, bool]]) -> str:
    """What came of a request that `make` made: a status, "left" or "closed".

    Raises
    ------
    AssertionError
        No reply, or one that makes no sense.
    """
    data, well_formed = make(chance)
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(data)
        await writer.drain()
        says_all = chance.random() < 0.05 or not well_formed
        if says_all:  # asyncio's servers take it that the client left
            writer.write_eof()
        if chance.random() < 0.05:
            writer.transport.abort()
            return "left"
        try:
            reply = await asyncio.wait_for(reader.read(), SECONDS)
        except ConnectionError:
            reply = b""
        assert reply or not well_formed or chance, "no reply"
    finally:
        writer.close()
    if not reply:
        assert says_all, data[:300]
        return "closed"
    head, _, content = reply.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    known = (data[:300], reply[-300:])
    assert status in STATUSES, known
    if status >= 400 and b"application/json" in head.lower():
        error = json.loads(content)["error"]
        assert set(error) == {"message", "type", "param", "code"}, known
        assert len(error["message"]) > 5, known
    elif status >= 400:
        assert not well_formed, known  # uvicorn's own words, of what is no HTTP
    elif status == 200:
        assert b"daemon" in content or b"OPTIONS" in data[:8], known
    return str(status)


async def storm(
    host: str, port: int, seeds: range, make: Callable[[random.Random], tuple[bytes, bool]] = raw, at_once: int = 16
) -> Counter[str]:
    """Send a request for each seed, some at once; count what came of them."""
    came: Counter[str] = Counter()
    todo = iter(seeds)

    async def sender() -> None:
        for seed in todo:
            came[await send(host, port, random.Random(seed), make)] += 1

    await asyncio.gather(*(sender() for _ in range(at_once)))
    return came


def artefact(folder: Path) -> Path:
    """Of a tiny model that is saved there, with a chat template."""
    from daemon_fast import Energy, metrics
    from daemon_fast.proposals.load import EngineSpec

    tokenizer, at = tiny.tokenizer(), folder / MODEL
    tiny.model().save_pretrained(at)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(at)
    settings = EngineSpec(model_id=str(at)).settings(num_candidates=6, max_new_tokens=12, min_new_tokens=0)
    mu = torch.tensor([3.0, 2.0], dtype=torch.float64)
    path = folder / "energy.json"
    Energy(metrics.parse(["sr_1", "tr_4"]), mu, torch.zeros(2), settings).save(path)
    return path


def start(energy: Path, *options: str, **popen: object) -> tuple[subprocess.Popen[str], str, int]:
    """`daemon-fast serve` in a process of its own, and where it listens."""
    command = [sys.executable, "-m", "daemon_fast", "serve", "--energy", str(energy), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **popen)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving "), line
    host, port = line.split("http://")[1].split("/v1")[0].split(":")
    return process, host, int(port)


def resident(pid: int) -> float:
    """MB of memory that a process holds."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS"))


def sound(chance: random.Random) -> tuple[bytes, bool]:
    """As `raw`: a completion or a chat, of a text of any length, streamed or not."""
    text = tiny.text(chance.randrange(1, 40), chance.randrange(1000))
    asked = {"model": MODEL, "n": chance.randrange(1, 5), "stream": chance.random() < 0.3}
    chat = chance.random() < 0.5
    asked |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    data, path = json.dumps(asked).encode(), "/v1/chat/completions" if chat else "/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data, True


def main() -> None:
    counts = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    total, make = counts[0] if counts else 10_000, sound if "--sound" in sys.argv else raw
    with tempfile.TemporaryDirectory() as folder:
        path, came = artefact(Path(folder)), Counter()
        process, host, port = start(path, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        begin = time.monotonic()
        try:
            for first in range(0, total, 1000):
                came += asyncio.run(storm(host, port, range(first, min(total, first + 1000)), make))
                print(
                    f"{sum(came.values())} requests, {time.monotonic() - begin:.0f} s, {resident(process.pid):.0f} MB"
                )
        finally:
            process.terminate()
            process.wait(60)
    print(dict(came))


if __name__ == "__main__":
    main()
