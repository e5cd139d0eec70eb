"""A plan as text to print."""

from __future__ import annotations

from sparse_lm.experiment import Experiment
from sparse_lm.models.counts import table
from sparse_lm.planning.collectives import Collective
from sparse_lm.planning.plan import OutOfMemory, Plan
from sparse_lm.planning.work import Buffer
from sparse_lm.telemetry.format import percent

_OUT_OF_MEMORY_LINES = 30


def describe(plan: Plan, experiment: Experiment, largest: int = 0) -> str:
    """The plan as text. experiment: the one that it was made for. largest: how many of the largest arrays to list."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one"
    lines = [table(experiment.model, experiment.data.length), f"devices: {mesh} ({plan.device_kind})", ""]
    lines += [*_header(plan), "", *_memory(plan), "", *_flops(plan), "", *_collectives(plan)]
    if plan.roofline is not None:
        lines += ["", *_roofline(plan)]
    if largest and plan.step is not None:
        lines += ["", *_largest(plan.step.largest[:largest])]
    if isinstance(plan.compiled, OutOfMemory):
        told = plan.compiled.message.splitlines()
        lines += ["", "the compiler's words:", *(f"  {line}" for line in told[:_OUT_OF_MEMORY_LINES])]
    return "\n".join(lines)


def _header(plan: Plan) -> list[str]:
    if isinstance(plan.compiled, str):
        return [f"estimated, not compiled: {plan.compiled}"]
    if plan.compiled is None:
        return ["estimated, not compiled: formulas that know the largest arrays and no scheduling"]
    if isinstance(plan.compiled, OutOfMemory):
        return [f"the compiler gave up after {plan.compiled.seconds:.1f} s: the step is too large for a device"]
    return [f"train step, compiled in {plan.compiled.seconds:.1f} s; figures are of the compiled program, per device"]


def _memory(plan: Plan) -> list[str]:
    state, step = plan.state, plan.step
    rows = [
        ("  parameters", state.parameters),
        ("  optimizer state", state.optimizer),
        ("  kept between steps", state.kept),
        ("  gradients", state.gradients),
        ("  activations kept for the backward pass (estimated)", plan.estimate.activations),
    ]
    if step is None:
        rows.append(("  the largest layer or the loss at work (estimated)", plan.estimate.working))
    else:
        known = state.gradients + plan.estimate.activations
        rows += [
            ("  temporaries (gradients, activations, all else)", step.temporaries),
            ("  of them neither gradients nor kept activations", max(0, step.temporaries - known)),
            ("  not in place of arguments: outputs", step.outputs - step.aliased),
            ("  all of it, as if none shared its place", step.total),
        ]
    rows.append((f"  at most in use ({plan.source})", plan.peak))
    lines = ["bytes per device", *aligned([(name, binary(size)) for name, size in rows])]
    if plan.chip is not None:
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        share = percent(plan.peak / plan.chip.hbm, 3)
        lines.append(f"  {verdict}: {share} of the {binary(plan.chip.hbm)} of {plan.chip.name}")
    return lines


def _flops(plan: Plan) -> list[str]:
    lines = [f"model FLOPs per step: {plan.model_flops:.4g} ({plan.tokens_per_step:,} tokens, all devices)"]
    if plan.estimate.idle:
        lines.append(
            f"stages have no microbatch in {percent(plan.estimate.idle, 3)} of the pipeline's turns; larger "
            "train.accumulate and train.pipeline_microbatches make it less"
        )
    if isinstance(plan.compiled, OutOfMemory):
        return lines
    exact = plan.step is None or plan.step.work.exact
    words = "loops by their iterations" if exact else "at least: a loop of unknown length counts as one iteration"
    how = f"compiled, {words}" if plan.step else "estimated"
    lines.append(f"executed: {plan.flops:.4g} per device ({how}), {plan.overhead:.3f} of the model's")
    if plan.step is not None and plan.step.work.unknown:
        lines.append(f"  not counted, they do not tell: {', '.join(plan.step.work.unknown)}")
    return lines


def _collectives(plan: Plan) -> list[str]:
    found = () if isinstance(plan.compiled, OutOfMemory) else plan.collectives
    if not found:
        return ["collectives: none" if plan.step else "collectives: not known"]
    how = "per step" if plan.step else "per step, estimated"
    cells = [_cells(one, plan.step is not None) for one in found]
    lines = [f"collectives {how}, and bytes of operand or result per device", *aligned(cells)]
    if not all(one.exact for one in found):
        lines.append("  (at least): some are in a loop of unknown length, counted as one iteration, or in a branch")
    return lines


def _cells(one: Collective, counted: bool) -> tuple[str, ...]:
    count = f"{one.count:,} x" if counted else ""  # formulas know bytes, not into how many pieces they are cut
    return (f"  {one.kind}", " x ".join(one.axes), count, binary(one.bytes), "" if one.exact else "(at least)")


def _roofline(plan: Plan) -> list[str]:
    found, chip = plan.roofline, plan.chip
    if found is None or chip is None or isinstance(plan.compiled, OutOfMemory):
        return []
    low, high = found.utilisation
    rows = [
        (f"  arithmetic, at {chip.flops_per_second:.3g} FLOP/s (bfloat16)", f"{1e3 * found.compute:,.1f} ms"),
        (f"  main memory, at {chip.hbm_rate:.3g} bytes/s", f"{1e3 * found.memory:,.1f} ms"),
        (f"  communication, at {chip.link_rate:.3g} bytes/s per link", f"{1e3 * found.communication:,.1f} ms"),
    ]
    return [
        "a step takes at least, at the vendor's full speed",
        *aligned(rows),
        f"  all at once {1e3 * found.overlapped:,.1f} ms (bound by {found.bound}), one by one "
        f"{1e3 * found.serial:,.1f} ms: model FLOPs utilisation of {percent(low, 3)} to {percent(high, 3)}",
    ]


def _largest(buffers: tuple[Buffer, ...]) -> list[str]:
    cells = [(f"  {binary(b.bytes)}", b.type, f"{b.times:,} x", b.opcode, b.source) for b in buffers]
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return ["largest arrays of the step, with how often each is made (not all live at once)", *lines]


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns of equal width, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, len(row)))]).rstrip()
        for row in rows
    ]


def binary(size: int) -> str:
    """Bytes as a person reads them: 1536 is 1.5 KiB."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{size:,} B" if unit == "B" else f"{value:.4g} {unit}"
