"""The operators: one short front each, its fake kernel for `torch.compile` under it.

All are deterministic, run on the device of their arguments, and are also reachable as `torch.ops.daemon_fast.*`.
A bad argument is a RuntimeError, as with torch's own operators, that names the argument, its value and the limit.
On CUDA no operator waits for the device, and all can be captured in a CUDA graph. So they can't raise for a bad value
that lies on the device: they mark the result instead, by NaN or -1, as each docstring says. The decoder and the fit
check for these marks.

`token_logprobs` and `sample_tokens` are differentiable with respect to the logits, once; in forward mode and under the
transforms of `torch.func` torch's own operators take their place, and so any number of times. The others have no
gradient: they run on tensors that require one, and a backward pass that reaches them, or a tangent that reaches them in
forward mode, is a RuntimeError, never a silent zero. All this holds of the functions here: called as
`torch.ops.daemon_fast.*`, operators know nothing of forward mode. `daemon_fast.reference` holds the definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from daemon_fast import extension

__all__ = [
    "append_tokens",
    "importance_weights",
    "race_select",
    "repetition",
    "sample_tokens",
    "sir_select",
    "tilted_moments",
    "token_logprobs",
]

extension.load()  # registers the operators
_ops = torch.ops.daemon_fast
_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])

Normalization = Literal["per_prefix", "global"]  # of importance weights: see `tilted_moments`
Draw = Literal["race", "sir"]  # the rule that chooses among candidates: `race_select` or `sir_select`


def _fake_of(operator: str) -> Callable[[_Kernel], _Kernel]:
    decorator: Callable[[_Kernel], _Kernel] = torch.library.register_fake(f"daemon_fast::{operator}")
    return decorator


class _Undifferentiable(torch.autograd.Function):
    """An operator without a gradient, called where one, or a tangent, may be asked for."""

    generate_vmap_rule = True  # torch.func.jacrev and jacfwd go by vmap

    @staticmethod
    def forward(operator: str, *arguments: Any) -> Any:
        return getattr(_ops, operator)(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"{ctx.operator} has no gradient: detach what it is given, or what it returns")

    @staticmethod
    def jvp(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"{ctx.operator} has no gradient, in forward mode neither: detach what it is given")


def _call(operator: str, *arguments: Any) -> Any:
    """What `register_autograd` would do for these operators takes 4 us a call, as long as a choice itself."""
    if _transformed():
        if torch.compiler.is_compiling():  # which would leave out the function below, and its errors with it
            raise RuntimeError(f"{operator} can't be compiled inside a transform of torch.func")
        return _Undifferentiable.apply(operator, *arguments)  # type: ignore[no-untyped-call]
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return _Undifferentiable.apply(operator, *arguments)  # type: ignore[no-untyped-call]
    return getattr(_ops, operator)(*arguments)


def _transformed() -> bool:
    """Whether forward-mode AD or a transform of `torch.func` is at work, which know torch's own operators alone."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


# For the fake kernels, what csrc/checks.h checks of shapes and dtypes, in its words. `argument` is "operator: name".


def _require(condition: bool, message: Callable[[], str]) -> None:
    torch._check(condition, message)  # type: ignore[no-untyped-call]


def _check(argument: str, tensor: Tensor, layout: str, *dtypes: torch.dtype) -> None:
    dimensions = [shape.count(",") + 1 for shape in layout.split(" or ")]
    got = list(tensor.shape)
    _require(tensor.dim() in dimensions, lambda: f"{argument} must have shape {layout}, got {got}")
    allowed = " or ".join(str(dtype) for dtype in dtypes).replace("torch.", "")
    dtype = str(tensor.dtype).removeprefix("torch.")
    _require(tensor.dtype in dtypes, lambda: f"{argument} must be {allowed}, got {dtype}")


def _check_size(argument: str, tensor: Tensor, dimension: int, size: int, expected: str) -> None:
    got = list(tensor.shape)
    _require(
        tensor.shape[dimension] == size,
        lambda: f"{argument} must have {expected} = {size} at dimension {dimension}, got shape {got}",
    )


