"""Typed configuration: what is coerced, what is refused and how the refusal reads, and the round trips."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, ClassVar, Literal

import hypothesis
import hypothesis.strategies as st
import pytest
from ml_collections import config_dict

from sparse_lm.config import (
    Config,
    ConfigError,
    closest,
    coerce,
    from_dict,
    option,
    python_file,
    to_config_dict,
    to_dict,
)


@dataclasses.dataclass(frozen=True)
class Circle(Config):
    kind: ClassVar[str] = "circle"
    radius: float = option(1.0, gt=0)


@dataclasses.dataclass(frozen=True)
class Square(Config):
    kind: ClassVar[str] = "square"
    side: int = option(2, ge=1)


SHAPES: dict[str, type] = {"circle": Circle, "square": Square}


@dataclasses.dataclass(frozen=True)
class Leaf(Config):
    width: int = option(4, ge=1, le=8)
    rate: float = option(0.5, gt=0, lt=1)
    limit: float | None = option(None, gt=0)
    name: str = "leaf"


@dataclasses.dataclass(frozen=True)
class Branch(Config):
    leaf: Leaf = Leaf()
    shape: Circle | Square = option(Circle(), variants=SHAPES)

    def check(self) -> None:
        if self.leaf.name == "bad":
            raise ConfigError("leaf.name", self.leaf.name, "choose another")


@dataclasses.dataclass(frozen=True)
class Root(Config):
    branch: Branch = Branch()
    extra: Leaf | None = None
    sizes: tuple[int, ...] = (1, 2)
    mode: Literal["slow", "fast"] = "slow"
    level: Literal["low", "high"] | None = None
    steps: int | None = option(None, ge=1)
    flag: bool = False


def refusal(values: dict[str, Any], cls: type = Root) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        from_dict(cls, values)
    return caught.value


def test_error_carries_key_value_and_reason():
    error = ConfigError("width", 0, "must be at least 1")
    assert str(error) == "config.width=0: must be at least 1"
    assert (error.key, error.value, error.why) == ("width", 0, "must be at least 1")
    assert isinstance(error, ValueError)
    outer = error.under("leaf").under("branch")
    assert str(outer) == "config.branch.leaf.width=0: must be at least 1"
    assert str(ConfigError("name", "x", "no")) == "config.name='x': no"


@pytest.mark.parametrize(
    ("values", "key", "why"),
    [
        ({"width": 0}, "width", "must be at least 1"),
        ({"width": 9}, "width", "must be at most 8"),
        ({"rate": 0.0}, "rate", "must be greater than 0"),
        ({"rate": 1}, "rate", "must be less than 1"),
        ({"limit": 0.0}, "limit", "must be greater than 0"),
        ({"limit": -1}, "limit", "must be greater than 0"),
    ],
)
def test_bounds(values, key, why):
    error = refusal(values, Leaf)
    assert (error.key, error.why) == (key, why)
    with pytest.raises(ConfigError, match=why):
        Leaf(**values)


def test_inclusive_bounds_are_allowed_and_none_has_none():
    assert Leaf(width=1).width == 1
    assert Leaf(width=8).width == 8
    assert Leaf(limit=None).limit is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["rate", "limit"])
def test_floats_are_finite(key, value):
    assert "expected a finite number" in refusal({key: value}, Leaf).why


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"width": True}, "expected int, got bool"),
        ({"width": 4.0}, "expected int, got float"),
        ({"width": "4"}, "expected int, got str"),
        ({"width": None}, "expected int, got NoneType"),
        ({"rate": True}, "expected float, got bool"),
        ({"rate": "0.5"}, "expected float, got str"),
        ({"rate": None}, "expected float, got NoneType"),
        ({"limit": False}, "expected float, got bool"),
        ({"name": 3}, "expected str, got int"),
        ({"name": None}, "expected str, got NoneType"),
    ],
)
def test_scalars_are_not_converted(values, why):
    error = refusal(values, Leaf)
    assert error.why == why
    assert [error.value] == list(values.values())


def test_flag_takes_only_a_bool():
    assert from_dict(Root, {"flag": True}).flag is True
    assert refusal({"flag": 1}).why == "expected bool, got int"


def test_int_becomes_float():
    config = from_dict(Branch, {"shape": {"kind": "circle", "radius": 3}, "leaf": {"limit": 2}})
    assert config == Branch(Leaf(limit=2.0), Circle(3.0))
    assert type(config.shape.radius) is float and type(config.leaf.limit) is float
    assert type(Circle(3).radius) is float


def test_unknown_key_names_the_closest_and_all():
    error = refusal({"widht": 3}, Leaf)
    assert (error.key, error.value) == ("widht", 3)
    assert error.why == "unknown key; did you mean 'width'? known: limit, name, rate, width"
    assert "did you mean" not in refusal({"zzz": 3}, Leaf).why
    assert refusal({"branch": {"leaf": {"widht": 3}}}).key == "branch.leaf.widht"


def test_closest_sorts_and_takes_words_of_any_type():
    numbers: Any = [10, 2, 1]
    assert closest("2", numbers) == "did you mean '2'? known: 1, 10, 2"
    assert closest("x", []) == "known: "


def test_nested_errors_carry_the_whole_path():
    assert refusal({"branch": {"leaf": {"width": 0}}}).key == "branch.leaf.width"
    assert refusal({"branch": {"shape": {"kind": "square", "side": 0}}}).key == "branch.shape.side"
    assert refusal({"branch": {"leaf": {"name": "bad"}}}).key == "branch.leaf.name"
    assert refusal({"sizes": [1, "2"]}).key == "sizes[1]"


@pytest.mark.parametrize("value", [3, "leaf", Circle(), [Leaf()]])
def test_nested_takes_the_dataclass_or_a_mapping(value):
    error = refusal({"leaf": value}, Branch)
    assert (error.key, error.why) == ("leaf", "expected a Leaf or a mapping of its fields")


def test_check_runs_on_construction_and_on_replace():
    with pytest.raises(ConfigError, match="choose another"):
        Branch(leaf=Leaf(name="bad"))
    with pytest.raises(ConfigError, match="choose another"):
        Branch().replace(leaf__name="bad")


def test_variants_are_chosen_by_kind():
    assert from_dict(Branch, {"shape": {"kind": "square", "side": 3}}).shape == Square(3)
    assert from_dict(Branch, {"shape": {"kind": "circle"}}).shape == Circle()
    assert from_dict(Branch, {"shape": Square(5)}).shape == Square(5)
    assert from_dict(Branch, {}).shape == Circle()


@pytest.mark.parametrize(
    ("value", "key", "why"),
    [
        ({"kind": "sqare"}, "shape.kind", "did you mean 'square'? known: circle, square"),
        ({"side": 3}, "shape.kind", "known: circle, square"),
        ({"kind": "circle", "side": 3}, "shape.side", "unknown key; known: radius"),
        (Leaf(), "shape", "expected one of the kinds circle, square"),
        ("square", "shape", "expected one of the kinds circle, square"),
        (None, "shape", "expected one of the kinds circle, square"),
    ],
)
def test_wrong_variants(value, key, why):
    error = refusal({"shape": value}, Branch)
    assert (error.key, error.why) == (key, why)


def test_optional_takes_none_or_the_inner_type():
    assert from_dict(Root, {"steps": None, "extra": None, "level": None}) == Root()
    assert from_dict(Root, {"steps": 3, "level": "high"}) == Root(steps=3, level="high")
    assert from_dict(Root, {"extra": {"width": 2}}).extra == Leaf(width=2)
    assert refusal({"steps": True}).why == "expected int, got bool"
    assert refusal({"extra": {"width": 0}}).key == "extra.width"


def test_literal_names_the_closest():
    error = refusal({"mode": "fas"})
    assert (error.key, error.why) == ("mode", "did you mean 'fast'? known: fast, slow")
    assert refusal({"mode": None}).value is None
    assert refusal({"level": "hi"}).key == "level"


@pytest.mark.parametrize("value", [[3, 4, 5], (3, 4, 5)])
def test_tuple_takes_lists(value):
    assert from_dict(Root, {"sizes": value}).sizes == (3, 4, 5)


@pytest.mark.parametrize("value", [3, "12", None, {1: 2}])
def test_tuple_takes_nothing_else(value):
    assert refusal({"sizes": value}).why == "expected a tuple"


def test_coerce_alone():
    assert coerce(1, float, "x") == 1.0
    assert coerce([1, 2], tuple[float, ...], "x") == (1.0, 2.0)
    assert coerce(config_dict.ConfigDict({"width": 2}), Leaf, "x") == Leaf(width=2)
    with pytest.raises(ConfigError, match=r"config\.x='a': expected int"):
        coerce("a", int, "x")


def test_replace():
    root = Root()
    assert root.replace(flag=True) == Root(flag=True)
    changed = root.replace(branch__leaf__width=2, branch__leaf__rate=0.25, branch__shape=Square(), steps=7)
    assert changed == Root(branch=Branch(Leaf(width=2, rate=0.25), Square()), steps=7)
    assert root == Root()
    with pytest.raises(ConfigError, match="at most 8"):
        root.replace(branch__leaf__width=9)
    with pytest.raises(TypeError, match="nothing"):
        root.replace(nothing=1)
    with pytest.raises(AttributeError, match="nowhere"):
        root.replace(nowhere__width=1)


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Leaf().width = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_to_dict_is_plain_and_carries_kinds():
    assert to_dict(Root(extra=Leaf(), sizes=(3,))) == {
        "branch": {
            "leaf": {"width": 4, "rate": 0.5, "limit": None, "name": "leaf"},
            "shape": {"kind": "circle", "radius": 1.0},
        },
        "extra": {"width": 4, "rate": 0.5, "limit": None, "name": "leaf"},
        "sizes": [3],
        "mode": "slow",
        "level": None,
        "steps": None,
        "flag": False,
    }


leaves = st.builds(
    Leaf,
    width=st.integers(1, 8),
    rate=st.floats(0.01, 0.99),
    limit=st.none() | st.floats(0.01, 1e9),
    name=st.text(max_size=5).filter(lambda name: name != "bad"),
)
shapes = st.builds(Circle, radius=st.floats(0.1, 10)) | st.builds(Square, side=st.integers(1, 9))
roots = st.builds(
    Root,
    branch=st.builds(Branch, leaf=leaves, shape=shapes),
    extra=st.none() | leaves,
    sizes=st.lists(st.integers(), max_size=4).map(tuple),
    mode=st.sampled_from(["slow", "fast"]),
    level=st.sampled_from([None, "low", "high"]),
    steps=st.none() | st.integers(1, 10**9),
    flag=st.booleans(),
)


@hypothesis.given(roots)
def test_round_trip_through_json(root):
    assert from_dict(Root, json.loads(json.dumps(to_dict(root)))) == root


@hypothesis.given(roots)
def test_round_trip_through_config_dict(root):
    flags: Any = to_config_dict(root)
    assert from_dict(Root, flags) == root
    assert from_dict(Root, flags.to_dict()) == root


def test_config_dict_options_that_are_off_keep_their_type():
    flags: Any = to_config_dict(Root())
    assert flags.steps is None and flags.level is None and flags.branch.leaf.limit is None
    flags.steps = 5
    flags.level = "high"
    flags.branch.leaf.limit = 2.5
    with pytest.raises(TypeError):
        flags.branch.leaf.limit = "much"
    with pytest.raises(TypeError):
        to_config_dict(Root()).steps = "many"
    assert from_dict(Root, flags) == Root(branch=Branch(Leaf(limit=2.5)), level="high", steps=5)
    flags.stepps = 3
    assert "did you mean 'steps'?" in refusal(flags).why


def test_config_dict_carries_kinds_that_can_be_changed():
    flags: Any = to_config_dict(Branch(shape=Square(3)))
    assert flags.shape.kind == "square" and flags.shape.side == 3
    flags.shape.side = 4
    assert from_dict(Branch, flags).shape == Square(4)
    flags.shape = config_dict.ConfigDict({"kind": "circle"})
    assert from_dict(Branch, flags).shape == Circle()


def test_a_nested_config_that_is_off_stays_off():
    assert to_config_dict(Root()).extra is None
    flags: Any = to_config_dict(Root(extra=Leaf(width=2)))
    assert flags.extra.width == 2


def test_a_python_file_is_run_and_anything_else_is_none(tmp_path):
    (tmp_path / "one.py").write_text("SIZE = 3\n")
    (tmp_path / "one.txt").write_text("SIZE = 3\n")
    module = python_file(tmp_path / "one.py")
    assert module is not None and module.SIZE == 3
    assert python_file(tmp_path / "one.txt") is None
    assert python_file(tmp_path / "two.py") is None
