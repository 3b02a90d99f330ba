"""Problems whose answer is known: a teacher with k true units, which every method must find among n.

The recipe is one for all: AdamW, 500 steps of 128 fresh examples, rate 1e-2 and weight decay 0.1 for weights, 2e-2 for
gates, a penalty of 1 on the density, the loss as a share of the target's variance. What the method cards state is
granted: ARM and AR take their variance reductions, AR, the noisiest, three times the steps as well; the competitive
form of Differentiable Sparsification takes a weight decay of 3, by which what is useless loses its share, and the
independent one a start that closes nothing before it has learned; magnitude pruning is told how many to close.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc

STEPS = 500
DECAY, STRONG_DECAY = 0.1, 3.0

METHODS: dict[str, Callable[[float], sc.Method]] = {
    "hard-concrete": lambda _: sc.HardConcrete(),
    "arm": lambda _: sc.ARM(rao_blackwell=True),
    "ar": lambda _: sc.ARM(estimator="ar", control_variate=True, rao_blackwell=True),
    "diffprune": lambda _: sc.DiffPrune(),
    "diffprune-stochastic": lambda _: sc.DiffPrune(mode="stochastic"),
    "diff-sparse": lambda _: sc.DifferentiableSparsification(),
    "diff-sparse-independent": lambda _: sc.DifferentiableSparsification(form="independent", init_open=0.99),
    "straight-through": lambda _: sc.StraightThrough(),
    "magnitude": lambda closed: sc.Magnitude(final_closed=closed, steps=int(0.6 * STEPS)),
}

#: The student, what its inputs look like, what the teacher says of them, the rule, and which units are true.
Problem = tuple[nn.Module, tuple[int, ...], Callable[[Tensor], Tensor], sc.Rule, Tensor]


class Hidden(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, n), nn.Linear(n, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def hidden(n: int = 24, k: int = 4) -> Problem:
    """Which of n given features the target is made of."""
    teacher, student = Hidden(n), Hidden(n)
    with torch.no_grad():
        teacher.fc2.weight.mul_(4.0)
        teacher.fc2.weight[:, k:] = 0.0
    student.fc1.load_state_dict(teacher.fc1.state_dict())
    student.fc1.requires_grad_(False)
    return student, (128, 16), teacher, sc.Rule(), torch.arange(n) < k


def inputs(n: int = 40, k: int = 4) -> Problem:
    """Which of n inputs the target depends on."""
    weight = torch.randn(8, n) * (torch.arange(n) < k)
    return nn.Linear(n, 8), (128, n), lambda x: x @ weight.T, sc.Rule("inputs"), torch.arange(n) < k


def weights(n: int = 80, k: int = 8) -> Problem:
    """Which single weights of a matrix are not zero."""
    weight = torch.zeros(n)
    weight[torch.randperm(n)[:k]] = torch.where(torch.rand(k) < 0.5, -1.0, 1.0) * (1.0 + torch.rand(k))
    matrix = weight.view(4, -1)
    student = nn.Linear(matrix.shape[1], 4)
    return student, (128, matrix.shape[1]), lambda x: x @ matrix.T, sc.Rule("weights"), weight != 0


class Attention(nn.Module):
    def __init__(self, n: int, size: int = 4) -> None:
        super().__init__()
        self.n, self.size = n, size
        self.q, self.k, self.v = (nn.Linear(16, n * size) for _ in range(3))
        self.out = nn.Linear(n * size, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, self.n, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))


def heads(n: int = 20, k: int = 3) -> Problem:
    """Which of n attention heads write."""
    teacher, student = Attention(n), Attention(n)
    with torch.no_grad():
        teacher.q.weight.mul_(3.0)
        teacher.k.weight.mul_(3.0)
        teacher.out.weight.mul_(4.0)
        teacher.out.weight[:, k * teacher.size :] = 0.0
    for name in ("q", "k", "v"):
        getattr(student, name).load_state_dict(getattr(teacher, name).state_dict())
    return student, (24, 6, 16), teacher, sc.Rule("heads"), torch.arange(n) < k


class Blocks(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def blocks(n: int = 20, k: int = 3) -> Problem:
    """Which of n residual branches do anything; the others start small."""
    teacher, student = Blocks(n), Blocks(n)
    true = torch.zeros(n, dtype=torch.bool)
    true[torch.randperm(n)[:k]] = True
    with torch.no_grad():
        for does, theirs, ours in zip(true, teacher.blocks, student.blocks, strict=True):
            theirs[2].weight.mul_(3.0 if does else 0.0)
            theirs[2].bias.mul_(1.0 if does else 0.0)
            ours[0].load_state_dict(theirs[0].state_dict())
            if does:
                ours[2].load_state_dict(theirs[2].state_dict())
            else:
                ours[2].weight.mul_(0.3)
                ours[2].bias.zero_()
    return student, (128, 8), teacher, sc.Rule("blocks", where="blocks.*", exclude="blocks.*.*"), true


PROBLEMS = {"hidden": hidden, "inputs": inputs, "weights": weights, "heads": heads, "blocks": blocks}


def found(problem: str, method: str) -> tuple[Tensor, Tensor]:
    """Which units are open after training, and which are true."""
    torch.manual_seed(0)
    student, shape, teacher, rule, true = PROBLEMS[problem]()
    x = torch.randn(shape)
    with torch.no_grad():
        scale = teacher(x).square().mean()
    made = METHODS[method]((~true).float().mean().item())
    penalty = sc.Penalty(1.0, unit="density")
    pruner = sc.attach(student, examples=(x[:4],), gates=[rule], method=made, penalty=penalty)
    decay = STRONG_DECAY if method == "diff-sparse" else DECAY
    optimizer = torch.optim.AdamW(pruner.param_groups(lr=1e-2, gate_lr=2e-2, weight_decay=decay))
    for _ in range(STEPS * (3 if method == "ar" else 1)):
        x = torch.randn(shape)
        with torch.no_grad():
            y = teacher(x)
        pruner.backward(lambda x=x, y=y: (student(x) - y).square().mean() / scale)
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    return pruner.gates.fixed() != 0, true


#: One problem for each method and one method for each problem are always tried, the others with `-m slow`.
ALWAYS = {
    ("hidden", "diffprune"),
    ("inputs", "hard-concrete"),
    ("inputs", "arm"),
    ("weights", "diff-sparse"),
    ("heads", "hard-concrete"),
    ("blocks", "diffprune"),
}
#: What is not found by this recipe, and why.
MISSED = {
    ("blocks", "diff-sparse"): "survivors grow as others close, so that branches do not keep their scale",
    ("blocks", "straight-through"): "biased: a branch that is drawn less grows, and what open draws overshoot cancels"
    " what closed ones lack, so that the penalty closes it; 5 of the first 8 seeds lose one",
}


def marks(problem: str, method: str) -> list[pytest.MarkDecorator]:
    found = [] if (problem, method) in ALWAYS else [pytest.mark.slow]
    return [*found, pytest.mark.xfail(reason=MISSED[problem, method])] if (problem, method) in MISSED else found


CASES = [pytest.param(problem, method, marks=marks(problem, method)) for problem in PROBLEMS for method in METHODS]


@pytest.mark.parametrize(("problem", "method"), CASES)
def test_the_true_units_are_found(problem: str, method: str) -> None:
    is_open, true = found(problem, method)
    assert is_open[true].all(), f"{int(is_open[true].sum())} of {int(true.sum())} true units kept"
    assert (~is_open[~true]).float().mean() >= 0.95
