"""Configuration of sparse layers."""

from __future__ import annotations

import dataclasses
from typing import Literal

from sparse_lm.config import Config, ConfigError, option
from sparse_lm.moe.dispatch import DISPATCHERS
from sparse_lm.moe.grouped import Grouped
from sparse_lm.moe.routers import ROUTERS, RouterConfig, RouterShape
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.moe.shared import SharedGate
from sparse_lm.moe.slots import Priority, capacity


@dataclasses.dataclass(frozen=True)
class BalanceConfig(Config):
    """Weights of the router losses; each is added once per sparse layer (a sum over layers, as in Switch, DeepSeek).

    load: of the load-balance loss, which is 1 at perfect balance for every k. z: of the z-loss.
    entropy: of the mean entropy of a token's probabilities, in nats: above 0 makes routers decided, below 0 undecided.
    scope: over which tokens loads and probabilities are averaged before they are multiplied: `sequence` (DeepSeek-V2),
        `group` (Switch, GShard), `global` (the whole batch of a step, over devices and microbatches: Qiu et al. 2025).
    """

    load: float = option(0.01, ge=0)
    z: float = option(0.001, ge=0)
    entropy: float = 0.0
    scope: Literal["sequence", "group", "global"] = "global"

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every loss by its name in `moe.balance.router_losses`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, float)}

    def reaching(self, router: RouterConfig) -> BalanceConfig:
        """The weights; all 0 where no gradient reaches the router, as under hash routing."""
        return self if router.learned else self.replace(**dict.fromkeys(self.weights, 0.0))


