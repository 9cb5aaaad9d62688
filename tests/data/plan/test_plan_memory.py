"""Private memory of a plan must follow its shards, not its samples (benchmarks/plan_memory.py: 100 M)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = 4_000_000


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux")
def test_four_million_samples() -> None:
    command = [sys.executable, "-m", "benchmarks.plan_memory", f"--samples={SAMPLES}"]
    output = subprocess.run(
        [*command, "--steps=40", "--distinct=30"], check=True, capture_output=True, text=True
    ).stdout
    cases = json.loads(output.splitlines()[-1])["cases"]
    assert [case["unit"] for case in cases] == ["samples", "packs"]
    for case in cases:
        assert case["samples"] >= SAMPLES
        # The lengths alone would be 52 MB, keys and places ten times that.
        assert case["private_mib_opened"] - case["private_mib_imports"] < 8
        assert case["private_mib_peak"] - case["private_mib_imports"] < 130
