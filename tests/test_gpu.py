"""What gpu.py says of the machine."""

import subprocess
import sys

from conftest import ROOT

FAT_PARENT = """
import subprocess, sys
ballast = b"x" * 900_000_000
child = "import gpu; print(gpu.peak_resident_bytes())"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
"""


def test_peak_memory_is_that_of_the_process_and_not_of_the_one_that_started_it() -> None:
    run = subprocess.run(
        [sys.executable, "-c", FAT_PARENT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 50e6 < int(run.stdout) < 700e6
