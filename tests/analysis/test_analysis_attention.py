"""Experts in attention: their decisions are recorded, laid flat like the others, and on the page."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import analysis_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.analysis.export import as_json
from sparse_lm.analysis.observe import observe, observe_attention
from sparse_lm.analysis.page import render
from sparse_lm.analysis.run import Analysis, InAttention, Options, analyze
from sparse_lm.evals.routing import record, record_attention
from sparse_lm.moe.attention.mixture import Mixture
from sparse_lm.moe.attention.switch_head import SwitchHead
from sparse_lm.moe.routers.top_k import TopK

FORMS = {
    "mixture": Mixture(num_experts=4, top_k=2, router=TopK(gate="softmax_after", init_scale=4.0)),
    "switch_head": SwitchHead(num_experts=2, top_k=1, router_scale=4.0),
}
HEADS = {"mixture": 2, "switch_head": None}


def changes(form: str) -> dict:
    return {"model__attention": FORMS[form], "model__num_kv_heads": HEADS[form]}


@pytest.fixture(scope="module", params=sorted(FORMS))
def found(request, tmp_path_factory) -> Analysis:
    workdir = cases.write_run(tmp_path_factory.mktemp(request.param) / "a", {1: 0}, **changes(request.param))
    return analyze(workdir, Options(batches=2, effect_batches=0, shuffles=2), lambda line: None)


def attention_of(found: Analysis) -> InAttention:
    assert found.attention is not None
    return found.attention


def test_decisions_are_those_that_the_statistics_count(found):
    model, tokens = found.loaded.model, len(found.tokens.id_M)
    loads = []
    forward = jax.jit(lambda model, *rows: model(*rows)[1])
    for batch in (jax.tree.map(jnp.asarray, batch) for batch in cases.BATCHES):
        reports = forward(model, batch.tokens_BL[:, :-1], batch.segments_BL[:, :-1], batch.positions_BL[:, :-1])
        loads.append(np.asarray(reports.attention.router.load_UE).sum(1))
        assert reports.attention.decision is None  # not unless it is asked for
    np.testing.assert_array_equal(attention_of(found).load_NE, np.sum(loads, axis=0))
    chosen = found.loaded.experiment.model.attention.top_k
    chosen *= 8 if len(attention_of(found).experts) == 16 else 1  # four heads, values and outputs
    assert (attention_of(found).load_NE.sum(1) == chosen * tokens).all() and len(attention_of(found).load_NE) == 2


def test_tokens_stand_where_those_of_the_feed_forward_experts_stand(found):
    """Of rows that end in padding the rest is left out; a token's experts do not depend on what follows."""
    model = found.loaded.model
    whole, cut = cases.BATCHES[0], jax.tree.map(np.array, cases.BATCHES[0])
    cut.segments_BL[:, 9:] = 0
    expert_NMK = observe_attention(model, [whole])
    assert expert_NMK.shape[1] == observe(model, [whole]).expert_NMK.shape[1]
    real_BL = np.asarray(cut.segments_BL)[:, :-1] > 0
    shape = (len(expert_NMK), *real_BL.shape, -1)
    assert (np.asarray(whole.segments_BL) > 0).all()
    np.testing.assert_array_equal(observe_attention(model, [cut]), expert_NMK.reshape(shape)[:, real_BL])


def test_what_they_specialise_in_is_found_like_the_others(found):
    attention = attention_of(found)
    assert [one.kind for one in attention.specialisation] == [one.kind for one in cases.inside(found).specialisation]
    for one in attention.specialisation:
        np.testing.assert_array_equal(one.counts_NEC.sum(2), attention.load_NE)
    # Which symbol it is decides about experts that see little else, also in an untrained model.
    assert attention.specialisation[0].information[0].bits > 3 * attention.specialisation[0].information[0].highest
    assert [where for where, _ in found.all_specialisation()] == ["", " in attention"]


def test_the_page_and_the_json_have_them(found):
    page, content = render(found), as_json(found)["attention"]
    attention = attention_of(found)
    assert "Experts in attention" in page and "Attention experts by token class, layer 2" in page
    assert ("third expert" in page) == (attention.experts[0] == "value 0.0")
    best = attention.specialisation[0].information[0]
    assert f"{best.bits:.4f}" in page
    assert content["experts"] == list(attention.experts) and content["load"] == attention.load_NE.tolist()
    assert content["specialisation"]["domain"]["layers"][1]["bits"] == attention.specialisation[1].information[1].bits


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Analysis:
    """Of a model whose feed-forward layers are dense."""
    dense = changes("mixture") | {"model__moe": None}
    workdir = cases.write_run(tmp_path_factory.mktemp("alone") / "a", {1: 0}, **dense)
    return analyze(workdir, Options(batches=2, effect_batches=1, shuffles=2), lambda line: None)


def test_experts_in_attention_alone(alone):
    attention, tokens = attention_of(alone), len(alone.tokens.id_M)
    assert alone.feed_forward is None and (attention.load_NE.sum(1) == 2 * tokens).all()
    assert alone.all_specialisation() == ((" in attention", attention.specialisation),)
    page, content = render(alone), as_json(alone)
    ET.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    best = max(attention.specialisation[0].information, key=lambda one: one.excess)
    assert "2 of 4" in page and f"{best.excess:.3g} bits" in page and "Of no domain" not in page
    assert not any(words in page for words in ("Router saturation", "Without an expert", "among the sparse ones"))
    assert content["attention"]["load"] == attention.load_NE.tolist() and content["tokens"] == tokens
    assert not {"experts", "load", "saturation", "removal"} & set(content)


def test_names_are_in_the_order_of_the_statistics():
    assert FORMS["mixture"].names(4) == ("0", "1", "2", "3")
    names = FORMS["switch_head"].names(2)
    assert names == (
        *("value 0.0", "value 0.1", "value 1.0", "value 1.1"),
        *("output 0.0", "output 0.1", "output 1.0", "output 1.1"),
    )


def test_only_attention_with_experts_has_decisions():
    with pytest.raises(ValueError, match=r"no experts.*set model\.attention"):
        record_attention(cases.model(), cases.BATCHES[0])


def test_feed_forward_decisions_stay_apart(found):
    model, batch = found.loaded.model, jax.tree.map(jnp.asarray, cases.BATCHES[0])
    one, other = record(model, batch).expert_GSK, record_attention(model, batch).expert_GSK
    assert one.shape[:3] == other.shape[:3] == (2, 8, 16)
    assert not np.array_equal(one, other[..., : one.shape[3]])
