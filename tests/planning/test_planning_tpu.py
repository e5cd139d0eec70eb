"""Programs compiled for a TPU that is not there move what they have to, once, and nothing else.

Each compilation is its own process, as `experiments/plan.py` is: the TPU compiler is one per process.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAYERS, LENGTH, WIDTH, HIDDEN, VOCABULARY = 2, 64, 128, 512, 264
COMMON = (
    "--topology=v5e:2x2",
    "--config.mesh.data=1",
    f"--config.model.num_layers={LAYERS}",
    f"--config.data.length={LENGTH}",
    "--config.model.dtype=bfloat16",
)
EXPERTS = ("--config.mesh.expert=4", "--config.model.moe.every=1")


def plan(tmp_path, config, *arguments):
    """What `experiments/plan.py` prints, and the plan that it writes."""
    file = tmp_path / "plan.json"
    command = [sys.executable, str(ROOT / "experiments/plan.py"), f"--config={ROOT}/configs/{config}", *arguments]
    # The flags of the tests are of the CPU's compiler.
    surroundings = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([*command, f"--json={file}"], capture_output=True, text=True, check=False, env=surroundings)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


def by_kind(written):
    return {(one["kind"], *one["axes"]): one for one in written["compiled"]["collectives"]}


def test_fsdp_gathers_each_weight_once_per_pass_and_scatters_its_gradient_once(tmp_path):
    """Dense layers, full remat: forward, once more in the backward pass, and one reduce-scatter."""
    text, written = plan(tmp_path, "quickstart.py:dense", *COMMON, "--config.mesh.fsdp=4", "--config.model.remat=full")
    found, layer = by_kind(written), 4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN
    table = VOCABULARY * WIDTH
    gathered = found["all-gather", "fsdp"]
    assert gathered["exact"]
    assert gathered["count"] == LAYERS * 6 * 2 + 1  # query, key, value, out, up, down; and the table, once
    assert gathered["bytes"] == 2 * (LAYERS * layer * 2 + table)  # bfloat16
    scattered = found["reduce-scatter", "fsdp"]["bytes"]
    assert 0 <= scattered - 2 * LAYERS * layer < 2**13  # the rest are norms
    # A table as small as this one is summed whole: float32 of the lookup, bfloat16 of the logits. Nothing of the size
    # of activations is.
    summed = found["all-reduce", "fsdp"]["bytes"]
    assert summed - 6 * table < 2**11 < 2 * 2 * LENGTH * WIDTH
    assert set(found) == {("all-gather", "fsdp"), ("reduce-scatter", "fsdp"), ("all-reduce", "fsdp")}
    # What is computed again: all of a layer but the product that nothing in the backward pass needs.
    assert 1.1 < written["overhead"] < 4 / 3
    step = written["compiled"]
    total = step["arguments"] + step["temporaries"] + step["outputs"] - step["aliased"]
    # The assignment has some MB of the device's own besides, which no large step would notice.
    assert step["arguments"] < written["peak"] == step["assigned"] < total + 2**23
    assert (written["source"], written["fits"], written["device_kind"]) == ("compiled", True, "TPU v5 lite")
    assert "fits: " in text and "a step takes at least" in text


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "passes"), [("none", 2), ("full", 3)])
def test_experts_exchange_slots_twice_per_pass_and_nothing_else_moves_activations(tmp_path, remat, passes):
    arguments = ("--config.model.moe.dispatcher=all_to_all", f"--config.model.remat={remat}")
    _, written = plan(tmp_path, "quickstart.py", *COMMON, *EXPERTS, *arguments)
    found = by_kind(written)
    exchanged = found["all-to-all", "expert"]
    assert (exchanged["count"], exchanged["exact"]) == (LAYERS * 2 * passes, True)
    # 2 rows of a device: 32 experts with 2 * 4 * 64 / 32 slots each, bfloat16.
    assert exchanged["bytes"] == LAYERS * 2 * passes * 2 * (2 * 32 * 16 * WIDTH)
    # Of experts' axes only the router's weights are gathered, and gradients of what all devices hold are summed.
    assert found["all-gather", "expert"]["bytes"] == LAYERS * (passes - 1) * 2 * WIDTH * 32
    shared = LAYERS * 4 * WIDTH * WIDTH * 2 + VOCABULARY * WIDTH * 6
    assert abs(found["all-reduce", "expert"]["bytes"] - shared) < 2**16
    assert len(found) == 3


@pytest.mark.slow
def test_ragged_exchanges_are_four_per_layer_and_the_step_compiles(tmp_path):
    arguments = ["--config.model.moe.dispatcher=ragged_all_to_all"]
    arguments += [f"--config.model.moe.capacity_factor{which}=None" for which in ("", "_eval")]
    _, written = plan(tmp_path, "quickstart.py", *COMMON, *EXPERTS, *arguments)
    assert by_kind(written)["ragged-all-to-all", "expert"]["count"] == LAYERS * 4


def test_without_compiling_an_estimate_and_the_nearest_change(tmp_path):
    """Mixtral on a slice that is too small for it."""
    text, written = plan(tmp_path, "paper/mixtral_8x7b.py", "--topology=v5e:8x8", "--nocompile")
    assert (written["source"], written["fits"], written["compiled"]) == ("estimated", False, None)
    assert sum(part["total"] for part in written["parts"]) == 46_702_792_704
    assert sum(part["active"] for part in written["parts"]) == 12_879_925_248
    assert "DOES NOT FIT" in text and "the nearest change that fits: --config." in text


def test_a_slice_that_there_is_not_is_one_line():
    command = [sys.executable, str(ROOT / "experiments/plan.py"), f"--config={ROOT}/configs/quickstart.py"]
    done = subprocess.run([*command, "--topology=v9:2x2"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: config.topology='v9:2x2'") and "Traceback" not in done.stderr
