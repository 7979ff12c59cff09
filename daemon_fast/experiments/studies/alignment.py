"""The paper's main table: how near each way to decode comes to human text (Ji et al. 2024, section 4.2)."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from daemon_fast.data.texts import Pairs
from daemon_fast.decode import LOW_ESS, select
from daemon_fast.errors import MissingPackage
from daemon_fast.experiments import baselines, measures, page
from daemon_fast.experiments.collected import Collected, Ess, Means
from daemon_fast.experiments.domain import DomainData
from daemon_fast.experiments.page import COLOURS, LABELS, Cell, Row, Section, Table, number
from daemon_fast.seeds import batch_seed, generator, stream

HEADING = "Alignment"
DRAWS = 5  # of MAUVE's clustering, and of the methods that it is cheap to draw again
ENOUGH_TEXTS = 1000  # of each side, for MAUVE; its authors recommend thousands


@dataclass(frozen=True)
class Mauve:
    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


@dataclass(frozen=True)
class Method:
    """A way to decode."""

    name: str
    expected: bool  # whether its values are expectations over its draw, or of one text a prefix
    means: Means
    spread: list[float]  # [K'] standard deviation of one drawn text, over that of human text
    wasserstein: list[float]  # [K'] Wasserstein-1 distance of one drawn text's law, in the same unit
    distance: float
    interval: tuple[float, float]  # 95%
    relative_rmse: float | None  # None where a human mean is 0
    nearest: list[str]  # metrics in which no other method of single texts has a mean nearer to the human one
    mauve: Mauve | None

    @property
    def label(self) -> str:
        return LABELS.get(self.name, self.name) + (", expected" if self.expected else "")

    @property
    def distance_text(self) -> str:
        return page.distance(self.distance, self.interval)


@dataclass(frozen=True)
class LengthBin:
    """Texts of `low` to `high` tokens: their share, and how far their means lie from those of human texts as long."""

    low: int
    high: int
    human: int  # texts
    share: dict[str, float]  # of the texts of "human", "sampling" and "daemon"
    distance: dict[str, float | None]  # of "sampling" and "daemon"; None where there are no such texts
    noise_floor: float


@dataclass(frozen=True)
class Alignment:
    """Of held-out prefixes."""

    names: list[str]  # K' metrics
    fitted: int  # the first of them, which distances are over
    spread: list[float]  # [K'] standard deviation of all human text: the unit
    human_spread: list[float]  # [K'] that of these prefixes' human text, over it
    prefixes: int
    noise_floor: float
    ess: Ess
    human: Means
    methods: list[Method]
    lengths: list[LengthBin]  # where texts end by themselves; else empty
    mean_length: dict[str, float]  # tokens, of "human", "sampling" and "daemon"
    amateur: str | None = None  # of contrastive decoding; None: the model itself, of a short context

    def of(self, name: str, expected: bool = False) -> Method:
        return next(method for method in self.methods if (method.name, method.expected) == (name, expected))


def compute(
    held_out: Collected,
    mu: Tensor,
    drawn: Mapping[str, Tensor],
    mauve: Mapping[str, Mauve] | None = None,
    seed: int = 0,
) -> Alignment:
    """Means of each method, and how far they lie from human text; of plain sampling and DAEMON, expectations too.

    Parameters
    ----------
    mu : [K]
    drawn : name -> [N, K'] metrics of one text a prefix
    mauve : name -> MAUVE of the same texts
    seed : of the intervals
    """
    human, names, k, (n, m) = held_out.human.double(), held_out.names, held_out.fitted, held_out.lengths.shape
    # Expectations have less noise than single texts: they don't compete with them.
    gaps = {name: (values.double().mean(0) - human.mean(0)).abs() for name, values in drawn.items()}
    nearest = {name: min(gaps, key=lambda method: float(gaps[method][i])) for i, name in enumerate(names)}

    def described(name: str, values: Tensor, chances: Tensor | None = None) -> Method:
        """Of one text a prefix, [N, K']; or of expectations [N, K'] by the chances [N, M] of candidates to be drawn."""
        texts, weights = values, torch.full((n,), 1 / n, dtype=torch.float64)
        if chances is not None:
            texts, weights = held_out.features.flatten(0, 1), chances.flatten() / n
        texts, single = texts.double() / held_out.spread, chances is None
        return Method(
            name=name,
            expected=not single,
            means=Means.of(values),
            spread=_deviation(texts, weights).tolist(),
            wasserstein=[
                measures.wasserstein(texts[:, i], weights, human[:, i] / held_out.spread[i]) for i in range(len(names))
            ],
            distance=held_out.distance(values),
            interval=held_out.interval(values, seed),
            relative_rmse=measures.relative_rmse(values[:, :k], human[:, :k]),
            nearest=[metric for metric, best in nearest.items() if best == name and single],
            mauve=(mauve or {}).get(name) if single else None,
        )

    even = torch.full((n, m), 1 / m, dtype=torch.float64)
    chances = {"sampling": even, "daemon": held_out.chances(mu)}
    lengths = held_out.lengths.double()
    mean_length = {name: float((chance * lengths).sum(1).mean()) for name, chance in chances.items()}
    return Alignment(
        names=names,
        fitted=k,
        spread=held_out.spread.tolist(),
        human_spread=(human.std(0) / held_out.spread).tolist(),
        prefixes=n,
        noise_floor=measures.noise_floor(len(human)),
        ess=Ess.of(held_out.weights(mu)),
        human=Means.of(human),
        methods=[
            *(described(name, values) for name, values in drawn.items()),
            described("sampling", held_out.expected(), chances["sampling"]),
            described("daemon", held_out.expected(mu), chances["daemon"]),
        ],
        lengths=_by_length(held_out, chances),
        mean_length={"human": float(held_out.human_tokens.double().mean()), **mean_length},
    )


def _by_length(held_out: Collected, chances: Mapping[str, Tensor]) -> list[LengthBin]:
    """Thirds of the human lengths below the maximum, and the maximum, at which texts are cut.

    `length` itself, which bins hold fixed, is no part of the distance.
    """
    of_human, lengths, n = held_out.human_tokens, held_out.lengths, len(held_out.lengths)
    if bool((of_human == of_human[0]).all()) and bool((lengths == of_human[0]).all()):
        return []
    most = int(max(of_human.max(), lengths.max()))
    below = of_human[of_human < most].double()
    thirds = below.quantile(torch.tensor([1, 2], dtype=torch.float64) / 3).floor().long().tolist() if len(below) else []
    edges = [*dict.fromkeys([-1, *thirds, most - 1]), most]
    at = [k for k, name in enumerate(held_out.fitted_names) if name != "length"]
    spread, bins = held_out.spread[at], []
    for low, high in itertools.pairwise(edges):
        human = held_out.human[(of_human > low) & (of_human <= high)][:, at].double()
        share, distance = {"human": len(human) / len(of_human)}, dict[str, float | None]()
        for name, chance in chances.items():
            inside = (chance * ((lengths > low) & (lengths <= high))).flatten() / n
            share[name] = float(inside.sum())
            known = len(human) > 0 and share[name] > 0 and len(at) > 0
            mean = inside @ held_out.features[..., at].flatten(0, 1).double() / share[name] if known else None
            gap = None if mean is None else (mean - human.mean(0)) / spread
            distance[name] = None if gap is None else float(gap.square().mean().sqrt())
        floor = measures.noise_floor(len(human)) if len(human) else math.inf
        bins.append(LengthBin(low + 1, high, len(human), share, distance, floor))
    return bins


def _deviation(values: Tensor, weights: Tensor) -> Tensor:
    """[K] standard deviation of values [S, K] with weights [S]; that of a sample where they are equal."""
    centred = values - weights @ values
    return ((weights @ centred.square()) / (1 - weights.square().sum())).sqrt()


def run(data: DomainData) -> Alignment:
    held_out, mu, seed, pairs = data.held_out, data.energy.mu, data.options.seed, data.held_out_pairs
    # As `SIRDecoder.choose` draws, from features that are there already. MAUVE needs more than one draw to know its own
    # noise, and the candidates and DAEMON have more.
    features = held_out.features[..., : held_out.fitted]
    chosen = select(data.energy, features, held_out.base_log_w, DRAWS, generator(seed, "choose")).index
    index = chosen[:, 0]
    drawn = {"sampling": held_out.features[:, 0], "daemon": held_out.features[torch.arange(len(pairs)), index]}
    candidates = data.candidates("held-out", data.proposal, pairs)
    m, tokens, lengths = candidates.shape[1], candidates.tokens.tolist(), candidates.lengths.tolist()

    def texts(index: Tensor) -> list[list[int]]:
        rows = [i * m + j for i, j in enumerate(index.tolist())]
        return [tokens[r][: lengths[r]] for r in rows]

    def without_end(rows: Sequence[list[int]]) -> list[list[int]]:
        return [row[:-1] if row[-1] in data.proposal.eos_token_ids else row for row in rows]

    draws = {
        "sampling": [texts(torch.full_like(index, j)) for j in range(min(DRAWS, m))],
        "daemon": [texts(column) for column in chosen.T],
    }
    for method, best in baselines.choices(held_out, data.energy.targets).items():
        draws[method] = [texts(best)]
        drawn[method] = held_out.features[torch.arange(len(pairs)), best]
    for method in tqdm(baselines.BASELINES, desc=f"{data.domain.name}: baselines"):
        decoded = Pairs(pairs.prefixes, _baseline(data, method))
        draws[method] = [without_end(decoded.continuations)]
        drawn[method] = data.scored(f"baseline-{method}-scored", decoded)[1]
    try:
        mauve = _mauve(data, draws, without_end(pairs.continuations))
    except MissingPackage as error:
        warnings.warn(f"MAUVE is left out: {error}", stacklevel=2)
        mauve = {}
    return replace(compute(held_out, mu, drawn, mauve, seed), amateur=_name(data.options.amateur))


def _name(amateur: Any) -> str | None:
    return None if amateur is None else getattr(amateur.config, "_name_or_path", "") or type(amateur).__name__


def _baseline(data: DomainData, method: str) -> list[list[int]]:
    """One continuation of each held-out prefix; the end-of-text token of one that ended included."""
    prefixes, settings = data.held_out_pairs.prefixes, data.energy.proposal_settings
    shortest, longest, eos = settings.min_new_tokens, settings.max_new_tokens, data.proposal.eos_token_ids
    amateur = data.options.amateur if "decoding" in method else None
    known = [method, shortest, longest, eos, data.options.seed, str(data.model.dtype), _name(amateur) or ""]
    # Of one length in a batch: nothing is padded.
    by_length: dict[int, list[int]] = {}
    for i, prefix in enumerate(prefixes):
        by_length.setdefault(len(prefix), []).append(i)
    # As many sequences together as candidates are drawn together: one option says how much memory is there for both.
    size = max(1, data.options.batch_size * settings.num_candidates // baselines.SEQUENCES.get(method, 1))
    batches = [some[a : a + size] for some in by_length.values() for a in range(0, len(some), size)]
    rows: dict[int, list[int]] = {}
    for b, some in enumerate(batches):
        batch, seed = [prefixes[i] for i in some], batch_seed(stream(data.options.seed, "baseline"), b)

        def draw(batch: list[list[int]] = batch, seed: int = seed) -> np.ndarray[Any, Any]:
            drawn = baselines.decode(method, data.model, batch, longest, seed, amateur, shortest, eos)
            return drawn.cpu().numpy()

        drawn = data.kept(f"baseline-{method}-{b:04d}", [batch, known], draw).tolist()
        rows |= dict(zip(some, (_to_end(row, eos) for row in drawn), strict=True))
    return [rows[i] for i in range(len(prefixes))]


def _to_end(row: list[int], eos: Sequence[int]) -> list[int]:
    end = next((t for t, token in enumerate(row) if token in eos), len(row))
    return row[: end + 1]


def _mauve(
    data: DomainData, draws: Mapping[str, Sequence[list[list[int]]]], human_texts: list[list[int]]
) -> dict[str, Mauve]:
    """Of each method against human text: mean over seeds of MAUVE's clustering, and its standard error.

    Methods with several draws take another one for each seed, so that their error holds that noise, too.
    Continuations are compared alone: prefixes are the same for all, and would make all alike.
    """
    featurizer, encoder = data.options.featurizer, data.options.encoder

    def embedded(method: str, texts: list[list[int]]) -> np.ndarray[Any, Any]:
        key = [texts, featurizer, encoder]
        return data.kept(f"mauve-{method}", key, lambda: measures.embed(texts, data.proposal, featurizer, encoder))

    human = embedded("human", human_texts)
    found = {}
    for method, of_method in draws.items():
        texts = [text for draw in of_method for text in draw]
        others = embedded(method, texts).reshape(len(of_method), len(human), -1)

        def score(others: np.ndarray[Any, Any] = others) -> list[float]:
            return measures.mauve_scores(human, others, DRAWS)

        scores = data.kept(f"mauve-{method}-scores", [human.tolist(), others.tolist(), DRAWS], score)
        found[method] = Mauve(float(scores.mean()), float(scores.std(ddof=1)) / math.sqrt(DRAWS))
    return found


# ---- what the report says -------------------------------------------------------------------------------------------


def section(result: Alignment) -> Section:
    distances = page.svg(
        9, 0.32 * len(result.methods) + 1.2, partial(_draw_distances, result), "Distance to human text of each method"
    )
    metrics = page.svg(
        8, 0.5 * result.fitted + 2, partial(draw_metrics, result),
        "Distance of each metric from its human mean, for plain sampling and DAEMON",
    )  # fmt: skip
    amateur = result.amateur or (
        f"the model itself, of its last {baselines.AMATEUR_WINDOW} tokens alone; --amateur names a weaker one"
    )
    return Section(
        "How near each way to decode comes to human text: one continuation of each held-out prefix; 'expected' takes "
        "the mean over the draw instead.",
        [table(result), spread_table(result), *([length_table(result)] if result.lengths else [])],
        [distances, metrics],
        notes=[f"The amateur of contrastive decoding is {amateur}."],
        verdict=verdict(result),
    )


def table(result: Alignment) -> Table:
    few = f"means little: {result.prefixes} texts" if result.prefixes < ENOUGH_TEXTS else ""
    mauve = [Cell("MAUVE", few)] if any(method.mauve for method in result.methods) else []
    head: Row = ["method", "distance", "relative RMSE", *mauve, *result.names]
    rows: list[Row] = [["human", *["-"] * (2 + len(mauve)), *page.means(result.names, result.human)]]
    for method in result.methods:
        means = [
            Cell(text, marked=name in method.nearest)
            for name, text in zip(result.names, page.means(result.names, method.means), strict=True)
        ]
        score = [str(method.mauve or "-")] * len(mauve)
        relative = "undefined" if method.relative_rmse is None else number(method.relative_rmse)
        rows.append([method.label, method.distance_text, relative, *score, *means])
    return Table(
        head,
        rows,
        f"{result.prefixes} held-out prefixes. Distance to human text over the {result.fitted} fitted metrics, in "
        "standard deviations of human text, without what noise adds, and its 95% interval; the noise floor is "
        f"{result.noise_floor:.3f}, and {result.noise_floor * 2**0.5:.3f} for single texts. Means x100 (not "
        "ent and nats) ± standard error over prefixes. Marked: the nearest to human of single texts. The "
        f"nearest and the likeliest candidate are of the same {result.ess.candidates} as DAEMON's.",
    )


def spread_table(result: Alignment) -> Table:
    rows: list[Row] = [["human", *(f"{spread:.2f}, -" for spread in result.human_spread)]]
    for method in result.methods:
        cells = zip(method.spread, method.wasserstein, strict=True)
        rows.append([method.label, *(f"{spread:.2f}, {distance:.2f}" for spread, distance in cells)])
    return Table(
        ["spread, Wasserstein", *result.names],
        rows,
        "Spread: standard deviation of one drawn text, over that of all human text: a method whose means are human can "
        "still draw texts too much alike. Wasserstein: distance of the law of one drawn text from that of the held-out "
        "human texts, in the same unit; two samples of one law have some, too. 'Expected' takes the law over all "
        "candidates by their chances to be drawn.",
    )


def length_table(result: Alignment) -> Table:
    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    rows: list[Row] = [
        [
            f"{x.low} to {x.high}", *(f"{100 * x.share[name]:.1f}%" for name in ("human", "sampling", "daemon")),
            cell(x.distance["sampling"]), cell(x.distance["daemon"]), cell(x.noise_floor),
        ]
        for x in result.lengths
    ]  # fmt: skip
    mean = result.mean_length
    return Table(
        ["tokens", "human", *(LABELS[name] for name in ("sampling", "daemon")),
         *(f"distance, {LABELS[name]}" for name in ("sampling", "daemon")), "noise floor"],
        rows,
        "By length: shares of texts, and how far the means of those in a bin lie from the human ones in it, in "
        "standard deviations of all human text (length itself left out, noise included). Mean length: human "
        f"{mean['human']:.1f}, sampling {mean['sampling']:.1f}, DAEMON {mean['daemon']:.1f} tokens.",
    )  # fmt: skip


def _draw_distances(result: Alignment, figure: Any) -> None:
    axes = figure.subplots()
    axes.axvspan(0, result.noise_floor, color="0.9", label=f"noise floor {result.noise_floor:.3f}")
    for y, method in enumerate(result.methods):
        colour = COLOURS.get(method.name, "0.5")
        axes.plot(method.interval, [y, y], color=colour)
        axes.plot(method.distance, y, "o", color=colour)
    axes.set_yticks(range(len(result.methods)), [method.label for method in result.methods])
    axes.set_ylim(len(result.methods) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("distance to human text, in standard deviations (line: 95% interval)")
    axes.legend(loc="lower right")


def draw_metrics(result: Alignment, figure: Any) -> None:
    """How far each fitted metric's expectation lies from its human mean."""
    floor, rows, axes = result.noise_floor, range(result.fitted), figure.subplots()
    axes.axvspan(-floor, floor, color="0.9", label=f"noise floor: ±1/√{result.prefixes} = ±{floor:.2f}")
    axes.axvline(0, color="0.3", linewidth=1)
    for offset, name in ((-0.13, "sampling"), (0.13, "daemon")):
        method = result.of(name, expected=True)
        shift = [(method.means.mean[k] - result.human.mean[k]) / result.spread[k] for k in rows]
        bars = [method.means.standard_error[k] / result.spread[k] for k in rows]
        axes.errorbar(
            shift, [k + offset for k in rows], xerr=bars, fmt="o", capsize=3, color=COLOURS[name],
            label=f"{LABELS[name]}: distance {method.distance:.2f}",
        )  # fmt: skip
    axes.set_yticks(list(rows), [name.replace("$", r"\$") for name in result.names[: result.fitted]])
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.85")
    axes.set_axisbelow(True)
    axes.set_xlabel("expected metric minus human mean, in standard deviations of human text (bars: standard error)")
    axes.set_title(
        f"Alignment with human text on {result.prefixes} held-out prefixes, M = {result.ess.candidates} candidates"
    )
    axes.legend(loc="best", frameon=True)


def verdict(result: Alignment) -> list[str]:
    daemon, sampling = result.of("daemon", expected=True), result.of("sampling", expected=True)
    floor, ess = result.noise_floor, result.ess
    sentences = [
        f"In expectation, DAEMON's distance to human text is {daemon.distance:.3f} standard deviations, plain "
        f"sampling's {sampling.distance:.3f}, the noise floor {floor:.3f}: DAEMON is "
        + ("nearer" if daemon.distance < sampling.distance else "not nearer")
        + (", and its interval reaches 0." if daemon.interval[0] == 0 else "."),
        _of_single_texts([method for method in result.methods if not method.expected], floor * 2**0.5),
        f"The effective sample size of DAEMON's draw is {ess.mean:.1f} of {ess.candidates} candidates on average and "
        f"{ess.min:.1f} at least" + (f"; below {LOW_ESS:g} there is next to no choice." if ess.min < LOW_ESS else "."),
    ]
    if result.lengths:
        human, ours = result.mean_length["human"], result.mean_length["daemon"]
        sentences.append(
            f"Human texts have {human:.1f} tokens on average, DAEMON's {ours:.1f} ({100 * (ours / human - 1):+.1f}%), "
            f"plain sampling's {result.mean_length['sampling']:.1f}."
            if human
            else f"Human texts are empty; DAEMON's have {ours:.1f} tokens on average."
        )
    scored = [f"{method.label} {method.mauve}" for method in result.methods if method.mauve]
    return sentences + ([f"MAUVE: {', '.join(scored)}."] if scored and result.prefixes >= ENOUGH_TEXTS else [])


def _of_single_texts(methods: list[Method], floor: float) -> str:
    first, second, *_ = ordered = sorted(methods, key=lambda method: method.distance)
    by_name = {method.name: method for method in ordered}
    daemon, sampling = by_name.pop("daemon"), by_name.pop("sampling")
    said = f"With one text a prefix: DAEMON {daemon.distance_text}, plain sampling {sampling.distance_text}"
    if by_name:
        best = next(iter(by_name.values()))
        said += f", the best baseline ({best.label}) {best.distance_text}"
    rival = second if first is daemon else first
    apart = rival.interval[0] > daemon.interval[1] or daemon.interval[0] > rival.interval[1]
    nearest = f"the nearest of {len(methods)} methods" if first is daemon else f"not the nearest: {first.label} is"
    return f"{said}; noise floor {floor:.3f}. DAEMON is {nearest}{'' if apart else ', though the intervals overlap'}."