@dataclasses.dataclass(frozen=True)
class HeterogeneousBalance(BalanceConfig):
    """The same for a layer whose experts are not meant to be loaded alike; see `moe.balance.load_balance`."""

    expert_weights: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class MoEConfig(Config):
    """Which layers are sparse and how.

    num_experts, top_k: routed experts, and how many of them see a token.
    d_expert: hidden width of an expert; None is d_ff / top_k (rounded down), so that routed FLOPs equal the dense
        layer's.
    num_zero, num_copy, num_constant: free experts, which the router may choose beside the feed-forward ones: see
        `moe.free`. A mesh cuts the feed-forward experts alone. Free ones have no slots, and what is assigned to them is
        never dropped (the paper gives them a capacity too); the balance loss and all statistics of the router are
        over all experts.
    free_share: tau in (0, 1], what a free expert's load weighs in the load-balance loss against a feed-forward
        expert's: balance is when it has 1 / tau times the assignments (Jin et al. 2024, MoE++: 0.75). What a router
        does for balance by itself, as with a bias, aims at equal loads all the same.
    num_shared: experts that see every token, beside the routed ones. d_shared: hidden width of each; None is
        d_expert. One of d_ff is a dense residual (OpenMoE, PR-MoE). shared_gate: see `moe.shared`.
    expert_bias: whether the routed experts' products have biases (gpt-oss).
    every, first_dense: after `first_dense` dense layers, each `every`-th layer is sparse.
    group_size: tokens that compete for the same slots; None is one sequence. It divides the length, or is a multiple
        of it; results never depend on the mesh.
    grouping: `sequence` (a group is neighbouring tokens of a row, or whole neighbouring rows), or `position` (the
        tokens at one position of group_size neighbouring rows: no token of a group is later than another, so that
        every router and every priority is causal; what a token gets depends on other rows instead. Krajewski et al.
        2024, whose groups have 256 rows).
    capacity_factor: slots per expert and group are ceil(factor * top_k * group_size / num_experts); with free experts
        the divisor is `worth` (MoE++, the equation of its expert capacity); None drops nothing.
        capacity_factor_eval: the same in evaluation.
    priority: who gets a slot first, see `moe.slots.place`. `token` is the only one that is causal for every top_k:
        under `first_choice` a later token's first choice takes the slot of an earlier token's second choice (but not
        with `prototype`, whose choices never share an expert), and under `probability`, `batch` and `random` any later
        token may push out an earlier one.
    dispatcher: see `moe.dispatch`. grouped: what computes the experts of those without a capacity, see `moe.grouped`.
    exchange_chunks: into how many parts a dispatcher that moves tokens cuts its exchanges, so that one part travels
        while the experts compute another; results stay the same. 1 is all at once.
    hot_copies: of so many experts, the most loaded ones of each step, every device of mesh.expert gets a copy with
        dispatcher=ragged_all_to_all; results stay the same, see `moe.dispatch.hot`.
    exchange_room: with dispatcher=ragged_all_to_all, rows that a device has room for, over its even share. What more
        come take further turns; results stay the same. Enough for all at once: the size of mesh.expert.
    expert_dropout: of the experts' hidden values. init_scale: of the experts' weights, see `fan_in_normal`.
    allow_non_causal: accept routing that looks at later tokens under a causal objective.
    """

    num_experts: int = option(8, ge=1)
    top_k: int = option(1, ge=1)
    num_zero: int = option(0, ge=0)
    num_copy: int = option(0, ge=0)
    num_constant: int = option(0, ge=0)
    free_share: float = option(1.0, gt=0, le=1)
    d_expert: int | None = option(None, ge=1)
    num_shared: int = option(0, ge=0)
    d_shared: int | None = option(None, ge=1)
    shared_gate: SharedGate = "none"
    expert_bias: bool = False
    every: int = option(2, ge=1)
    first_dense: int = option(0, ge=0)
    router: RouterConfig = option(TopK(), variants=ROUTERS)
    group_size: int | None = option(None, ge=1)
    grouping: Literal["sequence", "position"] = "sequence"
    capacity_factor: float | None = option(1.25, gt=0)
    capacity_factor_eval: float | None = option(2.0, gt=0)
    priority: Priority = "token"
    dispatcher: Literal["dense", "einsum", "gather", "dropless", "all_to_all", "ragged_all_to_all"] = "gather"
    grouped: Grouped = "auto"
    exchange_chunks: int = option(1, ge=1)
    hot_copies: int = option(0, ge=0)
    exchange_room: float = option(2.0, gt=0)
    balance: BalanceConfig = BalanceConfig()
    expert_dropout: float = option(0.0, ge=0, lt=1)
    init_scale: float = option(1.0, gt=0)
    allow_non_causal: bool = False

    def check(self) -> None:
        """Raises `ConfigError` when fields contradict each other."""
        if self.top_k > self.num_choices:
            what = f"num_experts={self.num_experts}" + (f" and the {self.num_free} free ones" if self.num_free else "")
            raise ConfigError("top_k", self.top_k, f"must be at most {what}")
        self._check_free()
        for name, unused in (("d_shared", None), ("shared_gate", "none")):
            if not self.num_shared and getattr(self, name) != unused:
                raise ConfigError(name, getattr(self, name), "there are no shared experts; set num_shared, or leave it")
        if self.grouping == "position" and self.group_size is None:
            raise ConfigError(
                "group_size",
                None,
                "grouping=position needs the number of rows of a group; set it, or grouping=sequence",
            )
        if self.grouping == "position" and self.balance.scope == "sequence":
            raise ConfigError(
                "balance.scope", "sequence", "with grouping=position no group lies in one sequence; use group or global"
            )
        self._check_carried()
        try:
            self.router.check_shape(self.router_shape(1))
        except ConfigError as error:
            raise error.under("router") from None

    def _check_carried(self) -> None:
        """Refuses what the router's decisions cannot be carried out with."""
        kind, able = self.router.kind, self.router.dispatchers
        if able is not None and self.dispatcher not in able:
            raise ConfigError(
                "dispatcher",
                self.dispatcher,
                f"cannot carry the decisions of router.kind={kind}; use {' or '.join(able)}",
            )
        has_capacity = DISPATCHERS[self.dispatcher].has_capacity
        if has_capacity and self.grouped != "auto":
            raise ConfigError(
                "grouped",
                self.grouped,
                f"dispatcher={self.dispatcher} has no grouped products; use auto, or dispatcher=dropless",
            )
        if self.exchange_chunks > 1 and not DISPATCHERS[self.dispatcher].moves_tokens:
            moving = " or ".join(name for name, cls in DISPATCHERS.items() if cls.moves_tokens)
            raise ConfigError(
                "exchange_chunks",
                self.exchange_chunks,
                f"{self.dispatcher} exchanges nothing; use 1, or dispatcher={moving}",
            )
        for name in ("hot_copies", "exchange_room"):
            unused = getattr(MoEConfig, name)
            if not self.exchanges_ragged and getattr(self, name) != unused:
                why = "has the same room for every expert" if has_capacity else "exchanges nothing"
                what = f"{self.dispatcher} {why}; use {unused}, or dispatcher=ragged_all_to_all"
                raise ConfigError(name, getattr(self, name), what)
        if self.hot_copies > self.num_experts:
            raise ConfigError("hot_copies", self.hot_copies, f"there are {self.num_experts} experts; use fewer copies")
        for name in ("capacity_factor", "capacity_factor_eval"):
            factor = getattr(self, name)
            if not has_capacity and factor is not None:
                raise ConfigError(
                    name,
                    factor,
                    f"dispatcher={self.dispatcher} has no capacity; use None, or one that has, such as gather",
                )
            if self.router.needs_slots and getattr(self, name) is None:
                raise ConfigError(name, None, f"every expert of router.kind={kind} would take all tokens; set a number")
        if self.router.fixed_slots and self.capacity_factor_eval != self.capacity_factor:
            raise ConfigError(
                "capacity_factor_eval",
                self.capacity_factor_eval,
                f"slots have weights with router.kind={kind}, so their number is fixed; use {self.capacity_factor}",
            )

    @property
    def exchanges_ragged(self) -> bool:
        """Whether tokens move to their experts as many as there are: where rooms and copies mean something."""
        return DISPATCHERS[self.dispatcher].moves_tokens and not DISPATCHERS[self.dispatcher].has_capacity

    def router_shape(self, d_model: int) -> RouterShape:
        """What the router is told about the layer."""
        slots = None
        if self.router.fixed_slots and self.group_size is not None:
            slots = capacity(self.capacity_factor, self.top_k, self.group_size, self.num_experts)
        return RouterShape(d_model, self.num_choices, self.top_k, slots)

    def _check_free(self) -> None:
        if not self.num_free:
            if self.free_share != 1:
                raise ConfigError(
                    "free_share", self.free_share, "there are no free experts; set num_zero, num_copy or num_constant"
                )
            return
        if not self.router.takes_free:
            raise ConfigError(
                "router.kind",
                self.router.kind,
                "shares tokens or slots out among equal experts, which free ones are not; use another router, such as "
                "top_k, or num_zero=num_copy=num_constant=0",
            )
        on_input = getattr(self.router, "gate_on", "output") == "input"
        if on_input and getattr(self.router, "renormalise", "none") == "after_drop":
            raise ConfigError(
                "router.renormalise",
                "after_drop",
                "with free experts gates are renormalised on the experts' output, and gate_on=input has them on the "
                "input; use before_drop, or gate_on=output",
            )

    def shared_width(self, d_expert: int) -> int:
        """Hidden width of all shared experts together; 0 when there are none."""
        return self.num_shared * (self.d_shared or d_expert)

    @property
    def num_free(self) -> int:
        """Experts that cost nothing."""
        return self.num_zero + self.num_copy + self.num_constant

    @property
    def num_choices(self) -> int:
        """Experts that the router chooses among."""
        return self.num_experts + self.num_free

    @property
    def worth(self) -> float:
        """How many feed-forward experts would get, at balance, as many assignments as there are.

        One of them gets 1 / worth of the assignments, a free one 1 / (free_share * worth).
        """
        return self.num_experts + self.num_free / self.free_share

    @property
    def expected(self) -> float:
        """How many feed-forward experts a token has at balance; top_k without free ones."""
        return self.top_k * self.num_experts / self.worth

    @property
    def losses(self) -> BalanceConfig:
        """The weights of the router losses; all 0 where no gradient reaches the router, as under hash routing."""
        if self.free_share != 1:
            weights = (1.0,) * self.num_experts + (self.free_share,) * self.num_free
            return HeterogeneousBalance(**vars(self.balance), expert_weights=weights)
        return self.balance.reaching(self.router)

    @property
    def causal(self) -> bool:
        """Whether no token's result depends on later tokens of its sequence, in training and in evaluation."""
        if self.grouping == "position":
            return True
        drops = self.capacity_factor is not None or self.capacity_factor_eval is not None
        in_order = self.priority == "token" or (
            self.priority == "first_choice" and (self.top_k == 1 or self.router.disjoint)
        )
        return self.router.causal and (in_order or not drops)
