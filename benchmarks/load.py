"""The clients of `serving.py`, in a process of their own: each sends its next request when it has the last one's reply.

Reads {"url", "requests", "clients"} from standard input; writes the seconds of each request, of all, and the texts.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any


async def load(url: str, requests: list[dict[str, Any]], clients: int) -> dict[str, Any]:
    import httpx2  # what openai comes with

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


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(**json.load(sys.stdin)))))
