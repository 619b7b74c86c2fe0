"""Runs registration_cases.py in a process of its own.

tensorrt_rtx's plugin registry, which stands in for TensorRT's, ends in a segmentation fault when creators written in Python are
registered in a process that has built networks before, as this suite has by now.
"""

import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_registration_under_tensorrts_own_code():
    cases = Path(__file__).with_name("registration_cases.py")
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", str(cases)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 11 and "skipped" not in run.stdout
