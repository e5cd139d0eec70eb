"""Formulas for a step: right where they can be, and moving the right way where they are rough."""

from __future__ import annotations

import jax
import pytest
import tiny

from sparse_lm.mesh import MESH_AXES, make_mesh
from sparse_lm.models.counts import count
from sparse_lm.nn.config import LatentConfig
from sparse_lm.planning.estimate import estimate, filled
from sparse_lm.planning.plan import make_plan, resolve

ONE = dict.fromkeys(MESH_AXES, 1)


def experiment(**changes):
    return resolve(tiny.experiment(model__dropout=0.0, **changes))


def estimated(mesh=ONE, **changes):
    return estimate(experiment(**changes), ONE | mesh, 1000, 2000)


def moves(found):
    return {(one.kind, one.axes): one.bytes for one in found.collectives}


def test_full_recomputation_keeps_the_input_of_every_layer():
    # 8 rows of 16 tokens, 16 wide, 2 layers, float32.
    assert estimated(model__remat="full").activations == 2 * 8 * 16 * 16 * 4
    assert estimated(model__remat="full", train__accumulate=4).activations == 2 * 2 * 16 * 16 * 4
    assert estimated({"data": 8}, model__remat="full").activations == 2 * 16 * 16 * 4


def test_what_is_kept_grows_from_full_over_dots_to_none():
    kept = [estimated(model__remat=remat).activations for remat in ("full", "dots", "none")]
    assert kept[0] < kept[1] < kept[2]


def test_attention_by_blocks_holds_scores_of_one_pair_of_blocks():
    kept = [
        estimated(data__length=64, model__heads__implementation=name, model__heads__block=16).activations
        for name in ("reference", "chunked", "auto")
    ]
    # 2 layers, 8 rows, 4 heads: logits, shifted ones and weights, float32.
    assert kept[0] - kept[1] == 2 * 8 * 4 * (64**2 - 16**2) * 12
    assert kept[1] == kept[2]


def test_rows_that_are_cut_leave_a_device_with_its_part():
    whole, cut = (estimated({"context": size}, model__remat="full").activations for size in (1, 4))
    assert whole == 4 * cut


def test_rotated_numbers_of_latent_attention_are_held_as_well():
    latent = estimated(model__heads__latent=LatentConfig(kv_rank=8, rope_dim=2)).activations
    # 2 layers x 8 x 16 tokens: 2 more numbers in the queries and keys of 4 heads, float32.
    assert latent - estimated().activations == 2 * 8 * 16 * (4 + 4) * 2 * 4


def test_without_capacity_experts_have_room_for_all_that_may_come():
    """Rows of experts per token, each of 2 x 16 + 3 x 8 numbers inside of a layer, on 4 devices."""

    def inside(dispatcher, factor=None, copies=0, room=2.0):
        moe = {"dispatcher": dispatcher, "capacity_factor": factor, "capacity_factor_eval": None, "every": 1}
        moe |= {"hot_copies": copies, "exchange_room": room}
        found = estimated({"expert": 4}, **{f"model__moe__{key}": value for key, value in moe.items()})
        return found.activations / (2 * 2 * 16 * 4)  # layers x tokens of a device x bytes

    per_row, bounded = 2 * 16 + 3 * 8, inside("gather", 1.0)
    assert inside("dropless") == bounded
    assert inside("ragged_all_to_all") - bounded == per_row * 2 * (2 - 1)
    assert inside("ragged_all_to_all", room=9.0) - bounded == per_row * 2 * (4 - 1)
    # 4 experts: one per device, of which half of all rows at most come, and the device's own.
    assert inside("ragged_all_to_all", copies=1, room=9.0) - bounded == per_row * 2 * (4 / 2 + 1 - 1)
    assert inside("gather") - bounded == inside("dense") - bounded == per_row * (4 - 2)


def test_how_much_of_the_room_is_filled_at_even_loads():
    def share(dispatcher, **more):
        moe = {"dispatcher": dispatcher, "capacity_factor": None, "capacity_factor_eval": None, **more}
        changes = {f"model__moe__{key}": value for key, value in moe.items()}
        return filled(experiment(**changes), {"expert": 4})

    assert filled(experiment(), {"expert": 4}) == 1  # with a capacity all slots are multiplied
    assert share("dropless") == 1
    assert share("ragged_all_to_all") == 1 / 2
    assert share("ragged_all_to_all", exchange_room=1.5) == 2 / 3
    assert share("ragged_all_to_all", exchange_room=8.0) == 1 / 4
    assert share("ragged_all_to_all", exchange_room=0.5) == 1


def test_flops_are_the_models_with_what_is_computed_again():
    config = experiment()
    tokens, counts = 8 * 16, count(config.model)
    assert estimated().flops == tokens * counts.flops_per_token(16)
    assert estimated({"fsdp": 4}).flops == tokens * counts.flops_per_token(16) // 4
    again = sum(counts.part_flops(name, 16) for name in counts.parts() if name != "unembedding")
    assert estimated(model__remat="full").flops == pytest.approx(
        tokens * (counts.flops_per_token(16) + again / 3), rel=1e-6
    )
    wider = estimated(model__moe__capacity_factor=2.0).flops - estimated().flops
    assert wider == tokens * counts.part_flops("experts", 16)