def _check_tilt(operator: str, features: Tensor, mu: Tensor, base_log_w: Tensor | None) -> None:
    _check(f"{operator}: features", features, "[G, M, K]", torch.float32, torch.float64)
    _check(f"{operator}: mu", mu, "[K]", torch.float64)
    _check_size(f"{operator}: mu", mu, 0, features.shape[2], "features.shape[2]")
    if base_log_w is not None:
        _check(f"{operator}: base_log_w", base_log_w, "[G, M]", torch.float32, torch.float64)
        for dimension in (0, 1):
            size = features.shape[dimension]
            _check_size(f"{operator}: base_log_w", base_log_w, dimension, size, f"features.shape[{dimension}]")


class ImportanceWeights(NamedTuple):
    weights: Tensor  # [G, M], each row sums to 1
    log_mean: Tensor  # [G]
    ess: Tensor  # [G]


class Selection(NamedTuple):
    index: Tensor  # type: ignore[assignment]  # [G] or [G, S] int64; hides tuple.index, which nobody needs here
    weights: Tensor  # [G, M]
    log_z: Tensor  # [G]
    ess: Tensor  # [G]


class Moments(NamedTuple):
    log_z: Tensor  # [] float64
    mean: Tensor  # [K] float64
    covariance: Tensor  # [K, K] float64


class TokenLogProbs(NamedTuple):
    log_p: Tensor  # [R] float32
    log_q: Tensor  # [R] float32


class SampledTokens(NamedTuple):
    ids: Tensor  # [R] int64
    log_p: Tensor  # [R] float32
    log_q: Tensor  # [R] float32


def repetition(
    tokens: Tensor,  # [R, T] int32 or int64
    lengths: Tensor | None = None,  # [R] int32 or int64
    ngrams: Sequence[int] = (2, 3, 4),
    windows: Sequence[int] = (8, 16, 32),
) -> Tensor:
    """N-gram repetition and token repetition of each row, exactly.

    Parameters
    ----------
    tokens : [R, T] int32 or int64
        One sequence a row; any ids, negative ones included. Rows may be strided.
    lengths : [R] int32 or int64, optional
        Only tokens[r, :lengths[r]] counts; what lies behind never changes a result. Default: T for every row.
    ngrams : sequence of int >= 1
        For each n, sr_n = 1 - (distinct n-grams) / (lengths[r] - n + 1), or 0 for a row shorter than n.
    windows : sequence of int >= 1
        For each w, tr_w = the share of tokens that occur among the w tokens before them, or 0 for an empty row.

    Returns
    -------
    [R, len(ngrams) + len(windows)] float32
        Fractions: sr_n in the order of `ngrams`, then tr_w in the order of `windows`.

    Raises
    ------
    RuntimeError
        Wrong shape or dtype; n or w below 1; on CUDA, more than 32 of either. A length below 0 or above T: on CUDA, the
        row is NaN.

    Examples
    --------
    >>> import torch, daemon_fast
    >>> daemon_fast.repetition(torch.tensor([[5, 7, 5, 7, 5]]), ngrams=[2], windows=[2])
    tensor([[0.5000, 0.6000]])

    Source: Ji et al. 2024 (arXiv 2310.01041), section 4.1; sr-n after Welleck et al. 2020.
    """
    if lengths is None:
        lengths = torch.full(tokens.shape[:1], tokens.shape[-1], device=tokens.device)
    out: Tensor = _ops.repetition(tokens, lengths, ngrams, windows)
    return out


@_fake_of("repetition")
def _(tokens: Tensor, lengths: Tensor, ngrams: Sequence[int], windows: Sequence[int]) -> Tensor:
    _check("repetition: tokens", tokens, "[R, T]", torch.int32, torch.int64)
    _check("repetition: lengths", lengths, "[R]", torch.int32, torch.int64)
    _check_size("repetition: lengths", lengths, 0, tokens.shape[0], "tokens.shape[0]")
    return tokens.new_empty((tokens.shape[0], len(ngrams) + len(windows)), dtype=torch.float32)


