"""The page of an analysis, analysis.html, and its numbers, analysis.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from sparse_lm.analysis.export import as_json
from sparse_lm.analysis.information import Information, lift
from sparse_lm.analysis.intervene import Effects
from sparse_lm.analysis.observe import drop_shares, loads
from sparse_lm.analysis.plots import COLORS, Signed, cell_map, signed_legend
from sparse_lm.analysis.run import Analysis, Specialisation
from sparse_lm.analysis.vocabulary import ExpertWords
from sparse_lm.telemetry.axes import Axis
from sparse_lm.telemetry.colors import depth_color
from sparse_lm.telemetry.figures import Figure
from sparse_lm.telemetry.format import percent
from sparse_lm.telemetry.page import cards, page, table, tile
from sparse_lm.telemetry.routing import chosen_layers
from sparse_lm.telemetry.sinks import replace_file
from sparse_lm.telemetry.svg import Reference, Series, color_legend, line_chart

PAGE_NAME, JSON_NAME = "analysis.html", "analysis.json"
STRONGEST = 10  # rows of a table of the strongest
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
    parts = [_STYLE, _head(found), "<h2>What experts specialise in</h2>"]
    parts += _special(found.specialisation, found.experts, "Experts")
    if "language" not in {one.kind for one in found.specialisation}:
        parts += [f'<p class="muted">{UNKNOWN}</p>']
    parts += _attention(found)
    parts += ["<h2>Router saturation</h2>", _saturation(found)]
    parts += ["<h2>Experts chosen together</h2>", _together(found)]
    parts += ["<h2>Drops by position</h2>", _drops(found)]
    parts += ["<h2>Vocabulary of each expert</h2>", _vocabulary(found)]
    parts += ["<h2>Without an expert, and with one alone</h2>", _interventions(found)]
    parts += [f"<p><code>{escape(command)}</code></p>"] if command else []
    return page(f"experts of {found.workdir.name} - sparse_lm", "\n".join(parts))


def color_legend_box(colors, label: str) -> str:
    """A legend as wide as a column of text."""
    return f'<div class="key">{color_legend(colors, label)}</div>'


def _head(found: Analysis) -> str:
    observed, moe = found.observed, found.loaded.experiment.model.moe
    assert moe is not None
    shown = {one.kind: max(one.information, key=lambda i: i.excess) for one in found.specialisation}
    tiles = [
        tile("Experts", f"{moe.top_k} of {observed.num_experts}", f"in each of {len(observed.expert_NMK)} layers"),
        tile("Tokens looked at", f"{len(observed.tokens.id_M):,}", "held out"),
    ]
    for kind, best in shown.items():
        tiles.append(
            tile(kind.capitalize(), f"{best.excess:.3g} bits", f"above chance, of {best.entropy:.3g}; best layer")
        )
    if found.removal is not None:
        tiles.append(tile("Loss", f"{found.removal.loss:.3f}", "nats / target, on the rows of the interventions"))
    words = (
        f"Checkpoint of step {found.loaded.step:,}, routed as in evaluation. Layers are counted among the sparse ones."
    )
    if not found.expected_data:
        words += " The data are not those that the run was trained on (another fingerprint)."
    name = escape(found.workdir.name)
    return f'<h1>The experts of {name}</h1>\n<p>{escape(words)}</p>\n<div class="tiles">{"".join(tiles)}</div>'


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


def _saturation(found: Analysis) -> str:
    history = found.saturation
    if len(history.steps) == 1:
        return "<p>The run keeps no other checkpoint to compare with; checkpoint.keep keeps more.</p>"
    layers = history.share_XN.shape[1]
    series = [
        Series(
            f"layer {n + 1}",
            history.steps,
            (100 * history.share_XN[:, n]).tolist(),
            depth_color(n, layers),
            markers=True,
        )
        for n in chosen_layers(layers)
    ]
    caption = (
        f"Share of a token's experts at step {found.loaded.step:,} that it had at an earlier checkpoint already "
        f"({len(history.steps)} are kept; checkpoint.keep keeps more)."
    )
    x = Axis("step", low=0, high=max(history.steps), integer=True)
    chance = [Reference("unrelated routers", 100 * history.chance)]
    svg = line_chart(series, x, Axis("% of experts", low=0.0, high=100.0), "Router saturation over steps", chance)
    return cards([Figure("Saturation", caption, svg)])


def _together(found: Analysis) -> str:
    moe = found.loaded.experiment.model.moe
    assert moe is not None
    pairs = found.pairs_NEE
    apart = np.array([np.diag(np.diag(layer)) for layer in pairs])
    if not (pairs - apart).any():
        return "<p>No token has two experts in a layer.</p>"
    # A token that has an expert has others: chance is independent choices among tokens.
    ratios = np.stack([together_lift(layer, len(found.observed.tokens.id_M)) for layer in pairs])
    figures = []
    for n in chosen_layers(len(pairs)):

        def words(i: int, j: int, n=n) -> str:
            return (
                f"experts {found.experts[i]} and {found.experts[j]}: {pairs[n, i, j]:,} tokens, "
                f"{ratios[n, i, j]:.2f} times as often as if independent"
            )

        svg = cell_map(ratios[n], found.experts, found.experts, f"Experts chosen together, layer {n + 1}", words)
        figures.append(Figure(f"Layer {n + 1}", "Pairs against independent choices.", svg))
    best = _strongest(np.where(np.isnan(ratios), -np.inf, np.triu(ratios, 1)))
    rows = [
        (str(n + 1), f"{found.experts[i]}, {found.experts[j]}", f"{pairs[n, i, j]:,}", f"{ratios[n, i, j]:.2f}",
         percent(pairs[n, i, j] / max(1, pairs[n, i, i])), percent(pairs[n, i, j] / max(1, pairs[n, j, j])))
        for n, i, j in best if pairs[n, i, j]
    ]  # fmt: skip
    head = ("layer", "experts", "tokens", "times chance", "of the first's tokens", "of the second's")
    legend = color_legend_box(COLORS, "times as often together as if independent")
    return legend + cards(figures) + table(head, rows, numeric=(0, 2, 3, 4, 5))


def together_lift(pairs_EE: np.ndarray, tokens: int) -> np.ndarray:
    """p(i and j) / (p(i) p(j)) over tokens; NaN on the diagonal and for unused experts."""
    own = np.diag(pairs_EE).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = pairs_EE * tokens / (own[:, None] * own[None, :])
    np.fill_diagonal(ratios, np.nan)
    return ratios


def _strongest(values: np.ndarray) -> list[tuple[int, ...]]:
    order = np.argsort(-values, axis=None, kind="stable")[:STRONGEST]
    return [tuple(int(i) for i in np.unravel_index(flat, values.shape)) for flat in order]


def _drops(found: Analysis) -> str:
    observed = found.observed
    if not observed.dropped_NP.any():
        return "<p>Nothing was dropped at the capacity of evaluation.</p>"
    shares = 100 * drop_shares(observed.routed_NP, observed.dropped_NP)
    layers, bins = shares.shape
    middle = [(i + 0.5) / bins for i in range(bins)]
    series = [
        Series(f"layer {n + 1}", middle, shares[n].tolist(), depth_color(n, layers), markers=True)
        for n in chosen_layers(layers)
    ]
    x = Axis("place in the routing group (share of its length)", low=0.0, high=1.0)
    svg = line_chart(series, x, Axis("% of assignments", low=0.0), "Dropped assignments by position")
    total = observed.dropped_NP.sum() / max(1, observed.routed_NP.sum())
    caption = f"{percent(float(total), 3)} of all, at the capacity of evaluation. "
    caption += "A rise means that early tokens take the places."
    return cards([Figure("Dropped share", caption, svg)])


def _vocabulary(found: Analysis) -> str:
    load_NE = loads(found.observed.expert_NMK, found.observed.num_experts)
    parts = [
        "<p>Tokens that an expert has more often than their share of all assignments, with the number of its own and "
        "the ratio (lift); then the place in the held-out text where its gate is highest for each of the first three. "
        "A ratio of few counts is mostly luck.</p>"
    ]
    for layer, experts in enumerate(found.words):
        share = load_NE[layer] / max(1, load_NE[layer].sum())
        rows = "".join(_word_row(found.experts[e], share[e], words) for e, words in enumerate(experts))
        body = f'<tr><th>expert</th><th class="n">load</th><th>tokens</th><th>in context</th></tr>{rows}'
        opened = ' open="open"' if layer == 0 else ""
        parts.append(
            f"<details{opened}><summary>Layer {layer + 1}</summary>"
            f'<div class="scroll words"><table>{body}</table></div></details>'
        )
    return "\n".join(parts)


def _word_row(name: str, share: float, words: ExpertWords) -> str:
    shown = [f"<span><code>{escape(w.name)}</code> {w.count:,} (x {w.lift:.2g})</span>" for w in words.words]
    tokens = ", ".join(shown) or ("unused" if not words.assignments else "none that it has enough of")
    examples = "<br/>".join(f"<code>{escape(example)}</code>" for example in words.examples)
    load = percent(float(share))
    return f'<tr><td>{escape(name)}</td><td class="n">{load}</td><td>{tokens}</td><td>{examples}</td></tr>'


def _interventions(found: Analysis) -> str:
    if found.removal is None or found.forcing is None:
        return "<p>Left out.</p>"
    gates = "the other gates of a token grow to the same sum" if found.options.renormalise else "its gates are lost"
    parts = [
        "<p>Loss with one expert changed, minus loss as it is. All other decisions are kept as they were, in later "
        "layers too: what is seen is the expert's own work. Forced: every token of a layer has this one expert, and "
        "nothing is dropped. ± is the standard error over rows of held-out tokens, which are chosen so that every "
        "domain is among them if it can be; without ± a single row has the domain.</p>"
    ]
    for title, effect in (("Removed", found.removal), ("Forced on all tokens", found.forcing)):
        scale = Signed(_most(effect))
        parts += [
            f"<h3>{title}</h3>",
            f'<p class="muted">{escape(gates.capitalize())}.</p>' if effect.kind == "remove" else "",
            f'<div class="key">{signed_legend(scale, "change of the loss, nats / target")}</div>',
            cards(_effect_maps(found, effect, scale)),
            _effect_table(found, effect),
        ]
    return "\n".join(parts)


def _most(effect: Effects) -> float:
    """The end of the colours: what all but one in a hundred cells keep within, to two digits."""
    there = np.abs(effect.change_NEC[~np.isnan(effect.change_NEC)])
    return float(f"{np.percentile(there, 99):.1g}") or 1.0 if there.size else 1.0


def _effect_maps(found: Analysis, effect: Effects, scale: Signed) -> list[Figure]:
    seen = np.flatnonzero(effect.targets_C > 0)
    names = ["all", *(found.domains[c] for c in seen)]
    figures = []
    for n in chosen_layers(len(effect.change_NEC)):
        values = np.concatenate([effect.change_NE[n][:, None], effect.change_NEC[n][:, seen]], axis=1)

        def words(i: int, j: int, values=values) -> str:
            return f"expert {found.experts[i]}, {names[j]}: {values[i, j]:+.4f} nats / target"

        title = f"{effect.kind}: change of the loss by domain, layer {n + 1}"
        svg = cell_map(scale.ratios(values), found.experts, names, title, words)
        figures.append(Figure(f"Layer {n + 1}", "Rows are experts, columns domains.", svg))
    return figures


def _effect_table(found: Analysis, effect: Effects) -> str:
    load_NE = loads(found.observed.expert_NMK, found.observed.num_experts)
    share_NE = load_NE / np.maximum(load_NE.sum(1, keepdims=True), 1)
    sign = 1 if effect.kind == "remove" else -1
    rows = []
    for n, e in _strongest(sign * effect.change_NE):
        by_domain, errors = effect.change_NEC[n, e], effect.error_NEC[n, e]
        order = [int(c) for c in np.argsort(-by_domain) if not np.isnan(by_domain[c])]
        ends = [f"{found.domains[c]} {_with_error(by_domain[c], errors[c])}" for c in (*order[:1], *order[-1:])]
        mean = _with_error(effect.change_NE[n, e], effect.error_NE[n, e])
        rows.append((str(n + 1), found.experts[e], percent(float(share_NE[n, e])), mean, *(ends or ("-", "-"))))
    change = "change" if effect.kind == "remove" else "change, the smallest first"
    head = ("layer", "expert", "load", change, "hurt most", "hurt least")
    return table(head, rows, numeric=(0, 1, 2, 3))


def _with_error(value: float, error: float) -> str:
    return f"{value:+.4f}" + ("" if np.isnan(error) else f" ± {error:.4f}")
