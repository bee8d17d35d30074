"""Operators of the engine: Triton kernels on CUDA, torch references on the CPU.

The device of the tensors decides which runs, and nothing falls back: an error on CUDA is an error.
"""

from engine.kernels.attention_backward import attention_backward
from engine.kernels.grouped_lora import grouped_lora, lora_weight_grad
from engine.kernels.loss import IGNORE_LABEL, linear_cross_entropy
from engine.kernels.paged_attention import paged_attention
from engine.kernels.write_kv import write_kv

__all__ = [
    "IGNORE_LABEL",
    "attention_backward",
    "grouped_lora",
    "linear_cross_entropy",
    "lora_weight_grad",
    "paged_attention",
    "write_kv",
]
