"""`daemon-fast evaluate`: the paper's experiments for fitted artefacts, each on its own domain of human text.

Whatever takes long (candidates, baselines, features) is saved as it is made; a run that is killed and started again
goes on from there, to the same report. The studies themselves are functions of `daemon_fast.experiments.studies`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from daemon_fast import metrics as metrics_module
from daemon_fast import ops
from daemon_fast.data.collect import collect, human_folder, saved_batch_size, scores
from daemon_fast.data.texts import Pairs, read_texts, split
from daemon_fast.energy import Energy
from daemon_fast.errors import DataError, FitError, InvalidInput
from daemon_fast.experiments import baselines, studies
from daemon_fast.experiments.measures import noise_floor
from daemon_fast.experiments.studies import Collected
from daemon_fast.models import load_encoder
from daemon_fast.proposals.candidates import Candidates
from daemon_fast.proposals.transformers import TransformersProposal
from daemon_fast.seeds import batch_seed

__all__ = ["STUDIES", "Domain", "Sizes", "evaluate"]

STUDIES = (
    "alignment", "perplexity", "convergence", "one_metric", "temperatures", "ablation", "forward_kl", "tail",
    "transfer",
)  # fmt: skip
TEMPERATURES = (0.8, 0.85, 0.9, 0.95, 1.0)
POOL_SIZES = (5, 10, 25, 50, 100, 200, 1000)
BASELINE_BATCH = 100  # prefixes that `generate` gets at once: a CPU draws faster in large batches
DRAWS = 5  # of MAUVE's clustering, and of the methods that it is cheap to draw again


@dataclass(frozen=True)
class Sizes:
    """How much is drawn.

    Attributes
    ----------
    held_out : prefixes of each domain that the fit has not seen; fewer where the texts don't suffice
    pool_prefixes, pool_candidates : for the convergence study
    sweep_prefixes : to fit, and as many held out, at each temperature of the sweep
    """

    held_out: int = 300
    pool_prefixes: int = 10
    pool_candidates: int = 1000
    sweep_prefixes: int = 50


@dataclass(frozen=True)
class Domain:
    """A collection of human text, the artefact that was fitted to it, and the candidates that the fit left, if any."""

    name: str
    data: str
    energy: Energy
    field: str = "text"
    candidates: Path | None = None


def evaluate(
    domains: Sequence[Domain],
    output: str | os.PathLike[str],
    model: Any,
    tokenizer: Any,
    *,
    wanted: Sequence[str] = STUDIES,
    sizes: Sizes | None = None,
    amateur: Any = None,
    featurizer: str = "encoder",
    encoder: str | None = None,
    prefix_tokens: int = 32,
    batch_size: int = 4,
    seed: int = 0,
    command: str = "",
) -> dict[str, Any]:
    """Run studies and write report.json and report.html to `output`.

    Parameters
    ----------
    domains : with artefacts of `fit`; their prefixes are those that the fit, given the same seed, did not take
    model, tokenizer : the language model that the artefacts were fitted for
    wanted : names out of `STUDIES`
    amateur : the weaker model of contrastive decoding; default: the model itself, of a short context
    featurizer : what MAUVE compares texts by, "encoder" (sentence embeddings) or "model" (the LM's last hidden state)
    seed : the one that the fit was given, too

    Raises
    ------
    InvalidInput, DataError
        An unknown study, no held-out text left, or an output folder that holds another run.
    """
    if unknown := sorted(set(wanted) - set(STUDIES)):
        raise InvalidInput(f"unknown study {unknown[0]!r}; known: {', '.join(STUDIES)}")
    if featurizer not in ("encoder", "model"):
        raise InvalidInput(f"featurizer = {featurizer!r} must be encoder or model")
    if len({domain.name for domain in domains}) < len(domains) or not domains:
        raise InvalidInput(f"domains must have different names, got {[domain.name for domain in domains]}")
    folder, sizes = Path(output), sizes or Sizes()
    folder.mkdir(parents=True, exist_ok=True)
    runs = [
        _Run(domain, folder / domain.name, model, tokenizer, sizes, prefix_tokens, batch_size, seed)
        for domain in domains
    ]
    report: dict[str, Any] = {
        "title": "Direct metrics optimization: does it do what it claims?",
        "command": command,
        "model": runs[0].proposal.settings.model_id,
        "settings": {**asdict(sizes), "prefix_tokens": prefix_tokens, "seed": seed, "featurizer": featurizer},
        "domains": {},
    }
    for run in runs:
        report["domains"][run.domain.name] = run.studies(wanted, amateur, featurizer, encoder)
    if "transfer" in wanted and len(runs) > 1:
        report["transfer"] = studies.transfer(
            {run.domain.name: run.held_out() for run in runs},
            {run.domain.name: run.domain.energy.mu for run in runs},
            {run.domain.name: run.spread() for run in runs},
        )
    report = _rounded(report)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    _write(folder / "report.json", text)
    from daemon_fast.experiments.report import write_report

    write_report(report, folder / "report.html")
    return report


class _Run:
    """One domain: what is drawn for it, and what the studies say."""

    def __init__(
        self, domain: Domain, folder: Path, model: Any, tokenizer: Any, sizes: Sizes, prefix_tokens: int,
        batch_size: int, seed: int,
    ) -> None:  # fmt: skip
        self.domain, self.folder, self.sizes = domain, folder, sizes
        self.model, self.tokenizer, self.batch_size, self.seed = model, tokenizer, batch_size, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.proposal = self._proposal()
        fitted = domain.energy.proposal_settings
        if fitted.vocabulary != self.proposal.settings.vocabulary:
            raise InvalidInput(f"the artefact of {domain.name} was fitted for another vocabulary than the model's")
        found = domain.energy.diagnostics
        self.ridge = found.ridge if found else 0.0  # of every refit
        fit_prefixes, fit_texts = (found.num_prefixes, found.num_targets) if found else (0, 0)
        texts = read_texts(domain.data, domain.field)
        tokens = fitted.max_new_tokens
        pairs = split(texts, tokenizer, prefix_tokens, tokens, None, seed)
        seen = max(fit_prefixes, fit_texts)
        self.to_fit_pairs, self.target_pairs = pairs[:fit_prefixes], pairs[:fit_texts]
        self.held_out_pairs = pairs[seen : seen + sizes.held_out]
        if not len(self.held_out_pairs):
            raise DataError(
                f"{domain.name}: {len(pairs)} texts are long enough, and the fit took {seen}: none is held out"
            )
        # div is no metric of the fit, being a function of three of them, but of the paper's table
        self.metrics = [*domain.energy.metrics]
        if "div" not in domain.energy.names:
            self.metrics += metrics_module.parse(["div"])
        self.fitted = list(range(len(domain.energy.names)))

    def _proposal(self, **changes: Any) -> TransformersProposal:
        fitted = self.domain.energy.proposal_settings
        settings = {**fitted.sampling(), **changes}
        return TransformersProposal(self.model, self.tokenizer, model_id=fitted.model_id, **settings)

    def studies(self, wanted: Sequence[str], amateur: Any, featurizer: str, encoder: str | None) -> dict[str, Any]:
        mu = self.domain.energy.mu
        out: dict[str, Any] = {}
        held_out = self.held_out()
        out["names"] = held_out.names
        out["prefixes"] = {
            "fit": len(self.to_fit_pairs),
            "targets": len(self.target_pairs),
            "held_out": len(self.held_out_pairs),
        }
        out["mu"], out["ridge"], out["noise_floor"] = mu.tolist(), self.ridge, noise_floor(len(self.held_out_pairs))
        weighed = held_out.weights(mu)
        ess = 1 / weighed.square().sum(1)
        out["ess"] = {"mean": float(ess.mean()), "min": float(ess.min()), "candidates": weighed.shape[1]}
        if "alignment" in wanted:
            out["alignment"] = self._alignment(amateur, featurizer, encoder)
        if "perplexity" in wanted:
            sizes = [m for m in (5, 10, 25, 50, 100) if m < held_out.features.shape[1]]
            out["perplexity"] = studies.perplexity(held_out, mu, sizes)
            if self.domain.energy.base == "proposal":
                out["perplexity"]["tilting_model"] = _attempt(self._tilting_model)
        if "convergence" in wanted:
            pool, to_fit = self._pool(), self.to_fit()

            def with_global_fit() -> dict[str, Any]:
                # Its mu; a draw's weights are normalised within its prefix, whatever the fit did.
                return studies.convergence(pool, to_fit.fit_mu(self.ridge, "global"), POOL_SIZES)

            out["convergence"] = {
                "per_prefix": studies.convergence(pool, mu, POOL_SIZES),
                "global": {"rows": [], **_attempt(with_global_fit)},
            }
            out["prefixes"]["pool"] = len(pool.human)
        if "one_metric" in wanted and "sr_4" in held_out.names:
            out["one_metric"] = _attempt(lambda: studies.one_metric(self.to_fit(), held_out, ridge=self.ridge))
        if "temperatures" in wanted:
            out["temperatures"] = self._temperatures()
        if "ablation" in wanted and len(held_out.names) > 1:
            out["ablation"] = _attempt(lambda: studies.ablation(self.to_fit(), held_out, self.ridge))
        if "forward_kl" in wanted:
            out["forward_kl"] = _attempt(lambda: studies.forward_kl(self.to_fit(), held_out))
        if "tail" in wanted:
            out["tail"] = studies.tail_quality(held_out)
        return out

    # ---- what is drawn ----------------------------------------------------------------------------------------------

    def held_out(self) -> Collected:
        return self._collected("held-out", self.proposal, self.held_out_pairs, self.held_out_pairs)[0]

    def to_fit(self) -> Collected:
        return self._collected("fit", self.proposal, self.to_fit_pairs, self.target_pairs)[0]

    def _tilting_model(self) -> dict[str, Any]:
        mu = self.to_fit().tilting_model().fit_mu(self.ridge)
        return studies.perplexity(self.held_out().tilting_model(), mu)

    def spread(self) -> Tensor:
        """[K] standard deviation of all human text that was measured: of the targets and the held-out."""
        return torch.cat([self.to_fit().human, self.held_out().human]).double().std(0)

    def _pool(self) -> Collected:
        pairs = self.held_out_pairs[: self.sizes.pool_prefixes]
        proposal = self._proposal(num_candidates=self.sizes.pool_candidates)
        return self._collected("pool", proposal, pairs, pairs, batch_size=1)[0]

    def _temperatures(self) -> list[dict[str, Any]]:
        n, collected = self.sizes.sweep_prefixes, {}
        to_fit_pairs, held_out_pairs = self.to_fit_pairs[:n], self.held_out_pairs[:n]
        own = self.domain.energy.proposal_settings.temperature
        for tau in sorted({*TEMPERATURES, own}):
            if tau == own:
                collected[tau] = self.to_fit().first(n), self.held_out().first(n, n)
                continue
            proposal, name = self._proposal(temperature=tau), f"temperature-{tau}"
            to_fit, *_ = self._collected(f"{name}-fit", proposal, to_fit_pairs, self.target_pairs)
            held_out, *_ = self._collected(f"{name}-held-out", proposal, held_out_pairs, held_out_pairs)
            if self.domain.energy.base == "proposal":  # which is another one here
                scored, _ = self._scored(f"{name}-human", held_out_pairs, proposal)
                held_out = replace(held_out, human_log_base=scored.log_q[:, 0])
            collected[tau] = to_fit, held_out
        return studies.temperatures(collected, self.domain.energy.mu, self.ridge)

    def _collected(
        self, name: str, proposal: TransformersProposal, pairs: Pairs, human: Pairs, batch_size: int | None = None
    ) -> tuple[Collected, Tensor, Tensor]:
        """Candidates and human continuations, measured; and [N, M, K'] and [N', K'] of all metrics, div too."""
        drawn, batch_size = self.folder / name, batch_size or self.batch_size
        if name == "fit" and self.domain.candidates is not None:
            drawn = self.domain.candidates
            batch_size = saved_batch_size(drawn) or batch_size
        candidates, _ = collect(
            proposal, pairs.prefixes, drawn, self.seed + (name != "fit"), batch_size, f"{self.domain.name}: {name}"
        )
        features = self._features(name, candidates)
        scored, of_human = self._scored("human-" + _digest(human.prefixes, human.continuations), human)
        energy, names = self.domain.energy, self.domain.energy.names
        log_p = scored.log_p[:, 0]
        return (
            Collected(
                names=names,
                human=of_human[:, self.fitted],
                human_tokens=scored.lengths,
                human_log_p=log_p,
                human_log_base=scored.log_q[:, 0] if energy.base == "proposal" else log_p,
                features=features[:, :, self.fitted],
                log_p=candidates.log_p,
                log_q=candidates.log_q,
                lengths=candidates.lengths.reshape(candidates.shape),
                base_log_w=energy.base_log_w(candidates),
            ),
            features,
            of_human,
        )

    def _features(self, name: str, candidates: Candidates) -> Tensor:
        key = _digest(candidates.tokens.tolist(), [metric.spec for metric in self.metrics])
        made = self._saved(
            f"{name}-features",
            key,
            lambda: {"features": metrics_module.features(self.metrics, candidates).cpu().numpy()},
        )
        return torch.from_numpy(made["features"])

    def _scored(
        self, name: str, pairs: Pairs, proposal: TransformersProposal | None = None
    ) -> tuple[Candidates, Tensor]:
        """Given continuations with their log-probabilities (M = 1), and their metrics [N, K']."""
        folder = self.folder / name
        if pairs is self.target_pairs and self.domain.candidates is not None:
            folder = human_folder(self.domain.candidates)
        description = f"{self.domain.name}: {name}"
        scored = Candidates.concatenate(list(scores(proposal or self.proposal, pairs, folder, description)))
        return scored, self._features(name, scored)[:, 0]

    def _saved(self, name: str, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Arrays from a file, if it is whole and was made from the same things; made and written otherwise."""
        path = self.folder / f"{name}.npz"
        try:
            with np.load(path, allow_pickle=False) as archive:
                if str(archive["key"]) == key:
                    return {k: archive[k] for k in archive.files if k != "key"}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            pass
        made = make()
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez_compressed(file, key=np.array(key), **made)
        temporary.replace(path)
        return made

    # ---- the alignment table ----------------------------------------------------------------------------------------

    def _alignment(self, amateur: Any, featurizer: str, encoder: str | None) -> list[dict[str, Any]]:
        collected, features, of_human = self._collected(
            "held-out", self.proposal, self.held_out_pairs, self.held_out_pairs
        )
        pairs, mu = self.held_out_pairs, self.domain.energy.mu
        candidates, _ = collect(
            self.proposal, pairs.prefixes, self.folder / "held-out", self.seed + 1, self.batch_size, "read"
        )
        # As `SIRDecoder.choose` draws, from features that are there already.
        uniforms = torch.rand(len(pairs), generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        drawn = ops.sir_select(collected.features, mu, uniforms, collected.base_log_w)
        index, weights = drawn.index, drawn.weights.double()
        rows, m = torch.arange(len(index)), candidates.shape[1]
        values = {"sampling": features[:, 0], "daemon": features[rows, index]}
        # MAUVE needs more than one draw to know its own noise, and these two have more.
        more = torch.multinomial(weights, DRAWS, replacement=True, generator=torch.Generator().manual_seed(self.seed))
        texts = {
            "sampling": [candidates.tokens[rows * m + j] for j in range(min(DRAWS, m))],
            "daemon": [candidates.tokens[rows * m + j] for j in (index, *more.T[1:])],
        }
        for method in tqdm(baselines.BASELINES, desc=f"{self.domain.name}: baselines"):
            texts[method] = [self._baseline(method, amateur)]
            decoded = Pairs(pairs.prefixes, texts[method][0].tolist())
            _, values[method] = self._scored(f"baseline-{method}-scored", decoded)
        values["sampling, expected"] = features.double().mean(1)
        values["daemon, expected"] = (features.double() * weights[..., None]).sum(1)
        everything = torch.cat(
            [self._collected("fit", self.proposal, self.to_fit_pairs, self.target_pairs)[2], of_human]
        )
        wide = replace(collected, names=metrics_module.column_names(self.metrics), human=of_human)
        table = studies.alignment(wide, values, everything.double().std(0), self.fitted)
        continuations = {"human": [torch.tensor(pairs.continuations)], **texts}
        scores = self._mauve(continuations, featurizer, encoder)
        for row in table:
            row["names"] = wide.names
            if row["method"] in continuations:
                row["length"] = float(continuations[row["method"]][0].shape[1])
            if row["method"] in scores:
                row["mauve"] = scores[row["method"]]
        return table

    def _baseline(self, method: str, amateur: Any) -> Tensor:
        """[N, T] one continuation of each held-out prefix."""
        prefixes, new_tokens = self.held_out_pairs.prefixes, self.domain.energy.proposal_settings.max_new_tokens
        parts = []
        for i, start in enumerate(range(0, len(prefixes), BASELINE_BATCH)):
            batch = prefixes[start : start + BASELINE_BATCH]

            def make(batch: list[list[int]] = batch, i: int = i) -> dict[str, Any]:
                drawn = baselines.decode(method, self.model, batch, new_tokens, batch_seed(self.seed, i), amateur)
                return {"tokens": drawn.cpu().numpy()}

            name = getattr(getattr(amateur, "config", None), "_name_or_path", "") if "decoding" in method else ""
            key = _digest(batch, method, new_tokens, self.seed, name, str(self.model.dtype))
            made = self._saved(f"baseline-{method}-{i:04d}", key, make)
            parts.append(torch.from_numpy(made["tokens"]))
        return torch.cat(parts)

    def _mauve(
        self, continuations: Mapping[str, Sequence[Tensor]], featurizer: str, encoder: str | None
    ) -> dict[str, dict[str, float]]:
        """Of each method against human text: mean over seeds of MAUVE's clustering, and its standard error.

        Methods with several draws take another one for each seed, so that their error holds that noise, too.
        Continuations are compared alone: prefixes are the same for all, and would make all alike.
        """
        if importlib.util.find_spec("mauve") is None:
            warnings.warn("MAUVE is left out: pip install mauve-text", stacklevel=2)
            return {}
        out = {}

        def embedded(method: str) -> np.ndarray[Any, Any]:
            rows = torch.cat(list(continuations[method])).tolist()

            def make() -> dict[str, Any]:
                return {"x": _embed(rows, self.proposal, featurizer, encoder)}

            x = self._saved(f"mauve-{method}", _digest(rows, featurizer, str(encoder)), make)["x"]
            return x.reshape(len(continuations[method]), -1, x.shape[1])  # type: ignore[no-any-return]

        human = embedded("human")[0]
        for method in continuations:
            if method == "human":
                continue
            others = embedded(method)
            key = _digest(human.tolist(), others.tolist(), DRAWS)
            scores = self._saved(f"mauve-{method}-scores", key, functools.partial(_mauve_scores, human, others))["x"]
            out[method] = {"value": float(np.mean(scores)), "error": float(np.std(scores, ddof=1) / np.sqrt(DRAWS))}
        return out


def _mauve_scores(human: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> dict[str, Any]:
    """One score for each of `DRAWS` seeds; `others` is [draws, N, d], taken in turn."""
    import mauve

    options = {"p_features": human, "verbose": False}
    return {
        "x": [
            mauve.compute_mauve(q_features=others[seed % len(others)], seed=seed, **options).mauve
            for seed in range(DRAWS)
        ]
    }


@torch.inference_mode()
def _embed(
    rows: list[list[int]], proposal: TransformersProposal, featurizer: str, encoder: str | None
) -> np.ndarray[Any, Any]:
    """[N, d] of rows of token ids: sentence embeddings, or the language model's last hidden state."""
    if featurizer == "encoder":
        loaded = load_encoder(encoder) if encoder else load_encoder()
        return np.asarray(loaded.encode(proposal.detokenize(rows), show_progress_bar=False), dtype=np.float32)
    parts = []
    for start in range(0, len(rows), BASELINE_BATCH):
        ids = torch.tensor(rows[start : start + BASELINE_BATCH], device=proposal.model.device)
        hidden = proposal.model(ids, use_cache=False, output_hidden_states=True).hidden_states[-1][:, -1]
        parts.append(hidden.float().cpu().numpy())
    return np.concatenate(parts)


def _attempt(study: Callable[[], Any]) -> Any:
    """What a study finds; where a fit of it has no solution, why."""
    try:
        return study()
    except FitError as error:
        return {"infeasible": str(error)}


def _rounded(value: Any) -> Any:
    """Floats to eight digits, and 0 below 1e-12: sums differ by rounding between runs, and a report must not."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.8g}") if abs(value) > 1e-12 else 0.0
    return value


def _digest(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
