"""Checksums of a checkpoint step: what is restored is bit for bit what was saved, or it is not restored.

The storage format has checksums on its indices and none on the numbers: most flipped bits in the data restore without
an error. So every step directory carries a manifest: size and SHA-256 of each data file, and name, type and shape of
each stored array. The manifest carries a checksum of itself. `ManifestHandler` writes it as an item of the step.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import difflib
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

import orbax.checkpoint as ocp
from etils import epath

ITEM = "manifest"  # a directory of the step, beside those of the data
FILE = "sha256.json"
_FORMAT = 1
_CHUNK = 1 << 20
_READERS = 8

Kind = Literal[
    "unreadable", "absent", "exists", "corrupt", "missing leaf", "extra leaf", "renamed leaf", "shape", "dtype",
    "write", "unsupported leaf",
]  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be restored.

    Attributes: `path`, `step` (None where no single one is concerned), `kind`, `what` (the fault and the way out).
    """

    def __init__(self, path: epath.PathLike, step: int | None, kind: Kind, what: str):
        super().__init__(f"checkpoint {path}" + ("" if step is None else f" (step {step})") + f": {what}")
        self.path, self.step, self.kind, self.what = str(path), step, kind, what


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One stored array."""

    path: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.path!r} ({self.dtype}{list(self.shape)})"


@dataclasses.dataclass(frozen=True)
class File:
    """One data file; `path` is relative to the step directory."""

    path: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a step directory holds."""

    leaves: tuple[Leaf, ...]
    files: tuple[File, ...]


def write_manifest(directory: epath.PathLike, leaves: Sequence[Leaf], into: epath.PathLike | None = None) -> Manifest:
    """Writes the manifest of a step directory whose data is complete; it appears whole or not at all.

    `into` is the directory for the manifest's own file, where that has another name until the step is committed.

    Covers every file in a subdirectory. Files at the top are bookkeeping of the storage library, which rewrites them
    when it commits the step, and which restores the same arrays without them.
    """
    directory = epath.Path(directory)
    into = directory / ITEM if into is None else epath.Path(into)
    names = _data_files(directory, into.name)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        files = list(pool.map(lambda name: _measure(directory, name), names))
    body = {
        "format": _FORMAT,
        "leaves": [dataclasses.asdict(leaf) for leaf in leaves],
        "files": [dataclasses.asdict(file) for file in files],
    }
    into.mkdir(exist_ok=True)
    partial = into / f"{FILE}.partial"
    partial.write_text(json.dumps(body | {"digest": _digest(body)}, indent=1))
    partial.replace(into / FILE)
    return Manifest(tuple(leaves), tuple(files))


def read_manifest(directory: epath.PathLike) -> Manifest:
    """The manifest of a step directory, its own checksum verified; the data files are not looked at.

    Raises `CheckpointError` (kind `corrupt`) when it is missing or damaged.
    """
    path = epath.Path(directory) / ITEM / FILE
    if not path.exists():
        raise _corrupt(directory, f"{ITEM}/{FILE} is missing, so that nothing says what the data should be")
    try:
        body = json.loads(path.read_text())
        digest = body.pop("digest")
        intact = digest == _digest(body)
    except (ValueError, KeyError, TypeError, AttributeError):
        intact, body = False, {}
    if not intact:
        raise _corrupt(directory, f"{ITEM}/{FILE} is damaged")
    if body["format"] != _FORMAT:
        raise _corrupt(directory, f"{ITEM}/{FILE} has format {body['format']}, this version reads {_FORMAT}")
    leaves = tuple(Leaf(leaf["path"], leaf["dtype"], tuple(leaf["shape"])) for leaf in body["leaves"])
    return Manifest(leaves, tuple(File(**file) for file in body["files"]))


def verify_manifest(directory: epath.PathLike) -> Manifest:
    """Reads every data file of a step directory and compares it with the manifest, which is returned.

    Raises `CheckpointError` (kind `corrupt`) naming the first file that is missing, unexpected, of another size, or
    changed, and how many more there are.
    """
    directory = epath.Path(directory)
    manifest = read_manifest(directory)
    present = set(_data_files(directory, ITEM))
    wanted = {file.path for file in manifest.files}
    faults = [f"{name} is missing" for name in sorted(wanted - present)]
    faults += [f"{name} is there but was never written by a save; delete it" for name in sorted(present - wanted)]
    if not faults:
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            checked = pool.map(lambda file: _fault(directory, file), manifest.files)
            faults = [fault for fault in checked if fault is not None]
    if faults:
        raise _corrupt(directory, faults[0] + (f" (and {len(faults) - 1} more files)" if faults[1:] else ""))
    return manifest


