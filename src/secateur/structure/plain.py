"""What keeps a model from being traced, gated or cut as it is, each with what to do about it.

==============================  ==========================================================================
model, or module of it          what to do
==============================  ==========================================================================
DDP, DataParallel               take ``model.module``, and wrap it again afterwards
FSDP, ``fully_shard``           take the module before it is sharded
``torch.compile``               take what was compiled, and compile it again afterwards
``torch.jit``                   take the module before it was scripted
a lazy module                   run it once
a gated model                   ``pruner.finalize()`` or ``pruner.detach()``
==============================  ==========================================================================

A weight that is computed from others before it is read (parametrizations, and the hooks of ``weight_norm``,
``spectral_norm`` and pruning masks in `torch.nn.utils`) is no reason to refuse a model: what it is computed from is
frozen (`kept_whole`).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["kept_whole", "unfit", "with_graph"]

#: Classes, by name anywhere in a module's ancestry, for importing them would load what most models never need.
_WRAPPERS = {
    "DistributedDataParallel": "wraps the model; use its .module, before wrapping or instead of the wrapper",
    "DataParallel": "wraps the model; use its .module",
    "FullyShardedDataParallel": "shards the model; use the module before it is sharded, and shard afterwards",
    "FSDPModule": "is sharded (fully_shard); use the module before that, and shard afterwards",
    "OptimizedModule": "is compiled; use what was given to torch.compile (._orig_mod), and compile afterwards",
    "ScriptModule": "is scripted, and its Python forward is gone; use the module before torch.jit",
}
#: Hooks by which torch.nn.utils computes a weight before each forward, and what takes them off.
_HOOKS = {
    "WeightNorm": "remove_weight_norm",
    "SpectralNorm": "remove_spectral_norm",
    "BasePruningMethod": "prune.remove",
}


def unfit(model: nn.Module) -> str:
    """Why a model cannot be taken as it is, and what to do; "" where it can."""
    for path, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS:
                return f"{path or 'model'}: {type(module).__name__} {_WRAPPERS[kind.__name__]}"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            return f"model: {name} has no shape yet (a lazy module); run the model once first"
        if any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__):
            return f"model: {name} is spread over devices (a DTensor); use the model before it is parallelised"
        if getattr(tensor, "secateur_gate", False):
            return "model: it is gated; call finalize() or detach() of its pruner first"
    return ""


def kept_whole(model: nn.Module) -> dict[str, str]:
    """Names of tensors that are frozen from the start, each with the reason.

    These are the ones from which weights are computed before they are read, and the projections of an LSTM, which torch
    knows by nothing but that their two widths differ.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        at = f"{path}." if path else ""
        if isinstance(module, ParametrizationList):
            reason = "is what a parametrization computes a weight from (remove_parametrizations undoes it)"
            found |= {f"{at}{name}": reason for name, _ in (*module.named_parameters(), *module.named_buffers())}
        if isinstance(module, nn.LSTM) and module.proj_size:
            reason = "projects the state of an LSTM, which torch tells from widths that differ (proj_size=0 has none)"
            found |= {f"{at}{name}": reason for name in module._parameters if name.startswith("weight_hr")}
        for hook in module._forward_pre_hooks.values():
            ancestry = {kind.__name__ for kind in type(hook).__mro__ if kind.__module__.startswith("torch.nn.utils")}
            for kind in sorted(ancestry & _HOOKS.keys()):
                stem = getattr(hook, "name", None) or getattr(hook, "_tensor_name", "weight")
                reason = f"is what {kind} computes a weight from before each forward ({_HOOKS[kind]} undoes it)"
                mine = (*module._parameters, *module._buffers)
                found |= {f"{at}{name}": reason for name in mine if name.startswith(f"{stem}_")}
    return found


def with_graph(model: nn.Module) -> list[str]:
    """Attributes that hold tensors with a graph, which no deep copy of a model gets over."""
    return [
        f"{path}.{key}" if path else key
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    ]
