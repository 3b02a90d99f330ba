"""Dense checkpoints into gated models: keys are translated while a state dict is loaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.errors import GateError
from secateur.pruning.draws import GATES, gates_of
from secateur.pruning.placement import gated_sites

__all__ = ["accept_dense_keys", "refuse_dense_keys"]


def accept_dense_keys(model: nn.Module) -> None:
    """Let a gated model, and any module of it that holds a gated weight, load state dicts of the dense one.

    ``fc.weight`` is read as ``fc.parametrizations.weight.original``, and gates, which a dense state dict cannot have,
    stay as they are. A state dict of the gated model is loaded as any other; one that has gated keys but lacks gates is
    refused by `torch.nn.Module.load_state_dict` as usual.
    """
    # First on the root: where the root itself holds a gated weight, its keys must still be the dense ones.
    model.register_load_state_dict_pre_hook(_keep_gates)  # type: ignore[no-untyped-call]
    owners = {id(site.owner): site.owner for site in gated_sites(model)}
    for owner in owners.values():
        owner.register_load_state_dict_pre_hook(_translate)  # type: ignore[no-untyped-call]


def refuse_dense_keys(model: nn.Module) -> None:
    """Undo `accept_dense_keys`."""
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks
        for number in [n for n, hook in hooks.items() if getattr(hook, "hook", None) in {_keep_gates, _translate}]:
            del hooks[number]


def _translate(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for site in gated_sites(module):
        if site.owner is module and f"{prefix}{site.key}" in state_dict:
            state_dict[f"{prefix}parametrizations.{site.key}.original"] = state_dict.pop(f"{prefix}{site.key}")


def _keep_gates(root: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    _check_sizes(root, state_dict, prefix)
    # Where gates act on outputs alone, nothing but the gates tells the two kinds apart.
    sites = gated_sites(root)
    dense = not sites or any(f"{prefix}{site.name}" in state_dict for site in sites)
    if dense and not any(key.startswith(f"{prefix}{GATES}.") for key in state_dict):
        for key, value in gates_of(root).state_dict(keep_vars=True).items():
            state_dict[f"{prefix}{GATES}.{key}"] = value


def _check_sizes(root: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Refuse the state of a model that `secateur.Pruner.shrink` left with other units than this one."""
    if not any(key.startswith(f"{prefix}{GATES}.") for key in state_dict):
        return
    own, saved = gates_of(root).left, state_dict.get(f"{prefix}{GATES}.left")
    counts = [0 if left is None else int((left == 0).sum()) for left in (own, saved)]
    if own is None and saved is None:
        return
    if own is None or saved is None or not bool((own.cpu() == saved.cpu()).all()):
        raise GateError(
            f"the state dict is of a model that shrinking took {counts[1]} units out of, this one lost {counts[0]}. To"
            " resume, attach to a dense model, call pruner.load_state_dict(...), then model.load_state_dict(...), and"
            " only then make the optimizer and copies of the model"
        )
