"""What is drawn for each element is off while a cut is proven, and is the same with and without gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.compaction.compact import compact
from secateur.compaction.exact import Exact
from secateur.compaction.proof import prove
from secateur.structure.trace import trace

#: Whatever draws a number for each element and lets units pass, in place or not.
DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rrelu": lambda h: F.rrelu(h, training=True),
    "rrelu_": lambda h: F.rrelu_(h.clone(), 0.1, 0.9, training=True),
    "dropout": lambda h: F.dropout(h, 0.3, training=True),
    "alpha_dropout": lambda h: F.alpha_dropout(h, training=True),
    "feature_dropout": lambda h: F.dropout1d(h[:, :, None], training=True)[:, :, 0],
    "feature_alpha_dropout": lambda h: F.feature_alpha_dropout(h[:, :, None], training=True)[:, :, 0],
    "native_dropout": lambda h: torch.native_dropout(h, 0.5, True)[0],
    "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.5)),
    "bernoulli into a tensor": lambda h: h * torch.bernoulli(torch.full_like(h, 0.5), out=torch.empty_like(h)),
    "bernoulli_": lambda h: h * torch.empty_like(h).bernoulli_(0.5),
    "bernoulli_ of chances": lambda h: h * torch.empty_like(h).bernoulli_(torch.full_like(h, 0.5)),
    "bernoulli of a number": lambda h: h * torch.bernoulli(torch.zeros_like(h), 0.5),
}


class Drawing(nn.Module):
    """Draws in training mode."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(self.draw(h) if self.training else h)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=list(DRAWS))
def test_what_is_drawn_for_each_element_is_off(draw: Callable[[Tensor], Tensor]) -> None:
    net, x = Drawing(draw), torch.randn(3, 4)
    structure = trace(net, (x,))
    keep = {"first": torch.tensor([0, 2, 5])}
    proof = prove(net, compact(net, structure, keep), structure, keep, (x,))
    assert proof.relative < 1e-13
    assert sum("training mode" in setting for setting in proof.checked) == 2


def test_rrelu_has_its_mean_slope_forward_and_backward() -> None:
    x = torch.tensor([-2.0, -1.0, 0.5, 3.0], requires_grad=True)
    with Exact({}):
        y = F.rrelu(x, 0.1, 0.5, training=True)
        (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, F.rrelu(x, 0.1, 0.5))
    torch.testing.assert_close(slope, torch.tensor([0.3, 0.3, 1.0, 1.0]))
