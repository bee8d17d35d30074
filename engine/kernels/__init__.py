"""Operators of the engine, one per file: Triton kernels on CUDA, torch references on the CPU.

The device of the tensors decides which runs, and nothing falls back: an error on CUDA is an error.
Nothing is re-exported: operators have the names of their files, and would hide them.

    from engine.kernels.paged_attention import paged_attention
"""
