"""The dense peak that a model-FLOPs utilisation (MFU) is a share of.

GPU figures are the makers' dense (not sparse) rates: bf16 of the tensor cores, and for fp32 theirs
in TF32 where torch is told to use it, which it is not unasked, else that of fp32 itself. Elsewhere
the peak is what the products of linear layers reach now, on a CPU through the library that they go
through and with the threads this rank has.
"""

from __future__ import annotations

import time

import torch

from models.matmul import times
from pipeline.accelerators import tabulated_peak


def dense_peak(device: torch.device, precision: str) -> float:
    """Dense FLOP/s of one rank's device; measured where the table has no entry."""
    if device.type == "cuda":
        known = tabulated_peak(torch.cuda.get_device_name(device), numbers(precision))
        if known is not None:
            return known
    # A GPU needs far larger products than a core to be kept busy.
    size = 8192 if device.type == "cuda" else 512
    return measured_matmul(device, torch.bfloat16 if precision == "bf16" else torch.float32, size)


def numbers(precision: str) -> str:
    """What a GPU multiplies matrices of `precision` in: bf16, tf32 or fp32."""
    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return precision


def measured_matmul(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """The best FLOP/s of a few [size, size] matrix products, after one to warm up."""
    left = torch.ones(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        times(left, left)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])
