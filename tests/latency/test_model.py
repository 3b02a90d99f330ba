"""A latency model from measuring to a budget that is met, by a clock that only layers move, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.latency.ticking import NOW, Net, example, nanoseconds, tick

import secateur as sc
from secateur.errors import BudgetError, CompactionError, LatencyError

MEASURED: dict[str, sc.LatencyModel] = {}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def latency(net: Net, monkeypatch: pytest.MonkeyPatch) -> sc.LatencyModel:
    """Measured once, for it is always the same."""
    if not MEASURED:
        tick(monkeypatch)
        structure = sc.trace(net, examples=(example(),))
        MEASURED["net"] = sc.latency_model(net, structure, examples=(example(),), cache=False, seconds=0.01)
    return MEASURED["net"]


def test_it_predicts_widths_that_it_has_not_seen(latency: sc.LatencyModel) -> None:
    first, second = (group.name for group in latency.structure.groups)
    for n in ((16, 8), (7, 3), (1, 1), (16, 1)):
        keep = {first: torch.arange(n[0]), second: torch.arange(n[1])}
        assert latency.predict(keep) == pytest.approx(nanoseconds(*n) / 1e6, abs=1e-6)
    assert latency.predict() == pytest.approx(latency.dense, abs=1e-6)
    assert latency.error < 1e-6
    assert latency.noise == 0.0
    assert len(latency.checks) == 10
    assert latency.by_layer()["rest.3"] == pytest.approx((1000 + 3.5 * 24 + 60) / 1e6, rel=1e-6)
    assert sum(latency.by_layer().values()) == pytest.approx(latency.dense, rel=1e-6)
    shown = str(latency)
    for part in ("(float32 (2, 6))", "ticks", "thread", f"torch {torch.__version__}", "median error 0.0%"):
        assert part in shown


@pytest.mark.parametrize("budget", [sc.Budget(latency=0.8), sc.Budget(latency_ms=0.0037, keep_params=0.5)])
def test_a_budget_of_it_is_met_by_the_compact_network(net: Net, latency: sc.LatencyModel, budget: sc.Budget) -> None:
    pruner = sc.attach(net, structure=latency.structure, examples=(example(),), budget=budget)
    small, report = pruner.finalize()
    limit = 0.8 * nanoseconds(16, 8) if budget.latency else 3700.0
    start = NOW[0]
    small.eval()(example())
    assert NOW[0] - start == pytest.approx(report.compact.latency, abs=1.0)
    assert report.compact.latency <= limit
    assert report.dense.latency == pytest.approx(nanoseconds(16, 8), abs=1.0)
    assert "ms (predicted)" in str(report)
    assert f"{report.compact.latency / report.dense.latency:.2%}" in str(report)


def test_inputs_with_gates_count_where_units_own_them_and_blocks_go_with_all_they_take(
    net: Net, latency: sc.LatencyModel
) -> None:
    rules = [sc.Rule(), sc.Rule(units="inputs", where=("first", "rest.3"))]
    pruner = sc.attach(net, structure=latency.structure, gates=rules)
    costs = pruner.costs
    # first.inputs: closed ones were not measured; rest.3.inputs: each costs what its unit's reading does.
    names = [group.name for group in costs.structure.groups]
    of = {name: dict(zip(names, costs.sizes, strict=True)) | {name: 1} for name in names}
    cost = {name: costs.count([sizes[n] for n in names]).latency for name, sizes in of.items()}
    assert cost["first.inputs"] == costs.dense.latency
    assert cost["rest.3.inputs"] == pytest.approx(costs.dense.latency - 7 * 3 * 3.5, abs=1.0)


def test_it_cannot_be_below_its_calls(net: Net, latency: sc.LatencyModel) -> None:
    with pytest.raises(BudgetError, match=r"ms latency .* cannot be reached: with one unit left .* ms remain"):
        sc.attach(net, structure=latency.structure, budget=sc.Budget(latency=0.5))
    with pytest.raises(BudgetError, match="the structure has none"):
        sc.attach(net, examples=(example(),), budget=sc.Budget(latency=0.5))


def test_what_cannot_be_measured_is_refused(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = sc.trace(net, examples=(example(),))

    def measured(structure: sc.Structure = structure, **settings: Any) -> sc.LatencyModel:
        return sc.latency_model(net, structure, **{"examples": (example(),), "cache": False, **settings})

    with pytest.raises(LatencyError, match="device 'meta' has no clock"):
        measured(device="meta")
    for seconds in (0.0, -1.0, float("inf"), True):
        with pytest.raises(LatencyError, match="expected a finite number over 0"):
            measured(seconds=seconds)
    with pytest.raises(LatencyError, match="no unit of this model can go"):
        measured(replace(structure, groups=()))
    with pytest.raises(CompactionError, match="the structure is not of this Net"):
        measured(sc.trace(torch.nn.Linear(6, 3), examples=(example(),)))


class TestCache:
    """Files of measured latencies."""

    @pytest.fixture
    def measured(self, net: Net, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
        tick(monkeypatch)
        monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("secateur.latency.model.FITTED", 2)
        monkeypatch.setattr("secateur.latency.model.HELD_BACK", 2)
        monkeypatch.setattr("secateur.latency.measure.SHARES", (1.0, 0.5))
        monkeypatch.setattr("secateur.latency.measure.ROUNDS", (1, 1))
        structure = sc.trace(net, examples=(example(),))

        def measured(rows: int = 2, cache: Any = True) -> sc.LatencyModel:
            return sc.latency_model(net, structure, examples=(torch.zeros(rows, 6),), seconds=0.01, cache=cache)

        return measured

    def test_what_was_measured_is_read_again(self, measured: Any, tmp_path: Path) -> None:
        first = measured()
        (file,) = (tmp_path / "cache" / "secateur" / "latency").iterdir()
        before, now = file.read_bytes(), NOW[0]
        second = measured()
        assert NOW[0] == now
        assert file.read_bytes() == before
        assert second.structure.latency_terms == first.structure.latency_terms
        assert (second.checks, second.dense, second.rounds) == (first.checks, first.dense, first.rounds)
        measured(rows=5)
        assert len(list(file.parent.iterdir())) == 2

    def test_a_named_file_of_other_conditions_is_refused(self, measured: Any, tmp_path: Path) -> None:
        file = tmp_path / "latency.json"
        measured(cache=file)
        assert measured(cache=str(file)).dense > 0
        with pytest.raises(
            LatencyError, match=r"measured for inputs '\(float32 \(2, 6\)\)', here '\(float32 \(5, 6\)\)'"
        ):
            measured(rows=5, cache=file)
        file.write_text('{"conditions": 3}')
        with pytest.raises(LatencyError, match="not a measured latency"):
            measured(cache=file)

    def test_a_place_that_cannot_be_written_is_refused_before_measuring(
        self, measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = NOW[0]
        with pytest.raises(LatencyError, match=r"cannot be written .* there is no folder"):
            measured(cache=tmp_path / "nowhere" / "latency.json")
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file"))
        with pytest.raises(LatencyError, match=r"cannot be written .* or cache=False"):
            measured()
        assert NOW[0] == now
