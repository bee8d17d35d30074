"""Constants of an architecture: what its measured card has in common with its siblings.

A card that was never measured has the datasheet's numbers and its architecture's constants. They are shares of
peaks, clocks, and times of kernels that do not depend on the number of multiprocessors, so that they can be
carried from one card to the next; how far that holds is in `profiles/README.md`. What was measured where is
kept beside them, by the beginning of a constant's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sim.core.specs import DeviceSpec

NVLINK_BYTES_S = 1e11
"""Per direction; slower links are PCIe, or a bridge between two cards."""
NCCL_LATENCY_S = 6.6e-6
"""NCCL's own figure for the start of a ring's low-latency protocol, whatever the card (baseLatencies of
ncclTunerConstantsDefaults, src/graph/tuning.cc, 2.28): 10.0 us were measured on an A100, 5.1 us on an H200."""
NCCL_TABLE = ", latencies from NCCL's own tuning table"
PCIE = {"nccl_fixed_s": NCCL_LATENCY_S, "nccl_hop_s": 1.3e-6}
"""Latencies of collectives through PCIe, which nobody has measured: a hop takes 0.8 us by NVLink (measured, A100
and H200), times 1.0 / 0.6, the ratio of the two in hwLatencies of the same file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Constants that differ from an A100's, and the cards whose measurements they were fitted to."""

    constants: Mapping[str, float]
    measured_on: Mapping[str, str]
    """Beginning of a constant's name -> card or cards; what is not named is the A100's."""


AMPERE_CARD = "a100_80gb"
AMPERE = Architecture(constants={}, measured_on={})

SHORT = ("norm_", "add_", "rotary_", "activation_", "embedding_")

BOTH, BOTH_LAYERS = "a100_80gb and h200", "a100_80gb and h100"
ADA_ATTENTION = "rtx_4090 and a100_80gb"
SHARED = {
    "gemm_flops": 0.902,
    "gemm_l2_bandwidth": 0.0187,
    "gemm_read_bandwidth": 0.82,
    "gemm_write_bandwidth": 0.587,
    "gemm_smoothness": 2.22,
    "gemm_tile_steps": 4.22,
    "gemm_split_k_s": 2.42e-6,
    "gemm_fixed_s": 2.14e-6,
    "layer_flops": 0.771,
    "layer_l2_bandwidth": 0.0144,
    "layer_read_bandwidth": 0.804,
    "layer_write_bandwidth": 0.409,
    "layer_smoothness": 2.82,
    "layer_tile_steps": 0.364,
    "layer_split_k_s": 0.487e-6,
    "layer_fixed_s": 3.86e-6,
    "decode_bandwidth": 0.794,
    "decode_sm_bandwidth": 1.21,
    "decode_tile_s": 3.15e-6,
    "decode_head64": 0.779,
    "decode_head256": 1.34,
    "decode_query": 2.68,
    "decode_fixed_s": 9.52e-6,
    "allreduce_fixed_s": 4.61e-6,
    "allreduce_hop_s": 0.0882e-6,
    "allreduce_one_shot": 0.594,
    "allreduce_two_shot": 0.621,
    "allreduce_two_shot_s": 3.58e-6,
    "nccl_fixed_s": NCCL_LATENCY_S,
    "nccl_hop_s": 0.79e-6,
    "nccl_low_latency": 0.239,
    "nccl_simple": 3.33,
    "nccl_bandwidth": 0.887,
    "nccl_few_devices": 0.852,
    "nccl_switch": 0.925,
    "nccl_all_gather": 0.855,
    "nccl_reduce_scatter": 0.877,
    "nccl_alltoall": 0.821,
    "nccl_alltoall_low_latency": 0.0481,
    "nccl_alltoall_simple_s": 5.13e-6,
}
"""Fitted to an A100 and a Hopper together (`coserve profile curves`, one set for both): what a third architecture has
where none of its cards was measured."""

ADA = Architecture(
    # casys-kaist/LLMServingSim 5daddb2 (MIT): an RTX 4090, vLLM 0.19.0, Llama-3.1-8B, kernels without their
    # launches. The rest of FlashAttention 2 is an A100's; heads of other sizes than 128 are in neither file.
    constants={
        **{name: value for name, value in SHARED.items() if not name.startswith("decode_")},
        "attention_exponentials": 2.95,
        "attention_fixed_s": 6.26e-6,
        "decode_bandwidth": 0.903,
        "decode_sm_bandwidth": 2.33,
        "decode_fixed_s": 4.06e-6,
        "norm_clock_bytes": 7.48,
        "norm_missed": 0.00556,
        "norm_fixed_s": 2.21e-6,
        "rotary_clock_bytes": 6.64,
        "rotary_fixed_s": 2.25e-6,
        "activation_clock_bytes": 5.24,
        "activation_missed": 0.298,
        "activation_fixed_s": 2.9e-6,
        "embedding_clock_bytes": 11.2,
        "embedding_fixed_s": 3.54e-6,
    },
    measured_on={
        **dict.fromkeys(("gemm_", "allreduce_", "nccl_"), BOTH),
        "layer_": BOTH_LAYERS,
        **dict.fromkeys(("attention_", "decode_"), ADA_ATTENTION),
        **dict.fromkeys(("norm_", "rotary_", "activation_", "embedding_"), "rtx_4090"),
    },
)

