"""What a card can compute at most: the divisor of MFU. No torch."""

from __future__ import annotations

import re

BF16_PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800 PCIe", 756e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX A6000", 154.8e12),
    ("GeForce RTX 4090", 165.2e12),
    ("GeForce RTX 3090", 71e12),
    ("MI300X", 1307e12),
    ("MI325X", 1307e12),
)
"""Words of a device's name to its dense bf16 products with fp32 sums; the first row that fits holds. [FLOP/s]

From the makers' data sheets of each card (NVIDIA: Blackwell, GB200 NVL72, GH200, H200, H100, A100, A40, A30,
A10, L40S, L40, L4; AMD: MI300X, MI325X), which give NVIDIA's newer ones with 2:4 sparsity: half of that is
here. The cards for desktops are from the white papers of the Ada and GA102 architectures."""


def bf16_peak(device_name: str) -> float | None:
    """Looks up what a card computes at most, in bf16 FLOP/s.

    >>> bf16_peak("NVIDIA H100 80GB HBM3"), bf16_peak("NVIDIA H100 PCIe"), bf16_peak("cpu")
    (989000000000000.0, 756000000000000.0, None)

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.

    Returns:
        None for a device that is not in the table, and for a slice of one (MIG).
    """
    words = set(re.split(r"[\s-]+", device_name))
    if "MIG" in words:
        return None
    fitting = (peak for name, peak in BF16_PEAKS if words.issuperset(name.split()))
    return next(fitting, None)
