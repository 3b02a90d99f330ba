"""A frontier from the command line: a chain of points, each kept, drawn and found again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import secateur as sc
from secateur.cli import app
from secateur.errors import BudgetError, SecateurError
from secateur.recipes import frontier
from secateur.recipes.data import digits
from secateur.recipes.frontier import Sweep, jobs_of
from secateur.recipes.task import fresh

SHARES = ("0.5", "0.2")


def run(out: Path, *words: str) -> Any:
    defaults = ["frontier", "--epochs", "2", "--budgets", ",".join(SHARES), "--out", str(out)]
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [*defaults, *words])


def sweep(out: Path, **settings: Any) -> Sweep:
    defaults: dict[str, Any] = {
        "data": "digits",
        "net": "",
        "method": "hard-concrete",
        "by": "params",
        "shares": (0.2, 1.0, 0.5),
        "epochs": 2,
        "seeds": (0,),
        "device": "cpu",
        "data_dir": None,
    }
    return Sweep(**defaults | settings, out=out)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("frontier")
    return run(out, "--page", str(out / "page.md")), out


def records(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*-seed0.json"))}


def test_every_point_is_recorded_within_its_budget_and_shown(ended: tuple[Any, Path]) -> None:
    result, out = ended
    assert result.exit_code == 0, result.output
    found = records(out)
    assert list(found) == ["dense-seed0", "params0.2-seed0", "params0.5-seed0"]
    dense = found["dense-seed0"]["found"]["params"]
    for share in SHARES:
        record = found[f"params{share}-seed0"]
        assert 0.9 * float(share) * dense < record["found"]["params"] <= float(share) * dense
        assert record["found"]["difference"] < 1e-9
        small = sc.load(out / f"params{share}-seed0.safetensors", fresh("resnet-7", 0))
        assert sum(p.numel() for p in small.parameters()) == record["found"]["params"]
    assert [found[f"params{share}-seed0"]["settings"]["starts_from"] for share in SHARES] == [1.0, 0.5]
    lines = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    assert [line for line in lines if line in ("dense", *SHARES)] == ["dense", *SHARES]


def test_the_picture_and_the_page_are_there_and_the_same_for_the_same_points(ended: tuple[Any, Path]) -> None:
    _, out = ended
    from secateur.recipes import curves

    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "page.svg").read_bytes() == (out / "frontier.svg").read_bytes()
    page = (out / "page.md").read_text()
    assert "![accuracy against size](page.svg)" in page
    assert "--by params --budgets 0.5,0.2 --seeds 0 --epochs 2" in page
    points = frontier.points(sweep(out))
    for turn in ("first", "second"):
        curves.draw(sweep(out), points, out / f"{turn}.svg", out / f"{turn}.png")
    assert (out / "first.svg").read_bytes() == (out / "second.svg").read_bytes()
    assert (out / "first.png").read_bytes() == (out / "second.png").read_bytes()


def test_a_second_run_trains_nothing_and_a_lost_point_is_made_again_alike(ended: tuple[Any, Path]) -> None:
    _, out = ended
    before = {path: path.read_bytes() for path in out.glob("*-seed0*")}
    again = run(out, "--no-picture")
    assert again.exit_code == 0
    assert "done:" not in again.output
    assert {path: path.read_bytes() for path in out.glob("*-seed0*")} == before
    lost = out / "params0.5-seed0.json"
    was = json.loads(lost.read_text())
    lost.unlink()
    assert [job.name for job in jobs_of(sweep(out))] == [
        "dense-seed0 trained",
        "params0.5-seed0 trained",
        "params0.5-seed0",
    ]
    again = run(out, "--no-picture")
    # Its training is found in its checkpoint; only what follows the cut is trained again.
    assert "params0.5-seed0 tuned epoch" in again.stderr
    assert "params0.5-seed0 epoch" not in again.stderr
    now = json.loads(lost.read_text())
    for one in (was, now):
        del one["found"]["seconds"]
    assert now == was


def test_a_point_starts_as_the_one_before_ended(ended: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, out = ended
    starts: list[dict[str, torch.Tensor]] = []

    def note(model: torch.nn.Module, *_: Any, **__: Any) -> None:
        starts.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    monkeypatch.setattr(frontier, "train", note)
    for share in (0.5, 0.2):
        frontier._trained(sweep(out), share, 0, lambda epoch: None)
    dense, half = (frontier._state(sweep(out), share, 0) for share in (1.0, 0.5))
    assert all(torch.equal(starts[1][name], tensor) for name, tensor in half.items())
    assert starts[1].keys() == half.keys()
    assert torch.equal(starts[0]["fc.parametrizations.weight.original"], dense["fc.weight"])
    assert torch.equal(starts[0]["bn1.running_mean"], dense["bn1.running_mean"])


def test_no_unit_is_removed_while_a_chain_may_still_open_it(ended: tuple[Any, Path]) -> None:
    _, out = ended
    for share in SHARES:
        state = frontier._state(sweep(out), float(share), 0)
        assert not any(key.endswith(".left") for key in state), "what was removed is noted there"
    assert all(frontier._phase(sweep(out), float(share), 0).checks == 0 for share in SHARES)


def test_points_between_and_other_settings_are_refused_before_training(ended: tuple[Any, Path]) -> None:
    _, out = ended
    for words, message in (
        (["--epochs", "4"], "was found with schedule="),
        (["--budgets", "0.5,0.3,0.2"], "was found with starts_from=0.5, not 0.3"),
    ):
        result = run(out, *words)
        assert result.exit_code == 2
        assert message in result.stderr
        assert "epoch " not in result.stderr
        assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "bytes"}, "by='bytes'; expected one of params, macs, latency"),
        ({"shares": (0.5, 0.0, 1.5)}, r"budgets 0, 1.5 are outside \(0, 1\]"),
        ({"shares": (1.0,)}, "no budget under 1"),
        ({"seeds": (0, 0)}, "expected at least one, each once"),
        ({"data": "faces"}, "unknown data set 'faces'"),
        ({"net": "vgg"}, "unknown network 'vgg'"),
        ({"method": "luck"}, "unknown method 'luck'"),
        ({"epochs": 1}, "epochs=1; expected at least 2"),
        ({"device": "tpu9"}, "device 'tpu9'"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        sweep(tmp_path, **settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budgets", "0.5,half"], "--budgets '0.5,half': expected numbers with commas between, such as 0.5,0.1"),
        (["--seeds", "a"], "--seeds 'a': expected whole numbers"),
        (["--jobs", "0"], "--jobs 0; expected at least 1"),
        (["--epochs", "0"], "epochs=0; expected at least 2"),
        (["--data", "mnist", "--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_wrong_words_are_refused_in_one_line(tmp_path: Path, words: Sequence[str], message: str) -> None:
    result = run(tmp_path / "out", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_budget_out_of_reach_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="cannot be reached"):
        frontier.check(sweep(tmp_path, shares=(0.5, 0.001)), digits())


def test_without_matplotlib_only_the_table_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(tmp_path)
    assert result.exit_code == 2
    assert 'pip install "secateur[plots]"' in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_and_latency_give_the_frontier_too(tmp_path: Path) -> None:
    words = ["frontier", "--epochs", "2", "--budgets", "0.7,0.5", "--by", "latency", "--jobs", "2", "--seeds", "0,1"]
    done = subprocess.run(
        [sys.executable, "-m", "secateur", *words, "--out", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("latency0.5-seed*.json"))) == 2
