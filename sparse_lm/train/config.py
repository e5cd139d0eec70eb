"""Configuration of the training run, and of how it is laid out over devices."""

from __future__ import annotations

import dataclasses

from sparse_lm.config import Config, ConfigError, closest, option
from sparse_lm.mesh import MESH_AXES
from sparse_lm.rules import STRATEGIES
from sparse_lm.sharding import Rules


@dataclasses.dataclass(frozen=True)
class TrainConfig(Config):
    """How long, how much at a time, and how often to look.

    batch_size: sequences in one optimizer step, over all devices.
    accumulate: microbatches that one step is cut into. Loss and gradients are those of the whole batch.
    pipeline_microbatches: how many of them pass the stages of a pipeline together, on a mesh with stages: more of them
        waste less time, and hold more activations. None is all. Loss and gradients do not depend on it.
    log_every: steps between two rows of metrics.
    eval_every: steps between two evaluations; the last step is always evaluated. eval_batches bounds one of them.
    max_nonfinite: a step with a non-finite loss or gradient changes nothing and is counted; so many in a row abort.
    sample_tokens: length of the continuation that is printed in the end; 0 is none.
    """

    steps: int = option(1000, ge=1)
    batch_size: int = option(16, ge=1)
    accumulate: int = option(1, ge=1)
    pipeline_microbatches: int | None = option(None, ge=1)
    log_every: int = option(1, ge=1)
    eval_every: int = option(200, ge=1)
    eval_batches: int = option(16, ge=1)
    max_nonfinite: int = option(10, ge=1)
    sample_tokens: int = option(200, ge=0)

    def check(self) -> None:
        """Raises `ConfigError` when the batch cannot be cut into microbatches."""
        if self.batch_size % self.accumulate:
            raise ConfigError("accumulate", self.accumulate, f"must divide train.batch_size={self.batch_size}")
        together = self.pipeline_microbatches
        if together is not None and self.accumulate % together:
            raise ConfigError("pipeline_microbatches", together, f"must divide train.accumulate={self.accumulate}")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Config):
    """every: steps between two checkpoints (the last step is always saved). keep: how many of the newest stay.

    best: keep the one with the lowest validation loss as well. asynchronous: write while training goes on.
    """

    every: int = option(200, ge=1)
    keep: int = option(2, ge=1)
    best: bool = True
    asynchronous: bool = True


@dataclasses.dataclass(frozen=True)
class MeshConfig(Config):
    """Sizes of the mesh axes (see `sparse_lm.mesh`); one of them may be -1: whatever devices are left."""

    replica: int = 1
    stage: int = 1
    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    model: int = 1


@dataclasses.dataclass(frozen=True)
class ShardingConfig(Config):
    """Along which mesh axes weights and optimizer state are cut while they are stored (see `sparse_lm.rules`).

    strategy: ep, zero1_ep, fsdp_ep, hybrid_ep or fsdp_over_ep.
    stored, dense, state: mesh axes joined by `+`, or an empty text for none, instead of what the strategy says: of all
    weights, of those of no expert besides, and of optimizer state besides. None is as the strategy says.
    """

    strategy: str = "fsdp_ep"
    stored: str | None = None
    dense: str | None = None
    state: str | None = None

    def check(self) -> None:
        """Raises `ConfigError` on an unknown strategy or axis, and on an axis that would cut one array twice."""
        if self.strategy not in STRATEGIES:
            raise ConfigError("strategy", self.strategy, closest(self.strategy, STRATEGIES))
        for key, axes in self._given.items():
            for axis in axes:
                if axis not in MESH_AXES:
                    raise ConfigError(key, getattr(self, key), f"{axis!r} is no mesh axis; {closest(axis, MESH_AXES)}")
        for letters in ("DF", "EDF", "VD", "DHI", "PHI"):
            try:
                self.rules.for_state.param(letters)
            except ValueError as error:
                raise ConfigError("strategy", self.strategy, f"with {self._given or 'no changes'}: {error}") from None

    @property
    def rules(self) -> Rules:
        """The table that all this amounts to."""
        return dataclasses.replace(STRATEGIES[self.strategy], **self._given)

    @property
    def _given(self) -> dict[str, tuple[str, ...]]:
        values = {key: getattr(self, key) for key in ("stored", "dense", "state")}
        return {key: tuple(filter(None, text.split("+"))) for key, text in values.items() if text is not None}
