"""The decoder: candidates from a proposal, metrics, weights, and one of the candidates, by a race or by SIR."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from daemon_fast import ops
from daemon_fast.arguments import integer
from daemon_fast.energy import Energy
from daemon_fast.errors import ArtefactError, InvalidInput, LowEffectiveSampleSize
from daemon_fast.memory import check_fits
from daemon_fast.ops import Draw
from daemon_fast.progress import progress as shown
from daemon_fast.prompts import Messages, fingerprint, is_chat, user
from daemon_fast.proposals.base import Prefixes, Proposal, ProposalSettings, as_list
from daemon_fast.proposals.candidates import Candidates
from daemon_fast.race import probabilities
from daemon_fast.seeds import batch_seed, generator

__all__ = ["Decoded", "SIRDecoder"]

LOW_ESS = 2.0  # fewer effective candidates than that, and the draw is next to no choice


@dataclass(frozen=True)
class Decoded:
    """What was chosen for N prefixes, S samples each, and why.

    Attributes
    ----------
    texts : N lists of S strings
    tokens : N lists of S lists of token ids
    index : [N, S] int64
        Which of the M candidates.
    weights : [N, M]
        Their normalised weights.
    ess : [N]
        Effective sample size of the M candidates: 1 to M.
    log_z : [N]
        log (1/M) Σ_j exp(b_j - mu · f_j).
    features : [N, S, K]
        Metrics of the choices, in the order of `Energy.names`.
    candidates : Candidates
        All that was chosen from.
    candidate_features : [N, M, K]
    seconds : dict
        Wall-clock seconds spent in each stage: propose, metrics, select.
    """

    candidates: Candidates
    candidate_features: Tensor
    index: Tensor
    weights: Tensor
    log_z: Tensor
    ess: Tensor
    seconds: dict[str, float]

    @property
    def features(self) -> Tensor:
        k = self.candidate_features.shape[2]
        return self.candidate_features.gather(1, self.index[..., None].expand(-1, -1, k))

    @property
    def tokens(self) -> list[list[list[int]]]:
        rows = self._rows()
        tokens, lengths = self.candidates.tokens.tolist(), self.candidates.lengths.tolist()
        return [[tokens[r][: lengths[r]] for r in chosen] for chosen in rows]

    @property
    def texts(self) -> list[list[str]]:
        rows = self._rows()
        texts = iter(self.candidates.texts_of([r for chosen in rows for r in chosen]))
        return [[next(texts) for _ in chosen] for chosen in rows]

    def _rows(self) -> list[list[int]]:
        m = self.candidates.shape[1]
        return [[i * m + j for j in chosen] for i, chosen in enumerate(self.index.tolist())]


class SIRDecoder:
    """Decodes from p_mu: draws M candidates of each prefix and chooses one by their weights exp(-mu · f).

    The artefact says by which rule: a race (`race_select`), or Sampling-Importance-Resampling (`sir_select`), as in the
    paper.

    Parameters
    ----------
    energy : Energy
        A fitted artefact.
    proposal : Proposal
        Where candidates come from. It must have the vocabulary that the artefact was fitted for.
    batch_size : int
        Prefixes whose candidates are drawn together.

    Examples
    --------
    >>> decoder = SIRDecoder(Energy.load("energy.json"), TransformersProposal.load())
    >>> decoder("The Roman Empire was").texts[0][0]

    Source: Ji et al. 2024 (arXiv 2310.01041), algorithm 2.
    """

    def __init__(self, energy: Energy, proposal: Proposal, batch_size: int = 4) -> None:
        batch_size = _at_least_one("batch_size", batch_size)
        check_compatible(energy.proposal_settings, proposal.settings)
        self._check_template(energy, proposal)
        self.energy, self.proposal, self.batch_size = energy, proposal, batch_size

    def __call__(
        self,
        prefixes: Prefixes,
        *,
        num_samples: int = 1,
        seed: int = 0,
        progress: bool = False,
        replacement: bool = True,
    ) -> Decoded:
        """Decode prefixes.

        Parameters
        ----------
        prefixes : a string, list of token ids or chat (a list of messages), or a sequence of these; a tensor of ids is
            [P] or [N, P]. Where the artefact was fitted to chats, a string is a user's message
        num_samples : draws per prefix, S, from the same candidates, each by random numbers of its own
        seed : of candidates and draws; the same seed, batch size and prefixes give the same result
        progress : show a progress bar
        replacement : whether a candidate can be drawn more than once; without, each next draw is from those left: by
            weight, or the next to arrive in one race

        Raises
        ------
        InvalidInput
            No prefixes, an empty one, one too long for the model's context, what is no text, token ids or chat,
            num_samples below 1, or more than the candidates of a prefix if drawn without replacement.

        Warns
        -----
        LowEffectiveSampleSize
        """
        num_samples = _at_least_one("num_samples", num_samples)
        batch = self.prompts(prefixes)
        starts = range(0, len(batch), self.batch_size)
        if not batch:
            raise InvalidInput("there are no prefixes")
        begin = time.perf_counter()
        parts = [
            self.proposal.propose(batch[start : start + self.batch_size], batch_seed(seed, i))
            for i, start in enumerate(shown(starts, desc="decode", unit="batch", disable=not progress))
        ]
        decoded = self.choose(
            Candidates.concatenate(parts), num_samples=num_samples, seed=seed, replacement=replacement
        )
        decoded.seconds["propose"] = time.perf_counter() - begin - sum(decoded.seconds.values())
        return decoded

    def prompts(self, prefixes: Prefixes) -> list[str | list[int] | Messages]:
        """What the proposal is given for each prefix: a string as it is, or as a chat where mu was fitted to chats.

        Warns
        -----
        UserWarning
            Chats, and mu was fitted to texts.
        """
        listed = as_list(prefixes)
        if self.energy.chat_template is not None:
            return [user(prefix) if isinstance(prefix, str) else prefix for prefix in listed]
        if any(map(is_chat, listed)):
            warnings.warn(
                "mu was fitted to prompts that are texts, and these are chats: expected metrics may miss the targets",
                stacklevel=3,
            )
        return listed

    @staticmethod
    def _check_template(energy: Energy, proposal: Proposal) -> None:
        if energy.chat_template is None or proposal.tokenizer is None:  # then prompts are token ids
            return
        used = fingerprint(proposal.tokenizer)
        if energy.chat_template != used:
            warnings.warn(
                f"mu was fitted to chats in another template ({energy.chat_template}) than the tokenizer has "
                f"({used or 'none'}): expected metrics may miss the targets",
                stacklevel=4,
            )

    def choose(
        self, candidates: Candidates, *, num_samples: int = 1, seed: int = 0, replacement: bool = True
    ) -> Decoded:
        """Choose from candidates that are there already. The same seed chooses the same on CPU and CUDA."""
        num_samples = _at_least_one("num_samples", num_samples)
        n, device = candidates.shape[0], candidates.tokens.device
        check_fits(
            f"num_samples = {num_samples} of {n} prefixes",
            {"draws": n * num_samples * 3 * 8, "their metrics": n * num_samples * 4},
            torch.device("cpu"),
            "num_samples",
        )
        begin = _seconds(device)
        features = self.energy.features(candidates)
        measured = _seconds(device)
        random = generator(seed, "choose")
        selection = select(self.energy, features, self.energy.base_log_w(candidates), 1, random)
        if not replacement:
            index = _without_replacement(self.energy.draw, selection.weights, num_samples, random)
            selection = selection._replace(index=index)
        elif num_samples > 1:
            energies = features.double() @ self.energy.mu.to(features.device)
            index = _systematic(self.energy.draw, selection.weights, energies, num_samples, random)
            selection = selection._replace(index=index)
        self._warn_of_low_ess(selection.ess)
        seconds = {"metrics": measured - begin, "select": _seconds(device) - measured}
        return Decoded(candidates, features, *selection, seconds=seconds)

    def _warn_of_low_ess(self, ess: Tensor) -> None:
        low = int((ess < LOW_ESS).sum())
        if low and self.proposal.settings.num_candidates > LOW_ESS:
            warnings.warn(
                f"{low} of {len(ess)} prefixes have an effective sample size below {LOW_ESS:g} of "
                f"{self.proposal.settings.num_candidates} candidates (lowest {float(ess.min()):.2f}): their draw is "
                "next to no choice. Draw more candidates, bring the proposal nearer to the target (temperature, "
                "top-p), or refit with fewer metrics or with ridge > 0",
                LowEffectiveSampleSize,
                stacklevel=3,
            )


def _at_least_one(name: str, value: int) -> int:
    return integer(name, value, ">= 1", lambda n: n >= 1)


def _seconds(device: torch.device) -> float:
    """The time at which the device has done what it was given: it works on while the host goes ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def select(
    energy: Energy, features: Tensor, base_log_w: Tensor | None, num_samples: int, random: torch.Generator
) -> ops.Selection:
    """S of the M candidates of each prefix, index [N, S], by the artefact's rule, from their metrics [N, M, K].

    Raises
    ------
    InvalidInput
        A prefix without a candidate that could be drawn.
    """
    n, m, _ = features.shape
    race = energy.draw == "race"
    shape = (n, num_samples, m) if race else (n, num_samples)
    uniforms = torch.rand(shape, generator=random, dtype=torch.float64, device="cpu")
    operator = ops.race_select if race else ops.sir_select
    selection = operator(features, energy.mu.to(features.device), uniforms.to(features.device), base_log_w)
    bad = (selection.index < 0).any(1).nonzero()
    if len(bad):  # on the CPU the operator itself raises; on CUDA it can only mark the row
        raise InvalidInput(
            f"prefix {int(bad[0])} has no candidate to draw: its log-weights hold NaN or infinity, or are all -inf"
        )
    return selection