def token_logprobs(
    logits: Tensor,  # [R, V] float16, bfloat16 or float32
    ids: Tensor,  # [R] int32 or int64
    temperature: float = 1.0,
) -> TokenLogProbs:
    """Log-probability of one id per row, at temperature 1 and at `temperature`, in one pass over the vocabulary.

    Parameters
    ----------
    logits : [R, V] float16, bfloat16 or float32
        Unnormalised; -inf marks an excluded id. A row of nothing but -inf, or with NaN, gives NaN.
    ids : [R] int32 or int64, each in [0, V)
    temperature : float > 0

    Returns
    -------
    log_p : [R] float32
        log softmax(logits)[id].
    log_q : [R] float32
        log softmax(logits / temperature)[id].

    Both are accumulated in float64 on the CPU (relative error 1e-6), in float32 on CUDA (1e-6, relative or absolute,
    whichever is larger).

    Both are differentiable with respect to the logits: g_p (onehot(id) - softmax(logits)) + g_q / temperature
    (onehot(id) - softmax(logits / temperature)), in the logits' dtype, computed in float32 or better. Between forward
    and backward only `logits` and `ids` are kept; the sums are made again. A row whose g_p and g_q are 0, such as that
    of a token that the loss leaves out, costs nothing. There is no second derivative: asking for it is a RuntimeError.

    Raises
    ------
    RuntimeError
        Wrong shape or dtype, temperature not positive and finite, an id outside the vocabulary (on CUDA, and under a
        transform of `torch.func`: NaN).

    Examples
    --------
    >>> log_p = daemon_fast.token_logprobs(model(tokens).logits[0, :-1], tokens[0, 1:]).log_p
    >>> (-log_p.mean()).backward()
    """
    if _transformed():
        _check_token_logprobs(logits, ids)
        return TokenLogProbs(*_log_probs(logits, ids, temperature))
    return TokenLogProbs(*_ops.token_logprobs(logits, ids, temperature))


