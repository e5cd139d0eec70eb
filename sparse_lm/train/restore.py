"""The model of a run, from its directory: for generation, evaluation and notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax

from sparse_lm.config import ConfigError
from sparse_lm.data.config import DataConfig
from sparse_lm.data.tokenizers import ByteTokenizer, FactTokenizer, SymbolTokenizer, Tokenizer
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.decoder import Decoder
from sparse_lm.telemetry.rundata import CONFIG_NAME
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.manifest import CheckpointError
from sparse_lm.train.run import CHECKPOINTS_NAME, read_info

NOT_THE_MODEL = ("optimizer/", "step", "nonfinite")


class Loaded(NamedTuple):
    """A trained model, the experiment that made it, the tokenizer of its data, and the step it was saved at."""

    model: Decoder
    experiment: Experiment
    tokenizer: Tokenizer
    step: int


def load_model(
    workdir: str | Path,
    step: int | None = None,
    best: bool = False,
    model: ModelConfig | None = None,
) -> Loaded:
    """The model of a run, laid out by its rules on the mesh that is set, or on the first device; whatever mesh it had.

    step: None is the newest checkpoint, or with `best` the one of the lowest validation loss. model: its configuration,
    with the same parameters, instead of the one it was trained with. The directory is only read, so that its training
    may go on meanwhile; the data are not needed.

    Raises `ConfigError` when the directory holds no run, or the arguments contradict each other, and `CheckpointError`
    when there is no such step or it is damaged.
    """
    workdir = Path(workdir)
    if best and step is not None:
        raise ConfigError("step", step, "and best ask for two checkpoints; leave one out")
    info = read_info(workdir)
    if info is None:
        raise ConfigError("workdir", str(workdir), f"holds no run: there is no {CONFIG_NAME} in it; check the path")
    experiment = info.experiment if model is None else info.experiment.replace(model=model)
    with Checkpoints(workdir / CHECKPOINTS_NAME, experiment.checkpoint, read_only=True) as checkpoints:
        step = checkpoints.best_step() if best else step
        if best and step is None:
            what = "no step there has a validation loss; name one, or take the newest"
            raise CheckpointError(checkpoints.directory, None, "absent", what)
        step = checkpoints.latest_step() if step is None else step
        rules = experiment.sharding.rules
        abstract = jax.eval_shape(
            lambda key: rules.shard_parameters(Decoder(key, experiment.model, rules)), jax.random.key(0)
        )
        tree, _ = checkpoints.restore({"model": abstract}, step, ignore=NOT_THE_MODEL)
    assert step is not None  # restore raises when there is none
    return Loaded(tree["model"], experiment, tokenizer_of(experiment.data), step)


def tokenizer_of(config: DataConfig) -> Tokenizer:
    """The tokenizer of the dataset that `config` describes, without building it."""
    if config.source == "grammar":
        return SymbolTokenizer(config.grammar.num_symbols)
    if config.source == "facts":
        return FactTokenizer(config.facts.num_a, config.facts.num_b, config.facts.num_values)
    return ByteTokenizer()
