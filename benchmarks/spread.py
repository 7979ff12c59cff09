"""When second moments pay: the log-likelihood of held-out human text under fits with and without `spread`.

python benchmarks/spread.py --directory draw [--save]

Reads the candidates that benchmarks/draw.py keeps in the directory, or draws them. Prefixes and human texts are halved
at random, several times; mu is fitted to the one half from groups of M candidates, with a cross-validated ridge, and
judged on the other, with log Z from all candidates of a prefix.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from common import finish, table
from draw import NEW_TOKENS, POOL, TEMPERATURE, measured
from torch import Tensor

from daemon_fast import TransformersProposal, ops
from daemon_fast import metrics as metrics_module
from daemon_fast.fit import fit
from daemon_fast.seeds import generator

NAMES = list(metrics_module.DEFAULT)
SPREADS = ((), ("nats",), ("sr_4",), ("nats", "sr_4"), ("nats", "coh"), tuple(NAMES))
M, HALVES = 25, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    settings = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "temperature": TEMPERATURE}
    proposal = TransformersProposal.load(dtype=torch.bfloat16, num_candidates=POOL, **settings)
    figures = {}
    for domain, count in (("wikipedia", 48), ("news", 26)):
        features, human, *_ = measured(proposal, domain, arguments.directory / domain, count, 600)
        found = {spread: gains(features, human, spread) for spread in SPREADS}
        for spread, values in found.items():
            rise = values - found[()]
            figures[f"{domain}, {' and '.join(spread) if len(spread) < 8 else 'all'}" if spread else domain] = [
                float(number) for part in (values, rise) for number in (part.mean(), part.std() / HALVES**0.5)
            ]
    lines = [[name, *(f"{a:.3f} ± {b:.3f}" for a, b in (row[:2], row[2:]))] for name, row in figures.items()]
    title = f"# Spread: nats that a held-out text gains over the proposal, mean of {HALVES} halvings and its error"
    finish("spread", f"{title}\n\n{table(['spread of', 'gain', 'less the gain of means alone'], lines)}", figures)


def gains(features: Tensor, human: Tensor, spread: tuple[str, ...]) -> Tensor:
    """[HALVES] nats a text."""
    found = []
    for half in range(HALVES):
        random = generator(half, "halves")
        (prefixes, other_prefixes), (texts, other_texts) = (
            torch.randperm(len(values), generator=random).tensor_split(2) for values in (features, human)
        )
        to_fit, targets, held_out, judged = (
            features[prefixes],
            human[texts],
            features[other_prefixes],
            human[other_texts],
        )
        if spread:
            values = targets[:, [NAMES.index(name) for name in spread]].double()
            moments = metrics_module.Spread(spread, values.mean(0).tolist(), values.std(0).tolist())
            to_fit, targets, held_out, judged = (
                torch.cat([part, moments.combine(dict(zip(NAMES, part.unbind(-1), strict=True)))], -1)
                for part in (to_fit, targets, held_out, judged)
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mu = fit(to_fit.reshape(-1, M, to_fit.shape[2]), targets, ridge="cv").mu
        log_z = ops.importance_weights(-(held_out.double() @ mu)).log_mean
        found.append(float(-(judged.double() @ mu).mean() - log_z.mean()))
    return torch.tensor(found)


if __name__ == "__main__":
    main()
