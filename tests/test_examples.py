"""The examples run, on the real data, shortened."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_mnist_example_ends_within_its_budget(data_folder: Callable[[str], Path], tmp_path: Path):
    out = tmp_path / "small.safetensors"
    words = ["--data-dir", str(data_folder("mnist")), "--epochs", "2", "--limit", "600", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "mnist.py"), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kept = int(re.search(r"with ([\d,]+) parameters", done.stdout)[1].replace(",", ""))
    assert kept <= 0.05 * 431_080
    assert out.stat().st_size < 1.2 * 4 * kept + 10_000
