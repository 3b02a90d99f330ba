"""What one architecture is held against: traced, cut in half at random, proven, counted.

The tests assert on what is found here, and the zoo's page in the documentation shows it.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from secateur.compaction.proof import Proof, prove
from secateur.structure.nested import tensors_in

__all__ = ["Exam", "counted_macs", "half", "held_back", "one_each", "redrawn", "uneven"]


def half(structure: sc.Structure, seed: int = 0) -> dict[str, Tensor]:
    """Half of the units of every group, at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.randperm(group.size, generator=generator)[: max(1, group.size // 2)].sort().values
        for group in structure.groups
    }


def uneven(structure: sc.Structure, seed: int = 0) -> dict[str, Tensor]:
    """Anything from one unit to all but one of every group, at random: equal counts can hide a tie that was missed."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in structure.groups:
        count = int(torch.randint(1, group.size, (1,), generator=generator))
        keep[group.name] = torch.randperm(group.size, generator=generator)[:count].sort().values
    return keep


def one_each(structure: sc.Structure) -> dict[str, Tensor]:
    """The smallest keep-set: one unit of every group."""
    return {group.name: torch.zeros(1, dtype=torch.int64) for group in structure.groups}


def counted_macs(model: nn.Module, example: sc.Example) -> int:
    """Multiply-accumulates of one forward in evaluation mode, by torch's own counter.

    Fused attention and LSTMs count as nothing on the CPU, so both run as their products of matrices.
    """
    model.eval()
    onednn = torch.backends.mkldnn
    before, onednn.enabled = onednn.enabled, False
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*example.args, **example.kwargs)
    finally:
        onednn.enabled = before
    return counter.get_total_flops() // 2


def redrawn(model: nn.Module) -> nn.Module:
    """A copy with every floating parameter drawn anew, so that no layer that starts at zero hides what it reads."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                scale = max(parameter[0].numel(), 4) ** -0.5 if parameter.dim() > 1 else 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return twin


def held_back(structure: sc.Structure) -> dict[str, int]:
    """Parameters that stay at the smallest keep-set, by the reason that holds the largest dimension of their tensor."""
    smallest = one_each(structure)
    sizes = [axis.fixed + sum(times for _, times in axis.per_group) for axis in structure.axes]
    largest: dict[str, sc.Frozen] = {}
    for frozen in structure.frozen:
        if frozen.tensor not in largest or frozen.count > largest[frozen.tensor].count:
            largest[frozen.tensor] = frozen
    held: Counter[str] = Counter()
    for term in structure.param_terms:
        frozen = largest.get(term.label)
        why = "" if frozen is None else f"{frozen.reason} ({frozen.operator})" if frozen.operator else frozen.reason
        held[why or "one unit of a group stays"] += round(
            term.coefficient * math.prod(sizes[axis] for axis in term.axes)
        )
    assert sum(held.values()) == structure.cost(smallest).params
    return dict(held.most_common())


@dataclass
class Exam:
    """One model, traced, with a copy that is cut in half.

    Args:
        model: the dense model.
        example: its inputs.
        structure: its structure.
        seconds: of the processor, for the trace.
        keep: half of every group.
        small: the compact model.
    """

    model: nn.Module
    example: sc.Example
    structure: sc.Structure = field(init=False)
    seconds: float = field(init=False)
    keep: dict[str, Tensor] = field(init=False)
    small: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        start = time.process_time()
        self.structure = sc.trace(self.model, self.example)
        self.seconds = time.process_time() - start
        self.keep = half(self.structure)
        self.small = sc.compact(self.model, self.structure, self.keep)

    @property
    def units(self) -> int:
        return sum(group.size for group in self.structure.groups)

    @property
    def gone(self) -> float:
        """Share of the parameters that can go: all but one unit of every group."""
        return 1 - self.structure.cost(one_each(self.structure)).params / self.structure.cost().params

    def proof(self) -> Proof:
        """Masked against compact in float64, with all numbers re-drawn."""
        return prove(self.model, self.small, self.structure, self.keep, self.example)

    def proof_uneven(self) -> Proof:
        """The same for a keep-set of other counts in every group."""
        keep = uneven(self.structure)
        return prove(self.model, sc.compact(self.model, self.structure, keep), self.structure, keep, self.example)

    def effect(self) -> float:
        """How far the cut moves the outputs, relative to the largest: a proof of equality says nothing without it."""
        dense = redrawn(self.model).eval()
        outputs = []
        for model in (dense, sc.mask(dense, self.structure, self.keep)):
            torch.manual_seed(0)
            with torch.no_grad():
                outputs.append(tensors_in(model(*self.example.args, **self.example.kwargs)))
        pairs = [(a, b) for a, b in zip(*outputs, strict=True) if a.is_floating_point() and a.isfinite().all()]
        return max((float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs), default=0.0)

    def generated(self, n_tokens: int = 6) -> tuple[bool, float]:
        """Whether masked and compact say the same word after word with a cache, and how far their logits are apart.

        The logits are relative to the largest; models of transformers normalise in float32 whatever their own dtype.
        """
        dense = redrawn(self.model).double().eval()
        options = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False, "use_cache": True}
        made = [
            model.generate(
                self.example.kwargs["input_ids"][:, :5], return_dict_in_generate=True, output_logits=True, **options
            )
            for model in (
                sc.mask(dense, self.structure, self.keep),
                sc.compact(dense, self.structure, self.keep),
            )
        ]
        masked, small = (torch.stack(one.logits) for one in made)
        apart = float((masked - small).abs().max() / masked.abs().max())
        return torch.equal(made[0].sequences, made[1].sequences), apart

    def n_params(self) -> int:
        """Parameters of the compact model, counted on it."""
        return sum(parameter.numel() for parameter in self.small.parameters())
