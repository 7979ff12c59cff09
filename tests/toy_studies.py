"""Human text and candidates of the language model that can be listed: what studies read, and what they should find."""

from __future__ import annotations

from dataclasses import replace

import torch
import toy

from daemon_fast import metrics
from daemon_fast.experiments.collected import Collected

MU = torch.tensor([2.0, -1.5], dtype=torch.float64)
NAMES = ["sr_2", "tr_2", "div"]  # the first two are fitted
LISTED = metrics.features(metrics.parse(NAMES), toy.as_candidates(toy.SEQUENCES, 1))[0].double()  # [81, 3]
FITTED = LISTED[:, :2]
P = toy.PROBABILITIES


def tilted(mu=MU):
    """[81] p_mu, and log Z."""
    w = P * torch.exp(-(FITTED @ mu))
    return w / w.sum(), float(w.sum().log())


def draw(probabilities, count, seed):
    return torch.multinomial(probabilities, count, replacement=True, generator=torch.Generator().manual_seed(seed))


def collected(n=400, m=50, seed=0, human=None):
    """Human text drawn from p_mu, candidates from the model; the unit of distance is that of the exact human text."""
    human = tilted()[0] if human is None else human
    of_human, drawn = draw(human, n, seed + 1), draw(P, n * m, seed)
    log_p = P.log()
    return Collected(
        names=NAMES,
        fitted=2,
        spread=(human @ LISTED**2 - (human @ LISTED) ** 2).sqrt(),
        human=LISTED[of_human],
        human_tokens=torch.full((n,), toy.LENGTH),
        human_log_p=log_p[of_human],
        human_log_base=log_p[of_human],
        features=LISTED[drawn].reshape(n, m, -1),
        log_p=log_p[drawn].reshape(n, m),
        log_q=log_p[drawn].reshape(n, m),
        lengths=torch.full((n, m), toy.LENGTH),
    )


def drawn_from(of, probabilities, seed):
    """The same with candidates of another proposal."""
    n, m = of.lengths.shape
    rows = draw(probabilities, n * m, seed)
    return replace(
        of,
        features=LISTED[rows].reshape(n, m, -1),
        log_p=P.log()[rows].reshape(n, m),
        log_q=probabilities.log()[rows].reshape(n, m),
    )
