"""The peaks that MFU is a share of, by the names that cards give themselves."""

from __future__ import annotations

import pytest

from nvlm_train.cards import BF16_PEAKS, bf16_peak

TFLOPS = {
    "NVIDIA H200": 989, "NVIDIA H200 NVL": 835, "NVIDIA GH200 480GB": 989, "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835, "NVIDIA H20": 148, "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312, "NVIDIA A100-PCIE-40GB": 312, "NVIDIA L4": 121,
    "NVIDIA L40S": 362, "NVIDIA A10": 125, "NVIDIA GeForce RTX 4090": 165.2,
    "AMD Instinct MI300X": 1307,
}  # fmt: skip


@pytest.mark.parametrize("name", TFLOPS)
def test_a_card_by_its_name(name: str) -> None:
    assert bf16_peak(name) == pytest.approx(TFLOPS[name] * 1e12)


@pytest.mark.parametrize(
    "name",
    ["cpu", "", "Tesla V100-SXM2-32GB", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA H1000", "GPU"],
)
def test_others_have_none(name: str) -> None:
    """A guess would be a wrong MFU that looks right; a slice of a card has not its peak."""
    assert bf16_peak(name) is None


def test_every_row_can_be_found() -> None:
    """No row stands behind a shorter one that takes its names."""
    for name, peak in BF16_PEAKS:
        assert bf16_peak(f"NVIDIA {name}") == peak, name
