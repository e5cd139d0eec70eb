"""From the directory of a run to everything that is known about its experts: for `experiments/analyze.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from sparse_lm.analysis.classes import Labels, position_bins, token_classes
from sparse_lm.analysis.history import Saturation, saturation_over
from sparse_lm.analysis.information import Information, count_pairs, specialisation
from sparse_lm.analysis.intervene import Effects, effects
from sparse_lm.analysis.languages import language_labels, languages
from sparse_lm.analysis.observe import (
    Observed,
    Tokens,
    batch_rows,
    check_sparse,
    chosen_experts,
    loads,
    observe,
    observe_attention,
    tokens_of,
)
from sparse_lm.analysis.vocabulary import ExpertWords, vocabulary
from sparse_lm.batch import Batch
from sparse_lm.config import ConfigError
from sparse_lm.data.loader import Dataset, build_dataset, validation_batches
from sparse_lm.evals.routing import pair_counts
from sparse_lm.moe.config import MoEConfig
from sparse_lm.train.restore import Loaded, load_model
from sparse_lm.train.run import read_info

Kind = Literal["token class", "domain", "language", "position"]
Kinds = Sequence[tuple[Kind, Labels, np.ndarray | None]]


@dataclasses.dataclass(frozen=True)
class Options:
    """batches: of held-out rows that are looked at, eight rows each or what groups ask for. effect_batches: of those,
    for removing and forcing, which takes layers x experts passes each; 0 leaves it out.

    renormalise: when an expert is removed, the gates of a token's others grow to the sum of all. shuffles: behind every
    baseline. step, best: which checkpoint, see `load_model`. languages: of domains, where the source of the data does
    not tell, see `languages.languages`. Raises `ConfigError` when a number is too low.
    """

    batches: int = 16
    effect_batches: int = 4
    renormalise: bool = False
    shuffles: int = 20
    step: int | None = None
    best: bool = False
    languages: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name, least in (("batches", 1), ("effect_batches", 0), ("shuffles", 1)):
            if getattr(self, name) < least:
                raise ConfigError(name, getattr(self, name), f"must be at least {least}")


@dataclasses.dataclass(frozen=True, eq=False)
class Specialisation:
    """Of one kind of label: its names, and per layer the information and the assignments by expert and label."""

    kind: Kind
    names: tuple[str, ...]
    information: tuple[Information, ...]
    counts_NEC: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class InAttention:
    """Of the experts in the attention of every layer: their names, assignments, and what they specialise in."""

    experts: tuple[str, ...]
    load_NE: np.ndarray
    specialisation: tuple[Specialisation, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class InFeedForward:
    """Of the experts in the sparse layers. experts: their names.

    pairs_NEE: tokens that chose both experts, on the diagonal the one. removal, forcing: None where they were left out.
    """

    experts: tuple[str, ...]
    observed: Observed
    specialisation: tuple[Specialisation, ...]
    saturation: Saturation
    pairs_NEE: np.ndarray
    words: tuple[tuple[ExpertWords, ...], ...]
    removal: Effects | None
    forcing: Effects | None


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """All that the page says. expected_data: False when the held-out text is not the run's.

    tokens: that were looked at. feed_forward, attention: None where tokens choose no experts there; never both.
    """

    workdir: Path
    loaded: Loaded
    options: Options
    domains: tuple[str, ...]
    expected_data: bool
    tokens: Tokens
    feed_forward: InFeedForward | None
    attention: InAttention | None

    def all_specialisation(self) -> tuple[tuple[str, tuple[Specialisation, ...]], ...]:
        """Of the feed-forward experts, and of those in attention, where there are any, with what to add to the name."""
        parts = (("", self.feed_forward), (" in attention", self.attention))
        return tuple((where, part.specialisation) for where, part in parts if part is not None)


def analyze(workdir: Path, options: Options = Options(), tell: Callable[[str], None] = print) -> Analysis:
    """Loads a run, routes held-out rows through it, and measures. The run is only read. `tell` gets lines of progress.

    Raises `ConfigError` when there is no run, or no experts in it that tokens choose, and `CheckpointError` when there
    is no such checkpoint.
    """
    info = read_info(workdir)
    if info is not None:
        chosen_experts(info.experiment.model)  # before any data is read
    loaded = load_model(workdir, options.step, options.best)
    experiment = loaded.experiment
    dataset = build_dataset(experiment.data, experiment.seed if experiment.data_seed is None else experiment.data_seed)
    rows = batch_rows(experiment.model.moe, experiment.data.length)
    batches = validation_batches(dataset, rows, options.batches)
    tokens = tokens_of(batches)
    tell(f"step {loaded.step}: {len(tokens.id_M):,} held-out tokens")
    of_domain = languages(experiment.data, dataset.domains, options.languages)
    kinds = label_kinds(tokens, loaded, dataset.domains, of_domain)
    feed_forward = None
    if chosen_experts(experiment.model) is not None:
        feed_forward = _in_feed_forward((workdir, loaded, dataset), batches, kinds, options, tell)
    return Analysis(
        workdir,
        loaded,
        options,
        dataset.domains,
        info is None or info.fingerprint == dataset.fingerprint,
        tokens,
        feed_forward,
        _in_attention(loaded, batches, kinds, options.shuffles),
    )


def _in_feed_forward(
    run: tuple[Path, Loaded, Dataset],
    batches: Sequence[Batch],
    kinds: Kinds,
    options: Options,
    tell: Callable[[str], None],
) -> InFeedForward:
    workdir, loaded, dataset = run
    moe = check_sparse(loaded.experiment.model)
    observed = observe(loaded.model, batches)
    words = tuple(
        vocabulary(observed.tokens, expert_MK, gate_MK, observed.num_experts, loaded.tokenizer)
        for expert_MK, gate_MK in zip(observed.expert_NMK, observed.gate_NMK, strict=True)
    )
    chance = moe.top_k / moe.num_choices
    history = saturation_over(workdir, loaded.step, batches, observed.decisions, chance)
    tell(f"checkpoints that are kept, and compared: {', '.join(map(str, history.steps))}")
    removal, forcing = _effects(loaded, batches, dataset, options, tell)
    return InFeedForward(
        expert_names(moe),
        observed,
        specialisations(observed.expert_NMK, observed.num_experts, kinds, options.shuffles),
        history,
        pair_counts(jnp.asarray(observed.expert_NMK[:, None]), observed.num_experts),
        words,
        removal,
        forcing,
    )


def _in_attention(loaded: Loaded, batches: Sequence[Batch], kinds: Kinds, shuffles: int) -> InAttention | None:
    model = loaded.experiment.model
    if model.attention is None:
        return None
    names = model.attention.names(model.num_heads)
    expert_NMK = observe_attention(loaded.model, batches)
    found = specialisations(expert_NMK, len(names), kinds, shuffles)
    return InAttention(names, loads(expert_NMK, len(names)), found)


def _effects(
    loaded: Loaded, batches: Sequence[Batch], dataset: Dataset, options: Options, tell: Callable[[str], None]
) -> tuple[Effects | None, Effects | None]:
    if not options.effect_batches:
        return None, None
    domains = len(dataset.domains)
    chosen = covering(batches, domains, options.effect_batches)
    return (
        effects(loaded.model, chosen, domains, "remove", options.renormalise, tell),
        effects(loaded.model, chosen, domains, "force", progress=tell),
    )


def covering(batches: Sequence[Batch], num_domains: int, count: int) -> list[Batch]:
    """At most `count` of the batches with as many domains in them as they can have, the rarest first; then the others
    in order."""
    sizes_XC = np.stack([np.bincount(tokens_of([batch]).domain_M, minlength=num_domains) for batch in batches])
    chosen: list[int] = []
    for domain in np.argsort(sizes_XC.sum(0), kind="stable"):
        if sizes_XC[:, domain].any() and not sizes_XC[chosen, domain].any():
            chosen.append(int(np.argmax(sizes_XC[:, domain])))
    chosen += [i for i in range(len(batches)) if i not in chosen]
    return [batches[i] for i in sorted(chosen[:count])]


def label_kinds(
    tokens: Tokens, loaded: Loaded, domains: tuple[str, ...], of_domain: Sequence[str | None]
) -> list[tuple[Kind, Labels, np.ndarray | None]]:
    """What is known of every token, and the blocks in which each kind of label is shuffled; None is by token.

    Domains and languages move with whole documents. Languages are left out where none is known.
    """
    classes = token_classes(loaded.tokenizer)
    spoken = language_labels(of_domain, tokens.domain_M)
    kinds: list[tuple[Kind, Labels, np.ndarray | None]] = [
        ("token class", Labels(classes.names, classes.index_M[tokens.id_M]).used(), None),
        ("domain", Labels(domains, tokens.domain_M).used(), tokens.part_M),
        ("language", spoken, tokens.part_M),
        ("position", position_bins(tokens.position_M), None),
    ]
    return [kind for kind in kinds if kind[1].names]


def specialisations(
    expert_NMK: Int[np.ndarray, "N M K"], num_experts: int, kinds: Kinds, shuffles: int
) -> tuple[Specialisation, ...]:
    """Every kind of label against its own kind of shuffle, over the tokens of which the label is known."""
    found = []
    for kind, labels, block_M in kinds:
        sizes, known_M = (num_experts, len(labels.names)), labels.index_M >= 0
        index_M, block_M = labels.index_M[known_M], None if block_M is None else block_M[known_M]
        layers = [expert_MK[known_M] for expert_MK in expert_NMK]
        information = tuple(specialisation(expert_MK, index_M, sizes, block_M, shuffles) for expert_MK in layers)
        counts = [count_pairs(expert_MK, index_M, *sizes) for expert_MK in layers]
        found.append(Specialisation(kind, labels.names, information, np.stack(counts)))
    return tuple(found)


def expert_names(moe: MoEConfig) -> tuple[str, ...]:
    """Numbers from 0, as everywhere; free experts, which follow, are called by what they do."""
    free = (("zero", moe.num_zero), ("copy", moe.num_copy), ("constant", moe.num_constant))
    return (*map(str, range(moe.num_experts)), *(f"{name} {i}" for name, count in free for i in range(count)))
