"""The losses of the experiments: labels, a teacher's outputs, dropout, shifted images, and the papers' L0 penalty.

Index conventions: ``B`` examples, ``C`` channels, ``K`` classes, ``Z`` gates of the model in a row.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.pruning.placement import gated_sites
from secateur.pruning.pruner import Pruner
from secateur.recipes.images import Images
from secateur.recipes.papers.recipe import Distillation, Recipe
from secateur.recipes.train import Objective
from secateur.structure.tensors import named_tensors

__all__ = ["dropped", "l0_penalty", "learning", "shifted_and_mirrored", "soft_targets"]

#: Pixels by which images of CIFAR are shifted at most, as is usual since He et al. 2016.
SHIFT = 4
#: Images in one batch of the teacher's evaluation.
TEACHER_BATCH = 1000


def learning(
    recipe: Recipe,
    images: Images,
    *,
    dropout: Mapping[str, float] | None = None,
    soft: Tensor | None = None,
    beside: Callable[[], Tensor] | None = None,
) -> Objective:
    """The loss that a network of the recipe learns by.

    Args:
        recipe: says label smoothing, distillation, shifts, and precision.
        images: the training images.
        dropout: rate at the inputs of layers, by name.
        soft: the teacher's distribution on the training images ``(N, K)``; None for learning from labels alone.
        beside: a term that depends on no draw.
    """
    taught = recipe.distillation if soft is not None else None
    smoothing = recipe.label_smoothing if taught is None else 0.0

    def loss(model: nn.Module, index: Tensor) -> Tensor:
        x, y = images.x[index], images.y[index]
        if recipe.augmented:
            x = shifted_and_mirrored(x)
        with dropped(model, dropout or {}), torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.half):
            logits = model(x)
        logits = logits.float()
        labels = F.cross_entropy(logits, y, label_smoothing=smoothing)
        if taught is None or soft is None:
            return labels
        return (1 - taught.share) * labels + taught.share * _divergence(logits, soft[index], taught.temperature)

    return Objective(loss, beside)


def _divergence(logits: Tensor, soft: Tensor, temperature: float) -> Tensor:
    own = F.log_softmax(logits / temperature, dim=1)
    return temperature**2 * F.kl_div(own, soft, reduction="batchmean")


@torch.no_grad()
def soft_targets(teacher: nn.Module, x: Tensor, distillation: Distillation) -> Tensor:
    """The teacher's distribution over classes at the temperature, in evaluation mode: ``(N, K)``."""
    teacher.eval()
    logits = torch.cat([teacher(part) for part in torch.split(x, TEACHER_BATCH)])
    return F.softmax(logits / distillation.temperature, dim=1)


@contextlib.contextmanager
def dropped(model: nn.Module, rates: Mapping[str, float]) -> Iterator[None]:
    """Within it the inputs of the named layers are dropped at these rates while the model is in training mode."""

    def dropping(rate: float) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda layer, args: (F.dropout(args[0], rate, layer.training), *args[1:])

    hooks = [model.get_submodule(name).register_forward_pre_hook(dropping(rate)) for name, rate in rates.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def shifted_and_mirrored(x: Tensor) -> Tensor:
    """Each image ``(B, C, H, W)`` shifted by up to ``SHIFT`` pixels, zeros coming in, and mirrored half of the time."""
    count, channels, height, width = x.shape
    device = x.device
    down, right = (torch.randint(0, 2 * SHIFT + 1, (count, 1), device=device) for _ in range(2))
    columns = torch.arange(width, device=device).expand(count, width)
    mirrored = torch.rand(count, 1, device=device) < 0.5
    columns = right + torch.where(mirrored, width - 1 - columns, columns)
    rows = down + torch.arange(height, device=device)
    padded = F.pad(x, (SHIFT,) * 4)
    image = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def l0_penalty(pruner: Pruner, lambdas: Sequence[float], n: int) -> Callable[[], Tensor]:
    r"""The papers' penalty.

    .. math:: \frac{1}{N} \sum_l \lambda_l \sum_{g \in l} |g| P(z_g \ne 0)

    with |g| the number of weights that unit g stands for in the full network: the filter of a feature map, the outgoing
    weights of the input of a dense layer. Unlike the expected cost it counts each unit as if no other could close.

    Args:
        pruner: of the gated model.
        lambdas: weights of the L0 norm, one for all or one for each group of gates, in the order in which the network
            computes.
        n: N, training images.

    Raises:
        SecateurError: there are more or fewer lambdas than groups.

    Source: Louizos, Welling, Kingma 2018, eq. 4 and their code; Li, Ji 2019 take it over.
    """
    layers = _layers(pruner)
    if len(lambdas) == 1:
        lambdas = tuple(lambdas) * len(layers)
    if len(layers) != len(lambdas):
        raise SecateurError(f"{len(lambdas)} lambdas for {len(layers)} gated groups: {', '.join(layers)}")
    per_unit = {name: size * price / n for (name, size), price in zip(layers.items(), lambdas, strict=True)}
    prices = torch.cat([torch.full((group.size,), per_unit[group.name]) for group in pruner.groups])

    def penalty() -> Tensor:
        chances = pruner.gates.prob_open()
        return chances @ prices.to(chances)

    return penalty


def _layers(pruner: Pruner) -> dict[str, int]:
    """By group, in the order in which the network computes, the weights that each of its units stands for."""
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(pruner.model).items()}
    shapes |= {site.name: tuple(site.chain.original.shape) for site in gated_sites(pruner.model)}
    order = list(dict.fromkeys(term.label for term in pruner.structure.mac_terms))
    found = {}
    for group in pruner.groups:
        filters = [member for member in group.members if not member.consumer and len(shapes[member.tensor]) > 2]
        member = filters[0] if filters else next(member for member in group.members if member.consumer)
        shape = shapes[member.tensor]
        size = math.prod(shape) // shape[member.dim] * member.index.shape[1]
        found[group.name] = order.index(member.tensor.rpartition(".")[0]), size
    return {name: size for name, (_, size) in sorted(found.items(), key=lambda item: item[1][0])}
