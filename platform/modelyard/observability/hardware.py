"""What the accelerator under a worker could do at best: the denominator of model FLOPs utilisation (MFU)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

PEAK_TFLOPS_BF16 = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L4": 121.0,
    "V100": 125.0,
    "T4": 65.0,
    "MI300X": 1307.0,
}
"""Dense 16-bit peaks from the makers' data sheets (V100 and T4: fp16), by part of the device name; first match wins."""


def peak_flops(device: torch.device, precision: Literal["fp32", "bf16"]) -> float:
    """Peak FLOP/s of one worker's device.

    A known GPU at 16 bits counts with its data sheet; anything else is measured with large matrix products, so on
    a CPU the peak is this machine's, with this process's threads, next to whatever else runs.
    """
    import torch

    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for part, tera in PEAK_TFLOPS_BF16.items():
            if part in name:
                return tera * 1e12
    return measured_matmul_flops(device, torch.float32 if precision == "fp32" else torch.bfloat16)


def measured_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.25) -> float:
    """Best FLOP/s over repeated square matrix products for about `seconds`."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    a_NN = torch.randn(size, size, device=device).to(dtype)
    b_NN = torch.randn(size, size, device=device).to(dtype)
    best, began, rounds = float("inf"), time.perf_counter(), 0
    while rounds < 4 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        torch.mm(a_NN, b_NN)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, rounds = min(best, time.perf_counter() - start), rounds + 1
    return float(2 * size**3 / best)
