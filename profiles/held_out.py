"""Constants for a device as if nobody had measured it, from all other devices and from what is written.

    c = argmin  sum over sources of mean soft(log predicted / measured)  +  w sum soft(s log(c / written))

soft is the loss of `profiles.curves`. Three things are used, no row of that device among them: rows of other devices
(`sources_in`), what is written about hardware and kernels (WRITTEN), and what papers and code say of how generations
of kernels and links differ (WRITTEN_OF, NVLINK). Single published figures may be of that device: FlashAttention's
shares of the peak of an A100 and an H100, aiconfigurator's empirical factors of both systems (0.8 of the memory's rate,
3 us a kernel), NCCL's table. Rows of one device leave directions of the constants open, along which the next device
may lie anywhere. So of all fits that are equally good on the sources (each one's
median within EQUAL of the freest fit's) the one nearest to what is written is taken: the largest w. Constants of a
generation of FlashAttention come from a source that runs it; if none does, they are another generation's in the ratio
of what the papers say of the two, or what is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiles.curves import (
    FAMILIES,
    FILES,
    KERNELS,
    SOFT,
    Family,
    levenberg,
    operators_in,
    rows_of,
    thin,
    upper_of,
)
from profiles.measured import read_measured
from profiles.named import device_named, model_named
from profiles.predict import predicted_s
from profiles.rows import Measured
from sim.core.specs import DeviceSpec
from sim.cost.architectures import NCCL_LATENCY_S
from sim.cost.efficiency import SHARES, Efficiency
from sim.cost.elementwise import SHORT

Floats = NDArray[np.float64]
Written = Mapping[float, Mapping[str, float]]
"""Generation of FlashAttention -> constant -> about what it should be."""

EQUAL = 0.002
"""Of two medians of errors that count as the same."""
SPREAD = float(np.log(1.3))
"""Of a constant about what is written of it. One for all, so that only w matters."""
WEIGHTS = tuple(4.0**-i for i in range(1, 11))
CARD, CARD_MODEL = "rtx_4090", "llama_3_1_8b"
CARD_FILE = "vllm-runs/kernel-profile-RTX4090/attention.csv"
CARD_OPERATORS = ("context attention", "generation attention")
"""A third card's attention, of generation 2. Chunks and decodes in one kernel are left out: their constants
(`sim.cost.attention.mixed_s`) were fitted with an A100's beside them."""
WITHOUT_LAUNCHES = (
    "attention_fixed_s",
    "decode_fixed_s",
    "decode_split_s",
    "decode_each_split_s",
    "decode_regroup_s",
)
"""What the launches of attention's kernels cost, which that card's times leave out."""
KERNEL_S = 3e-6
"""A short kernel: mem_empirical_constant_latency of aiconfigurator's a100_sxm.yaml and h200_sxm.yaml alike."""
MEMORY = 0.8
"""Share of the memory's rate: mem_bw_empirical_scaling_factor of both."""
L2_CLOCK_BYTES = 5120
"""Read from an A100's L2 per clock (NVIDIA's A100 whitepaper), by 108 multiprocessors at 1.41 GHz."""
TILE_S = 0.7e-6
"""Start and end of an attention tile: some four accesses to the memory, 500 clocks each, of which a second tile on
the multiprocessor hides half."""