def _systematic(draw: Draw, weights: Tensor, energies: Tensor, num_samples: int, random: torch.Generator) -> Tensor:
    """[N, S] candidates, each of the law that a single draw has, of weights [N, M]: systematic resampling.

    With candidates sorted by their energies [N, M], a draw is taken at every S-th part of their cumulated chances, from
    one random start, so that the S of a prefix spread over all that it may draw. Their mean varies less than that of
    independent draws (Kitagawa 1996). Their order is random.
    """
    log_w = weights.double().cpu().log()
    chances = log_w.exp() if draw == "sir" else probabilities(log_w)
    order = energies.cpu().argsort(dim=1, stable=True)
    cumulated = chances.gather(1, order).cumsum(1)
    cumulated /= cumulated[:, -1:].clone()
    start = torch.rand(len(weights), 1, generator=random, dtype=torch.float64, device="cpu")
    points = (torch.arange(num_samples, device="cpu") + start) / num_samples
    # A candidate without a chance ends where the one before it does, and no point lies between.
    drawn = order.gather(1, torch.searchsorted(cumulated, points, right=True).clamp_max(weights.shape[1] - 1))
    shuffled = torch.rand(points.shape, generator=random, dtype=torch.float64, device="cpu").argsort(1)
    index: Tensor = drawn.gather(1, shuffled).to(weights.device)
    return index


