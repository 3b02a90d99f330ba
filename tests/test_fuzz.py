"""Random networks and random keep-sets: masked equals cut, and the cost is exact.

A short run is part of the suite; ``make fuzz N=10000`` makes as many networks as are asked for.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from tests.fuzz import Network, networks
from tests.law import check_cut, keep_some
from torch.overrides import TorchFunctionMode

from secateur.compaction.compact import compact
from secateur.structure.trace import trace

#: Networks that are asked for; 0 for the short run.
N = int(os.environ.get("SECATEUR_FUZZ", "0"))
SHORT = 40
#: Parts of a long run, which several processes share.
SHARDS = 16 if N else 1
FIRST_SEED = int(os.environ.get("SECATEUR_FUZZ_SEED", "0"))


class Functions(TorchFunctionMode):
    """Notes which functions of torch are called."""

    def __init__(self) -> None:
        self.seen: set[object] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


def calls_einsum(network: torch.nn.Module, x: torch.Tensor) -> bool:
    with Functions() as functions:
        network(x)
    return torch.einsum in functions.seen


def check(network: Network, first: int) -> None:
    """Hold a network to the contract for three keep-sets."""
    x = network.inputs()
    structure = check_cut(network, x, seeds=(0, first, first + 1) if N else (first,))
    assert structure.cost().params == sum(p.numel() for p in network.parameters())
    if structure.groups:
        # What is left costs what the polynomials say, in multiply-accumulates as well.
        keep = keep_some(structure, first)
        small = compact(network, structure, keep)
        found, expected = trace(small, (x,)).cost(), structure.cost(keep)
        assert found.params == expected.params
        # torch.einsum multiplies instead of contracting where a size is 1, which counts as no multiply-accumulate.
        if any(len(kept) == 1 for kept in keep.values()) and calls_einsum(small, x):
            assert found.macs <= expected.macs
        else:
            assert found.macs == expected.macs


@pytest.mark.parametrize("shard", range(SHARDS))
def test_masked_equals_cut(shard: int) -> None:
    @seed(FIRST_SEED * SHARDS + shard)
    @settings(
        max_examples=-(-N // SHARDS) if N else SHORT,
        derandomize=False,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(networks(), st.integers(1, 1000))
    def run(network: Network, first: int) -> None:
        check(network, first)

    torch.manual_seed(0)
    run()