GUESSED = {
    "gemm_smoothness": 2.0,
    "attention_wide_head": 1.0,
    "attention_tile_s": TILE_S,
    "attention_tail": 0.5,
    "cache_write_clocks": 4000.0,
    "decode_sm_bandwidth": 1.5,
    "decode_tile_s": KERNEL_S,
    "decode_head64": 2**-0.5,  # half of the bytes, the same latency
    "decode_head256": 2**0.5,
    "decode_smoothness": 2.0,
    "decode_each_split_s": 0.1e-6,
    "decode_query": 2.0,
    "decode_sequence_s": 0.01e-6,
    "nccl_simple": 3.0,
    "nccl_few_devices": 0.5,
    "nccl_switch": 1.0,
    "nccl_all_gather": 1.0,
    "nccl_reduce_scatter": 1.0,
    "nccl_alltoall": 1.0,
    "nccl_alltoall_low_latency": 0.25,
    "nccl_alltoall_simple_s": 3 * NCCL_LATENCY_S,
    "allreduce_fixed_s": KERNEL_S,
    "allreduce_hop_s": 0.1e-6,
    "allreduce_one_shot": 0.8,
    "allreduce_two_shot": 0.8,
    "allreduce_two_shot_s": KERNEL_S,
    "allreduce_eager_s": 30e-6,
    **{f"{kind}_missed": 0.5 for kind in SHORT},
}
"""About what a constant should be by its meaning, of which nothing is written."""
WRITTEN = {
    **GUESSED,
    "gemm_flops": 0.9,  # FlashAttention-2, section 1: GEMMs reach 80 to 90 % of the peak
    "gemm_l2_bandwidth": L2_CLOCK_BYTES * 1.41e9 / 312e12,
    "gemm_read_bandwidth": MEMORY,
    "gemm_write_bandwidth": MEMORY,
    "gemm_tile_steps": 4.0,  # stages of CUTLASS's pipelines
    "gemm_split_k_s": KERNEL_S,
    "gemm_fixed_s": KERNEL_S,
    "attention_exponentials": 1.5,
    "attention_clock_bytes": L2_CLOCK_BYTES / 108,
    "attention_split_s": KERNEL_S,
    "attention_fixed_s": 2 * KERNEL_S,  # attention, and the write of keys and values
    "decode_bandwidth": MEMORY,
    "decode_split_s": KERNEL_S,
    "decode_regroup_s": 2 * KERNEL_S,  # the query's copy and the result's
    "decode_fixed_s": 2 * KERNEL_S,
    "nccl_fixed_s": NCCL_LATENCY_S,
    "nccl_hop_s": 0.6e-6,  # hwLatencies of tuning.cc: NVLink, ring, LL
    "nccl_low_latency": 87.7 / 300,  # llMaxBws of the same file: Ampere, one node
    "nccl_bandwidth": 0.8,  # SM80_NVLINK_BW of topo.h, 20 of 25 GB/s
    **{f"{kind}_fixed_s": KERNEL_S for kind in SHORT},
    **{f"{kind}_clock_bytes": 13.0 for kind in SHORT},  # the memory's rate of an A100 or H100
}
WRITTEN |= {f"layer_{n.removeprefix('gemm_')}": v for n, v in WRITTEN.items() if n.startswith("gemm_")}
WRITTEN_OF: Written = {
    2.0: WRITTEN,
    # A multiprocessor has one tile at a time (MinBlocksPerMultiprocessor of flash_fwd_kernel_sm90.h): nothing hides
    # its start, and its latencies add up to its reads.
    3.0: {
        **WRITTEN,
        "attention_exponentials": 0.73,
        "attention_tile_s": 2 * TILE_S,
        "decode_smoothness": 1.0,
    },
}
"""Generation of FlashAttention -> WRITTEN. Exponentials are what the papers' shares of the peak leave beside the
products of heads of 128: 73 % of an A100's (2307.08691), 740 of an H100's 989 TFLOP/s (2407.08608)."""
IN_RATIO = ("attention_exponentials", "attention_tile_s")
"""Constants of KERNELS that go from one generation to another in the ratio of WRITTEN_OF."""
NVLINK = {"nccl_low_latency": (36.7 / 450) / (20.0 / 300), "nccl_bandwidth": 20.6 / 20.0}
"""Hopper's over Ampere's share of the link in NCCL's own tables: perChMaxRingLL128Bws of tuning.cc (LL128 is what
bandwidth matters to; llMaxBws have 1.07), and SM90_NVLINK_BW over SM80_NVLINK_BW of topo.h."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A measured device to learn from."""

    device: DeviceSpec
    measured: Sequence[Measured]
    own: tuple[str, ...] = ()
    """Constants that say how it was measured, and nothing of another device."""

    @property
    def generation(self) -> float:
        return Efficiency.of(self.device).attention_generation


def sources_in(folder: Path) -> dict[str, Source]:
    """The public files under `folder`, by device; ValueError or OSError when one is missing or broken."""
    result = {}
    for name, prefix in FILES.items():
        where = folder / prefix
        result[name] = Source(device=device_named(name), measured=operators_in(where.parent, where.name))
    card = read_measured(folder / CARD_FILE, model_named(CARD_MODEL))
    alone = [m for m in card if m.operator.startswith(CARD_OPERATORS)]
    result[CARD] = Source(device=device_named(CARD), measured=alone, own=WITHOUT_LAUNCHES)
    return result


