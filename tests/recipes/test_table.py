"""The final table and the page of a run."""

import io
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from secateur.cli import app
from secateur.recipes.measure import Latency
from secateur.recipes.settings import Settings
from secateur.recipes.table import command, page, summary, table
from secateur.recipes.task import ORDER, Outcome, Row


def made(settings: Settings | None = None) -> Outcome:
    rows = tuple(
        Row(name, 99.0 + 0.1 * place, 431_080 // (place + 1), 2_293_000, 1_724_984, Latency(12.28, 9.19, 14.01))
        for place, name in enumerate(ORDER)
    )
    return Outcome(
        settings=settings or Settings(data="mnist", net="lenet-5", keep_params=0.05),
        schedule={"gated": 14, "fine-tuned": 6},
        rows=rows,
        difference={"float32": 1e-6, "float64": 1e-15},
        widths={"conv1": (7, 20), "conv2": (12, 50)},
        flipped=1,
        counted=(7, 12, 90, 30),
        pruned=0.98765,
        n_test=10_000,
        seconds=600.0,
    )


def test_the_table_fits_80_columns_with_nothing_cut_off():
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table(made()))
    text = console.export_text()
    assert "…" not in text
    assert all(word in text for word in (*ORDER, "431,080", "2,293,000", "1,724,984", "12.28 (9.19-14.01)"))


def test_the_page_has_every_row_and_says_what_the_last_one_reached():
    text = page(made())
    assert all(f"| {name} |" in text for name in ORDER)
    assert "**0.60% test error** at 86,216 parameters, 20.00% of the dense network's 431,080; 98.77% pruned" in text
    assert all(line[1:] in text for line in summary(made()))


def test_networks_without_a_published_count_have_no_prune_rate():
    assert any("7-12-90-30, 98.77% pruned" in line for line in summary(made()))
    without = replace(made(), counted=(), pruned=None)
    assert not any("pruned" in line for line in summary(without))
    assert "pruned" not in page(without)


def test_the_command_on_the_page_asks_for_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for settings in (
        Settings(keep_params=0.1, seed=3),
        Settings(data="mnist", net="lenet-300-100", method="arm", keep_params=0.05, keep_macs=0.2, epochs=7),
    ):
        asked: list[Settings] = []

        def noting(settings: Settings, *rest: object, asked: list[Settings] = asked) -> None:
            asked.append(settings)
            raise KeyboardInterrupt

        monkeypatch.setattr("secateur.recipes.task.run", noting)
        monkeypatch.setattr("secateur.recipes.data.load", lambda *args: None)
        CliRunner().invoke(app, shlex.split(command(made(settings)))[1:])
        assert asked == [replace(settings, epochs=settings.schedule().epochs)]
