"""The public surface, and what importing it does: nothing to torch, and nothing that only commands need."""

import subprocess
import sys
from pathlib import Path

import secateur as sc

SRC = Path(__file__).resolve().parents[1] / "src"


def test_every_public_name_exists_and_is_listed_once():
    assert len(sc.__all__) == len(set(sc.__all__))
    assert all(hasattr(sc, name) for name in sc.__all__)


def test_functions_are_not_shadowed_by_modules_of_their_name():
    assert all(callable(getattr(sc, name)) for name in ("attach", "compact", "mask", "trace", "save", "load"))


def test_importing_changes_nothing_in_torch_and_brings_in_nothing_for_commands_or_plots():
    program = """
import sys, torch

def state():
    return (
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed(),
        torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled(), torch.random.get_rng_state().tolist(),
        torch.get_float32_matmul_precision(), torch.get_default_device(),
        len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
        torch.nn.Module.__call__, torch.nn.Linear.forward, torch.distributions.Distribution._validate_args,
    )

before = state()
import secateur
assert state() == before
loaded = sorted({"matplotlib", "sklearn", "typer", "rich", "transformers", "torchvision"} & set(sys.modules))
assert not loaded, loaded
assert "secateur.recipes" not in sys.modules and "secateur.cli" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(SRC)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
