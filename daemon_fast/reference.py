"""The definitions, in plain Python and float64: what every kernel computes, and the oracle that tests compare with.

Written to be read. Nothing here is fast, and nothing on a hot path imports it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

Row = Sequence[int]
Vector = Sequence[float]
Matrix = Sequence[Vector]


def sequence_repetition(row: Row, n: int) -> float:
    """sr_n: the share of n-grams that repeat an earlier one; 0 if the row is shorter than n."""
    total = len(row) - n + 1
    if total <= 0:
        return 0.0
    distinct = {tuple(row[t : t + n]) for t in range(total)}
    return 1 - len(distinct) / total


def token_repetition(row: Row, w: int) -> float:
    """tr_w: the share of tokens that occur among the w tokens before them; 0 for an empty row."""
    if len(row) == 0:
        return 0.0
    hits = sum(row[t] in row[max(0, t - w) : t] for t in range(len(row)))
    return hits / len(row)


def diversity(row: Row) -> float:
    """div: the product of (1 - sr_n) over n = 2, 3, 4."""
    return math.prod(1 - sequence_repetition(row, n) for n in (2, 3, 4))


def information(token_log_p: Vector) -> float:
    """ent: perplexity of a continuation, given the log-probability of each of its tokens under a reference LM.

    Of an empty one, that of its end-of-text token is given.
    """
    if len(token_log_p) == 0:
        raise ValueError("information of an empty continuation is not defined")
    return math.exp(-math.fsum(token_log_p) / len(token_log_p))


def nats(token_log_p: Vector) -> float:
    """nats: mean negative log-probability of a token of a continuation under a reference LM.

    Of an empty one, that of its end-of-text token is given.
    """
    if len(token_log_p) == 0:
        raise ValueError("nats a token of an empty continuation are not defined")
    return -math.fsum(token_log_p) / len(token_log_p)


def length(row: Row) -> float:
    """length: log(1 + L), L the number of tokens."""
    return math.log(1 + len(row))


def coherence(prefix_embedding: Vector, continuation_embedding: Vector) -> float:
    """coh: the cosine between the sentence embeddings of the prefix and of the continuation."""
    dot = math.fsum(a * b for a, b in zip(prefix_embedding, continuation_embedding, strict=True))
    return dot / (math.hypot(*prefix_embedding) * math.hypot(*continuation_embedding))


def repetition(
    tokens: Sequence[Row], lengths: Sequence[int], ngrams: Sequence[int], windows: Sequence[int]
) -> list[list[float]]:
    """sr_n for each n, then tr_w for each w, of the first lengths[r] tokens of each row."""
    rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    return [[sequence_repetition(row, n) for n in ngrams] + [token_repetition(row, w) for w in windows] for row in rows]


def gopher_repetition(text: str, words: Sequence[str]) -> list[float]:
    """Shares of a text in repeated paragraphs, lines and word n-grams: the columns of `gopher.GOPHER_THRESHOLDS`.

    As datatrove's `GopherRepetitionFilter` computes them (after Rae et al. 2021, table A1), for its own words too.
    """
    fractions = []
    for parts in (re.split(r"\n{2,}", text.strip()), re.split(r"\n+", text)):
        repeated = [part for i, part in enumerate(parts) if part in parts[:i]]
        fractions += [len(repeated) / len(parts), sum(map(len, repeated)) / len(text)]
    for n in (2, 3, 4):
        ngrams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        top = max(ngrams, key=ngrams.count, default="")  # of several, the first
        fractions.append(len(top) * ngrams.count(top) / len(text))
    for n in range(5, 11):
        seen, i, characters = set(), 0, 0
        while i + n <= len(words):
            ngram = "".join(words[i : i + n])
            if ngram in seen:
                characters, i = characters + len(ngram), i + n
            else:
                seen.add(ngram)
                i += 1
        fractions.append(characters / len(text))
    return fractions


def log_sum_exp(values: Vector) -> float:
    """log Σ exp(v), with the maximum taken out first."""
    highest = max(values)
    if highest == -math.inf:
        return -math.inf
    return highest + math.log(math.fsum(math.exp(v - highest) for v in values))


def token_logprobs(logits: Matrix, ids: Sequence[int], temperature: float) -> tuple[list[float], list[float]]:
    """log softmax(logits)[id], and log softmax(logits / temperature)[id], of each row."""
    log_p, log_q = [], []
    for row, i in zip(logits, ids, strict=True):
        # Measured from logits[id], so that a probability near 1 keeps its digits.
        rest = [v - row[i] for v in row]
        log_p.append(-log_sum_exp(rest))
        log_q.append(-log_sum_exp([v / temperature for v in rest]))
    return log_p, log_q


def token_logprobs_backward(
    grad_log_p: Vector, grad_log_q: Vector, logits: Matrix, ids: Sequence[int], temperature: float
) -> list[list[float]]:
    """The gradient of Σ_r grad_log_p[r] log_p[r] + grad_log_q[r] log_q[r] with respect to the logits.

    d log softmax(x)[id] / d x = onehot(id) - softmax(x), and at a temperature the same of x / temperature, over it.
    """
    rows = []
    for g_p, g_q, row, i in zip(grad_log_p, grad_log_q, logits, ids, strict=True):
        scaled = [x / temperature for x in row]
        log_z_p, log_z_q = log_sum_exp(row), log_sum_exp(scaled)
        rows.append(
            [
                g_p * ((v == i) - math.exp(x - log_z_p)) + g_q / temperature * ((v == i) - math.exp(y - log_z_q))
                for v, (x, y) in enumerate(zip(row, scaled, strict=True))
            ]
        )
    return rows


def sample_tokens(logits: Matrix, uniforms: Sequence[float], temperature: float) -> list[int]:
    """The first id whose cumulative probability under softmax(logits / temperature) exceeds the uniform, per row."""
    ids = []
    for row, uniform in zip(logits, uniforms, strict=True):
        scaled = [x / temperature for x in row]
        log_z = log_sum_exp(scaled)
        cumulative = 0.0
        for i, x in enumerate(scaled):
            p = math.exp(x - log_z)
            cumulative += p
            if p > 0:
                chosen = i
            if p > 0 and cumulative > uniform:
                break
        ids.append(chosen)
    return ids


def append_tokens(
    rows: list[list[tuple[int, float, float]]], ids: Sequence[int], log_p: Vector, log_q: Vector, eos: Sequence[int]
) -> None:
    """Append (id, log p, log q) to each row that no end-of-text id has ended."""
    for row, i, p, q in zip(rows, ids, log_p, log_q, strict=True):
        if not any(before in eos for before, _, _ in row):
            row.append((i, p, q))


def importance_weights(log_w: Matrix) -> tuple[list[list[float]], list[float], list[float]]:
    """Normalised weights of each row, log((1/M) Σ w), and the effective sample size (Σ w)² / Σ w²."""
    weights, log_mean, ess = [], [], []
    for g, row in enumerate(log_w):
        for j, value in enumerate(row):
            if math.isnan(value) or value == math.inf:
                raise ValueError(f"log-weight of row {g}, candidate {j} is {value}")
        highest = max(row)
        if highest == -math.inf:
            raise ValueError(f"all {len(row)} log-weights of row {g} are -inf")
        unnormalised = [math.exp(value - highest) for value in row]
        total = math.fsum(unnormalised)
        normalised = [w / total for w in unnormalised]
        weights.append(normalised)
        log_mean.append(highest + math.log(total / len(row)))
        ess.append(1 / math.fsum(w * w for w in normalised))
    return weights, log_mean, ess


def tilted_log_weights(features: Sequence[Matrix], mu: Vector, base_log_w: Matrix | None) -> list[list[float]]:
    """log w_ij = b_ij - mu · f_ij."""
    return [
        [
            (0.0 if base_log_w is None else base_log_w[i][j]) - math.fsum(m * v for m, v in zip(mu, f, strict=True))
            for j, f in enumerate(group)
        ]
        for i, group in enumerate(features)
    ]


def sir_select(
    features: Sequence[Matrix], mu: Vector, uniforms: Vector, base_log_w: Matrix | None = None
) -> tuple[list[int], list[list[float]], list[float], list[float]]:
    """Sampling-Importance-Resampling: the chosen index of each group, and weights, log Z and ESS."""
    weights, log_z, ess = importance_weights(tilted_log_weights(features, mu, base_log_w))
    index = []
    for group, uniform in zip(weights, uniforms, strict=True):
        threshold, cumulative, chosen = uniform * sum(group), 0.0, 0
        for j, w in enumerate(group):
            if w == 0:
                continue
            cumulative, chosen = cumulative + w, j
            if cumulative > threshold:
                break
        index.append(chosen)
    return index, weights, log_z, ess


def race_select(
    features: Sequence[Matrix], mu: Vector, uniforms: Matrix, base_log_w: Matrix | None = None
) -> tuple[list[int], list[list[float]], list[float], list[float]]:
    """The uniform race: candidate j arrives at u_j / w_j, and the first is chosen; and weights, log Z and ESS.

    Of several that arrive at once, the one of lowest index. One of weight zero never arrives.
    """
    weights, log_z, ess = importance_weights(tilted_log_weights(features, mu, base_log_w))
    index = []
    for group, row in zip(weights, uniforms, strict=True):
        arrivals = [(u / w, j) for j, (w, u) in enumerate(zip(group, row, strict=True)) if w > 0]
        index.append(min(arrivals)[1])
    return index, weights, log_z, ess


def race_probabilities(weights: Vector) -> list[float]:
    """The probability that each candidate wins the race, given the weights, which needn't be normalised.

    With r = w / max w and t the arrival of the first, p_i = r_i ∫₀¹ Π_{j≠i} (1 - r_j t) dt: the product is a
    polynomial, expanded here and integrated term by term.
    """
    highest = max(weights)
    ratios = [Fraction(w) / Fraction(highest) for w in weights]  # exact: the terms alternate in sign
    probabilities = []
    for i, r in enumerate(ratios):
        polynomial = [Fraction(1)]  # coefficients of t^0, t^1, ...
        for other in ratios[:i] + ratios[i + 1 :]:
            shifted = [Fraction(0), *polynomial]
            polynomial = [a - other * b for a, b in zip([*polynomial, Fraction(0)], shifted, strict=True)]
        probabilities.append(float(r * sum((c / (k + 1) for k, c in enumerate(polynomial)), Fraction(0))))
    return probabilities


def tilted_moments(
    features: Sequence[Matrix], mu: Vector, base_log_w: Matrix | None = None, normalization: str = "per_prefix"
) -> tuple[float, list[float], list[list[float]]]:
    """log Z, and mean and covariance of the features under the tilted weights.

    "per_prefix": each prefix is normalised by itself and the three are averaged over the prefixes. "global": there is
    one normalisation over all samples.
    """
    if normalization not in ("per_prefix", "global"):
        raise ValueError(f"normalization = {normalization!r} must be 'per_prefix' or 'global'")
    if normalization == "global":
        features = [[f for group in features for f in group]]
        base_log_w = None if base_log_w is None else [[b for row in base_log_w for b in row]]
    weights, log_z, _ = importance_weights(tilted_log_weights(features, mu, base_log_w))
    n, k = len(features), len(mu)
    means = [
        [math.fsum(w * f[a] for w, f in zip(row, group, strict=True)) for a in range(k)]
        for row, group in zip(weights, features, strict=True)
    ]
    mean = [math.fsum(m[a] for m in means) / n for a in range(k)]
    covariance = [
        [
            math.fsum(
                w * (f[a] - m[a]) * (f[b] - m[b])
                for row, group, m in zip(weights, features, means, strict=True)
                for w, f in zip(row, group, strict=True)
            )
            / n
            for b in range(k)
        ]
        for a in range(k)
    ]
    return math.fsum(log_z) / n, mean, covariance
