"""A language model small enough to list: every sequence, its probability and its metrics are known."""

from __future__ import annotations

import itertools

import torch

from daemon_fast import Candidates, ProposalSettings

VOCABULARY, LENGTH = 3, 4
FIRST = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
NEXT = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64)

SEQUENCES = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))  # [81, 4]


def token_probabilities(tokens: torch.Tensor) -> torch.Tensor:
    """[R, T] float64 probability of each token given those before it."""
    rest = NEXT[tokens[:, :-1], tokens[:, 1:]]
    return torch.cat([FIRST[tokens[:, :1]], rest], dim=1)


PROBABILITIES = token_probabilities(SEQUENCES).prod(1)  # [81]


def as_candidates(tokens: torch.Tensor, num_prefixes: int) -> Candidates:
    log_p = token_probabilities(tokens).log().float()
    return Candidates(
        tokens=tokens,
        lengths=torch.full(tokens.shape[:1], LENGTH),
        token_log_p=log_p,
        token_log_q=log_p,
        prefix_tokens=[[0]] * num_prefixes,
        detokenize=detokenize,
    )


def detokenize(rows):
    return ["".join("abc"[token] for token in row) for row in rows]


class ToyProposal:
    """Draws from the model itself, whatever the prefix."""

    tokenizer, eos_token_ids = None, ()

    def __init__(self, num_candidates: int) -> None:
        self.settings = ProposalSettings(
            model_id="toy",
            vocabulary="3-toy",
            num_candidates=num_candidates,
            max_new_tokens=LENGTH,
            min_new_tokens=LENGTH,
        )
        self.calls = 0

    def propose(self, prefixes, seed):
        self.calls += 1
        generator = torch.Generator().manual_seed(seed)
        rows = len(prefixes) * self.settings.num_candidates
        drawn = torch.multinomial(PROBABILITIES, rows, replacement=True, generator=generator)
        return as_candidates(SEQUENCES[drawn], len(prefixes))

    def score(self, prefixes, continuations):
        self.calls += 1
        return as_candidates(torch.tensor(continuations), len(prefixes))

    def tokenize(self, prefixes):
        return [[0] for _ in prefixes]

    detokenize = staticmethod(detokenize)
