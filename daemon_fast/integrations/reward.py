"""Repetition as a reward for reinforcement learning, in the shape that TRL's GRPO trainer calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from daemon_fast import metrics as metrics_module
from daemon_fast.errors import InvalidInput
from daemon_fast.metrics import RepetitionMetric
from daemon_fast.proposals.base import token_ids
from daemon_fast.proposals.candidates import Candidates

__all__ = ["RepetitionReward"]


class RepetitionReward:
    """reward = Σ_k weight_k · metric_k(completion), over exact repetition metrics of the completion's token ids.

    Parameters
    ----------
    weights : mapping of metric name to weight
        Of "sr_<n>", "tr_<w>" and "div", which are fractions. Repetition is punished by negative weights.
    name : what training logs call it

    Raises
    ------
    UnknownMetric, InvalidInput
        A metric that isn't a function of token ids alone.

    Examples
    --------
    >>> reward = RepetitionReward({"sr_4": -1.0, "tr_16": -0.5})
    >>> reward(completion_ids=[[5, 6, 7, 8], [5, 5, 5, 5, 5, 5]])
    [0.0, -1.0833333432674408]

    `trl.GRPOTrainer(model, reward_funcs=[reward], train_dataset=dataset)` trains with it.
    """

    def __init__(self, weights: Mapping[str, float], name: str = "repetition") -> None:
        self._metrics = metrics_module.parse(list(weights))
        for metric in self._metrics:
            if not isinstance(metric, RepetitionMetric):
                raise InvalidInput(
                    f"metric {metric.name} needs more than token ids: rewards are of sr_<n>, tr_<w>, div"
                )
        self._weights = torch.tensor(list(weights.values()), dtype=torch.float64, device="cpu")
        if not self._weights.isfinite().all():
            raise InvalidInput(f"weights = {dict(weights)} must be finite")
        self.__name__ = name

    def __call__(self, completion_ids: Iterable[Sequence[int]] | None = None, **others: Any) -> list[float]:
        """One reward per completion.

        Parameters
        ----------
        completion_ids : B lists of token ids, without prompt and padding
        **others : what else TRL passes (prompts, completions, columns of the dataset, the trainer's state)

        Raises
        ------
        InvalidInput
            No completion_ids, or something else than lists of integers.
        """
        if completion_ids is None:
            raise InvalidInput(
                "completion_ids is missing: this reward reads token ids, which newer versions of TRL pass to it; got "
                f"{', '.join(others) or 'nothing'}"
            )
        if isinstance(completion_ids, str) or not isinstance(completion_ids, Iterable):
            raise InvalidInput(f"completion_ids = {completion_ids!r} must be a list of lists of token ids")
        rows = [
            torch.tensor(token_ids(row, f"completion_ids[{i}]"), dtype=torch.int64, device="cpu")
            for i, row in enumerate(completion_ids)
        ]
        if not rows:
            return []
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        zeros = torch.zeros(tokens.shape, dtype=torch.float32, device="cpu")
        lengths = torch.tensor([len(row) for row in rows], device="cpu")
        candidates = Candidates(tokens, lengths, zeros, zeros, [[]] * len(rows), _no_text)
        values = metrics_module.features(self._metrics, candidates)[:, 0].double()
        return (values @ self._weights).tolist()


def _no_text(rows: Sequence[Sequence[int]]) -> list[str]:
    raise InvalidInput("rewards read token ids, not texts")