def held_out(
    name: str,
    sources: Mapping[str, Source],
    families: Sequence[Family] = FAMILIES,
    written: Written = WRITTEN_OF,
) -> Efficiency:
    """Constants for the device `name` from all sources but its own."""
    others = [source for other, source in sources.items() if other != name]
    return unseen(sources[name].device, others, families, written)


def unseen(
    device: DeviceSpec,
    sources: Sequence[Source],
    families: Sequence[Family] = FAMILIES,
    written: Written = WRITTEN_OF,
) -> Efficiency:
    """Constants of `families` for `device`, whose generation of attention kernels and links are known, from
    `sources`; those without rows in them are what is written."""
    generation = Efficiency.of(device).attention_generation
    first: dict[str, Any] = dict(written[generation])
    result = replace(Efficiency(), attention_generation=generation, **first)
    for family in families:
        seen = [(source, rows_of(family, source.measured)) for source in sources]
        seen = [(source, rows) for source, rows in seen if rows]
        if seen:
            found = nearest(family, seen, result, written)
            own: dict[str, Any] = carried(family, found, device, seen[0][0], written)
            result = replace(result, **own)
    return replace(result, nccl_fixed_s=NCCL_LATENCY_S)


def carried(
    family: Family, found: Mapping[str, float], device: DeviceSpec, source: Source, written: Written
) -> dict[str, float]:
    """Constants of `device` by those `found` on other devices, of which `source` is the first.

    NVLINK is taken from that first source to `device`: exact where all sources that have rows of collectives are of
    one generation of links, as here, where there is one. Of a mix, whose fit lies between the generations, it is an
    approximation.
    """
    own, other = Efficiency.of(device).attention_generation, source.generation
    result = {}
    for name in family.constants:
        value = written[own][name]
        if _key(name, own) in found:
            value = found[_key(name, own)]
        elif name in IN_RATIO:
            value *= found[_key(name, other)] / written[other][name]
        if name in NVLINK:
            value *= NVLINK[name] ** (_is_hopper(device) - _is_hopper(source.device))
        result[name] = min(value, 1.0) if name in SHARES else value
    return result


def nearest(
    family: Family,
    sources: Sequence[tuple[Source, Sequence[Measured]]],
    start: Efficiency,
    written: Written,
) -> dict[str, float]:
    """Constants by `_key`, fitted to the rows of all sources, each source of the same weight: of the fits as good as
    the best, the one nearest to what is written."""
    parts = [(source, thin(rows)) for source, rows in sources]
    named = [[_key(name, s.generation, s) for name in family.constants] for s, _ in parts]
    about = {
        key: written[source.generation][name]
        for (source, _), keys in zip(parts, named, strict=True)
        for key, name in zip(keys, family.constants, strict=True)
    }
    keys, center = list(about), np.log(list(about.values()))
    places = [[keys.index(key) for key in own] for own in named]
    counts = [sum(len(m.seconds) for m in rows) for _, rows in parts]
    each = np.concatenate([np.full(count, 1.0 / count) for count in counts])

    def errors(x: Floats) -> list[Floats]:
        result = []
        for (source, rows), place in zip(parts, places, strict=True):
            values: dict[str, Any] = dict(zip(family.constants, np.exp(x[place]).tolist(), strict=True))
            e = replace(start, attention_generation=source.generation, **values)
            logs = [np.log(predicted_s(m, source.device, e) / m.seconds) for m in rows]
            result.append(np.concatenate(logs))
        return result

    def residuals(x: Floats) -> Floats:
        return np.concatenate([*errors(x), SOFT / SPREAD * (x - center)])

    upper = upper_of([key.split()[0] for key in keys])
    x, fits = np.minimum(center, upper), []
    for weight in WEIGHTS:
        x = levenberg(residuals, x, upper, np.append(each, np.full(len(keys), weight)))
        fits.append((x, np.array([np.median(np.abs(e)) for e in errors(x)])))
    best = fits[-1][1]
    x = next(x for x, medians in fits if (medians <= best + EQUAL).all())
    return dict(zip(keys, np.exp(x).tolist(), strict=True))


def _key(name: str, generation: float, source: Source | None = None) -> str:
    """A constant's name; with a generation or a device behind it if it is not the same for all."""
    if source is not None and name in source.own:
        return f"{name} {source.device.name}"
    return f"{name} {generation:g}" if name in KERNELS else name


def _is_hopper(device: DeviceSpec) -> int:
    return int(device.architecture == "hopper")
