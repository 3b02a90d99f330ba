"""The networks of the recipes, by name.

Every builder takes no argument and draws its initial weights from torch's global generator: seed it first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError

__all__ = [
    "NETWORKS",
    "LeNet5",
    "LeNet300",
    "Network",
    "ResNet7",
    "ResNet20",
    "Residual",
    "WideBlock",
    "WideResNet",
    "network",
]


class Residual(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm, added to their input: ``relu(x + bn2(conv2(relu(bn1(conv1(x))))))``.

    Where the block halves the resolution or changes the width, a strided 1 x 1 convolution with BatchNorm takes
    the place of ``x`` in the sum.

    Args:
        c_in: channels of ``x``, ``(B, c_in, H, W)``.
        c_out: channels of the result, ``(B, c_out, H / stride, W / stride)``.
        stride: of the first convolution.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, c_in, H, W)`` to ``(B, c_out, H / stride, W / stride)``."""
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class ResNet7(nn.Module):
    """A residual network for the 8 x 8 digits: stem, block of 24 channels, strided convolution, block of 40, linear.

    48,818 parameters, 1.3 million multiply-accumulates an image. The stem's channels are also those of the first
    block's sum, and the strided convolution's those of the second's: a unit of either lives in several layers.

    Shapes: ``(B, 1, 8, 8)`` to ``(B, 10)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.block1 = Residual(24, 24)
        self.down = nn.Conv2d(24, 40, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(40)
        self.block2 = Residual(40, 40)
        self.fc = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images to the logits of ten classes."""
        x = self.block1(F.relu(self.bn1(self.stem(x))))
        x = self.block2(F.relu(self.bn2(self.down(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class LeNet300(nn.Module):
    """LeNet-300-100: 784-300-100-10 with ReLU, 266,610 parameters.

    Shapes: ``(B, 1, 28, 28)`` to ``(B, 10)``.

    Source: LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition", 1998.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images to the logits of ten classes."""
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))  # type: ignore[no-any-return]


class LeNet5(nn.Module):
    """LeNet-5 as Caffe ships it, with ReLU after each hidden layer: 20-50-800-500, 431,080 parameters.

    Shapes: ``(B, 1, 28, 28)`` to ``(B, 10)``; the flattened maps that ``fc1`` reads are ``(B, 800)``.

    Source: the LeNet example of Caffe; ReLU after the convolutions as in the studies that report it as LeNet-5-Caffe.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images to the logits of ten classes."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))  # type: ignore[no-any-return]


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR: three stages of three blocks, 16, 32 and 64 channels, 1 x 1 convolutions where they change.

    Shapes: ``(B, 3, 32, 32)`` to ``(B, 10)``.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016 (projection shortcuts).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        widths = [16] * 4 + [32] * 3 + [64] * 3
        self.blocks = nn.Sequential(*(Residual(a, b, stride=1 if a == b else 2) for a, b in pairwise(widths)))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images to the logits of ten classes."""
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class WideBlock(nn.Module):
    """BatchNorm, ReLU and a 3 x 3 convolution, twice, added to the input; where shapes differ, to a 1 x 1 convolution.

    The 1 x 1 convolution reads the input after its BatchNorm and ReLU.

    Args:
        c_in: channels of the input.
        c_out: channels of the result.
        stride: of the first convolution and of the 1 x 1 one.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut = None if stride == 1 and c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, c_in, H, W)`` to ``(B, c_out, H / stride, W / stride)``."""
        ready = F.relu(self.bn1(x))
        hidden: Tensor = self.conv2(F.relu(self.bn2(self.conv1(ready))))
        return hidden + (x if self.shortcut is None else self.shortcut(ready))


class WideResNet(nn.Module):
    """WRN-d-k for CIFAR: (d - 4) / 6 blocks in each of three stages of 16 k, 32 k and 64 k channels.

    Shapes: ``(B, 3, 32, 32)`` to ``(B, 10)``.

    Args:
        depth: d, 6 n + 4.
        width: k.

    Source: Zagoruyko, Komodakis, "Wide Residual Networks", 2016.
    """

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        each = (depth - 4) // 6
        widths = [16] + [16 * width] * each + [32 * width] * each + [64 * width] * each
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks = [
            WideBlock(a, b, stride=2 if number in {each, 2 * each} else 1)
            for number, (a, b) in enumerate(pairwise(widths))
        ]
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images to the logits of ten classes."""
        x = F.relu(self.bn(self.blocks(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Network:
    """One row of the table of networks.

    Args:
        build: makes it, at full size and freshly initialised.
        shape: of one input, ``(C, H, W)``.
        inputs: layers whose single inputs get gates too, because they read something finer than a group of the
            trace: pixels, or single positions of a feature map. The papers' tables count them.
        counted: the units that the papers' tables list, in their order, each by a weight and one of its dimensions.
        pruned: the papers' prune rate as a function of those numbers, biases ignored; None where there is none.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    inputs: tuple[str, ...] = ()
    counted: tuple[tuple[str, int], ...] = ()
    pruned: Callable[[Sequence[int]], float] | None = None

    def kept(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The live units of ``counted``, read off the tensors' shapes of a compact network."""
        return tuple(shapes[name][dim] for name, dim in self.counted)


def _channels_last(build: Callable[..., nn.Module], *args: int) -> nn.Module:
    """A network whose weights, and with them all that it computes, have the channels last: a step takes 0.7 of it."""
    return build(*args).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _lenet300_pruned(kept: Sequence[int]) -> float:
    l0, l1, l2 = kept
    return 1 - (l0 * l1 + l1 * l2 + 10 * l2) / 266_200


def _lenet5_pruned(kept: Sequence[int]) -> float:
    l0, l1, l2, l3 = kept
    return 1 - (25 * l0 + 25 * l0 * l1 + l2 * l3 + 10 * l3) / 430_500


#: Every network by name. A new one is one row here.
NETWORKS: Mapping[str, Network] = {
    "resnet-7": Network(ResNet7, (1, 8, 8)),
    "lenet-300-100": Network(
        LeNet300,
        (1, 28, 28),
        inputs=("fc1",),
        counted=(("fc1.weight", 1), ("fc2.weight", 1), ("fc3.weight", 1)),
        pruned=_lenet300_pruned,
    ),
    "lenet-5": Network(
        LeNet5,
        (1, 28, 28),
        inputs=("fc1",),
        counted=(("conv1.weight", 0), ("conv2.weight", 0), ("fc1.weight", 1), ("fc1.weight", 0)),
        pruned=_lenet5_pruned,
    ),
    "resnet-20": Network(partial(_channels_last, ResNet20), (3, 32, 32)),
    "wrn-16-4": Network(partial(_channels_last, WideResNet, 16, 4), (3, 32, 32)),
    "wrn-28-10": Network(partial(_channels_last, WideResNet, 28, 10), (3, 32, 32)),
}


def network(name: str) -> Network:
    """The row ``name`` of ``NETWORKS``.

    Raises:
        SecateurError: there is no such network.

    Example:
        >>> round(network("lenet-5").pruned((5, 10, 76, 16)), 4)
        0.9936
    """
    if name not in NETWORKS:
        raise SecateurError(f"unknown network {name!r}; there are: {', '.join(NETWORKS)}")
    return NETWORKS[name]
