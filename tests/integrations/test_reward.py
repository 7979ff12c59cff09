"""Repetition rewards, and TRL's own trainer calling them."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from daemon_fast import RepetitionReward, reference
from daemon_fast.errors import InvalidInput, UnknownMetric

COMPLETIONS = [[5, 6, 7, 8, 5, 6, 7], [3] * 9, [4], [], list(range(20))]


def test_it_is_the_weighted_sum_of_the_definitions():
    reward = RepetitionReward({"sr_2": -1.0, "tr_8": -0.5, "div": 0.25})
    want = []
    for row in COMPLETIONS:
        diversity = 1.0
        for n in (2, 3, 4):
            diversity *= 1 - reference.sequence_repetition(row, n)
        want.append(
            -reference.sequence_repetition(row, 2) - 0.5 * reference.token_repetition(row, 8) + 0.25 * diversity
        )
    assert reward(completion_ids=COMPLETIONS) == pytest.approx(want, abs=1e-6)
    assert reward(completion_ids=[]) == []


def test_what_else_the_trainer_passes_is_ignored():
    reward = RepetitionReward({"sr_1": -1.0}, name="sr-1")
    got = reward(prompts=["a"], completions=["b"], completion_ids=[[1, 1]], trainer_state=None, column=[3])
    assert got == [-0.5]
    assert reward.__name__ == "sr-1"


def test_ids_may_be_arrays_and_tensors():
    reward = RepetitionReward({"sr_1": -1.0})
    want = reward(completion_ids=[[1, 1], [2, 3]])
    assert reward(completion_ids=torch.tensor([[1, 1], [2, 3]])) == want
    assert reward(completion_ids=[np.array([1, 1], dtype=np.int32), torch.tensor([2, 3])]) == want


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ["a"], "completions": ["b"]}, "completion_ids is missing.* got prompts, completions"),
        ({}, "completion_ids is missing.* got nothing"),
        ({"completion_ids": "text"}, "completion_ids = 'text' must be a list of lists of token ids"),
        ({"completion_ids": 3}, "completion_ids = 3 must be a list of lists"),
        ({"completion_ids": [5, 6]}, r"completion_ids\[0\] = 5 must be a list of token ids"),
        ({"completion_ids": [[5], None]}, r"completion_ids\[1\] = None must be a list of token ids"),
        ({"completion_ids": [[5], "text"]}, r"completion_ids\[1\] = 'text' must be a list of token ids"),
        ({"completion_ids": [[5, 1.5]]}, r"completion_ids\[0\] has 1.5 at position 1: a token id is an integer"),
        ({"completion_ids": [[5, None]]}, r"completion_ids\[0\] has None at position 1"),
        ({"completion_ids": [[True]]}, r"completion_ids\[0\] has True at position 0"),
        ({"completion_ids": [[[5]]]}, r"completion_ids\[0\] has \[5\] at position 0"),
        ({"completion_ids": [torch.tensor([0.5])]}, r"completion_ids\[0\] has 0.5 at position 0"),
    ],
)
def test_what_is_not_a_list_of_ids_is_named(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        RepetitionReward({"sr_1": -1.0})(**arguments)


@pytest.mark.parametrize("weights", [{"ent": 1.0}, {}, {"sr_2": float("nan")}])
def test_other_metrics_and_weights_are_refused(weights):
    with pytest.raises(InvalidInput):
        RepetitionReward(weights)
    with pytest.raises(UnknownMetric):
        RepetitionReward({"rouge": 1.0})


@pytest.mark.real_model
def test_trl_trains_on_it(tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    seen = []

    class Recorded(RepetitionReward):
        def __call__(self, completion_ids, **others):
            rewards = super().__call__(completion_ids, **others)
            seen.append((completion_ids, rewards))
            return rewards

    config = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=12,
        max_steps=2, report_to="none", use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        tiny.model("llama"), reward_funcs=[Recorded({"tr_8": -1.0})], args=config, processing_class=tiny.tokenizer(),
        train_dataset=datasets.Dataset.from_list([{"prompt": "w1 w2 w3"}] * 8),
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 2
    for ids, rewards in seen:
        assert rewards == pytest.approx([-reference.token_repetition(row, 8) for row in ids], abs=1e-6)
    logged = [entry for entry in trainer.state.log_history if "rewards/repetition/mean" in entry]
    assert len(logged) == 2
