"""The frame of the report page: style, tooltip script, tables and cards. Everything is inside the one file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from sparse_lm.telemetry.figures import Figure

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 24px 48px; max-width: 1200px; background: #fff; color: #222;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 38px 0 6px; padding-top: 12px; border-top: 1px solid #ddd; }
h3 { font-size: 15px; margin: 0; }
p { margin: 4px 0 10px; max-width: 78ch; }
.muted, figcaption { color: #5a5a5a; font-size: 13px; }
figcaption { margin: 1px 0 8px; min-height: 1.5em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(45%, 176px), 1fr)); gap: 10px;
  margin: 16px 0 8px; }
.tile { border: 1px solid #dcdcdc; border-radius: 6px; padding: 9px 12px; }
.tile b { display: block; font-size: 21px; line-height: 1.25; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile span { display: block; font-size: 12.5px; line-height: 1.35; color: #5a5a5a; }
.tile .name { color: #222; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); gap: 26px 32px;
  margin: 14px 0; }
.grid.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); gap: 20px 26px; }
figure { margin: 0; min-width: 0; max-width: 600px; break-inside: avoid; }
.small figure { max-width: 400px; }
@supports (grid-template-rows: subgrid) { .grid, .grid.small { row-gap: 0; }
  figure { display: grid; grid-row: span 3; grid-template-rows: subgrid; margin-bottom: 26px; } }
svg.chart { display: block; width: 100%; height: auto; }
.key { max-width: 360px; margin: 10px 0; }
details { border-bottom: 1px solid #e4e4e4; }
summary { cursor: pointer; padding: 7px 0; font-weight: 600; }
table { border-collapse: collapse; margin: 4px 0 14px; font-size: 13.5px; }
td, th { text-align: left; vertical-align: top; padding: 3px 22px 3px 0; border-bottom: 1px solid #eee;
  overflow-wrap: anywhere; }
th { font-weight: 600; color: #5a5a5a; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
#tip { position: absolute; pointer-events: none; background: #222; color: #fff; font-size: 12px; line-height: 1.4;
  padding: 4px 8px; border-radius: 4px; white-space: pre; display: none; z-index: 9; }
@media (max-width: 560px) { body { padding: 18px 14px 36px; } h1 { font-size: 22px; } }
@media print { body { max-width: none; padding: 0; font-size: 11px; } .tile b { font-size: 15px; }
  .grid { grid-template-columns: 1fr 1fr; gap: 14px 18px; } .grid.small { grid-template-columns: 1fr 1fr 1fr; }
  h2 { break-after: avoid; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

# Neither "<" nor "&" may stand in here: the page is well-formed XML too, which the tests parse.
SCRIPT = """
(function () {
  var tip = document.createElement("div");
  tip.id = "tip";
  document.body.appendChild(tip);
  function round(v) { return Math.abs(v) >= 1e5 ? v.toLocaleString("en", {maximumFractionDigits: 0})
    : String(Number(v.toPrecision(3))); }
  function value(share, ends) { return ends[2] ? ends[0] * Math.pow(ends[1] / ends[0], share)
    : ends[0] + share * (ends[1] - ends[0]); }
  function nums(svg, name) { return svg.dataset[name].split(" ").map(Number); }
  function points(path) {
    if (!path.points) path.points = path.getAttribute("d").split(/[ML]/).slice(1).map(function (p) {
      return p.split(",").map(Number); });
    return path.points;
  }
  function lines(svg, x, plot) {
    var nearest = null, rows = [];
    svg.querySelectorAll("path.series").forEach(function (path) {
      var best = points(path).reduce(function (a, b) { return Math.abs(b[0] - x) > Math.abs(a[0] - x) ? a : b; });
      if (nearest === null || Math.abs(nearest - x) > Math.abs(best[0] - x)) nearest = best[0];
      rows.push([path.dataset.name, best]);
    });
    if (nearest === null) return "";
    var at = value((nearest - plot[0]) / (plot[2] - plot[0]), nums(svg, "x"));
    return ["step " + Math.round(at).toLocaleString("en")].concat(rows.map(function (row) {
      return row[0] + ": " + round(value((plot[3] - row[1][1]) / (plot[3] - plot[1]), nums(svg, "y")));
    })).join("\\n");
  }
  function heat(svg, x, y, plot) {
    if (!svg.cells) svg.cells = atob(svg.dataset.cells);
    var columns = Number(svg.dataset.columns), rows = Number(svg.dataset.rows), most = Number(svg.dataset.most);
    var share = (x - plot[0]) / (plot[2] - plot[0]);
    var column = Math.min(columns - 1, Math.floor(share * columns));
    var row = Math.min(rows - 1, Math.floor((y - plot[1]) / (plot[3] - plot[1]) * rows));
    var level = svg.cells.charCodeAt(row * columns + column);
    var load = level === 255 ? "no record" : round(Math.pow(most, 2 * level / 254 - 1)) + " x even load";
    var edge = level === 0 ? "at most " : level === 254 ? "at least " : "";
    var step = Math.round(value(share, nums(svg, "x"))).toLocaleString("en");
    return "step " + step + "\\nexpert " + row + ": " + edge + load;
  }
  document.querySelectorAll("svg[data-kind]").forEach(function (svg) {
    svg.addEventListener("mousemove", function (event) {
      var box = svg.getBoundingClientRect(), plot = nums(svg, "plot"), scale = svg.viewBox.baseVal.width / box.width;
      var x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
      var inside = [x - plot[0], plot[2] - x, y - plot[1], plot[3] - y].every(function (d) { return d >= 0; });
      var words = inside ? (svg.dataset.kind === "heat" ? heat(svg, x, y, plot) : lines(svg, x, plot)) : "";
      tip.textContent = words;
      tip.style.display = words ? "block" : "none";
      var right = event.pageX + 14 + tip.offsetWidth > document.documentElement.clientWidth;
      tip.style.left = (right ? event.pageX - 14 - tip.offsetWidth : event.pageX + 14) + "px";
      tip.style.top = (event.pageY + 14) + "px";
    });
    svg.addEventListener("mouseleave", function () { tip.style.display = "none"; });
  });
})();
"""


def page(title: str, body: str) -> str:
    """A whole HTML document, also well-formed XML. `title` is escaped, `body` is markup."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def tile(name: str, value: str, detail: str) -> str:
    """A number with its name above and its unit or context below; all are escaped."""
    return (
        f'<div class="tile"><span class="name">{escape(name)}</span><b>{escape(value)}</b>'
        f"<span>{escape(detail)}</span></div>"
    )


