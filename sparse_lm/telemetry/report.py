"""A run's report: one self-contained HTML page, readable while the run still goes on."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from sparse_lm.telemetry import figures, routing
from sparse_lm.telemetry.format import MISSING, compact, duration, grouped, percent
from sparse_lm.telemetry.page import cards, folded, page, table, tile
from sparse_lm.telemetry.rundata import RunData, Verdict, get, load_run, number, verdict
from sparse_lm.telemetry.sinks import replace_file
from sparse_lm.telemetry.svg import color_legend

REPORT_NAME = "report.html"


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir`/report.html from config.json and metrics.jsonl; returns its path.

    An older page is replaced whole.

    Raises `FileNotFoundError` when there is no config.json and `ValueError` when either file is damaged.
    """
    path = Path(run_dir) / REPORT_NAME
    replace_file(path, render(load_run(Path(run_dir))).encode())
    return path


def render(run: RunData) -> str:
    """The page of a run as HTML."""
    bottom = verdict(run)
    parts = [_head(run, bottom)]
    if not run.train and not run.validation:
        parts.append("<p>No rows of metrics yet. Write the report again when the run has logged a step.</p>")
    else:
        main = figures.present(lambda: figures.losses(run, bottom), lambda: figures.domains(run))
        parts += ["<h2>Loss</h2>", cards(main), _domain_table(run), _routing(run)]
        optimization = figures.optimization(run)
        if optimization:
            parts += ["<h2>Optimization and throughput</h2>", cards(optimization)]
    parts.append(_appendix(run))
    return page(f"{run.name} - sparse_lm", "\n".join(part for part in parts if part))


def _head(run: RunData, bottom: Verdict) -> str:
    return (
        f"<h1>{escape(run.name)}</h1>\n<p>{escape(state_sentence(run, bottom))}</p>\n"
        f'<div class="tiles">{"".join(_tiles(run, bottom))}</div>'
    )


def state_sentence(run: RunData, bottom: Verdict) -> str:
    """How far the run is, for how long it went, and what went wrong, in words."""
    total, done = run.total_steps, run.last_step
    if total is None:
        words = f"{done:,} steps"
    elif done >= total:
        words = f"Finished: {done:,} of {total:,} steps"
    else:
        words = f"Not finished: {done:,} of {total:,} steps"
    words += f" in {duration(bottom.seconds)}." if bottom.seconds is not None else "."
    if bottom.nonfinite_steps:
        words += f" {bottom.nonfinite_steps:,} steps had a loss or gradient that was not finite and changed nothing."
    idle = routing.idle_experts(run)
    if idle is not None and idle[0]:
        words += f" Idle experts (under a tenth of an even load): {idle[0]} of {idle[1]:,}."
    elif idle is not None:
        words += f" All {idle[1]} experts are in use."
    return words


def _tiles(run: RunData, bottom: Verdict) -> list[str]:
    rows = "last row" if bottom.averaged <= 1 else f"mean of {bottom.averaged:,} rows"
    at = "no validation yet" if bottom.validation_step is None else f"step {bottom.validation_step:,}"
    tiles = [
        tile("Train loss", _loss(bottom.train_loss), f"nats / token, {rows}"),
        tile("Validation loss", _loss(bottom.validation_loss), f"nats / token, {at}"),
    ]
    if bottom.bits_per_byte is not None:
        tiles.append(tile("Bits per byte", f"{bottom.bits_per_byte:.3f}", f"validation, {at}"))
    if bottom.entropy_gap is not None:
        tiles.append(tile("Above the best", f"{bottom.entropy_gap:.3f}", "nats over the lowest possible loss"))
    tiles.append(tile("Throughput", compact(bottom.tokens_per_second), f"tokens / s, {rows}"))
    if bottom.mfu is not None:
        tiles.append(tile("MFU", percent(bottom.mfu, 3), "of the devices' FLOPs"))
    if routing.is_sparse(run):
        tiles.append(tile("Dropped", percent(bottom.dropped), f"of assignments, {rows}"))
        violation = MISSING if bottom.max_violation is None else f"{bottom.max_violation:.2f}"
        tiles.append(tile("Imbalance", violation, "busiest / mean load - 1"))
    total, active = (number(get(run.info, "parameters", key)) for key in ("total", "active"))
    if total is not None:
        detail = "all active for a token" if active in (None, total) else f"{compact(active)} active for a token"
        tiles.append(tile("Parameters", compact(total), detail))
    return tiles


def _loss(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _domain_table(run: RunData) -> str:
    names = figures.domain_names(run)
    if not names:
        return ""
    first, last = (get(row, "losses_by_domain") or {} for row in (run.validation[0], run.validation[-1]))
    rows = []
    for name in names:
        start, end = number(first.get(name)), number(last.get(name))
        change = MISSING if start is None or end is None else f"{end - start:+.3f}"
        rows.append((name, _loss(start), _loss(end), change))
    steps = [f"step {run.validation[i]['step']:,}" for i in (0, -1)]
    shown = table(("domain", *steps, "change"), rows, numeric=(1, 2, 3))
    return f"<details><summary>Validation loss by domain, nats / token</summary>{shown}</details>"


def _routing(run: RunData) -> str:
    if not routing.is_sparse(run):
        return "<h2>Routing</h2>\n<p>This is a dense run: no token is routed, so there is nothing to show here.</p>"
    parts = ["<h2>Routing</h2>"]
    maps = routing.load_maps(run)
    if maps:
        key = color_legend(routing.LOAD_COLORS, "load of an expert / even load (share x number of experts)")
        parts.append(
            '<h3>Expert load</h3>\n<p class="muted">Grey is an even load; towards yellow an expert gets more, towards '
            "dark blue less. Light and dark say the same as the colours.</p>"
        )
        parts += [f'<div class="key">{key}</div>', cards(maps, small=True)]
    else:
        parts.append(
            "<p>No row with per-layer statistics yet: load, drops and gates by layer follow with the first.</p>"
        )
    shown = figures.present(
        lambda: routing.drops(run),
        lambda: routing.drops_by_position(run),
        lambda: routing.entropy(run),
        lambda: routing.gates(run),
    )
    parts.append(cards([*shown, *routing.balance(run)]))
    return "\n".join(parts)


def _appendix(run: RunData) -> str:
    config = get(run.info, "config") or {}
    parts = ["<h2>Configuration</h2>"]
    loose = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    if loose:
        parts.append(folded("general", loose))
    parts += [folded(str(key), value) for key, value in config.items() if isinstance(value, Mapping)]
    if not config:
        parts.append("<p>config.json holds no configuration.</p>")
    parts.append("<h2>Model, data and machine</h2>")
    parameters = get(run.info, "parameters")
    if isinstance(parameters, Mapping):
        rows = [(key.replace("_", " "), grouped(number(value))) for key, value in parameters.items()]
        parts.append(table(("parameters", "count"), rows, numeric=(1,)))
    parts += [folded(key, run.info[key]) for key in ("data", "device", "versions", "git") if run.info.get(key)]
    return "\n".join(parts)
