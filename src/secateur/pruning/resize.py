"""Parameters that become smaller under a running optimizer: what is refused, and state that is cut with them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from secateur.errors import GateError
from secateur.pruning.draws import gates_of, in_backward, live_of
from secateur.pruning.optimizers import living, optimizers_of
from secateur.structure.slices import cut_tensor
from secateur.structure.tensors import listed

__all__ = ["check_free", "check_holds", "check_resizable", "check_unwrapped", "resize_", "resized"]


def check_holds(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Refuse optimizers of other models.

    Raises:
        GateError: one trains no parameter of this, with what to do.
    """
    own = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise GateError(
                f"shrink: the {type(optimizer).__name__} trains no parameter of the model, so it would go on with what"
                " is gone; pass the optimizer that was made from pruner.param_groups(...)"
            )


def check_free(model: nn.Module) -> None:
    """Refuse a pass that is still under way.

    Raises:
        GateError: with what to do.
    """
    live = live_of(gates_of(model))
    if in_backward():
        raise GateError("shrink: called during a backward pass; call it after optimizer.step()")
    if live.unfinished:
        raise GateError(
            "shrink: a training forward waits for its backward pass, which would reach tensors that are gone; call"
            " loss.backward() first, or drop what that forward returned"
        )


def check_unwrapped(model: nn.Module) -> None:
    """Refuse a model whose parameters a wrapper for several processes holds on to.

    Raises:
        GateError: with what to do.
    """
    wrappers: list[type[nn.Module]] = [DistributedDataParallel]
    if (sharded := sys.modules.get("torch.distributed.fsdp")) is not None:
        wrappers.append(sharded.FullyShardedDataParallel)
    for wrapper in (item for kind in wrappers for item in living(kind)):
        if any(module is model for module in wrapper.modules()):
            raise GateError(
                f"shrink: the model is in a {type(wrapper).__name__}, which holds on to the parameters that it was made"
                " with; shrink the model by itself, and wrap it anew afterwards"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "_local_tensor"):
            raise GateError(f"shrink: {name} is sharded over processes; shrink before sharding")


def check_resizable(optimizers: Sequence[Optimizer], tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse tensors that cannot become smaller without leaving something stale.

    Args:
        optimizers: those that will be told.
        tensors: what is to be cut, with names.

    Raises:
        GateError: a hook sits on a parameter, an optimizer that is not told trains it, or one that is told keeps state
            that cannot be cut; all problems are listed.
    """
    names = {id(tensor): name for name, tensor in tensors}
    problems = [
        f"{name}: it has hooks of its own; remove them before, and register them on the new parameter"
        for name, tensor in tensors
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None)
    ]
    problems += [
        f"another {type(optimizer).__name__} trains these parameters; pass all optimizers that are in use, and delete"
        " those that are not"
        for optimizer in _untold(optimizers, [tensor for _, tensor in tensors])
    ]
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        for tensor, state in optimizer.state.items():
            if id(tensor) in names:
                problems += [f"{names[id(tensor)]}: {kind} keeps {what}" for what in _uncuttable(tensor, state)]
        elsewhere = {k: v for k, v in vars(optimizer).items() if k not in {"param_groups", "state"}}
        held = {names[id(leaf)] for leaf in tree_leaves(elsewhere) if id(leaf) in names}
        problems += [f"{name}: {kind} holds it outside of its groups" for name in sorted(held)]
    if problems:
        raise GateError(f"shrink: nothing was changed: {listed(problems)}")


def resize_(optimizers: Sequence[Optimizer], made: Sequence[tuple[Tensor, Tensor, Mapping[int, Any]]]) -> None:
    """Put new tensors in the place of old ones: in groups, as keys of state, with state and gradient cut alike.

    Args:
        optimizers: checked by `check_resizable`.
        made: of each tensor the old one, the new one, and the positions that stayed of each dimension that was cut.
    """
    by_old = {id(old): (new, kept) for old, new, kept in made}
    for old, new, kept in made:
        if old.grad is not None:
            new.grad = cut_tensor(old.grad, kept)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            members = group["params"]
            members[:] = [by_old[id(one)][0] if id(one) in by_old else one for one in members]
        # Rebuilt in the old order, which is that of a state dict.
        states = list(optimizer.state.items())
        optimizer.state.clear()
        for tensor, state in states:
            if id(tensor) in by_old:
                new, kept = by_old[id(tensor)]
                optimizer.state[new] = {key: _cut(value, tensor, kept) for key, value in state.items()}
            else:
                optimizer.state[tensor] = state


def resized(
    tensors: Sequence[Tensor],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    made: Sequence[tuple[Tensor, Tensor, Mapping[int, Any]]],
) -> list[Tensor]:
    """Tensors that go along with parameters, one for each: cut where these were, in the order that these have now.

    Args:
        tensors: none at all, or one for each parameter, of its shape.
        before: the parameters as they were.
        after: the parameters as they are.
        made: as `resize_` takes it.

    Raises:
        GateError: their number or a shape differs from the parameters'.
    """
    if not tensors:
        return []
    if [tensor.shape for tensor in tensors] != [parameter.shape for parameter in before]:
        raise GateError("shrink: a list in ema= has not one tensor for each of model.parameters(), of its shape")
    by_old = {id(old): (new, kept) for old, new, kept in made}
    found: dict[int, Tensor] = {}
    for tensor, parameter in zip(tensors, before, strict=True):
        new, kept = by_old.get(id(parameter), (parameter, {}))
        found[id(new)] = cut_tensor(tensor, kept) if kept else tensor
    return [found[id(parameter)] for parameter in after]


def _untold(optimizers: Sequence[Optimizer], tensors: Sequence[Tensor]) -> list[Optimizer]:
    """Living optimizers of these tensors with groups that none of those that are told has."""
    told = {id(group) for optimizer in optimizers for group in optimizer.param_groups}

    def found() -> list[Optimizer]:
        return [one for one in optimizers_of(tensors) if any(id(group) not in told for group in one.param_groups)]

    if not found():
        return []
    gc.collect()  # a scheduler and its optimizer refer to each other, and outlive the training that made them
    return found()


def _uncuttable(tensor: Tensor, state: object) -> list[str]:
    """What of an optimizer's state for a tensor has neither its shape nor one number."""
    if not isinstance(state, dict):
        return [f"state of the type {type(state).__name__}"]
    problems = []
    for key, value in state.items():
        if isinstance(value, Tensor):
            if value.shape != tensor.shape and value.numel() != 1:
                problems.append(
                    f"state {key!r} of shape {tuple(value.shape)}, expected {tuple(tensor.shape)} or one number; use an"
                    " optimizer whose state has the shape of its parameters, or make it anew after a shrink without it"
                )
        elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            problems.append(f"state {key!r}, a {type(value).__name__} of tensors, which cannot be cut")
    return problems


def _cut(value: Any, tensor: Tensor, kept: Mapping[int, Any]) -> Any:
    return cut_tensor(value, kept) if isinstance(value, Tensor) and value.shape == tensor.shape else value
