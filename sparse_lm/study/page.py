"""A study's page and plots: report.html and plots/*.svg, readable while runs still go on."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from sparse_lm.study.plots import figures
from sparse_lm.study.results import Results, claim_rows, power_sentence, variant_rows
from sparse_lm.telemetry.format import duration
from sparse_lm.telemetry.page import cards, page, table, tile
from sparse_lm.telemetry.sinks import replace_file

PAGE_NAME, PLOTS_NAME = "report.html", "plots"
EXPLANATION = (
    "A comparison is shown when its whole interval (bootstrap over seeds, paired) lies in the claimed range, "
    "contradicted when all of it lies outside. 'Could have seen' is the smallest true difference that so many seeds "
    "would find in 80 % of repetitions; 'luck' is about the chance of 'shown' when the claim is just false. Numbers "
    "are in the unit of their measure, which is the first one below where none is named."
)


# Words of these tables are names and numbers, which must not be broken within.
_STYLE = (
    "<style>.study td, .study th { overflow-wrap: normal; padding-right: 14px; } td.n { white-space: nowrap; }</style>"
)


def render(results: Results) -> str:
    """The page as HTML."""
    study, plan = results.plan.study, results.plan
    states = list(results.states.values())
    verdicts = [judged.verdict for judged in results.judged]
    source = f"{study.source.paper} (arXiv {study.source.arxiv}), {study.source.table}"
    tiles = [
        tile("Runs", f"{states.count('finished')} / {len(states)}", f"{states.count('failed')} failed"),
        tile(
            "Claims shown",
            f"{verdicts.count('shown')} / {len(verdicts)}",
            f"{verdicts.count('contradicted')} contradicted",
        ),
        tile("Scale", plan.scale, f"{len({run.seed for run in plan.runs})} seeds, equal {study.budget}"),
        tile("Training", duration(results.seconds), "all finished runs"),
    ]
    head, rows = variant_rows(results)
    claim_head, claims = claim_rows(results)
    parts = [
        _STYLE,
        f'<h1>{escape(study.name)}</h1>\n<p>{escape(study.question)}</p>\n<p class="muted">{escape(source)}</p>',
        f'<div class="tiles">{"".join(tiles)}</div>',
        f"<p>{escape(power_sentence(results))}</p>",
        "<h2>Claims</h2>",
        _study(table(claim_head, claims, numeric=(4, 5, 6, 7))),
        f'<p class="muted">{escape(EXPLANATION)}</p>',
        "<h2>Variants</h2>",
        _study(table(head, rows, numeric=tuple(range(1, len(head))))),
        cards(figures(results)),
    ]
    if results.failures:
        parts += ["<h2>Failed runs</h2>", table(("run", "error"), list(results.failures.items()))]
        parts.append("<p>Means leave them out, which flatters a variant whose bad seeds fail.</p>")
    parts += [f"<p>{escape(study.notes)}</p>"] if study.notes else []
    parts += [f"<p><code>{escape(results.command)}</code></p>"] if results.command else []
    return page(f"{study.name} - sparse_lm", "\n".join(parts))


def _study(markup: str) -> str:
    return f'<div class="study">{markup}</div>'


def plot_name(heading: str) -> str:
    """The file of a figure among the plots, by its heading."""
    return re.sub(r"[^a-z0-9]+", "_", heading.lower()).strip("_") + ".svg"


def write_page(results: Results, directory: Path) -> Path:
    """Writes report.html and the plots as files of their own; returns the page's path."""
    plots = directory / PLOTS_NAME
    plots.mkdir(parents=True, exist_ok=True)
    for figure in figures(results):
        replace_file(plots / plot_name(figure.heading), figure.svg.encode())
    path = directory / PAGE_NAME
    replace_file(path, render(results).encode())
    return path
