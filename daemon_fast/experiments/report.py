"""The evaluation as one HTML file: tables, figures inline as SVG, nothing loaded from anywhere."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from daemon_fast.plot import new_figure

__all__ = ["write_report"]

Found = Mapping[str, Any]
STYLE = """
:root { color-scheme: light dark; --line: #8885; --mark: #2b6ca322; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); } h3 { margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; font-size: 0.9em; opacity: 0.8; padding-top: 0.4rem;
  max-width: min(48rem, 100vw - 2rem); position: sticky; left: 0; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.mark { background: var(--mark); font-weight: 600; }
figure { margin: 1rem 0; overflow-x: auto; } svg { background: white; max-width: 100%; height: auto; }
code { font-size: 0.9em; overflow-wrap: anywhere; }
"""
COLOURS = {"sampling": "#c44e52", "daemon": "#2b6ca3", "human": "0.2", "refitted": "#2b6ca3", "reused": "#8172b3"}


def write_report(report: Found, path: str | os.PathLike[str]) -> None:
    """Write the report as HTML; the same report gives the same bytes.

    Parameters
    ----------
    report : what `daemon_fast.experiments.run.evaluate` returns; what it lacks is left out
    path : the file appears whole or not at all

    Raises
    ------
    DataError
        matplotlib is not installed.
    """
    facts = {"model": report.get("model"), "command": report.get("command"), **report.get("settings", {})}
    listed = "".join(f"<li>{_text(k)}: <code>{_text(v)}</code></li>" for k, v in facts.items() if v not in (None, ""))
    body = [f"<h1>{_text(report.get('title', 'Evaluation'))}</h1>", f"<ul>{listed}</ul>"]
    for name, found in report.get("domains", {}).items():
        counts = ", ".join(f"{key.replace('_', ' ')} {n}" for key, n in found.get("prefixes", {}).items())
        ess = found.get("ess", {})
        of_ess = f"; effective sample size {ess['mean']:.1f} of {ess['candidates']} on average" if ess else ""
        ridge = f"; ridge {found['ridge']:g}" if "ridge" in found else ""
        body.append(f"<h2>{_text(name)}</h2><p>Prefixes: {_text(counts)}{of_ess}{ridge}.</p>")
        body += [_section(found, key) for key in SECTIONS if key in found]
    if "transfer" in report:
        body.append(_transfer(report["transfer"]))
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(report.get("title", "Evaluation"))}'
        '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>{"".join(body)}</body></html>\n'
    )
    temporary = Path(f"{os.fspath(path)}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def _section(found: Found, key: str) -> str:
    study = found[key]
    if isinstance(study, Mapping) and set(study) == {"infeasible"}:
        heading = f"{1 + list(SECTIONS).index(key)}. {key.replace('_', ' ')}"
        return f"<h3>{_text(heading)}</h3><p>Not done: {_text(study['infeasible'])}</p>"
    return SECTIONS[key](found)


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: Any, digits: int = 3) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.{digits}f}"


def _scaled(name: str, mean: float, error: float | None = None) -> str:
    """A metric as tables print it: x100, but `ent`, which is a perplexity."""
    scale = 1 if name == "ent" else 100
    return f"{scale * mean:.2f}" + ("" if error is None else f" ± {scale * error:.2f}")


def _table(
    head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str, marked: Sequence[tuple[int, int]] = ()
) -> str:
    def cell(value: Any, mark: bool) -> str:
        text = _text(_number(value) if isinstance(value, float) else value)
        return f"<td class=mark>{text}</td>" if mark else f"<td>{text}</td>"

    cells = "".join(
        f"<tr>{''.join(cell(value, (i, j) in marked) for j, value in enumerate(row))}</tr>"
        for i, row in enumerate(rows)
    )
    top = "".join(f"<th>{_text(name)}</th>" for name in head)
    return (
        f'<div class="scroll"><table><caption>{_text(caption)}</caption><thead><tr>{top}</tr></thead>'
        f"<tbody>{cells}</tbody></table></div>"
    )


def _figure(width: float, height: float, draw: Callable[[Any], None], label: str) -> str:
    """Inline SVG of what `draw` puts on a matplotlib figure."""
    figure = new_figure(width, height)
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": label, "svg.fonttype": "path"}):
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    return f'<figure role="img" aria-label="{_text(label)}">{svg[svg.index("<svg") :]}</figure>'


# ---- one function a study -------------------------------------------------------------------------------------------


def _alignment(found: Found) -> str:
    rows, floor = found["alignment"], found["noise_floor"]
    names = rows[0].get("names", found["names"])
    table, marked = [], []
    for i, row in enumerate(rows):
        cells = [
            _scaled(name, mean, error)
            for name, mean, error in zip(names, row["mean"], row["standard_error"], strict=True)
        ]
        mauve = row.get("mauve")
        distance = "-" if "distance" not in row else "{:.3f} ({:.3f}, {:.3f})".format(row["distance"], *row["interval"])
        table.append(
            [
                row["method"], *cells, "-" if mauve is None else f"{mauve['value']:.3f} ± {mauve['error']:.3f}",
                _number(row.get("length"), 0), distance, _number(row.get("relative_rmse")),
            ]
        )  # fmt: skip
        marked += [(i, 1 + names.index(name)) for name in row.get("nearest", [])]

    def draw(figure: Any) -> None:
        axes, shown = figure.subplots(), [row for row in rows if "distance" in row]
        axes.axvspan(0, floor, color="0.9", label=f"noise floor {floor:.3f}")
        for y, row in enumerate(shown):
            low, high = row["interval"]
            colour = COLOURS.get(row["method"].split(",")[0], "0.5")
            axes.plot([low, high], [y, y], color=colour)
            axes.plot(row["distance"], y, "o", color=colour)
        axes.set_yticks(range(len(shown)), [row["method"] for row in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel("distance to human text, in standard deviations (line: 95% of the bootstrap over prefixes)")
        axes.legend(loc="lower right")

    return (
        "<h3>1. Alignment</h3><p>How near each way to decode comes to human text: one continuation of each held-out "
        "prefix; 'expected' takes the mean over the draw instead.</p>"
        + _figure(9, 0.32 * len(rows) + 1.2, draw, "distance to human of each method")
        + _table(
            ["method", *names, "MAUVE", "length", "distance", "relative RMSE"], table,
            "Means x100 (ent: perplexity) ± standard error over prefixes. Marked: the nearest to human. Distance: root "
            "mean square over the fitted metrics of (mean - human mean) / standard deviation of human text, with the "
            f"95% interval of a bootstrap over prefixes; its noise floor is {floor:.3f}, and "
            f"{floor * 2**0.5:.3f} for single texts.", marked,
        )
    )  # fmt: skip


def _perplexity(found: Found) -> str:
    p = found["perplexity"]
    summary = [
        ["p_theta", p["model"]], ["what is tilted (the proposal)", p["base"]], ["p_mu", p["perplexity"]],
        ["gain of p_mu, nats a text", f"{p['gain']:.4f} ± {p['gain_error']:.4f}"],
        ["KL(p_mu || tilted), nats a text", p["kl"]],
        ["gain of p_mu, nats a token", f"{p['gain_per_token']:.5f} ± {p['gain_per_token_error']:.5f}"],
        ["standard error of log Z, one prefix", p["log_z_error"]],
        ["standard error of log Z, mean over prefixes", p["log_z_error_of_mean"]],
    ]  # fmt: skip
    if "perplexity" in (other := p.get("tilting_model", {})):
        gain = f"{other['gain_per_token']:.5f} ± {other['gain_per_token_error']:.5f}"
        summary += [
            ["p_mu refitted to tilt p_theta itself", other["perplexity"]],
            ["its gain over p_theta, nats a token", gain],
        ]
    by_m = [
        [str(x["m"]), x["perplexity"], f"{x['gain']:.4f} ± {x['gain_error']:.4f}", x["kl"], x["log_z_error"]]
        for x in [*p["by_m"], p]
    ]
    return (
        "<h3>2. Perplexity of human text</h3><p>The paper proves that p_mu is never worse than what it tilts, and "
        "better by KL(p_mu || p_theta) where human expectations are met exactly: gain and KL should agree.</p>"
        + _table(["", "value"], summary, "Perplexity per token; gains with standard errors over prefixes.")
        + _table(
            ["M", "perplexity", "gain, nats a text", "KL", "error of log Z"],
            by_m,
            "The same from fewer candidates: log Z from few candidates is too low, which flatters the perplexity.",
        )
    )


def _convergence(found: Found) -> str:
    studies = {kind: study for kind, study in found["convergence"].items() if study["rows"]}

    def draw(figure: Any) -> None:
        for axes, (kind, study) in zip(
            figure.subplots(1, len(studies), squeeze=False)[0], studies.items(), strict=True
        ):
            m = [row["m"] for row in study["rows"]]
            axes.loglog(m, [row["bias_norm"] for row in study["rows"]], "o-", color="#2b6ca3", label="bias")
            axes.loglog(m, [row["noise"] for row in study["rows"]], ":", color="0.5", label="its noise")
            variance = [sum(row["variance"]) / len(row["variance"]) for row in study["rows"]]
            axes.loglog(m, variance, "s-", color="#c44e52", label="variance")
            axes.set_title(f"{kind.replace('_', ' ')} fit: slope of the bias {_slope(study)}", fontsize=10)
            axes.set_xlabel("M")
            axes.legend()

    rows = [
        [kind, str(row["m"]), f"{row['bias_norm']:.5f}", f"{row['noise']:.5f}",
         f"{sum(row['variance']) / len(row['variance']):.4f}", row["ess"],
         "used" if row["m"] in study["used"] else ""]
        for kind, study in studies.items() for row in study["rows"]
    ]  # fmt: skip
    infeasible = "".join(
        f"<p>{_text(kind)} fit: {_text(study['infeasible'])}</p>"
        for kind, study in found["convergence"].items() if "infeasible" in study
    )  # fmt: skip
    return (
        "<h3>3. Convergence of the draw</h3><p>Bias and variance of the expected metrics against the number of "
        "candidates, in standard deviations of the candidates; the claim is a slope of -1.</p>"
        + (_figure(5 * len(studies), 4, draw, "bias and variance against M") if studies else "")
        + infeasible
        + _table(
            ["fit", "M", "bias", "noise of it", "variance", "ESS", "slope"],
            rows,
            "Root mean square over metrics. Slope of the bias: "
            + "; ".join(
                f"{kind.replace('_', ' ')} fit {_slope(study)}, with an ESS of the whole pool of "
                f"{study['pool_ess']['mean']:.0f} of {study['pool_ess']['candidates']} on average"
                for kind, study in studies.items()
            )
            + ". It is fitted to the sizes of healthy ESS whose bias exceeds twice its noise.",
        )
    )


def _slope(study: Found) -> str:
    return "not resolved" if study["slope"] is None else f"{study['slope']:.2f} ± {study['slope_error']:.2f}"


def _one_metric(found: Found) -> str:
    one = found["one_metric"]
    rows = [[who, _scaled(one["metric"], one[who]["mean"][0], one[who]["standard_error"][0])]
            for who in ("human", "sampling", "daemon")]  # fmt: skip
    p = one["perplexity"]
    rows += [["perplexity of human text, tilted", p["base"]], ["perplexity of human text, p_mu", p["perplexity"]]]
    return (
        "<h3>4. One metric alone</h3><p>Does a single coefficient bring repetition to the human level without cost in "
        "perplexity?</p>" + _table(["", one["metric"]], rows, f"mu = {one['mu'][0]:.4g}, held-out prefixes.")
    )


def _temperatures(found: Found) -> str:
    points = [row for row in found["temperatures"] if None not in map(row.get, ("diversity", "coherence"))]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for method in ("human", "sampling", "refitted", "reused"):
            own = [row for row in points if row["method"] == method]
            x, y = ([100 * row[what] for row in own] for what in ("diversity", "coherence"))
            axes.plot(x, y, "*" if method == "human" else "o-", color=COLOURS[method], label=method)
            for row, a, b in zip(own, x, y, strict=True):
                label = "" if row["temperature"] is None else f"{row['temperature']:g}"
                axes.annotate(label, (a, b), fontsize=8, xytext=(3, 3), textcoords="offset points")
        axes.set_xlabel("diversity x100")
        axes.set_ylabel("coherence x100")
        axes.legend()

    table = []
    for row in found["temperatures"]:
        cells = ["out of reach", "", "", "", ""]
        if "mean" in row:
            shares = (row.get(name) for name in ("diversity", "coherence"))
            cells = [_number(row["distance"]), *("-" if x is None else f"{100 * x:.2f}" for x in shares)]
            cells += [_number(row.get("perplexity")), _number(row.get("ess"), 1)]
        temperature = "-" if row["temperature"] is None else f"{row['temperature']:g}"
        table.append([temperature, row["method"], *cells])
    return (
        "<h3>5. Temperature of the proposal</h3><p>Diversity against coherence, with mu refitted at each temperature "
        "and with the artefact's own reused.</p>"
        + (_figure(7, 4.5, draw, "diversity against coherence") if points else "")
        + _table(
            ["temperature", "method", "distance", "diversity", "coherence", "perplexity of human text", "ESS"],
            table,
            "Held-out prefixes. Perplexity under the proposal (sampling) or under p_mu: where the ESS is low, log Z of "
            "p_mu is, too, and its perplexity means nothing.",
        )
    )


def _ablation(found: Found) -> str:
    names = found["names"]
    rows = [
        [row["left_out"] or "nothing", *(f"{shift:+.3f}" for shift in row["shift"]), row["distance"]]
        for row in found["ablation"]
    ]
    marked = [
        (i, 1 + names.index(row["left_out"])) for i, row in enumerate(found["ablation"]) if row["left_out"] is not None
    ]
    return "<h3>6. Leaving a metric out</h3><p>What drifts when the fit does without one metric (marked).</p>" + _table(
        ["left out", *names, "distance"], rows, "Mean minus human mean, in standard deviations of human text.", marked
    )


def _forward_kl(found: Found) -> str:
    study = found["forward_kl"]
    intro = (
        "<h3>7. Reverse against forward KL</h3><p>The same expectations, reached by minimising KL(q || p) (DAEMON) or "
        "KL(p || q).</p>"
    )
    names = found["names"]
    rows = [
        [row["on"], row["direction"], *(_scaled(n, m) for n, m in zip(names, row["mean"], strict=True)),
         row["distance"], row["ess"], row["largest_weight"]]
        for row in study["rows"]
    ]  # fmt: skip
    head = ["prefixes", "KL", *names, "distance", "ESS", "largest weight"]
    return intro + _table(head, rows, "Means x100 (ent: perplexity); ESS and largest weight are means over prefixes.")


def _tail(found: Found) -> str:
    names, rows = found["names"], found["tail"]
    wide = min(len(names), 5)
    high = -(-len(names) // wide)

    def draw(figure: Any) -> None:
        for k in range(len(names)):
            axes = figure.add_subplot(high, wide, k + 1)
            scale = 1 if names[k] == "ent" else 100
            x = [(row["from"] + row["to"]) / 2 for row in rows]
            mean, error = ([scale * row[what][k] for row in rows] for what in ("mean", "standard_error"))
            axes.errorbar(x, mean, yerr=error, fmt="o-", color="#2b6ca3", markersize=3)
            axes.set_title(names[k].replace("$", r"\$"), fontsize=9)  # a name is not mathematics
            axes.tick_params(labelsize=7)

    table = [
        [f"{row['from']:.2f} to {row['to']:.2f}", str(row["count"]),
         *(_scaled(n, m, e) for n, m, e in zip(names, row["mean"], row["standard_error"], strict=True))]
        for row in rows
    ]  # fmt: skip
    return (
        "<h3>8. The tail</h3><p>Is the region of low probability the poor one? Candidates in bins of equal number by "
        "log p_theta a token.</p>"
        + _figure(2.2 * wide, 1.9 * high, draw, "metrics by probability")
        + _table(["log p a token", "candidates", *names], table, "Means x100 (ent: perplexity) ± standard error.")
    )


def _transfer(rows: Sequence[Found]) -> str:
    table = [[row["fitted_on"], row["used_on"], row["distance"], row["sampling"], row["noise_floor"]] for row in rows]
    return "<h2>9. Transfer</h2><p>mu fitted on one domain, used on another.</p>" + _table(
        ["fitted on", "used on", "distance", "plain sampling", "noise floor"], table, "Held-out prefixes."
    )


SECTIONS: dict[str, Callable[[Found], str]] = {
    "alignment": _alignment,
    "perplexity": _perplexity,
    "convergence": _convergence,
    "one_metric": _one_metric,
    "temperatures": _temperatures,
    "ablation": _ablation,
    "forward_kl": _forward_kl,
    "tail": _tail,
}