HOPPER = Architecture(
    # ai-dynamo/aiconfigurator 095f58a (Apache-2.0): an H200-SXM, vLLM 0.24.0, NCCL 2.29.2; what runs in a layer
    # (its products and short kernels): microsoft/vidur 7d47513 (MIT), an H100, Llama-2-7B. That file alone does not
    # tell a product's tile_steps and split_k_s, which are the shared ones.
    constants={
        "attention_generation": 3.0,
        "gemm_flops": 0.845,
        "gemm_l2_bandwidth": 0.0198,
        "gemm_read_bandwidth": 0.825,
        "gemm_write_bandwidth": 0.607,
        "gemm_smoothness": 3.29,
        "gemm_tile_steps": 1.89,
        "gemm_split_k_s": 2.8e-6,
        "gemm_fixed_s": 2.5e-6,
        "layer_flops": 0.815,
        "layer_l2_bandwidth": 0.0149,
        "layer_read_bandwidth": 0.915,
        "layer_write_bandwidth": 0.667,
        "layer_smoothness": 1.91,
        "layer_tile_steps": 0.364,
        "layer_split_k_s": 0.487e-6,
        "layer_fixed_s": 4.47e-6,
        "attention_exponentials": 0.939,
        "attention_wide_head": 0.411,
        "attention_tile_s": 3.52e-6,
        "attention_tail": 0.412,
        "attention_clock_bytes": 24.4,
        "attention_split_s": 1.27e-6,
        "attention_fixed_s": 9.35e-6,
        "cache_write_clocks": 4540,
        "decode_bandwidth": 0.944,
        "decode_sm_bandwidth": 1.13,
        "decode_tile_s": 3e-6,
        "decode_head64": 0.846,
        "decode_head256": 1.57,
        "decode_smoothness": 1.12,
        "decode_split_s": 2.35e-6,
        "decode_each_split_s": 0.018e-6,
        "decode_query": 2.48,
        "decode_sequence_s": 0.015e-6,
        "decode_fixed_s": 9.48e-6,
        "allreduce_fixed_s": 4.38e-6,
        "allreduce_hop_s": 0.0515e-6,
        "allreduce_one_shot": 0.579,
        "allreduce_two_shot": 0.655,
        "allreduce_two_shot_s": 3.27e-6,
        "allreduce_eager_s": 21.1e-6,
        "nccl_fixed_s": 5.12e-6,
        "nccl_hop_s": 0.807e-6,
        "nccl_low_latency": 0.264,
        "nccl_simple": 3.29,
        "nccl_bandwidth": 0.943,
        "nccl_few_devices": 0.949,
        "nccl_switch": 0.958,
        "nccl_all_gather": 0.866,
        "nccl_reduce_scatter": 0.851,
        "nccl_alltoall": 0.846,
        "nccl_alltoall_low_latency": 0.0334,
        "nccl_alltoall_simple_s": 5.02e-6,
        "norm_clock_bytes": 5.28,
        "add_clock_bytes": 14.9,
        "rotary_clock_bytes": 6.16,
        "activation_clock_bytes": 7.57,
        "embedding_clock_bytes": 2.23,
        "norm_missed": 0.889,
        "add_missed": 0.153,
        "rotary_missed": 0.001,
        "activation_missed": 0.0229,
        "embedding_missed": 0.001,
        "norm_fixed_s": 3.67e-6,
        "add_fixed_s": 1.66e-6,
        "rotary_fixed_s": 2.25e-6,
        "activation_fixed_s": 1.87e-6,
        "embedding_fixed_s": 3.64e-6,
    },
    measured_on={
        **dict.fromkeys(("gemm_", "attention_", "decode_", "cache_", "allreduce_", "nccl_"), "h200"),
        **dict.fromkeys(("layer_", *SHORT), "h100"),
    },
)

BLACKWELL = Architecture(
    # Nothing was measured. FlashAttention 3, whose kernels these are, does not run there.
    constants={**HOPPER.constants, **SHARED},
    measured_on={
        **HOPPER.measured_on,
        **dict.fromkeys(("gemm_", "decode_", "allreduce_", "nccl_"), BOTH),
        "layer_": BOTH_LAYERS,
    },
)

ARCHITECTURES = {"ampere": AMPERE, "ada": ADA, "hopper": HOPPER, "blackwell": BLACKWELL}


def architecture_of(device: DeviceSpec) -> Architecture:
    """ValueError when there is none of that name."""
    if device.architecture not in ARCHITECTURES:
        raise ValueError(
            f"device.architecture of {device.name} is {device.architecture!r}; "
            f"allowed: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[device.architecture]


def constants_of(device: DeviceSpec) -> dict[str, float]:
    """Of its architecture and its links, with its own `extras` over them."""
    links = PCIE if _by_pcie(device) else {}
    return {**architecture_of(device).constants, **links, **device.extras}


def measured_on(device: DeviceSpec, prefix: str) -> str:
    """Names of the cards, joined by "and", on which the device's constants that begin with `prefix` were measured,
    and NCCL_TABLE after them for NCCL through PCIe, whose latencies were not."""
    if any(name.startswith(prefix) for name in device.extras):
        return device.name
    cards = architecture_of(device).measured_on.get(prefix, AMPERE_CARD)
    return cards + NCCL_TABLE if _by_pcie(device) and prefix == "nccl_" else cards


def measured_itself(device: DeviceSpec) -> bool:
    """Whether some of the device's constants were measured on it, or are its own. ValueError when there is no such
    architecture."""
    cards = " and ".join([AMPERE_CARD, *architecture_of(device).measured_on.values()])
    return bool(device.extras) or device.name in cards.split(" and ")


def _by_pcie(device: DeviceSpec) -> bool:
    return device.link_bandwidth_bytes_s < NVLINK_BYTES_S
