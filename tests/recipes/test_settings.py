"""Settings: what is refused, and how epochs are shared out."""

import pytest

from secateur.errors import BudgetError, SecateurError
from secateur.gates import METHODS
from secateur.recipes.data import DATA_SETS
from secateur.recipes.networks import NETWORKS
from secateur.recipes.settings import DEFAULT_NETS, SCHEDULES, Schedule, Settings


def test_every_table_covers_every_name():
    assert set(DEFAULT_NETS) == set(DATA_SETS)
    assert set(SCHEDULES) == set(NETWORKS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", DATA_SETS)
def test_every_method_is_accepted_on_every_data_set(data: str, method: str):
    settings = Settings(data=data, method=method, keep_params=0.5)
    assert settings.net == DEFAULT_NETS[data]
    assert settings.budget().keep_params == 0.5


@pytest.mark.parametrize("share", [0.0, -0.1, 1.0001, float("nan")])
def test_budgets_outside_their_range_are_refused(share: float):
    assert Settings(keep_params=1.0).budget().keep_params == 1.0
    with pytest.raises(BudgetError, match="keep_params"):
        Settings(keep_params=share)


def test_no_budget_is_refused():
    with pytest.raises(BudgetError):
        Settings()


def test_all_problems_are_named_at_once():
    with pytest.raises(SecateurError) as caught:
        Settings(data="letters", net="lenet-6", method="axe", keep_params=0.1, epochs=1, seed=-3, device="abacus")
    for word in ("letters", "lenet-6", "axe", "epochs=1", "seed=-3", "abacus", *DATA_SETS, *NETWORKS, *METHODS):
        assert word in str(caught.value)


@pytest.mark.parametrize("epochs", [2, 3, 10, 41])
@pytest.mark.parametrize("tuned", [0.0, 0.3, 0.99])
def test_a_gated_network_sees_as_many_epochs_as_a_dense_one(epochs: int, tuned: float):
    schedule = Schedule(epochs, tuned, batch=64, lr=1e-3, gate_lr=1e-2, tune_lr=1e-3)
    gated, after = schedule.gated("gated", 0), schedule.after_cut("after", 0)
    assert gated.epochs >= 1
    assert gated.epochs + after.epochs == schedule.whole("dense", 0).epochs == epochs


def test_the_number_of_epochs_replaces_the_networks_own_and_nothing_else():
    own, short = Settings(keep_params=0.1).schedule(), Settings(keep_params=0.1, epochs=5).schedule()
    assert (own.epochs, short.epochs) == (SCHEDULES["resnet-7"].epochs, 5)
    assert {**vars(own), "epochs": 0} == {**vars(short), "epochs": 0}


def test_titles_tell_runs_apart():
    titles = {
        Settings(keep_params=0.1).title,
        Settings(keep_params=0.2).title,
        Settings(keep_macs=0.1).title,
        Settings(keep_params=0.1, keep_macs=0.1).title,
        Settings(keep_params=0.1, seed=1).title,
        Settings(keep_params=0.1, method="arm").title,
    }
    assert len(titles) == 6
    assert not any("/" in title for title in titles)
