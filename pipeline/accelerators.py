"""What GPUs can do, from their makers' data sheets: for MFU and for plans. Imports no torch.

Dense (not sparse) FLOP/s, memory in decimal bytes as sold (a device reports a little more), one
direction of its links, and the board's power limit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Dense FLOP/s by device name part and numbers, from the makers' data sheets. bf16 is the tensor
# cores' (V100: fp16, it has no bf16), fp32 is without TF32.
# A longer name comes before the one it begins with.
DENSE_PEAKS: dict[str, dict[str, float]] = {
    "B200": {"bf16": 2250e12, "tf32": 1125e12, "fp32": 75e12},
    "H200": {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12},
    "H100 PCIe": {"bf16": 756e12, "tf32": 378e12, "fp32": 51e12},
    "H100 NVL": {"bf16": 835e12, "tf32": 417e12, "fp32": 60e12},
    "H100": {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "A10G": {"bf16": 70e12, "tf32": 35e12, "fp32": 35e12},
    "A10": {"bf16": 125e12, "tf32": 62.5e12, "fp32": 31.2e12},
    "L40S": {"bf16": 362e12, "tf32": 183e12, "fp32": 91.6e12},
    "L40": {"bf16": 181e12, "tf32": 90.5e12, "fp32": 90.5e12},
    "L4": {"bf16": 121e12, "tf32": 60e12, "fp32": 30.3e12},
    "V100": {"bf16": 125e12, "tf32": 15.7e12, "fp32": 15.7e12},
    "RTX 4090": {"bf16": 165.2e12, "tf32": 82.6e12, "fp32": 82.6e12},
}


def tabulated_peak(device_name: str, numbers: str) -> float | None:
    """Dense FLOP/s of the device that calls itself `device_name`; None where it is not known."""
    for part, peaks in DENSE_PEAKS.items():
        # Not the A10 in A1000, nor the slower variants of a desktop's card.
        if re.search(rf"{part}(?!\w| D\b| Laptop)", device_name):
            return peaks[numbers]
    return None


@dataclass(frozen=True)
class Accelerator:
    """One kind of device that a cluster is made of."""

    device_name: str
    """As in DENSE_PEAKS; "" for a CPU rank."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of its memory, bytes/s."""
    link: float
    """Bytes/s in one direction to the other devices of its node."""
    network: float
    """Bytes/s in one direction between nodes, of a whole node of the maker's own design; a
    modest cluster's where there is none."""
    watts: float
    source: str

    def peak(self, numbers: str) -> float:
        """Dense FLOP/s in bf16, tf32 or fp32."""
        if not self.device_name:
            return CPU_PEAK
        return DENSE_PEAKS[self.device_name][numbers]


# Assumed, not from a data sheet: one AVX2 core. `isoflop plan --gpu cpu` is for its memory.
CPU_PEAK = 50e9
# NVLink's published figures count both directions; PCIe 4.0 ×16 moves 32 GB/s in each.
ACCELERATORS: dict[str, Accelerator] = {
    "a100-40": Accelerator(
        "A100", 40e9, 1555e9, 300e9, 200e9, 400, "NVIDIA A100 data sheet (SXM4); DGX A100: 8 × HDR"
    ),
    "a100-80": Accelerator(
        "A100", 80e9, 2039e9, 300e9, 200e9, 400, "NVIDIA A100 data sheet (SXM4); DGX A100: 8 × HDR"
    ),
    "h100": Accelerator(
        "H100", 80e9, 3350e9, 450e9, 400e9, 700, "NVIDIA H100 data sheet (SXM5); DGX H100: 8 × NDR"
    ),
    "h200": Accelerator(
        "H200", 141e9, 4800e9, 450e9, 400e9, 700, "NVIDIA H200 data sheet (SXM); DGX H200: 8 × NDR"
    ),
    "b200": Accelerator(
        "B200", 180e9, 8000e9, 900e9, 400e9, 1000, "NVIDIA DGX B200 data sheet: 8 × NDR"
    ),
    "l40s": Accelerator(
        "L40S", 48e9, 864e9, 32e9, 12.5e9, 350, "NVIDIA L40S data sheet; PCIe 4.0; 100 Gb/s assumed"
    ),
    "l4": Accelerator(
        "L4", 24e9, 300e9, 32e9, 12.5e9, 72, "NVIDIA L4 data sheet; PCIe 4.0; 100 Gb/s assumed"
    ),
    "v100": Accelerator(
        "V100", 32e9, 900e9, 150e9, 50e9, 300, "NVIDIA V100 data sheet (SXM2 32 GB); DGX-1: 4 × EDR"
    ),
    "rtx4090": Accelerator(
        "RTX 4090", 24e9, 1008e9, 32e9, 12.5e9, 450, "NVIDIA Ada whitepaper; 100 Gb/s assumed"
    ),
    "cpu": Accelerator("", 16e9, 20e9, 5e9, 1.25e9, 15, "assumed: a core of a server, 10 Gb/s"),
}
