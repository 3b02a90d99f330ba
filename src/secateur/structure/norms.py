"""RMSNorm layers, recognised by what they compute, so that their width can be cut exactly.

``y = x rsqrt(mean(x^2) + eps) (w + offset)`` over the last dimension, ``offset`` 0 or 1 (Gemma). When ``d - d'``
of the ``d`` inputs are zero, the same outputs come from ``d'`` inputs with ``w' = (w + offset) sqrt(d / d') - offset``
and ``eps' = eps d / d'``: the sum of squares is the same, and only its divisor changes. (Algebra; no paper.)

Any module without children, with a single one-dimensional parameter and an eps that can be found, is
tried on numbers; names do not matter.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.structure.eps import default_eps, eps_of

__all__ = ["Kind", "RmsNorm", "Same", "find_rms_norms", "formula"]

#: Agreement asked for; such layers often compute in float32 whatever their input.
_TOLERANCE = 1e-4
#: The same for a layer that is tried in float16 and bfloat16, where it rounds to 8 bits several times.
_TOLERANCE_LOW = 0.05
_LARGEST_EPS = 0.01
#: An eps that no layer has, to see that it is this attribute that is added.
_OTHER_EPS = 0.37
#: Leading sizes of the inputs that are tried: few numbers, and of other sizes than the width, or a size in its place.
_LEADING, _OTHER_SIZE = (2, 3, 1, 1), 5
_RANKS = range(1, 6)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: What every module has: none of it says how it computes.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.Size)


@dataclass(frozen=True, eq=False)
class Kind:
    """How a recognised RMSNorm may be called for the formula to hold.

    Args:
        offset: what it adds to its weight, 0 or 1.
        ranks: numbers of dimensions of inputs that it normalises over their last one.
        results: by the type of its input, with the weight in the type that it has, the type of its output.
    """

    offset: float
    ranks: frozenset[int]
    results: Mapping[torch.dtype, torch.dtype]


@dataclass(frozen=True, eq=False)
class RmsNorm:
    """An RMSNorm layer of a model.

    Args:
        weight: qualified name of its weight.
        eps: qualified name of the attribute that holds its eps.
        eps_value: that eps; where the attribute is None, the one that torch takes then.
        kind: how it may be called.
    """

    weight: str
    eps: str
    eps_value: float
    kind: Kind


def find_rms_norms(
    model: nn.Module, trying: Callable[[], AbstractContextManager[None]] = nullcontext
) -> dict[str, RmsNorm]:
    """The RMSNorm layers of a model by their module path (the first one of a shared module).

    Args:
        model: any module; copies of its layers are run.
        trying: the context in which code that is not torch's is run.
    """
    found: dict[str, RmsNorm] = {}
    tried: dict[tuple[object, ...], Kind | None] = {}
    for path, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if len(parameters) != 1 or any(True for _ in module.children()) or any(True for _ in module.buffers()):
            continue
        ((key, weight),) = parameters.items()
        if weight.ndim != 1 or weight.dtype not in _FLOATS:
            continue
        for name in _candidates(module):
            kind = (type(module), name, key, weight.dtype, _settings(module))
            if kind not in tried:
                with nullcontext() if type(module) is nn.RMSNorm else trying():
                    tried[kind] = _recognise(module, key, name)
            if (known := tried[kind]) is not None:
                dot = f"{path}." if path else ""
                found[path] = RmsNorm(f"{dot}{key}", f"{dot}{name}", eps_of(module, name, weight.dtype), known)
                break
    return found


def _candidates(module: nn.Module) -> list[str]:
    """Attributes that may be the eps: small numbers first, then those that are None."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    small = [name for name, value in own.items() if type(value) is float and 0 < value <= _LARGEST_EPS]
    return small + [name for name, value in own.items() if value is None]


def _settings(module: nn.Module) -> tuple[object, ...]:
    """All else that a module keeps, for a class may compute otherwise with other settings."""

    def plain(value: object) -> object:
        if type(value) in _PLAIN:
            return value
        return tuple(map(plain, value)) if isinstance(value, (tuple, list)) else id(value)

    own = ((name, value) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE)
    return tuple((name, type(value), plain(value)) for name, value in own)


def _recognise(module: nn.Module, key: str, eps: str) -> Kind | None:
    """How a copy of a module computes an RMSNorm whose eps is that attribute; None where it does not."""
    try:
        with _undisturbed(), torch.no_grad():
            twin = _Tried(module, key, eps, torch.float64)
            ranks: list[int] = []
            offsets: tuple[float, ...] = (0.0, 1.0)
            for rank in _RANKS:
                agreed = [offset for offset in offsets if twin.computes(rank, offset)]
                if agreed:
                    offsets = (agreed[0],)
                    ranks.append(rank)
            if not ranks or not twin.untouched():
                return None
            kind = Kind(offsets[0], frozenset(ranks), _results(module, key, eps, max(ranks), offsets[0]))
    except Exception:  # noqa: BLE001 - a module that cannot be copied or called like this is no RMSNorm
        return None
    return kind if kind.results else None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave the caller's random numbers as they are, and warn of nothing: no user called these modules."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _results(module: nn.Module, key: str, eps: str, rank: int, offset: float) -> dict[torch.dtype, torch.dtype]:
    """By the type of the input, that of the output.

    Where the eps is torch's own, it must be that for every type for which it is the same number: a cut fixes it, and
    a model may run in any of these types (`torch.autocast`).
    """
    own = getattr(module, key).dtype
    by_default = getattr(module, eps) is None
    twin = _Tried(module, key, eps, own)
    found: dict[torch.dtype, torch.dtype] = {}
    for dtype in _FLOATS:
        if by_default and default_eps(dtype) != default_eps(own):
            continue
        try:
            if by_default and not twin.has_default_eps(rank, offset, dtype):
                return {}
            found[dtype] = twin.called(twin.input(rank, 1.0, dtype)).dtype
        except Exception:  # noqa: BLE001 - a type that it does not take
            if by_default:
                return {}
    return found


