"""The clients of `serving.py`, in a process of their own: each sends its next request when it has the last one's reply.

Reads {"url", "requests", "clients", "limit"} from standard input: after `limit` seconds no more requests are sent.
Writes the seconds and the text of each request, null where it was not sent, and the seconds of all together.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any


async def load(url: str, requests: list[dict[str, Any]], clients: int, limit: float) -> dict[str, Any]:
    import httpx2  # what openai comes with

    seconds: list[float | None] = [None] * len(requests)
    texts: list[str | None] = [None] * len(requests)
    todo = iter(enumerate(requests))
    async with httpx2.AsyncClient(timeout=3600, trust_env=False, limits=httpx2.Limits(max_connections=clients)) as http:

        async def client() -> None:
            while time.perf_counter() - start < limit and (job := next(todo, None)) is not None:
                i, request = job
                begin = time.perf_counter()
                reply = await http.post(f"{url}/completions", json=request)
                seconds[i] = time.perf_counter() - begin
                texts[i] = reply.raise_for_status().json()["choices"][0]["text"]

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return {"seconds": seconds, "whole": time.perf_counter() - start, "texts": texts}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(**json.load(sys.stdin)))))
