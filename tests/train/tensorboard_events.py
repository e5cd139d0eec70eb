"""Reads TensorBoard event files with the protocol buffers of their writer, without TensorBoard."""

from __future__ import annotations

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]


def scalars_of(directory: Path) -> dict[str, dict[int, float]]:
    """Values by tag and step; as in TensorBoard, the start of a later session hides the steps from its own on."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(directory.glob("events.out.tfevents.*")):
        for event in _events(path.read_bytes()):
            if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                for values in found.values():
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def _events(data: bytes):
    while len(data) >= 12:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event()
        event.ParseFromString(data[12 : 12 + length])
        yield event
        data = data[12 + length + 4 :]