def _log_probs(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log_p and log_q by torch's own operators, which can be differentiated in any way; NaN for an id outside."""
    _require(0 < temperature < torch.inf, lambda: f"temperature = {temperature} must be positive and finite")
    size = logits.shape[1]
    inside = (ids >= 0) & (ids < size)
    at = ids.long().clamp(0, size - 1)[:, None]
    log_p, log_q = (x.log_softmax(1).gather(1, at)[:, 0] for x in (logits.float(), logits.float() / temperature))
    return torch.where(inside, log_p, torch.nan), torch.where(inside, log_q, torch.nan)


def _check_token_logprobs(logits: Tensor, ids: Tensor) -> None:
    _check("token_logprobs: logits", logits, "[R, V]", torch.float16, torch.bfloat16, torch.float32)
    _check("token_logprobs: ids", ids, "[R]", torch.int32, torch.int64)
    _check_size("token_logprobs: ids", ids, 0, logits.shape[0], "logits.shape[0]")


@_fake_of("token_logprobs")
def _(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    _check_token_logprobs(logits, ids)
    return (
        logits.new_empty(logits.shape[:1], dtype=torch.float32),
        logits.new_empty(logits.shape[:1], dtype=torch.float32),
    )


@_fake_of("token_logprobs_backward")
def _(grad_log_p: Tensor, grad_log_q: Tensor, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    return logits.new_empty(logits.shape)


def _token_logprobs_setup(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    logits, ids, ctx.temperature = inputs
    ctx.save_for_backward(logits, ids)


def _sample_tokens_setup(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, ctx.temperature = inputs
    ctx.save_for_backward(logits, output[0])


def _logprobs_backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
    logits, ids = ctx.saved_tensors
    return _call("token_logprobs_backward", *gradients[-2:], logits, ids, ctx.temperature), None, None


torch.library.register_autograd("daemon_fast::token_logprobs", _logprobs_backward, setup_context=_token_logprobs_setup)
torch.library.register_autograd("daemon_fast::sample_tokens", _logprobs_backward, setup_context=_sample_tokens_setup)


def sample_tokens(
    logits: Tensor,  # [R, V] float16, bfloat16 or float32
    uniforms: Tensor,  # [R] float64
    temperature: float = 1.0,
) -> SampledTokens:
    """Draw one id per row from softmax(logits / temperature), and its log-probabilities, in one pass over the logits.

    Parameters
    ----------
    logits : [R, V] float16, bfloat16 or float32
        Unnormalised; -inf marks an excluded id, which is never drawn.
    uniforms : [R] float64, in [0, 1)
        Inverse CDF, ids in their order: the first id whose cumulative probability exceeds the uniform.
    temperature : float > 0

    Returns
    -------
    ids : [R] int64
    log_p : [R] float32
        log softmax(logits)[id], as `token_logprobs` gives it.
    log_q : [R] float32
        log softmax(logits / temperature)[id].

    The log-probabilities are differentiable with respect to the logits, the drawn id held fixed, as those of
    `token_logprobs` are.

    Raises
    ------
    RuntimeError
        Wrong shape or dtype, temperature not positive and finite, a uniform outside [0, 1), or a row whose logits are
        all -inf, or hold NaN or +inf. On CUDA, the last two give id -1 and NaN.
    """
    if _transformed():
        ids = _ops.sample_tokens(logits.detach(), uniforms, temperature)[0]
        return SampledTokens(ids, *_log_probs(logits, ids, temperature))
    return SampledTokens(*_ops.sample_tokens(logits, uniforms, temperature))


@_fake_of("sample_tokens")
def _(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    _check("sample_tokens: logits", logits, "[R, V]", torch.float16, torch.bfloat16, torch.float32)
    _check("sample_tokens: uniforms", uniforms, "[R]", torch.float64)
    _check_size("sample_tokens: uniforms", uniforms, 0, logits.shape[0], "logits.shape[0]")
    rows = logits.shape[:1]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
    )


def append_tokens(
    tokens: Tensor,  # [T, R] int64
    log_p: Tensor,  # [T, R] float32
    log_q: Tensor,  # [T, R] float32
    lengths: Tensor,  # [R] int64
    running: Tensor,  # [R] bool
    *,
    ids: Tensor,  # [D] int64
    ids_log_p: Tensor,  # [D] float32
    ids_log_q: Tensor,  # [D] float32
    slot: Tensor,  # [1] int64
    rows: Tensor,  # [D] int64
    eos: Tensor,  # [E] int64
    count_eos: bool,
) -> None:
    """Append a step's drawn ids to the candidates that still run, in place: all bookkeeping of a step in one kernel.

    Parameters
    ----------
    tokens, log_p, log_q : [T, R] int64, float32, float32
        Get the ids and their log-probabilities at `slot`. A row that has ended stays as it is.
    lengths : [R] int64
        Grow by one; for an end-of-text token only if `count_eos`.
    running : [R] bool
        Whether a row goes on: False from its end-of-text token on.
    ids, ids_log_p, ids_log_q : [D] int64, float32, float32
        What `sample_tokens` returned. An id below 0, which marks a row without a distribution on CUDA, ends its row: it
        counts nothing, its token is 0, and its log-probabilities, NaN, are kept.
    slot : [1] int64, from 0 to T - 1
        In a tensor, so that a captured CUDA graph finds another one at each replay.
    rows : [D] int64, from 0 to R - 1, no two alike
        Of each id.
    eos : [E] int64
        Ids that end a text; may be empty.

    Raises
    ------
    RuntimeError
        Wrong shape, dtype or device, a tensor that is not contiguous, a slot or row outside. On CUDA a slot outside
        makes its rows' lengths -1, and an id whose row is outside is left out.
    """
    _ops.append_tokens(tokens, log_p, log_q, lengths, running, ids, ids_log_p, ids_log_q, slot, rows, eos, count_eos)


@_fake_of("append_tokens")
def _(
    tokens: Tensor, log_p: Tensor, log_q: Tensor, lengths: Tensor, running: Tensor, ids: Tensor, ids_log_p: Tensor,
    ids_log_q: Tensor, slot: Tensor, rows: Tensor, eos: Tensor, count_eos: bool,
) -> None:  # fmt: skip
    _check("append_tokens: tokens", tokens, "[T, R]", torch.int64)
    for name, tensor in (("log_p", log_p), ("log_q", log_q)):
        _check(f"append_tokens: {name}", tensor, "[T, R]", torch.float32)
        for d in (0, 1):
            _check_size(f"append_tokens: {name}", tensor, d, tokens.shape[d], f"tokens.shape[{d}]")
    for name, tensor, dtype in (("lengths", lengths, torch.int64), ("running", running, torch.bool)):
        _check(f"append_tokens: {name}", tensor, "[R]", dtype)
        _check_size(f"append_tokens: {name}", tensor, 0, tokens.shape[1], "tokens.shape[1]")
    _check("append_tokens: ids", ids, "[D]", torch.int64)
    for name, tensor, dtype in (
        ("ids_log_p", ids_log_p, torch.float32), ("ids_log_q", ids_log_q, torch.float32), ("rows", rows, torch.int64)
    ):  # fmt: skip
        _check(f"append_tokens: {name}", tensor, "[D]", dtype)
        _check_size(f"append_tokens: {name}", tensor, 0, ids.shape[0], "ids.shape[0]")
    _check("append_tokens: slot", slot, "[1]", torch.int64)
    _check_size("append_tokens: slot", slot, 0, 1, "size")
    _check("append_tokens: eos", eos, "[E]", torch.int64)


def importance_weights(
    log_w: Tensor,  # [G, M] float32 or float64
) -> ImportanceWeights:
    """Normalised importance weights of each row, by log-sum-exp.

    Parameters
    ----------
    log_w : [G, M] float32 or float64
        Log-weights, known up to a constant per row; -inf is a weight of zero.

    Returns
    -------
    weights : [G, M], dtype of log_w
        exp(log_w) / Σ_j exp(log_w); each row sums to 1.
    log_mean : [G], dtype of log_w
        log (1/M) Σ_j exp(log_w).
    ess : [G], dtype of log_w
        Effective sample size 1 / Σ_j weights², from 1 to M.

    Raises
    ------
    RuntimeError
        Names the row whose log-weights are all -inf, or hold NaN or +inf. On CUDA, all results of that row are NaN.
        In a backward pass: there is no gradient.
    """
    return ImportanceWeights(*_call("importance_weights", log_w))


@_fake_of("importance_weights")
def _(log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check("importance_weights: log_w", log_w, "[G, M]", torch.float32, torch.float64)
    return log_w.new_empty(log_w.shape), log_w.new_empty(log_w.shape[:1]), log_w.new_empty(log_w.shape[:1])


def sir_select(
    features: Tensor,  # [G, M, K] float32 or float64
    mu: Tensor,  # [K] float64
    uniforms: Tensor,  # [G] or [G, S] float64
    base_log_w: Tensor | None = None,  # [G, M] float32 or float64
) -> Selection:
    """Draw from M candidates with probability ∝ exp(b - mu · f): Sampling-Importance-Resampling.

    Parameters
    ----------
    features : [G, M, K] float32 or float64
    mu : [K] float64
    uniforms : [G] or [G, S] float64, in [0, 1)
        Inverse CDF from one uniform a draw; S draws from the same candidates, with replacement.
    base_log_w : [G, M] float32 or float64, optional
        Base log-weights b; 0 if left out.

    Returns
    -------
    index : int64, shape of uniforms
        The chosen candidate. One of weight zero is never chosen.
    weights : [G, M], dtype of features
    log_z : [G], dtype of features
        log (1/M) Σ_j exp(b - mu · f).
    ess : [G], dtype of features
        Effective sample size 1 / Σ_j weights².

    Raises
    ------
    RuntimeError
        Wrong shape or dtype, a uniform outside [0, 1), or a row whose log-weights are all -inf, or hold NaN or +inf. On
        CUDA, the index is -1 in the last two cases, and in the last all else of the row is NaN.
        In a backward pass: there is no gradient.

    Source: Ji et al. 2024 (arXiv 2310.01041), algorithm 2.
    """
    return Selection(*_call("sir_select", features, mu, uniforms, base_log_w))


@_fake_of("sir_select")
def _(features: Tensor, mu: Tensor, uniforms: Tensor, base_log_w: Tensor | None = None) -> tuple[Tensor, ...]:
    _check_tilt("sir_select", features, mu, base_log_w)
    _check("sir_select: uniforms", uniforms, "[G] or [G, S]", torch.float64)
    _check_size("sir_select: uniforms", uniforms, 0, features.shape[0], "features.shape[0]")
    return _selection(features, uniforms.shape)


def _selection(features: Tensor, drawn: torch.Size) -> tuple[Tensor, ...]:
    groups = features.shape[:1]
    return (
        features.new_empty(drawn, dtype=torch.int64),
        features.new_empty(features.shape[:2]),
        features.new_empty(groups),
        features.new_empty(groups),
    )


def race_select(
    features: Tensor,  # [G, M, K] float32 or float64
    mu: Tensor,  # [K] float64
    uniforms: Tensor,  # [G, M] or [G, S, M] float64
    base_log_w: Tensor | None = None,  # [G, M] float32 or float64
) -> Selection:
    """Choose from M candidates by a race: the largest w_j / u_j, where w = exp(b - mu · f), wins.

    What is chosen, the draw of the candidates included, is never farther from the target than what `sir_select`
    chooses, in total variation and any other convex f-divergence, for any M; with bounded weights its distance falls
    exponentially in M. Given the candidates, j is chosen with probability r_j ∫₀¹ Π_{i≠j} (1 - r_i t) dt, where
    r = w / max w: the largest weights are chosen more often than their share of the sum.

    Parameters
    ----------
    features : [G, M, K] float32 or float64
    mu : [K] float64
    uniforms : [G, M] or [G, S, M] float64, in [0, 1)
        One for each candidate and draw, each independent of the others; S draws from the same candidates are S races.
    base_log_w : [G, M] float32 or float64, optional
        Base log-weights b; 0 if left out.

    Returns
    -------
    index : [G] or [G, S] int64
        The chosen candidate: the first to arrive, where j arrives at u_j / w_j. Of several that arrive at once, as
        where more than one uniform is 0, the one of lowest index. One of weight zero never arrives.
    weights, log_z, ess : of all candidates, as `sir_select` gives them

    Raises
    ------
    RuntimeError
        As `sir_select`, and on CUDA marks the same.

    Source: Shin and Pang 2026, "Uniform Race": the limit of rejection sampling that keeps the last survivor.
    """
    return Selection(*_call("race_select", features, mu, uniforms, base_log_w))


@_fake_of("race_select")
def _(features: Tensor, mu: Tensor, uniforms: Tensor, base_log_w: Tensor | None = None) -> tuple[Tensor, ...]:
    _check_tilt("race_select", features, mu, base_log_w)
    _check("race_select: uniforms", uniforms, "[G, M] or [G, S, M]", torch.float64)
    _check_size("race_select: uniforms", uniforms, 0, features.shape[0], "features.shape[0]")
    _check_size("race_select: uniforms", uniforms, uniforms.dim() - 1, features.shape[1], "features.shape[1]")
    return _selection(features, uniforms.shape[:-1])


def tilted_moments(
    features: Tensor,  # [N, M, K] float32 or float64
    mu: Tensor,  # [K] float64
    base_log_w: Tensor | None = None,  # [N, M] float32 or float64
    normalization: Normalization = "per_prefix",
) -> Moments:
    """Log Z, mean and covariance of the features under weights ∝ exp(b - mu · f): one Newton step of the fit.

    Parameters
    ----------
    features : [N, M, K] float32 or float64
    mu : [K] float64
    base_log_w : [N, M] float32 or float64, optional
        Base log-weights b; 0 if left out.
    normalization : "per_prefix" or "global"
        Per prefix: normalise the weights within each prefix, and average log Z, mean and covariance over the prefixes.
        Global: one normalisation over all N · M samples.

    Returns
    -------
    log_z : [] float64
        (1/N) Σ_i log (1/M) Σ_j w_ij per prefix, or log (1/NM) Σ_ij w_ij.
    mean : [K] float64
    covariance : [K, K] float64
        -d mean / d mu; exactly symmetric.

    Raises
    ------
    RuntimeError
        Wrong shape or dtype, another normalization, no prefixes, NaN or +inf in a log-weight, or no finite one where
        one is needed. On CUDA, all results are NaN in the last two cases; and K above 98 on an A100, 118 on an H100
        does not fit.
        In a backward pass: there is no gradient.
    """
    return Moments(*_call("tilted_moments", features, mu, base_log_w, normalization))


@_fake_of("tilted_moments")
def _(
    features: Tensor, mu: Tensor, base_log_w: Tensor | None = None, normalization: str = "per_prefix"
) -> tuple[Tensor, Tensor, Tensor]:
    _check_tilt("tilted_moments", features, mu, base_log_w)
    _require(
        normalization in ("per_prefix", "global"),
        lambda: f"tilted_moments: normalization = '{normalization}' must be 'per_prefix' or 'global'",
    )
    k = features.shape[2]
    return tuple(features.new_empty(shape, dtype=torch.float64) for shape in ((), (k,), (k, k)))  # type: ignore[return-value]
