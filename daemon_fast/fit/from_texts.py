"""A fit to human text: prefixes and continuations or prompts and responses, candidates, metrics, mu."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeGuard, get_args

import torch
from torch import Tensor

from daemon_fast import metrics as metrics_module
from daemon_fast.arguments import integer, one_of
from daemon_fast.data.collect import batches, human_folder, kept, scores
from daemon_fast.data.exchanges import pair, read_exchanges
from daemon_fast.data.texts import Pairs, read_texts, split
from daemon_fast.decode import LOW_ESS
from daemon_fast.embedded import EXCHANGES
from daemon_fast.energy import Base, Energy
from daemon_fast.errors import (
    FitError,
    InfeasibleTargets,
    InvalidInput,
    LowEffectiveSampleSize,
    Problems,
    TargetsNotMet,
)
from daemon_fast.files import check_folder
from daemon_fast.fit import FitResult, Ridge, check_draw, check_ridge, fit, warn_of_unbounded
from daemon_fast.fit.advice import advice
from daemon_fast.fit.dual import Problem
from daemon_fast.fit.newton import newton
from daemon_fast.fit.resample import FOLDS, cv_needs
from daemon_fast.fit.samples import Block, InMemory
from daemon_fast.memory import check_fits
from daemon_fast.metrics import Function, Metric
from daemon_fast.models import DEFAULT_ENCODER, Encoder
from daemon_fast.ops import Draw, Normalization
from daemon_fast.proposals.base import Proposal
from daemon_fast.seeds import check_seed

__all__ = ["Measured", "Plan", "check_ends", "fit_energy", "is_low", "measure", "prepare"]

# Texts; prompts with responses, in any form that `as_exchange` reads; token ids of both
Human = Sequence[str] | Sequence[Any] | Pairs

# Relative, of metrics in float32 and in float64: what differs by less is the same.
ROUNDING, ROUNDING_OF_DOUBLES = 1e-6, 1e-15
REUSED = (
    "a fit with other metrics, ridge, normalization or base reuses them; another M, seed or number of prefixes needs "
    "another folder"
)


def fit_energy(
    proposal: Proposal,
    human: str | os.PathLike[str] | Human,
    metrics: Sequence[str | Metric | Function] | None = None,
    *,
    encoder: Encoder | str = DEFAULT_ENCODER,
    num_prefixes: int = 96,
    num_targets: int | None = None,
    prefix_tokens: int = 32,
    chat: bool | None = None,
    normalization: Normalization = "per_prefix",
    draw: Draw = "sir",
    base: Base = "proposal",
    spread: Sequence[str] = (),
    ridge: Ridge = "cv",
    bootstrap: int = 0,
    seed: int = 0,
    batch_size: int = 4,
    directory: str | os.PathLike[str] | None = None,
) -> Energy:
    """Fit an artefact: the proposal, tilted, then has the expected metrics of human text.

    Each human text is cut into a prefix and a continuation as long as the proposal's; the proposal continues the
    prefixes; mu is what makes the candidates' expected metrics those of the human continuations. Of prompts with
    responses nothing is cut, but what is longer than the proposal's `max_new_tokens`: the proposal answers the prompts,
    and answers end by themselves.

    Parameters
    ----------
    proposal : draws the candidates: M of `max_new_tokens` tokens at most, for each prefix
    human : texts; or a file or embedded collection, see `daemon_fast.data.texts.read_texts`; or prompts and responses:
        "encyclopedia", or what `daemon_fast.data.exchanges.as_exchange` reads, chats (lists of messages, the last of
        them the assistant's), records with a prompt and a response, or pairs of both; or token ids, `Pairs`, of which
        all are used unless num_prefixes and num_targets say less
    metrics : names, metric objects and functions, see `daemon_fast.metrics.parse`; default: `metrics.DEFAULT`, and of
        prompts and responses `metrics.OF_RESPONSES`
    encoder : for `coh`, a sentence-transformers model, or its id, path or embedded name
    num_prefixes : N, of which candidates are drawn
    num_targets : human continuations that give the targets; default: those of the prefixes
    prefix_tokens : where texts are cut
    chat : whether a prompt that is a text is a user's message, in the tokenizer's chat template; default: if it has one
    normalization, draw, ridge, bootstrap : see `daemon_fast.fit`
    base : "proposal": that is tilted, as in the paper; "model": p_theta at temperature 1 is
    spread : names among the metrics, whose squares and products are to have human means, too: see `metrics.Spread`
    seed : of the choice of texts, the candidates and the bootstrap
    batch_size : prefixes drawn together
    directory : keeps candidates batch by batch, so that a run that is cut off goes on there. None: nothing is kept

    Raises
    ------
    DataError
        Too few texts are long enough.
    InvalidInput, InfeasibleTargets, FitDidNotConverge
        See `daemon_fast.fit`. With ridge = 0, also for a metric that is the same for all candidates, but not for human
        text.
    SeveralProblems
        More than one thing is wrong with the arguments: all of it is known before anything is drawn.

    Warns
    -----
    UserWarning
        A metric is left out: it is the same for all candidates and for human text.
    TargetsNotMet
        With a ridge: expected metrics lie farther from their targets than their error explains; or a metric is left
        out that is the same for all candidates, but not for human text. `Diagnostics.unmet` names both.
    LowEffectiveSampleSize

    Examples
    --------
    >>> proposal = TransformersProposal.load(num_candidates=25, min_new_tokens=64, max_new_tokens=64, temperature=0.97)
    >>> fit_energy(proposal, "wikipedia", ["sr_2", "sr_4", "nats"]).save("energy.json")
    """
    problems = Problems()
    texts: Human | None = None
    with problems:
        if not isinstance(human, str | os.PathLike):
            texts = _as_human(human)
        else:
            texts = read_exchanges(human) if os.fspath(human) in EXCHANGES else read_texts(human)
    sampling, tokenizer = proposal.settings, None if isinstance(human, Pairs) else proposal.tokenizer
    if tokenizer is None and not isinstance(human, Pairs):
        problems.found.append(
            InvalidInput("human texts need a proposal with a tokenizer; without one, give Pairs of token ids")
        )
    plan = prepare(
        problems, texts, tokenizer, metrics, sampling.num_candidates, sampling.max_new_tokens, sampling.min_new_tokens,
        encoder=encoder, num_prefixes=num_prefixes, num_targets=num_targets, prefix_tokens=prefix_tokens, chat=chat,
        normalization=normalization, draw=draw, base=base, spread=spread, ridge=ridge, bootstrap=bootstrap,
        seed=seed, batch_size=batch_size, directory=directory, check=proposal.tokenize,
    )  # fmt: skip
    check_ends(plan.human, tokenizer, proposal)
    batch_size, bootstrap, seed = int(batch_size), int(bootstrap), int(seed)  # NumPy's, which JSON has no place for
    measured = measure(
        proposal, plan.pairs, plan.metrics, targets=plan.targets, base=base, seed=seed, batch_size=batch_size,
        directory=directory,
    )  # fmt: skip
    with kept(directory, REUSED):
        result, fitted = _fitted(measured, plan.metrics, spread, normalization, draw, ridge, bootstrap, seed)
    return result.energy(fitted, proposal.settings, base, seed, len(plan.targets), plan.pairs.chat_template)


def check_ends(human: Pairs, tokenizer: Any, proposal: Proposal) -> None:
    """That what ends human responses is what ends the proposal's: else each would have a token that candidates lack."""
    if tokenizer is None:
        return
    last = {row[-1] for row in human.continuations} & set(tokenizer.all_special_ids)
    if last and (others := sorted(last - set(proposal.eos_token_ids))):
        raise InvalidInput(
            f"responses end with {tokenizer.decode(others[:1])!r}, token {others[0]}, which ends no text of the "
            f"proposal's: its eos_token_ids are {list(proposal.eos_token_ids)}"
        )


class Plan(NamedTuple):
    """What a fit reads, known before anything is drawn."""

    metrics: list[Metric]
    pairs: Pairs  # of whose prefixes candidates are drawn
    targets: Pairs  # that give the targets

    @property
    def human(self) -> Pairs:
        """The longer of the two, which begins with the other."""
        return max(self.pairs, self.targets, key=len)


def prepare(
    problems: Problems,
    human: Human | None,
    tokenizer: Any,
    metrics: Sequence[str | Metric | Function] | None,
    num_candidates: int,
    new_tokens: int,
    min_new_tokens: int | None = None,
    *,
    encoder: Encoder | str = DEFAULT_ENCODER,
    num_prefixes: int = 96,
    num_targets: int | None = None,
    prefix_tokens: int = 32,
    chat: bool | None = None,
    normalization: Normalization = "per_prefix",
    draw: Draw = "sir",
    base: Base = "proposal",
    spread: Sequence[str] = (),
    ridge: Ridge = "cv",
    bootstrap: int = 0,
    seed: int = 0,
    batch_size: int = 4,
    directory: str | os.PathLike[str] | None = None,
    check: Callable[[list[list[int]]], Any] | None = None,
) -> Plan:
    """All that can be known of a fit before candidates are drawn. Arguments are those of `fit_energy`.

    Parameters
    ----------
    problems : found before; what is wrong here is reported together with them
    human : texts, prompts with responses, or pairs; or None if a problem tells why there are none
    tokenizer : or None if there is none
    num_candidates, new_tokens, min_new_tokens : of the proposal
    check : of prompts, see `daemon_fast.data.exchanges.pair`

    Raises
    ------
    SeveralProblems
        More than one thing is wrong; else the one error.
    """

    def count(name: str, value: Any, least: int) -> int:
        with problems:
            return integer(name, value, f">= {least}", lambda n: n >= least)
        return 0  # a problem says so

    num_prefixes = count("num_prefixes", num_prefixes, 1)
    num_targets = None if num_targets is None else count("num_targets", num_targets, 1)
    prefix_tokens = count("prefix_tokens", prefix_tokens, 1)
    count("batch_size", batch_size, 1)
    count("bootstrap", bootstrap, 0)
    if isinstance(human, Pairs) and len(human) > 0:
        num_prefixes = min(num_prefixes, len(human))
        num_targets = len(human) if num_targets is None else min(num_targets, len(human))
    with problems:
        check_seed(seed)
        seed = int(seed)
    with problems:
        check_ridge(ridge)
    for name, value, options in (("normalization", normalization, Normalization), ("base", base, Base)):
        with problems:
            one_of(name, value, get_args(options))
    with problems:
        check_draw(draw, normalization)
    responses = _are_exchanges(human)
    if metrics is None:
        metrics = metrics_module.OF_RESPONSES if responses else metrics_module.DEFAULT
    parsed: list[Metric] = []
    with problems:
        parsed = metrics_module.parse(metrics, encoder)
    for metric in parsed:
        with problems:
            metric.prepare()
    names, texts = metrics_module.column_names(parsed), num_prefixes if num_targets is None else num_targets
    for name in spread:
        if name not in names or list(spread).count(name) > 1:
            problems.found.append(InvalidInput(f"spread has {name!r}: it must be a metric of {', '.join(names)}, once"))
    k = len(names) + len(spread) * (len(spread) + 1) // 2
    if 1 <= num_prefixes < k:
        problems.found.append(
            InvalidInput(f"num_prefixes = {num_prefixes} is fewer than the {k} metrics to fit: give at least as many")
        )
    if num_candidates == 1 and normalization == "per_prefix":
        problems.found.append(
            InvalidInput("num_candidates = 1 leaves per-prefix weights nothing to choose: use 2 or more, or 'global'")
        )
    with problems:
        check_fits(
            f"a fit of num_candidates = {num_candidates} of num_prefixes = {num_prefixes}",
            {f"{k} metrics": num_prefixes * num_candidates * k * (4 + 8)},  # float32, and float64 while it is fitted
            torch.device("cpu"),
            "num_candidates or num_prefixes",
        )
    if ridge == "cv" and 1 <= min(num_prefixes, texts) < FOLDS:
        problems.found.append(InvalidInput(cv_needs(num_prefixes, texts)))
    if directory is not None:
        with problems:
            check_folder(directory)
    pairs = Pairs([], [])
    with problems:
        if isinstance(human, Pairs):
            pairs = human
        elif human is None or tokenizer is None or min(num_prefixes, prefix_tokens, new_tokens, texts) < 1:
            pass  # a problem says so
        elif responses:
            limit = max(num_prefixes, texts)
            pairs = pair(human, tokenizer, new_tokens, min_new_tokens or 0, limit, seed, chat=chat, check=check)
        else:
            pairs = split(human, tokenizer, prefix_tokens, new_tokens, max(num_prefixes, texts), seed)
    problems.report()
    return Plan(parsed, pairs[:num_prefixes], pairs[:texts])


def _as_human(human: Any) -> Human:
    """Texts or exchanges as a list, also from a table of NumPy's friends."""
    if isinstance(human, Pairs):
        return human
    if hasattr(human, "to_pylist"):  # Arrow
        human = human.to_pylist()
    elif hasattr(human, "to_dict") and hasattr(human, "columns"):  # pandas
        human = human.to_dict("records")
    if isinstance(human, Mapping) or not isinstance(human, Iterable):
        raise InvalidInput(
            f"human is a {type(human).__name__}: it must be a list of texts, or of prompts with responses"
        )
    return human if isinstance(human, Sequence) else list(human)


def _are_exchanges(human: Human | None) -> TypeGuard[Sequence[Any]]:
    """Whether these are prompts with responses, and not texts."""
    return human is not None and not isinstance(human, Pairs) and len(human) > 0 and not isinstance(human[0], str)


class Measured(NamedTuple):
    """What a fit reads."""

    features: Tensor  # [N, M, K] float32 or float64, of the candidates
    human: Tensor  # [N', K] float32 or float64, of the human continuations
    base_log_w: Tensor | None  # [N, M] float64
    seconds: float  # that drawing the candidates took, in whichever run


def measure(
    proposal: Proposal,
    pairs: Pairs,
    metrics: Sequence[Metric],
    *,
    targets: Pairs | None = None,
    base: Base = "proposal",
    seed: int = 0,
    batch_size: int = 4,
    directory: str | os.PathLike[str] | None = None,
) -> Measured:
    """Draw candidates of `pairs` and measure them, and the continuations of `targets` (default: of the same pairs).

    Memory holds the metrics of all candidates, and the candidates themselves of one batch.
    """
    features, base_log_w, seconds = [], [], 0.0
    for candidates, spent in batches(proposal, pairs.prefixes, directory, seed, batch_size, "candidates to fit"):
        with kept(directory, REUSED):
            features.append(metrics_module.features(metrics, candidates))
        base_log_w += [] if base == "proposal" else [candidates.log_p - candidates.log_q]
        seconds += spent
    folder = None if directory is None else human_folder(directory)
    scored = scores(proposal, pairs if targets is None else targets, folder)
    human = [metrics_module.features(metrics, batch)[:, 0] for batch in scored]
    return Measured(torch.cat(features), torch.cat(human), torch.cat(base_log_w) if base_log_w else None, seconds)


def _fitted(
    measured: Measured,
    metrics: list[Metric],
    spread: Sequence[str],
    normalization: Normalization,
    draw: Draw,
    ridge: Ridge,
    bootstrap: int,
    seed: int,
) -> tuple[FitResult, list[Metric]]:
    """The fit of all metrics that the candidates vary in, and these; warns of the others, and of targets not met."""
    varying, columns, missed = _varying(measured, metrics, normalization)
    constant = f"the same for all candidates, unlike their targets: {', '.join(missed.values())}"
    if not varying:
        raise InfeasibleTargets(constant) if missed else InvalidInput("no metric is left to fit")
    features, human = measured.features[..., columns], measured.human[:, columns]
    if spread:
        varying, features, human = _with_spread(varying, features, human, spread)
    names, samples = metrics_module.column_names(varying), InMemory(Block(features, measured.base_log_w))
    try:
        result = fit(
            features, human, measured.base_log_w, normalization=normalization,
            draw=draw, ridge=ridge, names=names,
            bootstrap=bootstrap, seed=seed, progress=True,
        )  # fmt: skip
    except InfeasibleTargets as error:
        raise InfeasibleTargets(f"{constant}; {error}" if missed else str(error)) from error
    if missed and ridge == 0:
        raise InfeasibleTargets(f"{constant}. Leave out {', '.join(missed)}; or take ridge = 'cv', which does")
    if missed:
        warnings.warn(f"left out, with their targets missed: metrics that are {constant}", TargetsNotMet, stacklevel=3)
    if result.unmet:
        exact = Problem.standardised(samples, result.targets, normalization, tuple(names), 0.0)
        try:
            newton(replace(exact, draw="sir"))
            why = "ridge = 0 meets them with these candidates"
        except FitError as error:
            why = f"they are {error}. {advice(exact, human, soft=False)}"
        warnings.warn(f"targets not met: {_missed_by(result, human)}; {why}", TargetsNotMet, stacklevel=3)
    own = [metric for metric in varying if metrics_module.built_in(metric.name) is None]  # fit has told of the others
    warn_of_unbounded(own, dict(zip(names, result.mu.tolist(), strict=True)), stacklevel=4)
    if is_low(result.ess_mean, result.num_candidates):
        warnings.warn(
            f"the effective sample size is {result.ess_mean:.2f} of {result.num_candidates} candidates on average: the "
            "draw is next to no choice. Draw more candidates, bring the proposal nearer to human text (temperature, "
            "top-p), or fit fewer metrics or with a larger ridge",
            LowEffectiveSampleSize,
            stacklevel=3,
        )
    return replace(result, unmet=(*missed, *result.unmet)), varying


def _with_spread(
    metrics: list[Metric], features: Tensor, human: Tensor, spread: Sequence[str]
) -> tuple[list[Metric], Tensor, Tensor]:
    """Metrics, [N, M, K] and [N', K] with second moments beside them, in units of this human text."""
    names = metrics_module.column_names(metrics)
    of = [name for name in spread if name in names and human[:, names.index(name)].std() > 0]
    if without := [name for name in spread if name not in of]:
        warnings.warn(f"left out of spread: {', '.join(without)}, which human text does not vary in", stacklevel=4)
    if not of:
        return metrics, features, human
    values = human[:, [names.index(name) for name in of]].double()
    moments = metrics_module.Spread(of, values.mean(0).tolist(), values.std(0).tolist())

    def widened(table: Tensor) -> Tensor:
        return torch.cat([table, moments.combine(dict(zip(names, table.unbind(-1), strict=True)))], -1)

    return [*metrics, moments], widened(features), widened(human)


def _varying(
    measured: Measured, metrics: list[Metric], normalization: Normalization
) -> tuple[list[Metric], list[int], dict[str, str]]:
    """Metrics that weights can change, and their columns; of the others those whose target is missed, and by what.

    A metric that no weighting changes is of no use to a fit, and does no harm where its target is what it is.
    """
    names, targets = tuple(metrics_module.column_names(metrics)), measured.human.double().mean(0)
    samples = InMemory(Block(measured.features, measured.base_log_w))
    low, high = Problem(samples, targets, normalization, names, torch.ones_like(targets), 0.0).reachable()
    rounding = _rounding(measured.features)
    constant = high - low <= rounding * high.abs().maximum(low.abs())
    met = (targets - low).abs() <= rounding * targets.abs().maximum(low.abs())
    varying, columns, start = list[Metric](), list[int](), 0
    missed, useless = dict[str, str](), list[str]()
    for metric in metrics:
        own = range(start, start + len(metric.names))
        start = own.stop
        if not constant[own.start : own.stop].all():
            varying.append(metric)
            columns += own
            continue
        useless += [f"{names[k]} ({low[k]:.6g})" for k in own if met[k]]
        missed |= {names[k]: f"{names[k]} ({low[k]:.6g}, target {targets[k]:.6g})" for k in own if not met[k]}
    if useless:
        warnings.warn(
            f"left out, as nothing is to be fitted: metrics that are the same for all candidates, and for human text: "
            f"{', '.join(useless)}",
            stacklevel=4,
        )
    return varying, columns, missed


def _rounding(features: Tensor) -> Tensor:
    """[K] relative error of metrics [N, M, K]: that of float32 for what float32 holds; but integers have none."""
    columns = features.flatten(0, 1)
    rounded = ((columns.float() == columns) & (columns.round() != columns).any(0)).all(0)
    return torch.where(rounded, ROUNDING, ROUNDING_OF_DOUBLES).double().cpu()


def _missed_by(result: FitResult, human: Tensor) -> str:
    found = []
    for k, name in enumerate(result.names):
        if name in result.unmet:
            target, n = float(result.targets[k]), len(human)
            error = float(human[:, k].double().std()) / n**0.5 if n > 1 else math.inf
            reached = target + float(result.residual[k])
            found.append(f"{name} (target {target:.4g}, standard error {error:.2g}, reached {reached:.4g})")
    return ", ".join(found)


def is_low(ess_mean: float, num_candidates: int) -> bool:
    """Whether an effective sample size is so low that drawing is next to no choice."""
    return ess_mean < LOW_ESS < num_candidates
