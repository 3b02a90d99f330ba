"""Where ids live: every index of every dimension of every tensor, once."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from secateur.structure.coupling import Coupling
from secateur.structure.sites import Sites


def tied() -> nn.Module:
    model = nn.Module()
    model.embed = nn.Embedding(5, 3)
    model.head = nn.Linear(3, 5, bias=False)
    model.head.weight = model.embed.weight
    model.norm = nn.BatchNorm1d(3)
    return model


def test_every_index_has_an_id_of_its_own() -> None:
    coupling = Coupling()
    sites = Sites.of(tied(), coupling)
    ids = np.concatenate([sites.ids(site) for site in range(len(sites))])
    assert ids.tolist() == list(range(1, coupling.n_ids))
    assert coupling.first_made == coupling.n_ids


def test_tied_tensors_have_one_set_of_ids_under_their_first_name() -> None:
    sites = Sites.of(tied(), Coupling())
    assert sites.aliases == {"head.weight": "embed.weight"}
    assert [(t, d) for t, d in zip(sites.tensors, sites.dims, strict=True) if "weight" in t] == [
        ("embed.weight", 0),
        ("embed.weight", 1),
        ("norm.weight", 0),
    ]


def test_the_site_of_an_id_is_the_one_that_holds_it() -> None:
    sites = Sites.of(tied(), Coupling())
    for site in range(len(sites)):
        assert set(sites.of_id(sites.ids(site)).tolist()) == {site}


def test_labels_say_what_is_a_weight() -> None:
    """Buffers have units too, but nothing can be closed by zeroing them."""
    labels = Sites.of(tied(), Coupling()).labels()
    assert labels["embed.weight"].weight
    assert not labels["norm.running_mean"].weight
    assert labels["norm.num_batches_tracked"].shape == ()
    assert [f.dims for f in labels["embed.weight"].factors] == [(0,), (1,)]


def test_labels_of_a_cut_hold_the_kept_ids() -> None:
    sites = Sites.of(tied(), Coupling())
    dense = sites.labels()["embed.weight"]
    kept = sites.labels({"embed.weight": {1: np.array([0, 2])}})["embed.weight"]
    assert kept.shape == (5, 2)
    assert kept.ids_along(1).tolist() == dense.ids_along(1)[[0, 2]].tolist()
    assert kept.ids_along(0).tolist() == dense.ids_along(0).tolist()


def test_the_model_is_not_touched() -> None:
    model = tied()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Sites.of(model, Coupling())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