def cards(figures: Sequence[Figure], small: bool = False) -> str:
    """Figures side by side, as many as the width allows."""
    shown = "".join(
        f"<figure><h3>{escape(f.heading)}</h3><figcaption>{escape(f.caption)}</figcaption>{f.svg}</figure>\n"
        for f in figures
    )
    return f'<div class="grid{" small" if small else ""}">\n{shown}</div>\n' if figures else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table; all cells are escaped. numeric: the columns that are aligned to the right."""

    def line(kind: str, cells: Sequence[str]) -> str:
        opening = [f'{kind} class="n"' if i in numeric else kind for i in range(len(head))]
        shown = (f"<{tag}>{escape(cell)}</{kind}>" for tag, cell in zip(opening, cells, strict=True))
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table>{line("th", head)}{body}</table></div>'


def flatten(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """The leaves of nested mappings as (dotted key, value as text); lists on one line, None as "off"."""
    if isinstance(tree, Mapping):
        return [
            leaf for key, value in tree.items() for leaf in flatten(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(tree, (list, tuple)):
        return [(prefix, ", ".join(str(item) for item in tree) or "none")]
    return [(prefix, "off" if tree is None else str(tree))]


def folded(heading: str, tree: Any) -> str:
    """A folded table of every leaf of `tree`."""
    leaves = table(("key", "value"), flatten(tree, "" if isinstance(tree, Mapping) else heading))
    return f"<details><summary>{escape(heading)}</summary>{leaves}</details>\n"
