"""What the studies of one domain draw and measure, kept in a folder, so that a run can be killed and goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from daemon_fast import metrics as metrics_module
from daemon_fast.data.collect import collect, human_folder, saved_batch_size, scores
from daemon_fast.data.exchanges import pair, read_exchanges
from daemon_fast.data.formats import Format
from daemon_fast.data.texts import Pairs, read_texts, split
from daemon_fast.embedded import EXCHANGES
from daemon_fast.energy import Energy
from daemon_fast.errors import DataError, InvalidInput, Problems
from daemon_fast.experiments.collected import Collected
from daemon_fast.files import digest, read_arrays, write_arrays, writing
from daemon_fast.proposals.candidates import Candidates
from daemon_fast.proposals.transformers import TransformersProposal
from daemon_fast.seeds import stream

__all__ = ["Domain", "DomainData", "Options", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """How much is drawn.

    Attributes
    ----------
    held_out : prefixes of each domain that the fit has not seen; fewer where the texts don't suffice
    pool_prefixes, pool_candidates : for the convergence study
    sweep_prefixes : to fit, and as many held out, at each temperature of the sweep

    Raises
    ------
    InvalidInput
        Too few, or a pool that does not divide into the tenths that its jackknife leaves out.
    """

    held_out: int = 300
    pool_prefixes: int = 10
    pool_candidates: int = 1000
    sweep_prefixes: int = 50

    def __post_init__(self) -> None:
        least = {"held_out": 2, "pool_prefixes": 1, "pool_candidates": 20, "sweep_prefixes": 2}
        problems = [
            InvalidInput(f"{name} = {getattr(self, name)} must be at least {fewest}")
            for name, fewest in least.items()
            if getattr(self, name) < fewest
        ]
        if self.pool_candidates % 10:
            problems.append(InvalidInput(f"pool_candidates = {self.pool_candidates} must be a multiple of 10"))
        Problems(problems).report()


@dataclass(frozen=True)
class Domain:
    """A collection of human text, the artefact that was fitted to it, and the candidates that the fit left, if any."""

    name: str
    data: str
    energy: Energy
    field: str = "text"
    candidates: Path | None = None
    format: Format | None = None
    prompt_field: str | None = None  # prompts and responses in place of texts
    response_field: str | None = None


@dataclass(frozen=True)
class Options:
    """Of a run; see `daemon_fast.experiments.run.evaluate`."""

    sizes: Sizes
    amateur: Any
    featurizer: str
    encoder: str | None
    prefix_tokens: int
    batch_size: int
    seed: int


class DomainData:
    """Candidates, human texts and their metrics, each drawn or measured when a study first asks for it.

    Attributes
    ----------
    energies : artefacts of all domains of the run, by name
    names : of the metrics that are measured: the artefact's, and `div` and `ent`, which are functions of some of them
        and in the paper's tables
    to_fit_pairs, target_pairs : texts that the fit took its prefixes and its targets from
    """

    def __init__(
        self, domain: Domain, energies: Mapping[str, Energy], folder: Path, model: Any, tokenizer: Any, options: Options
    ) -> None:
        self.domain, self.energy, self.energies, self.options = domain, domain.energy, energies, options
        self.folder, self.model, self.tokenizer = folder, model, tokenizer
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.proposal = self.proposal_with()
        if self.energy.proposal_settings.vocabulary != self.proposal.settings.vocabulary:
            raise InvalidInput(f"the artefact of {domain.name} was fitted for another vocabulary than the model's")
        known = self.energy.diagnostics
        self.ridge = known.ridge if known else 0.0  # of every refit
        fit_prefixes, fit_texts = (known.num_prefixes, known.num_targets) if known else (0, 0)
        seen = max(fit_prefixes, fit_texts)
        pairs = self._pairs(seen + options.sizes.held_out)
        self.to_fit_pairs, self.target_pairs = pairs[:fit_prefixes], pairs[:fit_texts]
        self.held_out_pairs = pairs[seen : seen + options.sizes.held_out]
        if (left := len(self.held_out_pairs)) < 2:
            raise DataError(
                f"{domain.name}: {len(pairs)} texts are long enough, and the fit took {seen}: "
                + (f"{left} is held out, and standard deviations need 2" if left else "none is held out")
            )
        self.metrics = [*self.energy.metrics]
        more = [name for name in ("div", "ent") if name not in self.energy.names]
        self.metrics += metrics_module.parse(more) if more else []
        self.names = metrics_module.column_names(self.metrics)
        self._human: dict[str, tuple[Candidates, Tensor]] = {}

    def _pairs(self, limit: int) -> Pairs:
        """As the fit took them: first those that it saw, then those that are held out."""
        domain, settings, options = self.domain, self.energy.proposal_settings, self.options
        shortest, longest = settings.min_new_tokens, settings.max_new_tokens
        if domain.prompt_field is not None or domain.data in EXCHANGES:
            exchanges = read_exchanges(domain.data, domain.prompt_field, domain.response_field, domain.format)
            self.left_out = len(exchanges.problems)
            chat = self.energy.chat_template is not None
            check = self.proposal.tokenize
            return pair(exchanges, self.tokenizer, longest, shortest, limit, options.seed, 1, chat=chat, check=check)
        texts = read_texts(domain.data, domain.field, domain.format)
        self.left_out = len(texts.problems)
        return split(texts, self.tokenizer, options.prefix_tokens, longest, None, options.seed)

    def proposal_with(self, **changes: Any) -> TransformersProposal:
        """The artefact's proposal, with some settings changed."""
        fitted = self.energy.proposal_settings
        settings = {**fitted.sampling(), **changes}
        return TransformersProposal(self.model, self.tokenizer, model_id=fitted.model_id, **settings)

    @cached_property
    def to_fit(self) -> Collected:
        """Candidates of the fit's prefixes, and the texts that gave its targets."""
        if not len(self.to_fit_pairs):
            raise InvalidInput(f"{self.domain.name}: the artefact does not say which texts it was fitted to")
        return self.collected("fit", self.proposal, self.to_fit_pairs, self.target_pairs)

    @cached_property
    def held_out(self) -> Collected:
        return self.collected("held-out", self.proposal, self.held_out_pairs, self.held_out_pairs)

    @cached_property
    def spread(self) -> Tensor:
        """[K'] standard deviation of all human text, targets and held out: every study's unit of distance."""
        parts = [self.human(pairs)[1] for pairs in (self.target_pairs, self.held_out_pairs) if len(pairs)]
        return torch.cat(parts).double().std(0)

    def candidates(
        self, name: str, proposal: TransformersProposal, pairs: Pairs, batch_size: int | None = None
    ) -> Candidates:
        folder, batch_size = self.folder / name, batch_size or self.options.batch_size
        if name == "fit" and self.domain.candidates is not None:
            folder = self.domain.candidates
            batch_size = saved_batch_size(folder) or batch_size
        # That of the fit is the run's own, so that its candidates serve again.
        seed = self.options.seed if name == "fit" else stream(self.options.seed, name)
        return collect(proposal, pairs.prefixes, folder, seed, batch_size, f"{self.domain.name}: {name}")[0]

    def collected(
        self, name: str, proposal: TransformersProposal, pairs: Pairs, human: Pairs, batch_size: int | None = None
    ) -> Collected:
        """Candidates of `pairs`, and the human continuations of `human`."""
        candidates = self.candidates(name, proposal, pairs, batch_size)
        features = self._features(name, candidates)
        return Collected.of(self.energy, self.names, candidates, features, *self.human(human), self.spread)

    def human(self, pairs: Pairs) -> tuple[Candidates, Tensor]:
        """Human continuations, scored, and their metrics [N, K']."""
        name = "human-" + digest(pairs.prefixes, pairs.continuations)[:16]
        if name not in self._human:
            self._human[name] = self.scored(name, pairs)
        return self._human[name]

    def scored(
        self, name: str, pairs: Pairs, proposal: TransformersProposal | None = None
    ) -> tuple[Candidates, Tensor]:
        """Given continuations with their log-probabilities (M = 1), and their metrics [N, K']."""
        folder = self.folder / name
        if pairs is self.target_pairs and self.domain.candidates is not None:
            folder = human_folder(self.domain.candidates)
        batches = scores(proposal or self.proposal, pairs, folder, f"{self.domain.name}: {name}")
        scored = Candidates.concatenate(list(batches))
        return scored, self._features(name, scored)[:, 0]

    def _features(self, name: str, candidates: Candidates) -> Tensor:
        key = [candidates.tokens.tolist(), [metric.spec for metric in self.metrics]]
        return torch.from_numpy(
            self.kept(f"{name}-features", key, lambda: metrics_module.features(self.metrics, candidates).cpu().numpy())
        )

    def kept(self, name: str, key: Any, make: Callable[[], Any]) -> np.ndarray[Any, Any]:
        """An array from a file, if it is whole and was made for the same key; made and written otherwise."""
        path, key = self.folder / f"{name}.npz", digest(key)
        found = read_arrays(path)
        if found is None or str(found.get("key")) != key or "value" not in found:
            found = {"key": np.array(key), "value": np.asarray(make())}
            with writing(path):
                write_arrays(path, found)
        return found["value"]