class _Tried:
    """A copy of a module that is called with numbers.

    Args:
        module: any.
        key: name of its parameter.
        eps: name of the attribute that may be its eps.
        dtype: of the copy's parameter.
    """

    def __init__(self, module: nn.Module, key: str, eps: str, dtype: torch.dtype) -> None:
        self.twin = copy.deepcopy(module).to_empty(device="cpu").to(dtype)
        self.eps, self.own = eps, getattr(module, eps)
        self.weight: Tensor = getattr(self.twin, key)
        self._generator = torch.Generator().manual_seed(0)
        self.weight.copy_(torch.randn(self.weight.shape, generator=self._generator))
        self._numbers = self.weight.clone()
        self._before = self._state()

    def input(self, rank: int, scale: float, dtype: torch.dtype) -> Tensor:
        """Normal numbers of some size."""
        width = self.weight.shape[0]
        shape = (*[_OTHER_SIZE if size == width else size for size in _LEADING[: rank - 1]], width)
        return (torch.randn(shape, generator=self._generator, dtype=torch.float64) * scale).to(dtype)

    def called(self, x: Tensor) -> Tensor:
        """What the forward returns, without hooks: these run around the operator too."""
        given = x.clone()
        out = self.twin.forward(given)
        if type(out) is not Tensor or out.shape != x.shape or not torch.equal(given, x):
            raise TypeError
        return out

    def computes(self, rank: int, offset: float) -> bool:
        """Whether it is the RMSNorm over the last dimension, in both modes and with any eps in the attribute."""
        mine = default_eps(torch.float64) if self.own is None else self.own
        try:
            # With numbers that an eps of its size matters beside, and with another eps, which matters anywhere.
            return all(
                self._agrees(self.input(rank, scale, torch.float64), offset, value, added, _TOLERANCE)
                for training in (False, True)
                for value, added, scale in ((self.own, mine, math.sqrt(mine)), (_OTHER_EPS, _OTHER_EPS, 1.0))
                if self.twin.train(training) is self.twin
            )
        except Exception:  # noqa: BLE001 - a rank that it does not take
            return False

    def has_default_eps(self, rank: int, offset: float, dtype: torch.dtype) -> bool:
        """Whether it takes torch's eps for inputs of this type."""
        added = default_eps(dtype)
        tolerance = _TOLERANCE_LOW if dtype in (torch.float16, torch.bfloat16) else _TOLERANCE
        return self._agrees(self.input(rank, math.sqrt(added), dtype), offset, None, added, tolerance)

    def untouched(self) -> bool:
        """Whether all these calls left the module as it was: what a forward writes down may be read elsewhere."""
        return self._state() == self._before and torch.equal(self._numbers, self.weight)

    def _agrees(self, x: Tensor, offset: float, value: float | None, added: float, tolerance: float) -> bool:
        setattr(self.twin, self.eps, value)
        try:
            out = self.called(x).double()
            kept = getattr(self.twin, self.eps) == value
        finally:
            setattr(self.twin, self.eps, self.own)
        expected = formula(x.double(), self.weight.double(), added, offset)
        return kept and torch.allclose(out, expected, rtol=tolerance, atol=tolerance)

    def _state(self) -> dict[str, object]:
        """What the module keeps, and what lies in containers and objects that it keeps."""

        def within(value: object) -> object:
            if isinstance(value, Mapping):
                return [(key, Same(item)) for key, item in value.items()]
            if isinstance(value, (list, tuple, set, frozenset)):
                return [Same(item) for item in value]
            if isinstance(value, Tensor):
                return value._version
            if isinstance(value, (nn.Module, type)) or not hasattr(value, "__dict__"):
                return None
            return [(key, Same(item)) for key, item in vars(value).items()]

        own = {name: value for name, value in vars(self.twin).items() if name != "training"}
        return {name: (Same(value), within(value)) for name, value in own.items()}


class Same:
    """Equal to itself: the same object, or a plain value that is equal."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        theirs = other.value if isinstance(other, Same) else other
        plain = type(self.value) in _PLAIN and type(theirs) is type(self.value)
        return self.value is theirs or (plain and self.value == theirs)

    __hash__ = None  # type: ignore[assignment]


def formula(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """The RMSNorm of x over its last dimension."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)
