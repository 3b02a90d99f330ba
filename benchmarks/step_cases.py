"""Networks, batches and methods that `steps.py` measures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "src")]

import secateur as sc  # noqa: E402
from secateur.recipes import networks  # noqa: E402

__all__ = ["CASES", "METHODS", "Case", "by_hand"]

#: What may be measured: methods by name, with what they are drawn for.
METHODS: dict[str, Callable[[], sc.Method]] = {
    "hard-concrete": sc.HardConcrete,
    "ar": lambda: sc.ARM(estimator="ar"),
    "arm": sc.ARM,
    "diffprune": sc.DiffPrune,
    "diff-sparse": sc.DifferentiableSparsification,
    "straight-through": sc.StraightThrough,
}


class Gpt(nn.Module):
    """A small decoder: 4 layers of width 128 with 4 heads, 64 tokens, 96 kinds of them."""

    def __init__(self, layers: int = 4, width: int = 128, heads: int = 4, words: int = 96, tokens: int = 64) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(GptLayer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T)`` to logits ``(B * T, words)``."""
        h = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h)).flatten(0, 1)


class GptLayer(nn.Module):
    """Causal attention and an MLP, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """``(B, T, width)`` to the same shape."""
        x = self.norm1(h)
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class WideResNet(nn.Module):
    """WRN-16-4: three stages of two pre-activated blocks, 64, 128 and 256 channels."""

    def __init__(self, width: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        sizes = [16, *(16 * width * 2**stage for stage in range(3) for _ in range(blocks))]
        strides = [1 + (stage > 0 and block == 0) for stage in range(3) for block in range(blocks)]
        self.blocks = nn.Sequential(*(WideBlock(*three) for three in zip(sizes, sizes[1:], strides, strict=False)))
        self.norm, self.head = nn.BatchNorm2d(sizes[-1]), nn.Linear(sizes[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, 3, 32, 32)`` to the logits of ten classes."""
        h = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))


class WideBlock(nn.Module):
    """Two convolutions, each behind BatchNorm and ReLU, and a 1 x 1 convolution beside them where the width changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.beside = nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False) if c_in != c_out or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, c_in, H, W)`` to ``(B, c_out, H / stride, W / stride)``."""
        h = F.relu(self.norm1(x))
        aside = x if self.beside is None else self.beside(h)
        return aside + self.conv2(F.relu(self.norm2(self.conv1(h))))


class Bert(nn.Module):
    """BERT-tiny of transformers: 2 layers of width 128 with 2 heads, a classifier on top."""

    def __init__(self) -> None:
        super().__init__()
        from tests.conftest import _declare_torchvision_operators

        _declare_torchvision_operators()
        import transformers

        config = transformers.BertConfig(
            vocab_size=1000, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
            max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.body = transformers.BertForSequenceClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        """Words ``(B, T)`` to the logits of two classes."""
        logits: Tensor = self.body(input_ids=x).logits
        return logits


@dataclass(frozen=True)
class Case:
    """A network with a batch.

    Args:
        build: makes it.
        batch: inputs and classes of so many examples.
        size: of the batch.
        weights: which layers have per-weight gates in that kind of measurement; none where it is not measured.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    size: int
    weights: bool = False


def _images(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda n: (torch.randn(n, *shape), torch.randint(10, (n,)))


def _words(kinds: int, classes: int, per_token: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda n: (torch.randint(kinds, (n, 64)), torch.randint(classes, (n * per_token,)))


CASES: dict[str, Case] = {
    "LeNet-300-100": Case(networks.LeNet300, _images(1, 28, 28), 100, weights=True),
    "LeNet-5": Case(networks.LeNet5, _images(1, 28, 28), 100, weights=True),
    "ResNet-20": Case(networks.ResNet20, _images(3, 32, 32), 128),
    "WRN-16-4": Case(WideResNet, _images(3, 32, 32), 128),
    "small GPT": Case(Gpt, _words(96, 96, 64), 32),
    "BERT-tiny": Case(Bert, _words(1000, 2, 1), 32),
}


def by_hand(name: str, widths: dict[str, int]) -> nn.Module:
    """The same architecture written out in these widths."""
    if name == "LeNet-300-100":
        a, b = widths["fc1"], widths["fc2"]
        return nn.Sequential(nn.Flatten(), nn.Linear(784, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 10))
    net = networks.LeNet5()
    a, b, c = widths["conv1"], widths["conv2"], widths["fc1"]
    net.conv1, net.conv2 = nn.Conv2d(1, a, 5), nn.Conv2d(a, b, 5)
    net.fc1, net.fc2 = nn.Linear(16 * b, c), nn.Linear(c, 10)
    return net
