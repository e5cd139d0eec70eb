"""Sections of the page about the experts in the feed-forward layers: how they came to be, together, and alone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from sparse_lm.analysis.history import Saturation
from sparse_lm.analysis.intervene import Effects
from sparse_lm.analysis.observe import Observed, drop_shares, loads
from sparse_lm.analysis.plots import COLORS, Signed, cell_map, signed_legend
from sparse_lm.analysis.run import Analysis, InFeedForward
from sparse_lm.analysis.vocabulary import ExpertWords
from sparse_lm.telemetry.axes import Axis
from sparse_lm.telemetry.colors import depth_color
from sparse_lm.telemetry.figures import Figure
from sparse_lm.telemetry.format import percent
from sparse_lm.telemetry.page import cards, table
from sparse_lm.telemetry.routing import chosen_layers
from sparse_lm.telemetry.svg import Reference, Series, color_legend, line_chart

STRONGEST = 10  # rows of a table of the strongest


def feed_forward_sections(found: Analysis, inside: InFeedForward) -> list[str]:
    """Headings and what stands under them, as HTML, of everything but specialisation."""
    return [
        *("<h2>Router saturation</h2>", _saturation(found.loaded.step, inside.saturation)),
        *("<h2>Experts chosen together</h2>", _together(inside)),
        *("<h2>Drops by position</h2>", _drops(inside.observed)),
        *("<h2>Vocabulary of each expert</h2>", _vocabulary(inside)),
        *("<h2>Without an expert, and with one alone</h2>", _interventions(found, inside)),
    ]


def color_legend_box(colors, label: str) -> str:
    """A legend as wide as a column of text."""
    return f'<div class="key">{color_legend(colors, label)}</div>'


def _saturation(step: int, history: Saturation) -> str:
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
        f"Share of a token's experts at step {step:,} that it had at an earlier checkpoint already "
        f"({len(history.steps)} are kept; checkpoint.keep keeps more)."
    )
    x = Axis("step", low=0, high=max(history.steps), integer=True)
    chance = [Reference("unrelated routers", 100 * history.chance)]
    svg = line_chart(series, x, Axis("% of experts", low=0.0, high=100.0), "Router saturation over steps", chance)
    return cards([Figure("Saturation", caption, svg)])


def _together(inside: InFeedForward) -> str:
    pairs = inside.pairs_NEE
    apart = np.array([np.diag(np.diag(layer)) for layer in pairs])
    if not (pairs - apart).any():
        return "<p>No token has two experts in a layer.</p>"
    # A token that has an expert has others: chance is independent choices among tokens.
    ratios = np.stack([together_lift(layer, len(inside.observed.tokens.id_M)) for layer in pairs])
    figures = []
    for n in chosen_layers(len(pairs)):

        def words(i: int, j: int, n=n) -> str:
            return (
                f"experts {inside.experts[i]} and {inside.experts[j]}: {pairs[n, i, j]:,} tokens, "
                f"{ratios[n, i, j]:.2f} times as often as if independent"
            )

        svg = cell_map(ratios[n], inside.experts, inside.experts, f"Experts chosen together, layer {n + 1}", words)
        figures.append(Figure(f"Layer {n + 1}", "Pairs against independent choices.", svg))
    best = _strongest(np.where(np.isnan(ratios), -np.inf, np.triu(ratios, 1)))
    rows = [
        (str(n + 1), f"{inside.experts[i]}, {inside.experts[j]}", f"{pairs[n, i, j]:,}", f"{ratios[n, i, j]:.2f}",
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


def _drops(observed: Observed) -> str:
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


def _vocabulary(inside: InFeedForward) -> str:
    load_NE = loads(inside.observed.expert_NMK, inside.observed.num_experts)
    parts = [
        "<p>Tokens that an expert has more often than their share of all assignments, with the number of its own and "
        "the ratio (lift); then the place in the held-out text where its gate is highest for each of the first three. "
        "A ratio of few counts is mostly luck.</p>"
    ]
    for layer, experts in enumerate(inside.words):
        share = load_NE[layer] / max(1, load_NE[layer].sum())
        rows = "".join(_word_row(inside.experts[e], share[e], words) for e, words in enumerate(experts))
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


def _interventions(found: Analysis, inside: InFeedForward) -> str:
    if inside.removal is None or inside.forcing is None:
        return "<p>Left out.</p>"
    gates = "the other gates of a token grow to the same sum" if found.options.renormalise else "its gates are lost"
    parts = [
        "<p>Loss with one expert changed, minus loss as it is. All other decisions are kept as they were, in later "
        "layers too: what is seen is the expert's own work. Forced: every token of a layer has this one expert, and "
        "nothing is dropped. ± is the standard error over rows of held-out tokens, which are chosen so that every "
        "domain is among them if it can be; without ± a single row has the domain.</p>"
    ]
    for title, effect in (("Removed", inside.removal), ("Forced on all tokens", inside.forcing)):
        scale = Signed(_most(effect))
        parts += [
            f"<h3>{title}</h3>",
            f'<p class="muted">{escape(gates.capitalize())}.</p>' if effect.kind == "remove" else "",
            f'<div class="key">{signed_legend(scale, "change of the loss, nats / target")}</div>',
            cards(_effect_maps(found.domains, inside.experts, effect, scale)),
            _effect_table(found.domains, inside, effect),
        ]
    return "\n".join(parts)


def _most(effect: Effects) -> float:
    """The end of the colours: what all but one in a hundred cells keep within, to two digits."""
    there = np.abs(effect.change_NEC[~np.isnan(effect.change_NEC)])
    return float(f"{np.percentile(there, 99):.1g}") or 1.0 if there.size else 1.0


def _effect_maps(domains: Sequence[str], experts: Sequence[str], effect: Effects, scale: Signed) -> list[Figure]:
    seen = np.flatnonzero(effect.targets_C > 0)
    names = ["all", *(domains[int(c)] for c in seen)]
    figures = []
    for n in chosen_layers(len(effect.change_NEC)):
        values = np.concatenate([effect.change_NE[n][:, None], effect.change_NEC[n][:, seen]], axis=1)

        def words(i: int, j: int, values=values) -> str:
            return f"expert {experts[i]}, {names[j]}: {values[i, j]:+.4f} nats / target"

        title = f"{effect.kind}: change of the loss by domain, layer {n + 1}"
        svg = cell_map(scale.ratios(values), experts, names, title, words)
        figures.append(Figure(f"Layer {n + 1}", "Rows are experts, columns domains.", svg))
    return figures


def _effect_table(domains: Sequence[str], inside: InFeedForward, effect: Effects) -> str:
    load_NE = loads(inside.observed.expert_NMK, inside.observed.num_experts)
    share_NE = load_NE / np.maximum(load_NE.sum(1, keepdims=True), 1)
    sign = 1 if effect.kind == "remove" else -1
    rows = []
    for n, e in _strongest(sign * effect.change_NE):
        by_domain, errors = effect.change_NEC[n, e], effect.error_NEC[n, e]
        order = [int(c) for c in np.argsort(-by_domain) if not np.isnan(by_domain[c])]
        ends = [f"{domains[c]} {_with_error(by_domain[c], errors[c])}" for c in (*order[:1], *order[-1:])]
        mean = _with_error(effect.change_NE[n, e], effect.error_NE[n, e])
        rows.append((str(n + 1), inside.experts[e], percent(float(share_NE[n, e])), mean, *(ends or ("-", "-"))))
    change = "change" if effect.kind == "remove" else "change, the smallest first"
    head = ("layer", "expert", "load", change, "hurt most", "hurt least")
    return table(head, rows, numeric=(0, 1, 2, 3))


def _with_error(value: float, error: float) -> str:
    return f"{value:+.4f}" + ("" if np.isnan(error) else f" ± {error:.4f}")
