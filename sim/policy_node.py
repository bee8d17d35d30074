"""From a `policy` node to a policy, with what goes wrong in its own file told as that file's."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from sim.checked import build, check, locate
from sim.core.cost import Predictor
from sim.core.loop import PolicyError
from sim.core.plan import ClusterPolicy, Policy
from sim.core.request import Slo


def policy_node(node: Any) -> dict[str, Any]:
    """A `policy` node without its name, which tables show and no policy takes."""
    return {str(key): value for key, value in node.items() if key != "name"}


def policy_of(node: dict[str, Any], predictor: Predictor | None, slos: Mapping[str, Slo]) -> Policy:
    """Build a policy, giving it what it asks for by name: `predictor` (None is for one that does not), and where they
    are null the tightest bounds of the SLO classes, `budget_s` of TPOT and `ttft_s` of TTFT.

    Raises ValueError for a node that makes no policy, PolicyError for what else its constructor raises.
    """
    target = locate(node.get("_target_"), "policy")
    parameters = inspect.signature(target).parameters
    given: dict[str, object] = {}
    if "predictor" in parameters:
        given["predictor"] = predictor
    for key, bound in (("budget_s", "tpot_s"), ("ttft_s", "ttft_s")):
        if key in parameters and node.get(key) is None:
            node = {name: value for name, value in node.items() if name != key}
            given[key] = min(getattr(slo, bound) for slo in slos.values())
        elif key in parameters and not check(node[key], float, f"policy.{key}") > 0:
            raise ValueError(f"policy.{key} must be above 0 seconds, got {node[key]}")
    with _told_of(target):
        policy = build(None, node, "policy", **given)
    return cast(Policy, policy) if hasattr(policy, "assign") else _checked(policy)


def assigned(policy: Policy | ClusterPolicy, count: int) -> list[Policy] | None:
    """The policies of `count` pipelines by one for the whole cluster; None for one of a pipeline."""
    if not hasattr(policy, "assign"):
        return None
    kind = type(policy)
    with _told_of(kind):
        found = policy.assign(count)
        if len(found) != count:
            told = f"assign({count}) must return as many policies, got {len(found)}"
            raise ValueError(f"policy {kind.__name__} in {_file(kind)}: {told}")
    return [_checked(one) for one in found]


@contextmanager
def _told_of(target: Callable[..., Any]) -> Iterator[None]:
    """What goes wrong inside is told with the lines of the target's own file; a ValueError is for the user as it is."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        told = f"policy {target.__name__}: {type(error).__name__}: {error}".removesuffix(": ")
        raise PolicyError(told, _file(target)) from error


def _checked(policy: object) -> Policy:
    """`policy`, or ValueError for what it lacks to be one."""
    lacks = [
        f"{key} = True or False"
        for key in ("serves", "finetunes")
        if not isinstance(getattr(policy, key, None), bool)
    ]
    lacks += [] if callable(getattr(policy, "plan", None)) else ["a method plan(view) -> Plan"]
    if lacks:
        kind = type(policy)
        raise ValueError(f"policy {kind.__name__} in {_file(kind)} needs {', '.join(lacks)}")
    return cast(Policy, policy)


def _file(target: Callable[..., Any]) -> str:
    """Where a class or function stands."""
    return getattr(sys.modules.get(target.__module__), "__file__", None) or target.__module__