def _without_replacement(draw: Draw, weights: Tensor, num_samples: int, random: torch.Generator) -> Tensor:
    """[N, S] candidates, each drawn by weight [N, M] from those left: the S first of one race.

    By SIR, candidate j arrives at an exponential time of rate w_j (Kool et al. 2019, arXiv 1903.06059); by the race, at
    a uniform one over w_j.
    """
    if len(bad := ((weights > 0).sum(1) < num_samples).nonzero()):
        i = int(bad[0])
        raise InvalidInput(
            f"num_samples = {num_samples} without replacement: prefix {i} has {int((weights[i] > 0).sum())} candidates "
            "of positive weight"
        )
    uniforms = torch.rand(weights.shape, generator=random, dtype=torch.float64, device="cpu").to(weights.device)
    times = uniforms if draw == "race" else -torch.log1p(-uniforms)
    arrivals = torch.where(weights > 0, times / weights.double(), torch.inf)
    return arrivals.topk(num_samples, dim=1, largest=False).indices


def check_compatible(fitted: ProposalSettings, used: ProposalSettings) -> None:
    """An artefact holds for one vocabulary; for other settings than those it was fitted with, it may be off.

    Raises
    ------
    ArtefactError
        Another vocabulary.

    Warns
    -----
    UserWarning
        Any other setting differs.
    """
    if fitted.vocabulary != used.vocabulary:
        raise ArtefactError(
            f"the artefact was fitted for the vocabulary of {fitted.model_id} ({fitted.vocabulary}), the proposal's is "
            f"that of {used.model_id} ({used.vocabulary}): token metrics don't carry over; fit again for this model"
        )
    names = [f.name for f in fields(ProposalSettings) if f.name != "vocabulary"]
    changed = [
        f"{name} {getattr(fitted, name)} -> {getattr(used, name)}"
        for name in names
        if getattr(fitted, name) != getattr(used, name)
    ]
    if changed:
        warnings.warn(
            f"mu was fitted with other proposal settings ({', '.join(changed)}): expected metrics may miss the targets",
            stacklevel=3,
        )
