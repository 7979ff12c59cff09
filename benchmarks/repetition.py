"""repetition (n = 2, 3, 4; w = 8, 16, 32) against plain Python and against the best vectorised torch we could write.

One process, one thread (and then two), medians of interleaved calls, inputs rotated.
Run: python benchmarks/repetition.py [--save]
"""

from __future__ import annotations

import torch
from common import finish, interleaved, real_tokens, table, zipf_tokens

import daemon_fast
from daemon_fast import reference

NGRAMS, WINDOWS = [2, 3, 4], [8, 16, 32]
SIZES = [(25, 256), (4096, 256), (64, 2048)]
INPUTS = 16  # different inputs in rotation
ROUNDS = 21


def plain_python(tokens: torch.Tensor, lengths: torch.Tensor) -> list[list[float]]:
    return reference.repetition(tokens.tolist(), lengths.tolist(), NGRAMS, WINDOWS)


def vectorised_torch(tokens: torch.Tensor) -> torch.Tensor:
    """Sorts whole n-grams packed into one int64 each, and compares shifted rows for the windows.

    Its ids must be below 65,536, so that a 4-gram fits into 64 bits, and all rows full. Of what was tried this is the
    fastest on the CPU: ranking tokens first costs one more sort (+35%), comparing all pairs of positions ten times as
    much, sorting for the windows twice what the 32 comparisons cost but for the smallest input.
    """
    columns, key = [], tokens
    for n in NGRAMS:
        key = (key[:, :-1] << 16) | tokens[:, n - 1 :]
        ordered = key.sort(dim=1).values
        repeats = (ordered[:, 1:] == ordered[:, :-1]).sum(1)
        columns.append(repeats / key.shape[1])
    narrow = tokens.int()
    hits = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    for back in range(1, WINDOWS[-1] + 1):
        hits[:, back:] |= narrow[:, back:] == narrow[:, :-back]
        if back in WINDOWS:
            columns.append(hits.sum(1) / tokens.shape[1])
    return torch.stack(columns, dim=1)


def compare(inputs: list[torch.Tensor]) -> dict[str, float]:
    """ns per token of each, one thread, and of ours with two."""
    (rows, width), count = inputs[0].shape, len(inputs)
    lengths = torch.full((rows,), width)
    expected = torch.tensor(plain_python(inputs[0], lengths))
    assert torch.equal(daemon_fast.repetition(inputs[0], lengths), expected)
    torch.testing.assert_close(vectorised_torch(inputs[0]), expected)
    seconds = interleaved(
        {
            "Python": lambda i: plain_python(inputs[i % count], lengths),
            "torch": lambda i: vectorised_torch(inputs[i % count]),
            "ours": lambda i: daemon_fast.repetition(inputs[i % count], lengths),
        },
        rounds=ROUNDS if rows < 1000 else 7,
    )
    seconds["ours, 2 threads"] = two_threads(inputs, lengths)
    return {name: 1e9 * value / (rows * width) for name, value in seconds.items()}


def main() -> None:
    torch.set_num_threads(1)
    rows, figures = [], []
    for kind, source in (("Zipf", zipf_tokens), ("Wikipedia", real_tokens)):
        for size in SIZES:
            inputs = [source(*size, seed) for seed in range(INPUTS if size[0] < 1000 else 3)]
            if inputs[0] is None:
                print("Wikipedia left out: its packages are not installed")
                break
            ns = compare(inputs)
            rows.append(
                [kind, f"{size[0]} x {size[1]}", *ns.values(), ns["Python"] / ns["ours"], ns["torch"] / ns["ours"]]
            )
            figures.append({"tokens": kind, "size": size, "ns per token": ns})
    header = [
        "tokens",
        "R x T",
        "Python, ns/token",
        "torch",
        "ours",
        "ours, 2 threads",
        "Python / ours",
        "torch / ours",
    ]
    overhead, parts = call_overhead(), where_the_time_goes()
    text = "# repetition, n = 2, 3, 4 and w = 8, 16, 32, one thread\n\n" + table(header, rows)
    text += f"\n\nOne call on a (1, 1) input: {1e6 * overhead:.2f} µs.\n\n"
    text += "## What limits it (4096 x 256, Zipf, one thread)\n\n" + table(
        ["asked for", "ns/token"], list(parts.items())
    )
    finish("repetition", text, {"sizes": figures, "call overhead, s": overhead, "ns per token by part": parts})


def two_threads(inputs: list[torch.Tensor], lengths: torch.Tensor) -> float:
    torch.set_num_threads(2)
    call = {"ours": lambda i: daemon_fast.repetition(inputs[i % len(inputs)], lengths)}
    seconds = interleaved(call, ROUNDS)["ours"]
    torch.set_num_threads(1)
    return seconds


def call_overhead() -> float:
    tokens, lengths = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    return interleaved({"ours": lambda _: daemon_fast.repetition(tokens, lengths, NGRAMS, WINDOWS)}, 101)["ours"]


def where_the_time_goes() -> dict[str, float]:
    """ns per token of parts of the work: what each adds shows what it costs."""
    inputs = [zipf_tokens(4096, 256, seed) for seed in range(3)]
    sequential = [torch.arange(4096 * 256).reshape(4096, 256)] * 3
    lengths = torch.full((4096,), 256)
    calls = {
        "tokens only (n = 1)": (inputs, [1], []),
        "n = 1, all tokens distinct and in order (no misprediction)": (sequential, [1], []),
        "w = 8, 16, 32": (inputs, [], WINDOWS),
        "n = 2": (inputs, [2], []),
        "n = 2, 3, 4": (inputs, NGRAMS, []),
        "all": (inputs, NGRAMS, WINDOWS),
    }
    functions = {
        name: lambda i, c=call: daemon_fast.repetition(c[0][i % 3], lengths, c[1], c[2]) for name, call in calls.items()
    }
    return {name: 1e9 * seconds / (4096 * 256) for name, seconds in interleaved(functions, ROUNDS).items()}


if __name__ == "__main__":
    main()
