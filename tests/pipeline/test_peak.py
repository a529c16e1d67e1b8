"""Peaks: every device finds its own line, and a measured one is a rate that can be reached."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.matmul import linear
from pipeline import peak
from pipeline.accelerators import DENSE_PEAKS, tabulated_peak
from pipeline.peak import dense_peak, measured_matmul


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("Tesla V100-SXM2-32GB", 125e12),
    ],
)
def test_a_device_finds_its_own_line(name: str, bf16: float) -> None:
    assert tabulated_peak(name, "bf16") == bf16


def test_an_unknown_device_has_no_line_and_the_cpu_is_measured() -> None:
    for name in ("GeForce 9800", "RTX A1000", "A100X", "RTX 4090 Laptop GPU"):
        assert tabulated_peak(f"NVIDIA {name}", "bf16") is None
    assert 1e8 < dense_peak(torch.device("cpu"), "fp32") < 1e14


def test_no_name_hides_a_longer_one() -> None:
    names = list(DENSE_PEAKS)
    for index, name in enumerate(names):
        assert not any(name in later for later in names[index + 1 :]), name


@pytest.mark.parametrize(
    ("tf32", "precision", "expected"),
    [
        (False, "fp32", 67e12),
        (True, "fp32", 494e12),
        (False, "bf16", 989e12),
        (True, "bf16", 989e12),
    ],
)
def test_fp32_is_measured_by_what_torch_multiplies_in(
    tf32: bool, precision: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        assert dense_peak(torch.device("cuda"), precision) == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_gpu_without_a_line_is_measured_with_large_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Quadro")
    asked: list[tuple[torch.dtype, int]] = []

    def noted(device: torch.device, dtype: torch.dtype, size: int) -> float:
        asked.append((dtype, size))
        return 1.0

    monkeypatch.setattr(peak, "measured_matmul", noted)
    dense_peak(torch.device("cuda"), "bf16")
    dense_peak(torch.device("cuda"), "fp32")
    assert asked == [(torch.bfloat16, 8192), (torch.float32, 8192)]


def test_the_first_product_only_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # Begin and end of each product: the first takes the least here, and counts for nothing.
    times = iter([0.0, 1.0, *(float(t) for k in range(5) for t in (10 * k, 10 * k + 2))])
    monkeypatch.setattr(peak.time, "perf_counter", lambda: next(times))
    assert measured_matmul(torch.device("cpu"), torch.float32, 4) == 2 * 4**3 / 2.0


def test_the_measured_products_are_those_of_linear_layers() -> None:
    """On CPUs that MKL slows down the others take twice as long: a share of them would exceed 1."""
    size = 512
    x = torch.ones(size, size)
    products = []
    for multiply in (
        lambda: linear(x, x),
        lambda: measured_matmul(torch.device("cpu"), torch.float32, size),
    ):
        with FlopCounterMode(display=False) as counter:
            multiply()
        products.append(counter.get_flop_counts()["Global"])
    assert products[0].keys() == products[1].keys() != set()
