"""Sums, means, softmax and sorting: frozen along the units' own dimension, free along others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.law import Row, alone, given, hold, hold_in_a_model, in_models, law, row

H = given((2, 8, 3), 1)
FREE = "abcdefgh"
NONE = "........"

#: Operators over one dimension; each is held to both: over the units' own, and over another one.
OVER_ONE = (
    *("sum", "mean", "amax", "amin", "prod", "var", "std", "logsumexp", "argmax", "any", "all", "median", "norm"),
    *("count_nonzero", "nansum", "cumsum", "cumprod", "softmax", "log_softmax", "logcumsumexp"),
    *("argsort", "nanmedian", "mode", "msort", "cummax", "max", "std_mean", "var_mean", "quantile"),
    "diff",
)  # fmt: skip

ROWS: dict[str, Row] = {
    "mean over places": row(lambda h: h.mean(2), H, FREE),
    "mean over units": row(lambda h: h.mean(1), H, NONE, "is reduced over (mean)"),
    "sum of everything": row(lambda h: h.sum(), H, NONE, "is reduced over (sum)"),
    "sum over an empty list": row(lambda h: h.sum([]), H, NONE, "is reduced over (sum)"),
    "max over several, sizes kept": row(lambda h: h.amax((0, 2), keepdim=True), H, FREE),
    "topk": row(lambda h: h.topk(2, 2)[0], H, FREE),
    "topk of units": row(lambda h: h.topk(2, 1)[0], H, NONE, "is ordered by value (topk)"),
    "sort": row(lambda h: h.sort(2)[0], H, FREE),
    "kthvalue": row(lambda h: h.kthvalue(1, 2)[0], H, FREE),
    "softmax over units": row(lambda h: h.softmax(1), H, NONE, "is mixed over its own dimension"),
    "softmax over places": row(lambda h: h.softmax(2), H, FREE),
    "mean over one of two dimensions of heads": row(lambda h: h.unflatten(1, (-1, 2)).mean(2), H, "aabbccdd"),
    "normalize over places": row(lambda h: F.normalize(h, dim=2), H, FREE),
    "normalize over units": row(lambda h: F.normalize(h, dim=1), H, NONE, "is reduced over"),
    "cosine similarity": row(lambda a, b: F.cosine_similarity(a, b, 2), H, H, FREE, FREE),
    "distances of rows": row(torch.cdist, given((2, 4, 5), 1), given((2, 6, 5), 1), "abcd", "efghij"),
    "distances along units": row(
        torch.cdist, given((2, 4, 5), 2), given((2, 6, 5), 2), ".....", ".....", "is reduced over (cdist)"
    ),
    "pairwise distance": row(F.pairwise_distance, given((2, 4, 5), 1), given((2, 4, 5), 1), "abcd", "abcd"),
    "cross product": row(lambda a, b: torch.linalg.cross(a, b, dim=0), given((3, 8), 1), given((3, 8), 1), FREE, FREE),
    "triangle of other dimensions": row(lambda a: a.tril(), given((8, 3, 3), 0), FREE),
    "triangle of the units": row(lambda a: a.triu(), given((3, 8), 1), NONE, "is masked by position"),
    "a loss": row(F.mse_loss, H, H, NONE, NONE, "is reduced over (mean)"),
}


@pytest.mark.parametrize("one", alone(ROWS))
def test_commutes_with_removal(one: Row) -> None:
    hold(one)


@pytest.mark.parametrize("one", in_models(ROWS))
def test_in_a_model(one: Row) -> None:
    hold_in_a_model(one)


@pytest.mark.parametrize("name", OVER_ONE)
def test_one_dimension_of_each_operator(name: str) -> None:
    operator = getattr(torch, name)
    if name == "msort":  # sorts the first dimension
        assert law(lambda h: operator(h.transpose(0, 2)), H, seeds=[0]).patterns() == (FREE,)
        assert law(lambda h: operator(h.transpose(0, 1)), H, seeds=[0]).patterns() == (NONE,)
        return
    extra = (0.5,) if name == "quantile" else ()
    over_places = law(lambda h: operator(h, *extra, dim=2), H, seeds=range(2))
    over_units = law(lambda h: operator(h, *extra, dim=1), H, seeds=[0])
    assert over_places.patterns() == (FREE,)
    assert not over_places.reasons()
    assert over_units.patterns() == (NONE,)
    assert len(over_units.reasons()) == 1
