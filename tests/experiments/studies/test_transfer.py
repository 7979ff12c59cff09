"""A mu of one domain on another, on the listed model."""

from __future__ import annotations

import torch
from toy_studies import MU, collected, tilted

from daemon_fast.experiments.studies import transfer


def test_each_domain_knows_its_own():
    other = torch.tensor([-3.0, 1.0], dtype=torch.float64)
    domains = {"a": collected(n=3000), "b": collected(n=3000, seed=5, human=tilted(other)[0])}
    found = {name: transfer.compute(held_out, {"a": MU, "b": other}) for name, held_out in domains.items()}
    got = {(row.fitted_on, name): row.distance for name, one in found.items() for row in one.rows}
    for name in "ab":
        assert got[name, name] < 0.06 < found[name].sampling
    assert got["a", "b"] > 0.3 < got["b", "a"]
    table = transfer.section(found["a"]).tables[0]
    assert [row[0] for row in table.rows] == ["a", "b", "plain sampling"]
