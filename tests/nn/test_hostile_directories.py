"""Model directories changed in every way at random: refused by name, or whole. In a process of its own, under limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("campaign_directories.py")


@pytest.mark.parametrize("n", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_directories(tmp_path, n):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(CAMPAIGN), str(tmp_path), str(n), str(n)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=n)
    assert done.returncode == 0, done.stderr[-2000:]  # a crash would be a signal
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["faults"] == []
    assert report["loaded"] + report["refused"] == n and report["refused"] > n / 2
    assert report["seconds"] < 2 and report["megabytes"] < 512
    assert {"M05", "M07", "M08", "M11", "M12", "M13", "M15", "M30", "M33"} <= set(report["codes"])
