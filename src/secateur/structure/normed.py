"""RMSNorms at work: while a model is traced, each runs as one operator, whose rule knows that its width can be cut.

That is where a layer is called as it was tried (``norms``): with one tensor, of a rank and a type that agreed with the
formula. Else it runs as it is written, and the rules of the operators that it is made of say what becomes of its width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.structure.coupling import Coupling, Freeze
from secateur.structure.eps import eps_of
from secateur.structure.ids import Label
from secateur.structure.norms import RmsNorm, Same, formula
from secateur.structure.record import Entry
from secateur.structure.sites import Sites

__all__ = ["as_one_operator", "freeze_read_weights"]

_OPERATOR = "secateur::rms_norm"
_READ_TOO = "is the weight of an RMSNorm, which a cut rescales, and is read in another way too"


@functools.cache
def _operator() -> Callable[[Tensor, Tensor, float, float, str], Tensor]:
    """The operator, defined at its first use: importing the package adds nothing to torch."""

    def compute(x: Tensor, weight: Tensor, eps: float, offset: float, path: str) -> Tensor:
        return formula(x, weight, eps, offset).contiguous()

    def shape(x: Tensor, weight: Tensor, eps: float, offset: float, path: str) -> Tensor:
        return x.new_empty(x.shape, dtype=torch.result_type(x, weight))

    operator = torch.library.custom_op(_OPERATOR, compute, mutates_args=())
    operator.register_fake(shape)
    return cast("Callable[[Tensor, Tensor, float, float, str], Tensor]", operator)


@contextmanager
def as_one_operator(model: nn.Module, norms: Mapping[str, RmsNorm]) -> Iterator[None]:
    """Let the RMSNorms of a (copied) model run as the operator ``secateur::rms_norm`` meanwhile, in place."""
    own = {path: vars(model.get_submodule(path)).get("forward") for path in norms}
    for path, norm in norms.items():
        module = model.get_submodule(path)
        module.forward = functools.partial(_forward, module, path, norm, module.forward)
    try:
        yield
    finally:
        for path, forward in own.items():  # a module that holds itself would outlive its model
            attributes = vars(model.get_submodule(path))
            del attributes["forward"]
            if forward is not None:
                attributes["forward"] = forward


def _forward(module: nn.Module, path: str, norm: RmsNorm, own: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    weight = getattr(module, norm.weight.rpartition(".")[2])
    x = _only_tensor(own, args, kwargs)
    kind = norm.kind
    if x is None or x.ndim not in kind.ranks or x.shape[-1] != weight.shape[0] or x.dtype not in kind.results:
        return own(*args, **kwargs)
    eps = eps_of(module, norm.eps.rpartition(".")[2], weight.dtype)
    out, dtype = _operator()(x, weight, eps, kind.offset, path), kind.results[x.dtype]
    return out if out.dtype == dtype else out.to(dtype)


def _only_tensor(own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The one tensor of a call that says nothing else: all other arguments are what they are if they are left out."""
    try:
        signature = inspect.signature(own)
        given = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return None
    parameters = signature.parameters
    told = {name: value for name, value in given.items() if Same(value) != parameters[name].default}
    if list(told) != [next(iter(parameters))]:
        return None
    (value,) = told.values()
    if isinstance(value, tuple) and len(value) == 1:  # a forward that takes *args
        value = value[0]
    return value if isinstance(value, Tensor) else None


def freeze_read_weights(
    coupling: Coupling, sites: Sites, norms: Mapping[str, RmsNorm], labels: Mapping[str, Label], ran: Iterable[Entry]
) -> None:
    """Freeze the widths of RMSNorms whose weight something else reads too: a cut rescales it.

    Args:
        coupling: what the runs recorded.
        sites: of the model.
        norms: its RMSNorm layers.
        labels: of the parameters, as these operators were given them.
        ran: all operators of these runs.
    """
    mine = {sites.aliases.get(name, name) for name in (norms[path].weight for _, path in coupling.normalised)}
    names = {id(labels[name]): name for name in mine}
    for entry in ran if names else ():
        if entry.operator != _OPERATOR:
            for name in {names[id(label)] for label in entry.inputs if id(label) in names}:
                freeze = Freeze(_READ_TOO, entry.operator, entry.module)
                coupling.freeze_at(sites.ids(sites.tensors.index(name)), freeze)
