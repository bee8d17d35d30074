from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest
from omegaconf import OmegaConf

from sim.checked import build


@dataclass(frozen=True, kw_only=True)
class Inner:
    tokens: int


partly = partial(Inner, tokens=3)


class Readable(Protocol):
    tokens: int

    def read(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Book:
    tokens: int

    def read(self) -> str:
        return "x"


@dataclass(frozen=True, kw_only=True)
class Outer:
    rate_rps: float
    count: int = 1
    on: bool = False
    name: str | None = None
    order: Literal["fcfs", "edf"] = "fcfs"
    targets: tuple[str, ...] = ()
    pair: tuple[float, int] = (0.0, 0)
    weights: dict[str, float] = field(default_factory=dict)
    inner: Inner | None = None
    many: list[Inner] = field(default_factory=list)
    made: Any = None
    book: Readable | None = None


@dataclass(kw_only=True)
class Card:
    first: int
    sms: int
    second: int
    third: int
    fourth: int = 4


HERE = __name__


def make(**keys: object) -> Outer:
    built = build(Outer, OmegaConf.create({"rate_rps": 1.0, **keys}), "workload")
    assert isinstance(built, Outer)
    return built


def test_all_missing_keys_are_told_at_once() -> None:
    for keys, told in (
        ({"sms": 1}, "device.first, device.second and device.third are missing; they must be given"),
        ({"sms": 1, "first": 1, "third": 1}, "device.second is missing; it must be given"),
    ):
        with pytest.raises(ValueError, match=f"^{told}$"):
            build(Card, keys, "device")


def test_values_of_the_right_type_arrive_as_the_annotation_says() -> None:
    built = make(
        rate_rps=5,
        name="x",
        targets=["a", "b"],
        pair=[1, 2],
        weights={"a": 1},
        inner={"tokens": 3},
        many=[{"tokens": 1}, {"tokens": 2}],
    )
    assert type(built.rate_rps) is float
    assert built == Outer(
        rate_rps=5.0,
        name="x",
        targets=("a", "b"),
        pair=(1.0, 2),
        weights={"a": 1.0},
        inner=Inner(tokens=3),
        many=[Inner(tokens=1), Inner(tokens=2)],
    )


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"rate_rps": "fast"}, "workload.rate_rps must be a number, got 'fast'"),
        ({"rate_rps": "1e-3"}, "workload.rate_rps must be a number, got '1e-3'"),
        ({"rate_rps": None}, "workload.rate_rps must be a number, got None"),
        ({"rate_rps": True}, "workload.rate_rps must be a number, got True"),
        ({"rate_rps": 10**400}, "workload.rate_rps must be at most 1.8e+308, got more"),
        ({"count": True}, "workload.count must be a whole number, got True"),
        ({"count": 1.0}, "workload.count must be a whole number, got 1.0"),
        ({"on": 1}, "workload.on must be true or false, got 1"),
        ({"name": 3}, "workload.name must be text or null, got 3"),
        ({"order": "lifo"}, "workload.order must be one of fcfs, edf, got 'lifo'"),
        ({"targets": "a"}, "workload.targets must be a list, each item text, got 'a'"),
        ({"targets": ["a", 1]}, "workload.targets[1] must be text, got 1"),
        ({"pair": [1]}, "workload.pair must be a list of 2: a number, a whole number, got [1]"),
        ({"weights": {"a": "b"}}, "workload.weights.a must be a number, got 'b'"),
        ({"inner": {"tokens": "3"}}, "workload.inner.tokens must be a whole number, got '3'"),
        ({"inner": {}}, "workload.inner.tokens is missing; it must be given"),
        ({"many": [{"tokens": None}]}, "workload.many[0].tokens must be a whole number, got None"),
        ({"count": 10**19}, "workload.count must be at most 9223372036854775807, got more"),
        ({"rate_rps": {"_target_": "os.getcwd"}}, "workload.rate_rps must be a number, got '"),
        ({"targets": [{"_target_": "os.getpid"}]}, "workload.targets[0] must be text, got "),
        (
            {"book": {"_target_": f"{HERE}.Inner", "tokens": 4}},
            "workload.book must be a node whose _target_ makes a Readable or null, got Inner(tokens=4)",
        ),
        ({"rate_rsp": 1}, "workload has no key 'rate_rsp'; did you mean 'rate_rps'?; known: rate_rps, count"),
        ({"made": {"_target_": "sim.nowhere.X"}}, "workload.made._target_ names a module that does"),
        ({"made": {"_target_": "math.nothing"}}, "workload.made._target_ names nothing that exists"),
        (
            {"made": {"_target_": f"{HERE}.partly"}},
            "workload.made._target_ must name a class or function, got",
        ),
    ],
)
def test_any_other_value_is_refused_by_name(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=r"^workload") as refused:
        make(**keys)
    assert str(refused.value).startswith(told)


@pytest.mark.parametrize(
    ("name", "source", "told"),
    [
        (
            "torn_importlib.py",
            b"x = 1\nx.y\n",
            "{file}, line 2: AttributeError: 'int' object has no attribute 'y'",
        ),
        ("torn_null.py", b"x = 1\0", "[A-Za-z ]+: source code .*null bytes"),
        ("torn_built" + EXTENSION_SUFFIXES[0], b"x", "ImportError: {file}: .*"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_with_its_own_place_or_none(
    name: str, source: bytes, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(source)
    monkeypatch.syspath_prepend(tmp_path)
    target = f"{name.partition('.')[0]}.X"
    place = told.format(file=re.escape(str(tmp_path / name)))
    with pytest.raises(ValueError, match=f"^workload._target_ '{target}' cannot be imported: {place}$"):
        build(None, {"_target_": target}, "workload")


def test_a_target_is_built_with_what_no_config_can_hold() -> None:
    node = OmegaConf.create({"_target_": f"{HERE}.Outer", "rate_rps": math.inf})
    inner = Inner(tokens=1)
    built = build(None, node, "workload", inner=inner)
    assert built.inner is inner
    with pytest.raises(ValueError, match="workload has no key 'inner'"):
        build(None, OmegaConf.merge(node, {"inner": {"tokens": 2}}), "workload", inner=inner)


def test_a_nested_target_is_built_first() -> None:
    assert make(made={"_target_": f"{HERE}.Inner", "tokens": 4}).made == Inner(tokens=4)
    assert make(book={"_target_": f"{HERE}.Book", "tokens": 4}).book == Book(tokens=4)
