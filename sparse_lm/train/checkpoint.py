"""Checkpoints that are whole, verified and independent of Python classes, devices and meshes.

A step is stored as a flat table of arrays by path, so that code may move without making old checkpoints unreadable. Its
manifest (see `manifest`) is written inside the step *before* the rename that commits it: there is no moment at which a
committed step lacks one, whenever the process is killed. A step without a manifest is therefore damaged, not unlucky.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers as managers

from sparse_lm.train.config import CheckpointConfig
from sparse_lm.train.manifest import (
    ITEM,
    CheckpointError,
    Leaf,
    ManifestHandler,
    ManifestRestore,
    ManifestSave,
    match_leaves,
    read_manifest,
    verify_manifest,
)

STATE, EXTRA = "state", "extra"
T = TypeVar("T")
log = logging.getLogger(__name__)


class Checkpoints:
    """The steps under one directory. A context manager: leaving it waits for the last save.

    Steps that were being written when a process died are removed on construction. With `read_only=True` nothing is
    created, removed or written: for looking at the checkpoints of a training that may be running.

    Every process of a multi-process run calls every method, in the same order; each verifies all files it restores.

    Raises `CheckpointError` (kind `unreadable`) when the directory cannot be written, or not be read.
    """

    def __init__(self, directory: epath.PathLike, config: CheckpointConfig, *, read_only: bool = False):
        self.directory = epath.Path(directory).resolve()
        self._config = config
        self._read_only = read_only
        self._written: set[int] = set()
        self._pending: int | None = None
        if read_only and not self.directory.is_dir():
            raise CheckpointError(self.directory, None, "unreadable", "there is no such directory; check the path")
        if not read_only:
            self._probe()
        self._manager = ocp.CheckpointManager(
            self.directory, options=_options(config, read_only), handler_registry=_handlers()
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, tree: Any, extra: dict[str, Any], loss: float | None = None, force: bool = False) -> bool:
        """Stores `tree` (any pytree of arrays) and `extra` (JSON) when `step` is a multiple of `every`, or on `force`.

        Returns whether it did. Arrays may be donated as soon as this returns. `loss` (validation) ranks the step for
        `best`. Saving a step twice in one run does nothing the second time.

        Raises `CheckpointError` when an earlier asynchronous save failed, when a leaf is no array (PRNG keys are not
        stored: derive them from a seed and the step), when `extra` is not JSON, and when the step is not newer than
        those of an earlier run in the directory.
        """
        self.raise_errors()
        if step in self._written or not (force or step % self._config.every == 0):
            return False
        if self._read_only:
            raise CheckpointError(self.directory, step, "write", "opened with read_only=True; open it for writing")
        newest = max((*self.steps(), *self._written), default=None)
        if newest is not None and step <= newest:
            raise CheckpointError(
                self.directory, step, "exists",
                f"step {newest} is there, and what is not newer would be mixed up with it; continue from {newest}, or "
                f"move the steps from {step} on away, or take a new directory",
            )  # fmt: skip
        arrays = self._flatten(step, tree)
        try:
            json.dumps(extra)
        except (TypeError, ValueError) as error:
            raise CheckpointError(self.directory, step, "write", f"extra is not JSON: {error}") from error
        args = {
            STATE: ocp.args.PyTreeSave(arrays),
            EXTRA: ocp.args.JsonSave(extra),
            ITEM: ManifestSave(tuple(_leaf(name, array) for name, array in arrays.items())),
        }
        metrics = {"loss": float(loss)} if loss is not None and math.isfinite(loss) else None
        self.wait()
        self._pending = step
        self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**args), metrics=metrics, force=True))
        self._written.add(step)
        return True

    def wait(self) -> None:
        """Blocks until the save in flight is committed. Raises `CheckpointError` (kind `write`) if it failed."""
        self._guard(self._manager.wait_until_finished)

    def raise_errors(self) -> None:
        """Raises `CheckpointError` (kind `write`) when an asynchronous save failed. Never blocks; call it each step."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def close(self) -> None:
        """Waits for the save in flight and releases threads. Raises `CheckpointError` (kind `write`) if it failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def steps(self) -> tuple[int, ...]:
        """The committed steps, as the disk has them now, oldest first."""
        return tuple(sorted(found.step for found in ocp.path.step.standard_name_format().find_all(self.directory)))

    def latest_step(self) -> int | None:
        """The newest committed step; None when there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The kept step with the lowest validation loss; None when no kept step has one."""
        losses = {step: self._manager.metrics(step) for step in self.steps()}
        ranked = [(metrics["loss"], -step) for step, metrics in losses.items() if metrics]
        return -min(ranked)[1] if ranked else None

    def leaves(self, step: int | None = None) -> tuple[Leaf, ...]:
        """Name, type and shape of each array of a step (default: the newest), without reading the arrays."""
        return read_manifest(self.directory / str(self._existing(step))).leaves

    def read_extra(self, step: int | None = None) -> dict[str, Any]:
        """The JSON of a step (default: the newest), all of whose files are verified first."""
        step = self._existing(step)
        verify_manifest(self.directory / str(step))
        return dict(self._manager.restore(step, args=ocp.args.Composite(**{EXTRA: ocp.args.JsonRestore()}))[EXTRA])

    def restore(
        self, abstract_tree: Any, step: int | None = None, *, allow_older: bool = False, ignore: tuple[str, ...] = ()
    ) -> tuple[Any, dict[str, Any]]:
        """`(tree, extra)` of a step (default: the newest), bit for bit as saved, laid out as `abstract_tree` says.

        abstract_tree: a pytree of `jax.ShapeDtypeStruct`, whose shardings may be over any mesh. One without a sharding
            goes to the first device; one over an abstract mesh is taken over the mesh of `jax.set_mesh`.
        allow_older: when the step is damaged, take the newest one before it that is not. The damaged ones are renamed
            to `damaged-<step>` (unless `read_only`), so that training can save those steps again.
        ignore: prefixes of stored paths that the tree need not have, for example `("opt_state/",)`.

        Raises `CheckpointError`, of kind `absent` (no such step, or none at all), `corrupt`, `missing leaf`,
        `extra leaf`, `renamed leaf`, `shape` or `dtype`. Nothing is ever cast, filled in or started from scratch.
        """
        self.wait()
        step = self._existing(step)
        candidates = [other for other in reversed(self.steps()) if other <= step] if allow_older else [step]
        damaged: list[CheckpointError] = []
        for candidate in candidates:
            try:
                manifest = verify_manifest(self.directory / str(candidate))
            except CheckpointError as error:
                if not allow_older:
                    raise
                log.warning("skipping a damaged step: %s", error)
                damaged.append(error)
                continue
            restored = self._read(candidate, abstract_tree, manifest.leaves, ignore)
            self._set_aside(damaged)
            return restored
        raise CheckpointError(
            self.directory, None, "corrupt", "no step is intact: " + "; ".join(str(error) for error in damaged)
        )

    def _read(
        self, step: int, abstract_tree: Any, stored: tuple[Leaf, ...], ignore: tuple[str, ...]
    ) -> tuple[Any, dict[str, Any]]:
        where = self.directory / str(step)
        wanted = {name: _placed(leaf) for name, leaf in _named(abstract_tree).items()}
        match_leaves(where, [_leaf(name, array) for name, array in wanted.items()], stored, ignore)
        args = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        items_args = ocp.args.Composite(**{STATE: args, EXTRA: ocp.args.JsonRestore()})
        try:
            items = self._manager.restore(step, args=items_args)
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(
                where, step, "unreadable", f"the files are as saved, yet reading failed: {error}"
            ) from error
        arrays = [items[STATE][name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract_tree), arrays), dict(items[EXTRA])

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise CheckpointError(
                self.directory, None, "absent", "there is no committed step; check the path, or train from scratch"
            )
        if step is None:
            return steps[-1]
        if step not in steps:
            raise CheckpointError(self.directory, step, "absent", f"no such step; there are {list(steps)}")
        return step

    def _flatten(self, step: int, tree: Any) -> dict[str, Any]:
        arrays = _named(tree)
        if len(arrays) != len(jax.tree.leaves(tree)):
            raise CheckpointError(self.directory, step, "unsupported leaf", "two leaves have one path; rename one")
        for name, leaf in arrays.items():
            if not isinstance(leaf, (jax.Array, np.ndarray)):
                what = f"leaf {name!r} is a {type(leaf).__name__}, not an array; put it into `extra`"
                raise CheckpointError(self.directory, step, "unsupported leaf", what)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                what = (
                    f"leaf {name!r} is a PRNG key; derive it from a seed and the step, or store its jax.random.key_data"
                )
                raise CheckpointError(self.directory, step, "unsupported leaf", what)
        return arrays

    def _set_aside(self, damaged: list[CheckpointError]) -> None:
        if not damaged or self._read_only:
            return
        if jax.process_index() == 0:
            for error in damaged:
                (self.directory / str(error.step)).rename(self.directory / f"damaged-{error.step}")
        ocp.multihost.sync_global_processes("sparse_lm:checkpoint:set_aside")
        self._manager.reload()

    def _probe(self) -> None:
        probe = self.directory / f".writable-{jax.process_index()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                self.directory, None, "unreadable", f"cannot be written ({error}); choose another directory"
            ) from error

    def _guard(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except CheckpointError:
            raise
        except Exception as error:
            failed, self._pending = self._pending, None
            self._written.discard(failed)  # type: ignore[arg-type]
            raise CheckpointError(
                self.directory, failed, "write",
                f"saving failed ({type(error).__name__}: {error}); earlier steps are intact; free space or choose "
                "another directory",
            ) from error  # fmt: skip


def _options(config: CheckpointConfig, read_only: bool) -> ocp.CheckpointManagerOptions:
    policies: list[managers.PreservationPolicy] = [managers.LatestN(config.keep)]
    if config.best:
        policies.append(managers.BestN(get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False))
    return ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(policies),
        best_fn=_loss,  # without it the metrics are not written
        best_mode="min",
        create=False,
        cleanup_tmp_directories=not read_only,
        enable_async_checkpointing=config.asynchronous,
        read_only=read_only,
    )


def _loss(metrics: Any) -> float:
    return metrics["loss"]


def _handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """Items are finalized in the order of this table, so that the manifest comes last and sees all other files."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    items = {
        STATE: (ocp.PyTreeCheckpointHandler(), ocp.args.PyTreeSave, ocp.args.PyTreeRestore),
        EXTRA: (ocp.JsonCheckpointHandler(), ocp.args.JsonSave, ocp.args.JsonRestore),
        "metrics": (ocp.JsonCheckpointHandler(filename="metrics"), ocp.args.JsonSave, ocp.args.JsonRestore),
        ITEM: (ManifestHandler(), ManifestSave, ManifestRestore),
    }
    for item, (handler, save, restore) in items.items():
        registry.add(item, save, handler)
        registry.add(item, restore, handler)
    return registry


def _named(tree: Any) -> dict[str, Any]:
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _leaf(name: str, array: Any) -> Leaf:
    return Leaf(name, str(array.dtype), tuple(array.shape))


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding
    if sharding is None:
        sharding = SingleDeviceSharding(jax.devices()[0])
    elif isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        sharding = NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
