"""Whatever a key is set to, it is taken, or refused in one line: every leaf of every choice of every group."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from sim.assemble import CONFIGS, assemble
from sim.compile_program import _compiled
from sim.errors import message

VALUES = (None, "word", -1, 0, 5e-324, 1e-300, math.inf, 10**18, 10**400, [], {"_target_": "os.getcwd"})
SHORT = [
    "workload=constant",
    "workload.duration_s=10",
    "workload.rate_rps=1",
    "finetune=none",
    "cluster=single",
]
QUICK = ["cost=flexllm_a100", "+cost.world.max_tokens=1024", "+cost.predictor.max_tokens=1024"]
"""A cost model that needs no fit, with short curves."""
GROUPS = ("policy", "cost", "workload", "workload/lengths", "slo", "finetune", "model", "device", "cluster")
NEEDS = {
    "csv": ["workload.file=t.csv"],
    "burstgpt": ["workload.file=b.csv"],
    "azure_conv": ["workload.file=a.csv"],
    "azure_code": ["workload.file=a.csv"],
    "mooncake": ["workload.file=m.jsonl"],
    "closed_loop": [],
    **{f"separate{share}": ["cluster.pipelines=4"] for share in ("", "_25", "_50", "_75")},
    "from_trace": ["workload=poisson", "workload.lengths.file=t.csv", "workload.lengths.format=csv"],
    "file": ["finetune.jobs.file.data.file=f.json"],
}
"""What a choice takes to be whole."""


@pytest.fixture(autouse=True)
def small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n20,20,5\n")
    calls = "0,A,9,9,18,x\n20,A,9,9,18,x\n"
    Path("b.csv").write_text(f"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n{calls}")
    calls = "2023-11-16 18:15:00,9,9\n2023-11-16 18:15:20,9,9\n"
    Path("a.csv").write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{calls}")
    row = '{"timestamp": %d, "input_length": 9, "output_length": 9, "hash_ids": []}\n'
    Path("m.jsonl").write_text(row % 0 + row % 20000)
    Path("f.json").write_text("[9, 9, 9, 9]")


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """What takes more than a machine has is found here, and not by whoever waits for the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def leaves(node: object, prefix: str = "", within: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, the class that takes it and the key within that class)."""
    if isinstance(node, dict):
        within = f"{node['_target_']}." if "_target_" in node else within
        for key, value in node.items():
            yield from leaves(value, f"{prefix}{key}.", f"{within}{key}.")
    else:
        yield prefix[:-1], within


@contextmanager
def with_value(config: DictConfig, key: str, value: object) -> Iterator[DictConfig]:
    """For a while: to copy a config takes as long as to build from it."""
    head, _, last = key.rpartition(".")
    plain = OmegaConf.to_container(OmegaConf.select(config, head) if head else config, resolve=False)
    assert isinstance(plain, dict)
    OmegaConf.update(config, key, value, merge=False)
    yield config
    OmegaConf.update(config, key, plain[last], merge=False)


def escapes(call: Callable[[DictConfig], object], config: DictConfig) -> str | None:
    """What a user would see that is not one line; None where all is well."""
    try:
        call(config)
    except Exception as error:
        line = message(error)
        if line is None or isinstance(error, MemoryError):
            return f"{type(error).__name__}: {error}"
        return None if line and "\n" not in line else f"told as {line!r}"
    return None


def found(call: Callable[[DictConfig], object], configs: list[DictConfig], below: str = "") -> list[str]:
    seen: set[str] = set()
    wrong = []
    for config in configs:
        assert escapes(call, config) is None
        for key, taken in leaves(OmegaConf.to_container(config, resolve=False)):
            if key.startswith(below) and taken not in seen:
                seen.add(taken)
                for value in VALUES:
                    with with_value(config, key, value) as changed:
                        what = escapes(call, changed)
                    wrong += [f"{key}={value}: {what}"] if what is not None else []
    assert seen
    return wrong


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, [*overrides])


def chosen(group: str, choice: str) -> DictConfig:
    given = [*SHORT, *(QUICK if group != "cost" else []), f"{group}={choice}", *NEEDS.get(choice, [])]
    given += ["workload/lengths=fixed"] if group in ("policy", "slo", "model", "device", "cluster") else []
    own = dict(part.split("=", 1) for part in given)
    if choice in NEEDS and group == "workload":
        del own["workload.rate_rps"]  # of a trace it would be stretched, and clients have none
    return composed("config", *(f"{key}={value}" for key, value in own.items()))


@pytest.mark.parametrize("group", [*GROUPS, "cluster/router"])
def test_every_key_of_a_group_takes_a_value_or_refuses_it_in_a_line(group: str) -> None:
    below = group.replace("/", ".")
    configs, seen = [], set[str]()
    for path in sorted((CONFIGS / group).glob("*.yaml")):
        own = {taken for _, taken in leaves(OmegaConf.to_container(OmegaConf.load(path)), "", f"{below}.")}
        # A profile of an engine is not shipped.
        if (group, path.stem) != ("cost", "table") and not own <= seen:
            configs.append(chosen(group, path.stem))
            seen |= own
    assert found(assemble, configs, below) == []


def test_every_key_of_a_run_takes_a_value_or_refuses_it_in_a_line() -> None:
    config = composed("config", *SHORT, *QUICK)
    for below in ("seed", "run"):
        assert found(assemble, [config], below) == []


@pytest.mark.parametrize("below", ["finetune", "tp", "memory_utilization", "adapter_config", "peft"])
def test_every_key_of_compile_takes_a_value_or_refuses_it_in_a_line(below: str) -> None:
    methods = sorted(path.stem for path in (CONFIGS / "peft").glob("*.yaml")) if below == "peft" else ["ia3"]
    configs = [composed("compile", f"peft={method}", "finetune.seq_len=64") for method in methods]
    assert found(_compiled, configs, below) == []
