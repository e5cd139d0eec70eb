"""What a benchmark measured, as files for other programs: JSON, and beside it CSV and a plot."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from sparse_lm.bench.harness import Drawn, Report
from sparse_lm.config import ConfigError, dotted
from sparse_lm.telemetry.axes import Axis, make_scale
from sparse_lm.telemetry.colors import SERIES
from sparse_lm.telemetry.format import compact
from sparse_lm.telemetry.svg import INK, MARGIN, Frame, Series, Size, line_chart, num, root, text, x_axis

_BAR, _GAP, _WIDTH = 13, 8, 640


def write(reports: Sequence[Report], path: Path, together: bool) -> None:
    """Writes `path`, and for each report a CSV and an SVG file beside it.

    together: the JSON is a list, and the other files have the name of the benchmark after that of `path`. Raises
    `ConfigError` when they cannot be written.
    """
    values = [report.to_json() for report in reports]
    texts = {path: json.dumps(values if together else values[0], indent=2) + "\n"}
    for report in reports:
        stem = f"{path.stem}-{report.name}" if together else path.stem
        texts[path.with_name(f"{stem}.csv")] = to_csv(report)
        texts[path.with_name(f"{stem}.svg")] = to_svg(report)
    if len(texts) != 1 + 2 * len(reports):
        raise ConfigError("json", str(path), "has the ending of the files beside it; end it in .json")
    try:
        for file, content in texts.items():
            file.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError("json", str(path), f"cannot be written ({error}); choose another file") from error


def to_csv(report: Report) -> str:
    """Every number of every row, what is nested as `name.part`; then machine, load and date, the same in each line."""
    here = report.machine
    where = {"cpu": here.cpu, "cores": here.cores, "load": here.load, "device": here.device_kind, "date": report.date}
    lines = [{"benchmark": report.name, **dotted(row.to_json()), **where} for row in report.rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def to_svg(report: Report) -> str:
    """Lines over a logarithmic axis where the rows have a place on one, else bars. Raises `ValueError` without rows."""
    drawn = [row.drawn() for row in report.rows]
    if not drawn:
        raise ValueError(f"benchmark {report.name!r} has no rows to plot")
    title = f"{report.name}, {report.date}, {report.machine.cpu}"
    return lines(drawn, title) if all(one.x is not None for one in drawn) else bars(drawn, title)


def lines(drawn: Sequence[Drawn], title: str) -> str:
    """A line for each `Drawn.line` and value, both axes logarithmic."""
    names = dict.fromkeys((one.line, value) for one in drawn for value in one.values)
    colors = {line: SERIES[i % len(SERIES)] for i, line in enumerate(dict.fromkeys(one.line for one in drawn))}
    series = []
    for line, value in names:
        there = [(one.x, one.values.get(value)) for one in drawn if one.line == line and one.x is not None]
        x, y = zip(*there, strict=True)
        dash = None if value == next(iter(drawn[0].values)) else "5 4"
        series.append(Series(f"{line} {value}", x, y, colors[line], markers=True, dash=dash))
    chart = line_chart(series, Axis("experts", log=True), Axis(drawn[0].unit, log=True), title, size=Size(_WIDTH, 320))
    return chart.replace(' data-kind="lines"', "")  # no page around it whose script would read it


def bars(drawn: Sequence[Drawn], title: str) -> str:
    """A group of horizontal bars for each row, one for each of its values, with the number at its end."""
    names = list(dict.fromkeys(name for one in drawn for name in one.values))
    group = 16 + _BAR * len(names) + _GAP
    top = 40
    size = Size(_WIDTH, top + group * len(drawn) + 40)
    frame = Frame(12, top, size.width - MARGIN - 50, size.height - 38)
    most = [value for one in drawn for value in one.values.values()]
    scale = make_scale(Axis(drawn[0].unit, low=0.0), [0.0, *most], frame.left, frame.right, pad=True)
    body = [text(2, 12, title, fill=INK)]
    for i, name in enumerate(names):
        body.append(f'<rect x="{2 + 110 * i}" y="20" width="10" height="10" fill="{SERIES[i % len(SERIES)]}"/>')
        body.append(text(16 + 110 * i, 29, name.replace("_", " ")))
    for row, one in enumerate(drawn):
        y = top + row * group
        body.append(text(frame.left, y + 12, one.name, fill=INK))
        for i, (name, value) in enumerate(one.values.items()):
            at = y + 16 + _BAR * i
            end = scale(value)
            color = SERIES[names.index(name) % len(SERIES)]
            body.append(
                f'<rect x="{num(frame.left)}" y="{at}" width="{num(max(0.6, end - frame.left))}" '
                f'height="{_BAR - 2}" fill="{color}"/>'
            )
            body.append(text(end + 5, at + 10, compact(value)))
    body.append(x_axis(frame, scale, Axis(drawn[0].unit)))
    return root(size, title, "".join(body))
