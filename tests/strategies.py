"""What several property tests draw."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

import daemon_fast
from daemon_fast import reference


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


class Tilt(NamedTuple):
    features: torch.Tensor  # [G, M, K]
    mu: torch.Tensor  # [K]
    base: torch.Tensor | None  # [G, M]


@st.composite
def tilts(draw):
    """Features of any size, dtype and layout, mu of any scale, and base log-weights, some of them -inf, or none."""
    shape = draw(st.integers(0, 5)), draw(st.sampled_from([1, 2, 3, 4, 5, 25, 64, 257])), draw(st.integers(0, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    features = torch.from_numpy(rng.normal(size=shape)).to(draw(st.sampled_from([torch.float32, torch.float64])))
    if draw(st.booleans()):
        features = features.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    mu = torch.from_numpy(rng.normal(size=shape[2]) * draw(st.sampled_from([0.0, 1.0, 1e3])))
    base = None
    if draw(st.booleans()):
        base = torch.from_numpy(rng.normal(size=shape[:2]) * 5)
        if shape[1] > 1:
            base[:, rng.integers(shape[1])] = -math.inf
        base = base.to(draw(st.sampled_from([torch.float32, torch.float64])))
    return Tilt(features, mu, base)


def check_selection(operator, tilt, uniforms, device="cpu"):
    """`sir_select` or `race_select` on the device, against the definition."""
    features, mu, base = tilt
    there = [None if part is None else part.to(device) for part in (features, mu, uniforms, base)]
    out = [part.cpu() for part in getattr(daemon_fast, operator)(*there)]
    listed = None if base is None else base.double().tolist()
    expected = getattr(reference, operator)(features.double().tolist(), mu.tolist(), uniforms.tolist(), listed)
    assert out[0].tolist() == expected[0]
    rtol, atol = (1e-6, 1e-37) if features.dtype == torch.float32 else (1e-12, 1e-300)
    # mu · f is a sum of K float64 products: its rounding, up to 1e-16 of the largest, is amplified by exp.
    rtol += 1e-15 * mu.abs().sum().item() * (features.abs().max().item() if features.numel() else 0)
    for got, want in zip(out[1:], expected[1:], strict=True):
        np.testing.assert_allclose(got.double().numpy(), np.array(want).reshape(got.shape), rtol=rtol, atol=atol)
