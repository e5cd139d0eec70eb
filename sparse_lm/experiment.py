"""The root of the configuration, and the checks that need more than one part of it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from sparse_lm.config import Config, ConfigError, from_dict, option, python_file
from sparse_lm.data.config import DataConfig
from sparse_lm.mesh import BATCH_AXES, MESH_AXES, mesh_shape
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.pipeline import pipelined_segment
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import CheckpointConfig, MeshConfig, ShardingConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Experiment(Config):
    """One training run.

    seed: of the weights, the order of the data, and all noise. data_seed: of the order of the data alone; None is seed.
    """

    seed: int = option(0, ge=0)
    data_seed: int | None = option(None, ge=0)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    sharding: ShardingConfig = ShardingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def check(self) -> None:
        """Raises `ConfigError` for what can be known before the devices are."""
        moe, length = self.model.moe, self.data.length
        max_length = self.model.max_length
        if self.model.position == "learned" and max_length is not None and max_length < length:
            raise ConfigError("model.max_length", max_length, f"must be at least data.length={length}")
        depth = self.model.depth
        if depth is not None and not depth.allow_non_causal:
            raise ConfigError(
                "model.depth.allow_non_causal",
                False,
                "in training later tokens of a row decide whether a token passes a wrapped block, which is not causal "
                "(evaluation and generation are); accept it with model.depth.allow_non_causal=True, or use depth=None",
            )
        if moe is None:
            return
        if not moe.causal and not moe.router.causal and not moe.allow_non_causal:
            raise ConfigError(
                "model.moe.router.kind",
                moe.router.kind,
                "lets later tokens decide what earlier ones get, which is not causal; choose another router, group by "
                "position across rows (model.moe.grouping=position), or accept it with model.moe.allow_non_causal=True",
            )
        if not moe.causal and not moe.allow_non_causal:
            raise ConfigError(
                "model.moe.priority",
                moe.priority,
                f"with top_k={moe.top_k} lets later tokens decide who is dropped, which is not causal; use token, "
                "drop nothing (both capacity factors None), or accept it with model.moe.allow_non_causal=True",
            )
        size = moe.group_size or length
        if moe.grouping == "sequence" and length % size and size % length:
            raise ConfigError(
                "model.moe.group_size", size, f"must divide data.length={length} or be a multiple of it; None is a row"
            )

    def mesh_sizes(self, num_devices: int) -> dict[str, int]:
        """The size of every mesh axis on this many devices.

        Raises `ConfigError` when the mesh does not fit the devices, or the batch or the model do not fit the mesh.
        """
        try:
            shape = mesh_shape(dataclasses.asdict(self.mesh), num_devices)
        except ValueError as error:
            raise ConfigError("mesh", dataclasses.asdict(self.mesh), str(error)) from None
        sizes: dict[str, int] = dict(zip(MESH_AXES, shape, strict=True))
        self._check_batch(sizes)
        model, moe = self.model, self.model.moe
        cuts = [
            ("data.length", self.data.length, "context"),
            ("model.num_heads", model.num_heads, "model"),
            ("model.num_kv_heads", model.kv_heads, "model"),
            ("model.d_ff", model.d_ff, "model"),
        ]
        if model.vocab_size is not None:
            cuts.append(("model.vocab_size", model.vocab_size, "model"))
        if moe is not None:
            cuts.append(("model.moe.d_expert", model.d_expert, "model"))
        if model.attention is not None:
            cuts.append(("model.attention.num_experts", model.attention.num_experts, "expert"))
        if model.depth is not None and model.depth.predictor == "mlp":
            cuts.append(("model.depth.hidden", model.depth.hidden, "model"))
        stored = (*self.sharding.rules.stored, *self.sharding.rules.dense)
        for key, value, *axes in (*cuts, ("model.d_model", model.d_model, *stored)):
            if value % math.prod(sizes[axis] for axis in axes):
                ways = " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes)
                raise ConfigError(key, value, f"must be a multiple of {ways}, or change the mesh")
        parts = sizes["expert"] * sizes["model"]
        if moe is not None and moe.num_experts % sizes["expert"] and model.d_expert % parts:
            raise ConfigError(
                "model.moe.num_experts",
                moe.num_experts,
                f"must be a multiple of mesh.expert={sizes['expert']}, or model.moe.d_expert={model.d_expert} one of "
                f"mesh.expert x mesh.model={parts}, so that experts can be cut along it; or change the mesh",
            )
        if sizes["stage"] > 1:
            self._check_stages(sizes["stage"])
        return sizes

    def _check_stages(self, stages: int) -> None:
        pipelined_segment(self.model, stages)
        together = self.train.pipeline_microbatches
        key, number = ("pipeline_microbatches", together) if together else ("accumulate", self.train.accumulate)
        if number % stages:
            raise ConfigError(
                f"train.{key}",
                number,
                f"must be a multiple of mesh.stage={stages}: each stage computes embedding and head of as many "
                "microbatches",
            )

    def _check_batch(self, sizes: dict[str, int]) -> None:
        microbatch = self.train.batch_size // self.train.accumulate
        shards = math.prod(sizes[axis] for axis in BATCH_AXES)
        if microbatch % shards:
            raise ConfigError(
                "train.batch_size",
                self.train.batch_size,
                f"gives microbatches of {microbatch} sequences, which the {shards} devices along "
                f"{'/'.join(BATCH_AXES)} cannot share; choose a multiple of {shards * self.train.accumulate}",
            )
        moe = self.model.moe
        size = (moe.group_size if moe else None) or self.data.length
        by_position = moe is not None and moe.grouping == "position"
        tokens, what = (microbatch, "rows") if by_position else (microbatch * self.data.length, "tokens")
        groups, shards = tokens / size, shards * sizes["context"]
        if groups % shards:
            raise ConfigError(
                "model.moe.group_size",
                size,
                f"cuts a microbatch of {tokens} {what} into {groups:g} groups, not whole for {shards} devices",
            )


def resolved(experiment: Experiment, vocab_size: int) -> Experiment:
    """The experiment with what only the data know filled in. Raises `ConfigError` when the vocabulary is too small."""
    model = experiment.model
    if model.vocab_size is not None and model.vocab_size < vocab_size:
        raise ConfigError("model.vocab_size", model.vocab_size, f"the data have {vocab_size} tokens; leave it out")
    model = model.replace(
        vocab_size=model.vocab_size or vocab_size, max_length=model.max_length or experiment.data.length
    )
    return experiment.replace(model=model)


def load_experiment(path: str | Path, variant: str | None = None) -> Experiment:
    """The experiment of a file of configs/, for notebooks; on the command line that is --config=path:variant.

    Raises `ConfigError` when there is no such file, or no `get_config` in it.
    """
    module = python_file(Path(path))
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        what = "is no Python file" if module is None else "defines no get_config()"
        raise ConfigError("config", str(path), f"{what}; name one such as configs/quickstart.py")
    return from_dict(Experiment, get_config() if variant is None else get_config(variant))
