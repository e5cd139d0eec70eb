"""The other side is a process that takes its turns, and both sides are the same model. A stand-in plays it."""

from __future__ import annotations

import ast
import dataclasses
import sys

import pytest
import tiny

from sparse_lm.bench import against
from sparse_lm.bench.against import (
    CARD,
    DISPATCHERS,
    ENVIRONMENT,
    QUICK,
    OtherSideError,
    Remote,
    Sizes,
    command_of,
    experiment_of,
    fastest,
    train_step_against,
)
from sparse_lm.bench.harness import Options
from sparse_lm.config import ConfigError
from sparse_lm.models.counts import count

# Logs what it is told; `grouped_mm` is four times as fast as `eager`, in bfloat16 the other way round.
STAND_IN = """
import json, pathlib, sys
options = dict(a[2:].split("=") for a in sys.argv[1:])
log = pathlib.Path(__file__).with_suffix(".log").open("a")
slow = (options["experts"] == "eager") == (options["dtype"] == "float32")
print(json.dumps({"transformers": "9.8.7"}), flush=True)
for line in sys.stdin:
    print(options["dtype"], options["experts"], line.strip(), file=log, flush=True)
    print(json.dumps({"peak": 4e12} if line == "peak\\n" else {"seconds": 4.0 if slow else 1.0}), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    script = tmp_path / "other.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(against, "SCRIPT", script)
    return tmp_path / "other.log"


def echo(program):
    return Remote([sys.executable, "-c", program])


def test_questions_are_answered_in_order():
    program = (
        "import sys\nprint('{}', flush=True)\nfor line in sys.stdin: print('{\"got\": \"%s\"}' % line[:-1], flush=True)"
    )
    with echo(program) as remote:
        assert remote.ready == {}
        assert [remote.ask(word) for word in ("step", "peak")] == [{"got": "step"}, {"got": "peak"}]
        process = remote._process
    assert process.returncode is not None  # it does not outlive its turn


@pytest.mark.parametrize(
    "program", ["raise SystemExit('no torch here')", "print('3'); raise SystemExit('no torch here')"]
)
def test_a_side_that_cannot_start_says_why(program):
    with pytest.raises(OtherSideError, match=r"answered '.*last words:\n(.|\n)*no torch here"), echo(program):
        pass


def test_a_side_that_ends_in_the_middle_says_why():
    with echo("print('{}'); input(); raise SystemExit('out of memory')") as remote:
        with pytest.raises(OtherSideError, match="out of memory"):
            remote.ask("step")
        with pytest.raises(OtherSideError):
            remote.ask("step")


def test_the_fastest_implementation_is_taken(stand_in):
    assert fastest(sys.executable, QUICK, "float32") == ("grouped_mm", " (eager x4.00)")
    assert fastest(sys.executable, QUICK, "bfloat16") == ("eager", " (grouped_mm x4.00)")
    assert stand_in.read_text().splitlines().count("float32 eager step") == 1 + against.PROBES


def test_the_sides_take_turns(stand_in, monkeypatch):
    taken = []

    def fake(experiment, mesh):
        assert mesh.size == 1
        taken.append((experiment.model.dtype, experiment.model.moe.dispatcher))

        def call():
            with stand_in.open("a") as log:
                log.write("ours\n")

        return call

    peaks = iter([1e12, 5e12])  # before and after; the other side's is 4e12
    monkeypatch.setattr(against, "stepper", fake)
    monkeypatch.setattr(against, "matmul_peak", lambda dtype: next(peaks))
    monkeypatch.setattr(against, "IMPLEMENTATIONS", ("eager",))
    options = Options(tiny.experiment(), quick=True, repeats=2, dtype="bfloat16", python=sys.executable, batch=3)
    rows = train_step_against(options)
    assert taken == [("bfloat16", dispatcher) for dispatcher in DISPATCHERS]
    assert [row.case for row in rows] == ["dropless bfloat16", "gather bfloat16"]
    assert {row.against for row in rows} == {"transformers 9.8.7 eager"}
    assert {(row.tokens, row.paired.repeats, row.peak) for row in rows} == {(3 * 64, 2, 5e12)}
    assert all(row.flops == row.flops_against > 0 for row in rows)
    step, peak = "bfloat16 eager step", "bfloat16 eager peak"
    pairs = ["ours", step] * 3  # the first warms up
    assert stand_in.read_text().splitlines() == [step] * (1 + against.PROBES) + [peak, *pairs, *pairs, peak]


def test_flops_and_parameters_by_hand():
    sizes = Sizes(
        d_model=4, num_layers=2, num_experts=3, top_k=2, d_expert=5, num_heads=2, vocab_size=7, length=6, batch=1
    )
    counts = count(experiment_of(sizes, "float32", "dropless").model)
    block = 4 * 4 * 4 + 4 * 3  # attention, router
    assert counts.total == 2 * 7 * 4 + 2 * (block + 3 * 3 * 4 * 5 + 2 * 4) + 4
    matrices = 7 * 4 + 2 * (block + 2 * 3 * 4 * 5)
    assert counts.flops_per_token(6) == 6 * matrices + 12 * 2 * 4 * 6


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_side_is_mixtral(dtype, dispatcher):
    experiment = experiment_of(Sizes(), dtype, dispatcher)
    model, moe = experiment.model, experiment.model.moe
    assert (model.dtype, model.activation, model.norm, model.position) == (dtype, "swiglu", "rmsnorm", "rope")
    assert all(model.sparse)
    assert moe is not None
    assert moe.router.gate == "softmax_after"
    assert (moe.capacity_factor is None) == (dispatcher == "dropless")
    assert (experiment.train.batch_size, experiment.data.length, model.kv_heads) == (8, 512, 8)


def test_the_script_takes_what_it_is_given():
    command = command_of(sys.executable, QUICK, "bfloat16", "eager")
    assert command[: len(ENVIRONMENT) + 3] == ["env", *ENVIRONMENT, sys.executable, "-P"]
    given = {argument.partition("=")[0] for argument in command if argument.startswith("--")}
    assert given == {f"--{field.name}" for field in dataclasses.fields(Sizes)} | {"--dtype", "--experts", "--device"}
    # Read, not imported: there is no torch here.
    tree = ast.parse(against.SCRIPT.read_text(encoding="utf-8"))
    words = {
        node.value.removeprefix("--")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert {name.removeprefix("--") for name in given} <= words


def test_on_a_gpu_the_other_side_computes_there_too_with_a_model_that_fills_it(monkeypatch):
    monkeypatch.setattr(against, "platform", lambda: "gpu")
    asked = []
    monkeypatch.setattr(against, "fastest", lambda python, sizes, dtype: asked.append(sizes) or ("eager", ""))
    assert "--device=cuda" in command_of(sys.executable, CARD, "bfloat16", "eager")
    with pytest.raises(ConfigError):
        train_step_against(Options(tiny.experiment(), python=None))
    assert asked == [CARD]
    counts = count(experiment_of(CARD, "bfloat16", "dropless").model)
    assert round(counts.total / 1e9, 1) == 3.7
    assert round(counts.active / 1e9, 1) == 1.2
    assert round(16 * counts.total / 1e9) == 58


@pytest.mark.parametrize("python", [None, "/nowhere/python"])
def test_without_another_python_it_is_refused(python):
    with pytest.raises(ConfigError, match=r"python=.*an environment with torch and transformers"):
        train_step_against(Options(tiny.experiment(), quick=True, python=python))
