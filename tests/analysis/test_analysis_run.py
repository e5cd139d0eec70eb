"""The whole analysis of a run on disk: what it holds, what it leaves alone, what it refuses."""

from __future__ import annotations

import dataclasses
import types

import analysis_cases as cases
import numpy as np
import pytest

from sparse_lm.analysis.information import specialisation
from sparse_lm.analysis.observe import Tokens, tokens_of
from sparse_lm.analysis.run import Options, analyze, covering, expert_names, label_kinds, specialisations
from sparse_lm.config import ConfigError
from sparse_lm.data.tokenizers import SymbolTokenizer
from sparse_lm.moe.config import MoEConfig
from sparse_lm.train.manifest import CheckpointError

OPTIONS = Options(batches=2, effect_batches=1, shuffles=3)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return cases.write_run(tmp_path_factory.mktemp("runs") / "a", {3: 2, 6: 0})


def test_an_analysis_is_whole_and_leaves_the_run_alone(workdir):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    lines: list[str] = []
    found = analyze(workdir, OPTIONS, lines.append)
    inside = cases.inside(found)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    assert found.loaded.step == 6 and found.expected_data and found.domains == cases.DATASET.domains
    assert inside.saturation.steps == (3, 6) and inside.saturation.chance == 0.5
    assert [one.kind for one in inside.specialisation] == ["token class", "domain", "language", "position"]
    assert found.attention is None and found.all_specialisation() == (("", inside.specialisation),)
    assignments = 2 * len(found.tokens.id_M)
    for one in inside.specialisation:
        assert one.counts_NEC.shape == (2, 4, len(one.names)) and len(one.information) == 2
        assert (one.counts_NEC.sum((1, 2)) == assignments).all()
        assert all(x.shuffles == 3 and 0 <= x.bits <= x.entropy for x in one.information)
    tokens = found.tokens
    by_document = specialisation(inside.observed.expert_NMK[0], tokens.domain_M, (4, 2), tokens.part_M, 3)
    assert inside.specialisation[1].information[0] == by_document
    # A chain is a language.
    assert inside.specialisation[2].information == inside.specialisation[1].information
    assert inside.specialisation[0].names == tuple(str(i) for i in range(8))
    assert inside.pairs_NEE.shape == (2, 4, 4) and (np.trace(inside.pairs_NEE, axis1=1, axis2=2) == assignments).all()
    assert [len(layer) for layer in inside.words] == [4, 4] and inside.experts == ("0", "1", "2", "3")
    assert inside.removal is not None and inside.forcing is not None
    assert (inside.removal.kind, inside.forcing.kind) == ("remove", "force")
    assert sum("layers" in line for line in lines) == 4 and any(line.endswith("compared: 3, 6") for line in lines)


def test_languages_are_of_the_tokens_that_have_one(workdir):
    tokens = Tokens(*(np.array(column) for column in ([1, 2, 3, 4], [0, 0, 1, 2], [0, 1, 0, 0], [0, 0, 1, 2])))
    loaded = types.SimpleNamespace(tokenizer=SymbolTokenizer(8))
    kinds = label_kinds(tokens, loaded, ("a", "b", "c"), ("x", None, "y"))  # type: ignore[arg-type]
    assert [kind for kind, *_ in kinds] == ["token class", "domain", "language", "position"]
    found = specialisations(np.array([[[0], [0], [1], [1]]]), 2, kinds, 3)
    np.testing.assert_array_equal(found[1].counts_NEC, [[[2, 0, 0], [0, 1, 1]]])
    np.testing.assert_array_equal(found[2].counts_NEC, [[[2, 0], [0, 1]]])  # not the token of domain b
    assert found[2].information[0].bits == pytest.approx(np.log2(3) - 2 / 3)  # the experts tell the language
    unknown = label_kinds(tokens, loaded, ("a", "b", "c"), (None,) * 3)  # type: ignore[arg-type]
    assert "language" not in [kind for kind, *_ in unknown]
    with pytest.raises(ConfigError, match=r"languages='grammar': is.*did you mean 'grammar001'"):
        analyze(workdir, Options(1, 0, languages={"grammar": "x"}))


def test_another_step_and_without_the_long_part(workdir):
    options = Options(batches=1, effect_batches=0, shuffles=1, step=3)
    found = analyze(workdir, options, lambda line: None)
    inside = cases.inside(found)
    assert found.loaded.step == 3 and inside.removal is None and inside.forcing is None
    np.testing.assert_array_equal(inside.saturation.share_XN[0], 1.0)
    best = analyze(workdir, Options(batches=1, effect_batches=0, shuffles=1, best=True), lambda line: None)
    assert best.loaded.step == 3  # the lower loss


def test_data_that_changed_are_noticed(tmp_path):
    cases.write_run(tmp_path / "a", {1: 0}, fingerprint="another")
    found = analyze(tmp_path / "a", Options(1, 0, shuffles=1), lambda line: None)
    assert not found.expected_data


def test_a_dense_run_is_refused_before_its_data_are_read(tmp_path, monkeypatch):
    cases.write_run(tmp_path / "a", {}, model__moe=None)
    monkeypatch.setattr("sparse_lm.analysis.run.build_dataset", lambda *_: pytest.fail("read the data"))
    with pytest.raises(ConfigError, match=r"model\.moe=None.*dense.*sparse run"):
        analyze(tmp_path / "a")


def test_what_is_not_there_is_refused(workdir, tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        analyze(tmp_path)
    with pytest.raises(CheckpointError, match="no such step"):
        analyze(workdir, Options(step=5))


@pytest.mark.parametrize("name", ["batches", "effect_batches", "shuffles"])
def test_numbers_that_are_too_low_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name}=-1"):
        dataclasses.replace(Options(), **{name: -1})


def test_batches_are_chosen_so_that_every_domain_is_there():
    def one(domain):
        return cases.batch([[1, 2, 3]], [[1, 1, 1]], domains=[[domain] * 3])

    batches = [one(0), one(0), one(0), one(1), one(0), one(2)]

    def domains(count):
        return [set(tokens_of([batch]).domain_M) for batch in covering(batches, 4, count)]

    assert domains(3) == [{0}, {1}, {2}]
    assert domains(2) == [{1}, {2}]  # the rarest
    assert domains(4) == [{0}, {0}, {1}, {2}] and len(domains(9)) == 6


def test_names_of_free_experts():
    moe = MoEConfig(num_experts=2, num_zero=1, num_copy=2, num_constant=1)
    assert expert_names(moe) == ("0", "1", "zero 0", "copy 0", "copy 1", "constant 0")
