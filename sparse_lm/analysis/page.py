"""The page of an analysis, analysis.html, and its numbers, analysis.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from sparse_lm.analysis.export import as_json
from sparse_lm.analysis.information import Information, lift
from sparse_lm.analysis.plots import COLORS, cell_map
from sparse_lm.analysis.run import Analysis, Specialisation
from sparse_lm.analysis.sections import color_legend_box, feed_forward_sections
from sparse_lm.telemetry.figures import Figure
from sparse_lm.telemetry.format import percent
from sparse_lm.telemetry.page import cards, page, table, tile
from sparse_lm.telemetry.routing import chosen_layers
from sparse_lm.telemetry.sinks import replace_file

PAGE_NAME, JSON_NAME = "analysis.html", "analysis.json"
_STYLE = (
    "<style>.words table { width: 100%; } .words td, .words th { padding-right: 16px; overflow-wrap: normal; } "
    ".words span { white-space: nowrap; } .words td:last-child code { white-space: pre; }</style>"
)
BIAS = (
    "Bits per assignment, estimated from counts. Such an estimate is above 0 for unrelated labels too, the more so "
    "the more experts and labels and the fewer tokens there are; 'shuffled' is what it gives after the labels were "
    "dealt out anew, on average and at most, and only what is above that says something. Token classes and positions "
    "are shuffled by token, domains and languages by document, since the tokens of one document are alike. 'Share' is "
    "the excess over the mean shuffle, as a share of the entropy of the labels."
)
UNKNOWN = "Of no domain is it known in what language it is; --languages=domain=language,... tells."
HEADS = (
    "'value 1.2' is the third expert of the second head for values, 'output' one for outputs. Every head has as many "
    "assignments as any other, so that bits are the mean over heads and both sides."
)


def write_analysis(found: Analysis, command: str = "") -> Path:
    """Writes both files into the directory of the run and returns the page's path; older ones are replaced whole."""
    content = as_json(found, command)
    replace_file(found.workdir / JSON_NAME, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    path = found.workdir / PAGE_NAME
    replace_file(path, render(found, command).encode())
    return path


def render(found: Analysis, command: str = "") -> str:
    """The page as HTML."""
    parts, inside = [_STYLE, _head(found)], found.feed_forward
    if inside is not None:
        parts += ["<h2>What experts specialise in</h2>", *_special(inside.specialisation, inside.experts, "Experts")]
    if not any(one.kind == "language" for _, special in found.all_specialisation() for one in special):
        parts += [f'<p class="muted">{UNKNOWN}</p>']
    parts += _attention(found)
    parts += [] if inside is None else feed_forward_sections(found, inside)
    parts += [f"<p><code>{escape(command)}</code></p>"] if command else []
    return page(f"experts of {found.workdir.name} - sparse_lm", "\n".join(parts))


def _head(found: Analysis) -> str:
    tiles = [*_sizes(found), tile("Tokens looked at", f"{len(found.tokens.id_M):,}", "held out")]
    for one in found.all_specialisation()[0][1]:
        best = max(one.information, key=lambda i: i.excess)
        tiles.append(
            tile(one.kind.capitalize(), f"{best.excess:.3g} bits", f"above chance, of {best.entropy:.3g}; best layer")
        )
    inside = found.feed_forward
    if inside is not None and inside.removal is not None:
        tiles.append(tile("Loss", f"{inside.removal.loss:.3f}", "nats / target, on the rows of the interventions"))
    words = f"Checkpoint of step {found.loaded.step:,}, routed as in evaluation."
    words += "" if inside is None else " Layers are counted among the sparse ones."
    if not found.expected_data:
        words += " The data are not those that the run was trained on (another fingerprint)."
    name = escape(found.workdir.name)
    return f'<h1>The experts of {name}</h1>\n<p>{escape(words)}</p>\n<div class="tiles">{"".join(tiles)}</div>'


def _sizes(found: Analysis) -> list[str]:
    """A tile for each kind of experts."""
    model, inside, tiles = found.loaded.experiment.model, found.feed_forward, []
    if inside is not None and model.moe is not None:
        layers = len(inside.observed.expert_NMK)
        tiles.append(
            tile("Experts", f"{model.moe.top_k} of {inside.observed.num_experts}", f"in each of {layers} layers")
        )
    if found.attention is not None and model.attention is not None:
        form, where = model.attention, f"in each of {len(found.attention.load_NE)} layers"
        where = where if found.attention.experts[0].isdigit() else f"for each head and side, {where}"
        tiles.append(tile("Experts in attention", f"{form.top_k} of {form.num_experts}", where))
    return tiles


def _attention(found: Analysis) -> list[str]:
    """The experts in the attention, where there are any."""
    if found.attention is None:
        return []
    experts, load_NE = found.attention.experts, found.attention.load_NE
    share_NE = load_NE / np.maximum(load_NE.sum(1, keepdims=True), 1)
    rows = [
        (str(n + 1), *(f"{experts[e]} {percent(float(share[e]), 3)}" for e in (share.argmax(), share.argmin())))
        for n, share in enumerate(share_NE)
    ]
    words = "Layers are all layers here. Nothing is dropped in attention."
    words += f" {HEADS}" if not experts[0].isdigit() else ""
    return [
        "<h2>Experts in attention</h2>",
        f"<p>{words}</p>",
        table(("layer", "chosen most", "chosen least"), rows, numeric=(0,)),
        *_special(found.attention.specialisation, experts, "Attention experts"),
    ]


def _special(specialisation: Sequence[Specialisation], experts: Sequence[str], title: str) -> list[str]:
    """What some experts specialise in: the table, then maps for each kind of label."""
    parts = [_information(specialisation), color_legend_box(COLORS, "times as often as among all assignments")]
    for one in specialisation:
        parts += [f"<h3>{title} by {one.kind}</h3>", cards(_special_maps(one, experts, title))]
    return parts


def _information(specialisation: Sequence[Specialisation]) -> str:
    head = ("label", "layer", "bits", "shuffled, mean", "shuffled, highest", "of (entropy)", "share", "above chance")
    rows = [_information_row(one, i, x) for one in specialisation for i, x in enumerate(one.information)]
    return f'{table(head, rows, numeric=(1, 2, 3, 4, 5, 6))}<p class="muted">{escape(BIAS)}</p>'


def _information_row(one: Specialisation, layer: int, x: Information) -> tuple[str, ...]:
    numbers = (f"{value:.4f}" for value in (x.bits, x.shuffled, x.highest))
    said = "one label only" if x.entropy == 0 else "no" if x.chance else f"yes, of {x.shuffles} shuffles none"
    return (one.kind, str(layer + 1), *numbers, f"{x.entropy:.3f}", percent(x.share, 3), said)


def _special_maps(one: Specialisation, experts: Sequence[str], title: str) -> list[Figure]:
    figures = []
    for layer in chosen_layers(len(one.counts_NEC)):
        counts = one.counts_NEC[layer]
        ratios = lift(counts)
        total = np.maximum(counts.sum(1), 1)

        def words(i: int, j: int, counts=counts, ratios=ratios, total=total) -> str:
            share = percent(float(counts[i, j] / total[i]), 3)
            return f"expert {experts[i]}, {one.names[j]}: {share} of its {total[i]:,}, {ratios[i, j]:.2f} times"

        svg = cell_map(ratios, experts, one.names, f"{title} by {one.kind}, layer {layer + 1}", words)
        x = one.information[layer]
        caption = f"{x.bits:.3f} bits, {x.shuffled:.3f} shuffled. Rows are experts."
        figures.append(Figure(f"Layer {layer + 1}", caption, svg))
    return figures
