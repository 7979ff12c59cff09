"""What several property tests draw."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st


@st.composite
def logit_rows(draw):
    """Logits [R, V] of any dtype, scale and layout, some with excluded ids; ids [R] that are not; and a generator."""
    rows = draw(st.integers(0, 4))
    vocabulary = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 511, 512, 513, 1024, 1500]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.01, 1.0, 5.0, 50.0]))
    logits = torch.from_numpy(rng.normal(size=(rows, vocabulary)) * scale + draw(st.sampled_from([0.0, 300.0, -300.0])))
    logits = logits.to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))
    ids = torch.from_numpy(rng.integers(0, vocabulary, size=rows))
    if draw(st.booleans()) and vocabulary > 1:  # what top-k and top-p leave behind
        some = torch.from_numpy(rng.random((rows, vocabulary)) < 0.1)
        keep = torch.nn.functional.one_hot(ids, vocabulary).bool() | some
        logits = logits.masked_fill(~keep, -math.inf)
    if draw(st.booleans()):
        logits = logits.t().contiguous().t()
    return logits, ids, rng
