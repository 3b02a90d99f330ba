"""One forward pass that shows whether every gate is read, and that nothing goes round a gate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.errors import GateError
from secateur.pruning.draws import gates_of, live_of
from secateur.pruning.outputs import output_gates
from secateur.pruning.placement import Site, gated_sites
from secateur.structure.example import Example
from secateur.structure.tensors import listed

__all__ = ["evaluating", "probe"]


def probe(model: nn.Module, examples: Sequence[Example], branches: Sequence[str] = ()) -> None:
    """Check that each gate is read and that no operator reads a gated weight ungated.

    All gates at 0 must leave nothing of what they gate. Then the examples run once, in evaluation mode and without
    gradient, watched by a dispatch mode: a module that computes with a reference to its weight that it took earlier, or
    that never reads the weight, is found. Without examples only the first part is done.

    With all gates at 0 the modules at ``branches`` must return zeros, each as large as the first tensor it takes.

    Raises:
        GateError: a gate is not read; all of them are listed.
    """
    sites = gated_sites(model)
    gates = gates_of(model)
    ones = torch.ones(gates.total + 1, device=gates.device)
    zeros = torch.cat([torch.zeros_like(ones[:-1]), ones[-1:]])
    live = live_of(gates)
    problems: set[str] = set()
    with evaluating(model):
        with live.overridden(zeros):
            problems |= {f"{site.name}: gates at 0 leave some of it" for site in sites if not _vanishes(site, zeros)}
            problems |= _not_zero(model, examples, branches)
            problems |= _not_called(model, examples)
        with live.overridden(ones):
            watch = _Watch(sites)
            for example in examples:
                with watch:
                    model(*example.args, **example.kwargs)
            problems |= {f"{name}: read without its gate" for name in watch.ungated}
            if examples:
                problems |= {
                    f"{site.name}: its gate is never read" for site in sites if id(site.gate) not in watch.read
                }
    if problems:
        raise GateError(
            f"gates would have no effect; the model is as it was: {listed(sorted(problems))}. Read these weights as"
            " attributes of their module in forward (self.weight), not through a reference taken earlier; or leave them"
            " out with sc.Rule(where=...)"
        )


def _not_zero(model: nn.Module, examples: Sequence[Example], branches: Sequence[str]) -> set[str]:
    """Which branches do not return zeros now, or not of the shape of what they take."""
    seen: dict[str, str] = {}

    def look(path: str, args: Any, kwargs: Any, output: Any) -> None:
        first = next((item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)), None)
        if first is None or not isinstance(output, Tensor) or output.shape != first.shape:
            seen[path] = "does not return one tensor of the shape of the first that it takes"
        elif bool(output.any()):
            seen[path] = "with its gate at 0 its output is not zero: its last layer is not what its output comes from"
        else:
            seen.setdefault(path, "")

    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda _, args, kwargs, output, path=path: look(path, args, kwargs, output), with_kwargs=True
        )
        for path in branches
    ]
    try:
        for example in examples if branches else ():
            model(*example.args, **example.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    untold = "is not called with these examples" if examples else "needs examples= to see what it returns"
    return {f"{path}: {seen.get(path, untold)}" for path in branches if seen.get(path, untold)}


def _not_called(model: nn.Module, examples: Sequence[Example]) -> set[str]:
    """Which modules whose output has gates no example calls."""
    missing = {path for path, _, _ in output_gates(model)}
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: missing.discard(path)) for path in missing
    ]
    try:
        for example in examples if hooks else ():
            model(*example.args, **example.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return {f"{path}: is not called with these examples" for path in missing} if examples else set()


def _vanishes(site: Site, zeros: Tensor) -> bool:
    weight = getattr(site.owner, site.key)
    for dim, factor in site.gate.factors(zeros).items():
        closed = torch.nonzero(factor == 0).flatten()
        if not len(closed) or bool(weight.index_select(dim, closed.to(weight.device)).any()):
            return False
    return site.gate.own(zeros) is None or not bool(weight.any())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient and without a trace in torch's random state; modes are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(set(devices), key=str)):
            yield
    finally:
        for module, training in modes:
            module.training = training


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees which gates are read, and which operators read a gated weight elsewhere."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sites = sites
        self._names = {_memory(site.chain.original): site.name for site in sites}
        self._inside = 0
        self._hooks: list[Any] = []
        self.read: set[int] = set()
        self.ungated: set[str] = set()

    def __enter__(self) -> _Watch:
        for site in self._sites:
            self._hooks += [
                site.gate.register_forward_pre_hook(self._enter),
                site.gate.register_forward_hook(self._leave),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _enter(self, gate: nn.Module, _: Any) -> None:
        self._inside += 1
        self.read.add(id(gate))

    def _leave(self, _: nn.Module, __: Any, ___: Any) -> None:
        self._inside -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and (name := self._names.get(_memory(leaf))):
                    self.ungated.add(name)
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    return 0 if tensor.numel() == 0 else tensor.untyped_storage()._cdata