def test_without_a_mesh_nothing_moves():
    assert estimated().collectives == ()


def test_weights_are_gathered_and_gradients_scattered_once_more_with_remat():
    plain, full = (moves(estimated({"fsdp": 4}, model__remat=remat)) for remat in ("none", "full"))
    assert full["all-gather", ("fsdp",)] == 2 * plain["all-gather", ("fsdp",)]
    assert full["reduce-scatter", ("fsdp",)] == plain["reduce-scatter", ("fsdp",)] == plain["all-gather", ("fsdp",)]


def test_slots_are_exchanged_four_times_per_sparse_layer_and_six_with_remat():
    plain, full = (
        moves(estimated({"expert": 4}, model__moe__dispatcher="all_to_all", model__remat=remat))
        for remat in ("none", "full")
    )
    # One sparse layer; 2 rows of 16 tokens on a device with 2 slots each, 16 wide, float32.
    assert plain["all-to-all", ("expert",)] == 4 * 2 * 16 * 2 * 16 * 4
    assert full["all-to-all", ("expert",)] == 6 * 2 * 16 * 2 * 16 * 4


def test_gathered_experts_and_cut_heads_move_too():
    found = moves(estimated({"expert": 2, "model": 2, "data": 2}))
    assert {kind for kind, _ in found} == {"all-gather", "all-reduce"}
    assert ("all-reduce", ("model",)) in found and ("all-reduce", ("data",)) in found
    assert found["all-gather", ("expert",)] > 0


def test_microbatches_need_a_second_set_of_gradients_but_smaller_arrays():
    whole, parts = estimated(train__accumulate=1), estimated(train__accumulate=8)
    assert parts.working < whole.working + 1000
    assert parts.flops == whole.flops


def test_stages_share_the_layers_and_wait_in_the_bubble():
    """2 layers on 2 stages, 4 microbatches of 2 rows of 16 tokens, 16 wide, float32: 5 turns, 4 of them with one."""
    changes = {"model__remat": "full", "train__accumulate": 4, "model__moe__every": 1}
    whole, cut = estimated(**changes), estimated({"stage": 2}, **changes)
    assert cut.activations == 5 * 1 * 2 * 16 * 16 * 4 and whole.activations == 2 * 2 * 16 * 16 * 4
    head = 8 * 16 * count(experiment(**changes).model).part_flops("unembedding", 16)
    assert cut.flops == pytest.approx(((whole.flops - head) * 5 / 4 + head) / 2, rel=1e-6)
    assert cut.idle == pytest.approx(1 / 5) and whole.idle == 0
    assert moves(cut) == {("collective-permute", ("stage",)): 3 * 2 * 5 * 2 * 16 * 16 * 4}


def test_flights_of_fewer_microbatches_keep_less_and_wait_more():
    all_at_once, in_pairs = (
        estimated({"stage": 2}, train__accumulate=4, train__pipeline_microbatches=number) for number in (None, 2)
    )
    assert in_pairs.activations * 5 == all_at_once.activations * 3
    assert in_pairs.flops > all_at_once.flops
    assert in_pairs.memory_bytes > all_at_once.memory_bytes


def test_rows_that_are_cut_gather_keys_and_values():
    found = moves(estimated({"context": 4}))
    # 2 layers, 8 rows of 16 tokens, keys and values of 16 numbers each, float32.
    assert found["all-gather", ("context",)] == found["reduce-scatter", ("context",)] == 2 * 8 * 16 * 2 * 16 * 4


def test_gradients_are_summed_over_slices_too():
    found = moves(estimated({"replica": 2, "data": 2}))
    assert set(found) == {("all-reduce", ("replica", "data"))}
    assert found["all-reduce", ("replica", "data")] == moves(estimated({"data": 4}))["all-reduce", ("data",)]


@pytest.mark.slow
def test_the_pipeline_does_what_the_formulas_say():
    def plan(stages):
        config = experiment(mesh__stage=stages, mesh__data=1, train__accumulate=4, model__moe__every=1)
        return make_plan(config, make_mesh(config.mesh_sizes(stages), jax.devices()[:stages]))

    whole, cut = plan(1), plan(2)
    compiled = {(one.kind, one.axes): one.bytes for one in cut.step.collectives}
    permuted = "collective-permute", ("stage",)
    assert moves(cut.estimate)[permuted] == pytest.approx(compiled[permuted], rel=0.1)
    assert cut.estimate.flops / whole.estimate.flops == pytest.approx(cut.step.work.flops / whole.step.work.flops, 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_exchanged_bytes_and_flops_are_those_of_the_compiled_step(remat):
    """Without remat `test_planning_plan.py` shows it."""
    config = experiment(mesh__expert=4, mesh__data=1, model__moe__dispatcher="all_to_all", model__remat=remat)
    mesh = make_mesh(config.mesh_sizes(4), jax.devices()[:4])
    plan = make_plan(config, mesh)
    compiled = {(one.kind, one.axes): one.bytes for one in plan.step.collectives}
    assert moves(plan.estimate)["all-to-all", ("expert",)] == compiled["all-to-all", ("expert",)]
    assert plan.estimate.flops == pytest.approx(plan.step.work.flops, rel=0.1)