def match_leaves(
    directory: epath.PathLike, wanted: Sequence[Leaf], stored: Sequence[Leaf], ignore: tuple[str, ...] = ()
) -> None:
    """Raises `CheckpointError` unless the stored arrays are the wanted ones, by name, shape and type.

    Kinds, in the order in which they are looked for: `renamed leaf` (one wanted and one stored array of the same shape
    and type lack a partner), `missing leaf`, `extra leaf` (stored, not wanted, under no prefix of `ignore`), `shape`,
    `dtype`. The message names the first such leaf, both sides, and how many more there are.
    """
    have, want = {leaf.path: leaf for leaf in stored}, {leaf.path: leaf for leaf in wanted}
    missing = [leaf for leaf in wanted if leaf.path not in have]
    extra = [leaf for leaf in stored if leaf.path not in want and not leaf.path.startswith(ignore or ("\0",))]
    shared = [(leaf, have[leaf.path]) for leaf in wanted if leaf.path in have]
    shape = [pair for pair in shared if pair[0].shape != pair[1].shape]
    dtype = [pair for pair in shared if pair[0].dtype != pair[1].dtype]
    twin = _twin(missing[0], extra) if missing else None
    if twin is not None:
        what = f"has {twin} where {missing[0]} is wanted: was it renamed? Rename it back, or convert the checkpoint"
        raise _mismatch(directory, "renamed leaf", what, len(missing) - 1)
    if missing:
        near = difflib.get_close_matches(missing[0].path, have, n=1)
        hint = f"the closest stored name is {near[0]!r}" if near else f"it stores {len(have)} other arrays"
        what = f"lacks {missing[0]}; {hint}; use the configuration that it was saved with"
        raise _mismatch(directory, "missing leaf", what, len(missing) - 1)
    if extra:
        what = (
            f"stores {extra[0]} and the model has no place for it; use the saved configuration, or pass it to `ignore`"
        )
        raise _mismatch(directory, "extra leaf", what, len(extra) - 1)
    kinds: tuple[tuple[Kind, list[tuple[Leaf, Leaf]], str], ...] = (
        ("shape", shape, "use the configuration that it was saved with"),
        ("dtype", dtype, "nothing is cast on restoring: restore as saved, then cast"),
    )
    for kind, pairs, way_out in kinds:
        if pairs:
            leaf, other = pairs[0]
            stored_as, wanted_as = str(getattr(other, kind)), str(getattr(leaf, kind))
            what = f"leaf {leaf.path!r} has {kind} {stored_as} here and {wanted_as} in the model; {way_out}"
            raise _mismatch(directory, kind, what, len(pairs) - 1)


def _twin(leaf: Leaf, others: Sequence[Leaf]) -> Leaf | None:
    alike = {other.path: other for other in others if (other.shape, other.dtype) == (leaf.shape, leaf.dtype)}
    names = difflib.get_close_matches(leaf.path, alike, n=1, cutoff=0.0)
    return alike[names[0]] if names else None


def _mismatch(directory: epath.PathLike, kind: Kind, what: str, more: int) -> CheckpointError:
    return CheckpointError(directory, _step(directory), kind, what + (f" (and {more} more leaves)" if more else ""))


class ManifestHandler(ocp.AsyncCheckpointHandler):
    """An item of a checkpoint step that holds no data of its own: the manifest of the items beside it.

    `finalize` runs after the data of all items is on disk and before the step is committed by a rename, which is the
    only moment at which the manifest can be written without leaving a gap in which a step has none. It must be
    registered after the items that it covers.
    """

    def __init__(self):
        self._leaves: tuple[Leaf, ...] = ()

    async def async_save(self, directory: epath.Path, args: ManifestSave) -> None:  # type: ignore[override]
        """Remembers the leaves until `finalize`; one save is in flight at a time."""
        self._leaves = args.leaves

    def save(self, directory: epath.Path, args: ManifestSave) -> None:  # type: ignore[override]
        """Like `async_save`."""
        self._leaves = args.leaves

    def restore(self, directory: epath.Path, args: ManifestRestore | None = None) -> Manifest:  # type: ignore[override]
        """The manifest, read and not compared with the data."""
        return read_manifest(directory.parent)

    def finalize(self, directory: epath.Path) -> None:
        """Writes the manifest of the step that `directory` is an item of."""
        write_manifest(directory.parent, self._leaves, into=directory)


@ocp.args.register_with_handler(ManifestHandler, for_save=True)
@dataclasses.dataclass
class ManifestSave(ocp.args.CheckpointArgs):
    """What the files alone do not tell: the arrays that are being saved."""

    leaves: tuple[Leaf, ...]


@ocp.args.register_with_handler(ManifestHandler, for_restore=True)
@dataclasses.dataclass
class ManifestRestore(ocp.args.CheckpointArgs):
    """Asks for the manifest."""


def _fault(directory: epath.Path, file: File) -> str | None:
    size = (directory / file.path).stat().length
    if size != file.bytes:
        return f"{file.path} has {size} bytes and was saved with {file.bytes}"
    digest = _measure(directory, file.path).sha256
    if digest != file.sha256:
        return f"{file.path} changed since it was saved (SHA-256 {digest[:12]}..., saved {file.sha256[:12]}...)"
    return None


def _corrupt(directory: epath.PathLike, what: str) -> CheckpointError:
    return CheckpointError(
        directory,
        _step(directory),
        "corrupt",
        f"{what}; restore the step from a copy, or ask for an older one (step=..., or allow_older=True for the newest "
        "that is intact)",
    )


def _step(directory: epath.PathLike) -> int | None:
    name = epath.Path(directory).name
    return int(name) if name.isdigit() else None


def _data_files(directory: epath.Path, manifest: str) -> list[str]:
    """Paths, relative to the step, of all files in its subdirectories but the one that is the manifest's."""
    found: list[str] = []
    waiting = [item for item in directory.iterdir() if item.is_dir() and item.name != manifest]
    while waiting:
        for path in waiting.pop().iterdir():
            if path.is_dir():
                waiting.append(path)
            else:
                found.append(path.relative_to(directory).as_posix())
    return sorted(found)


def _measure(directory: epath.Path, name: str) -> File:
    digest, size = hashlib.sha256(), 0
    with (directory / name).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return File(name, size, digest.hexdigest())


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
