"""Keeping a compact model: one safetensors file that says what was cut from what. Nothing is pickled.

The file holds the parameters and persistent buffers, tied ones once, and under the metadata key ``"secateur"`` a JSON
object:

=============  ====================================================================================
key            value
=============  ====================================================================================
``format``     version of this description; a reader refuses a newer one
``secateur``   version of the package that wrote it
``model``      class of the dense model
``plan``       the `CutPlan`, with the dense shapes
``aliases``    other names of tied tensors, with the name under which the file holds them
``order``      dimensions from slowest to fastest in memory, of tensors where these are not in order
``sparse``     shapes of tensors that are stored as a bitmask and values, ``name..mask`` and ``name..values``, since
               that is smaller (`secateur.compaction.packing`); absent where there are none
``training``   whether the model was in training mode
``other_mode`` paths of modules that were not in the model's mode; absent where there are none
``crc32``      checksum of the other keys and of all tensors in order of their names
=============  ====================================================================================
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import tempfile
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.nn.utils.parametrize import is_parametrized

from secateur.compaction.compact import PLAN, cut_of
from secateur.compaction.packing import packed, unpacked
from secateur.errors import CompactionError, SecateurError
from secateur.structure.cut import CutPlan, cut_
from secateur.structure.select import plain_class
from secateur.structure.tensors import (
    dimension_order,
    first_names,
    in_order,
    in_place_of,
    listed,
    misfits,
    named_tensors,
    shapes_of,
    slots_of,
)

__all__ = ["FORMAT", "check_writable", "load", "save", "whole_or_not_at_all"]

#: Version of the description. It grows when an older reader would misread a file.
FORMAT = 3
#: The version of files without outputs that are multiplied, which older readers can read.
FORMAT_WITHOUT_SCALES = 2
#: The version of files without bitmasks and branches that became zeros either.
FORMAT_BEFORE = 1
KEY = "secateur"

M = TypeVar("M", bound=nn.Module)


def save(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a compact model to one ``.safetensors`` file, whole or not at all.

    Args:
        module: what `secateur.compact` or ``finalize`` returned; a model that was not cut is saved alike.
        path: the file; one that exists is replaced.

    Raises:
        SecateurError: the path cannot be written, or the module holds what the file cannot.

    Example:
        >>> import tempfile, pathlib, secateur as sc
        >>> dense = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = dense()
        >>> structure = sc.trace(net, examples=(torch.zeros(2, 4),))
        >>> small = sc.compact(net, structure, {"0": torch.tensor([1, 5])})
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "small.safetensors"
        >>> sc.save(small, file)
        >>> again = sc.load(file, dense())
        >>> x = torch.randn(3, 4)
        >>> torch.equal(again(x), small(x))
        True
    """
    target = check_writable(path)
    _check_savable(module)
    tensors, aliases, order = _contents(module)
    plan = cut_of(module)
    tensors, sparse = packed(tensors)
    description = {
        "format": _format(plan, bool(sparse)),
        "secateur": _version(),
        "model": plain_class(module).__name__,
        "plan": (plan or CutPlan(dense=shapes_of(module))).to_json(),
        "aliases": aliases,
        "order": order,
        "training": module.training,
    }
    if sparse:
        description["sparse"] = sparse
    if other_mode := [path for path, part in module.named_modules() if part.training != module.training]:
        description["other_mode"] = other_mode
    description["crc32"] = _checksum(description, tensors)
    with whole_or_not_at_all(target) as temporary:
        save_file(tensors, temporary, metadata={KEY: json.dumps(description)})


def load(path: str | os.PathLike[str], model: M) -> M:
    """Cut a freshly built full-size model to what a file describes, and fill it with the numbers of the file.

    The model is changed in place and returned: with the parameters' dtypes and the modes (training or evaluation) of
    the model that was saved and its modules, on the devices where the fresh one was (on the CPU for ``meta`` tensors).

    Args:
        path: a file that `save` wrote.
        model: the full-size model, built as it was before the cut; its numbers do not matter.

    Raises:
        SecateurError: there is no such file; it is corrupt, of another kind, or of a newer version; or the model is not
            the one that was cut: then all differences are listed. The model was not changed.
    """
    stored = _read(Path(path))
    _check_fit(stored, model)
    cut_(model, stored.plan)
    _fill(stored, model)
    setattr(model, PLAN, stored.plan)
    model.train(stored.training)
    for part in stored.other_mode:
        model.get_submodule(part).training = not stored.training
    return model


def check_writable(path: str | os.PathLike[str]) -> Path:
    """The file's real path, after trying whether a file can be written there; nothing is left behind.

    Raises:
        SecateurError: the folder does not exist or cannot be written to, or the path is a folder.
    """
    target = Path(os.path.realpath(path))
    folder = target.parent
    if target.is_dir():
        raise SecateurError(f"cannot write {path}: it is a folder; name a file, such as {target / 'small.safetensors'}")
    if not folder.is_dir():
        raise SecateurError(f"cannot write {path}: there is no folder {folder}; make it first")
    try:
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(13, "the file is there and write-protected")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SecateurError(f"cannot write {path}: {error.strerror or error}; choose another path") from error
    return target


class _Stored(NamedTuple):
    """A file's contents."""

    path: Path
    model: str
    plan: CutPlan
    aliases: Mapping[str, str]
    order: Mapping[str, list[int]]
    training: bool
    other_mode: Sequence[str]
    tensors: dict[str, Tensor]


def _check_savable(module: nn.Module) -> None:
    persistent = set(_persistent(module))
    problems = [
        f"{path or type(module).__name__}: has parametrizations; finalize the pruner or remove_parametrizations first"
        for path, part in module.named_modules()
        if is_parametrized(part)
    ]
    problems += [
        f"{path or type(module).__name__}: keeps extra state (get_extra_state), for which the file has no place"
        for path, part in module.named_modules()
        if type(part).get_extra_state is not nn.Module.get_extra_state
    ]
    problems += [
        f"{name}: has no numbers ({'meta' if tensor.is_meta else 'fake'} tensor)"
        for name, tensor in named_tensors(module).items()
        if tensor.is_meta or isinstance(tensor, FakeTensor)
    ]
    problems += [
        f"{name}: is a tensor of {tensor.dtype} and {tensor.layout}, which a safetensors file cannot hold; convert it, "
        f"as by tensor{'.to(torch.complex64)' if tensor.is_complex() else '.float() or .to_dense()'}"
        for name, tensor in named_tensors(module).items()
        if name in persistent and not (tensor.layout is torch.strided and _can_hold(tensor.dtype))
    ]
    if problems:
        raise SecateurError(f"{type(module).__name__} cannot be saved; nothing was written: {listed(problems)}")


@functools.cache
def _can_hold(dtype: torch.dtype) -> bool:
    """Whether the format has a place for such numbers, which depends on its release: by trying."""
    try:
        return load_tensors(save_tensors({"x": torch.empty(0, dtype=dtype)}))["x"].dtype is dtype
    except (KeyError, ValueError, RuntimeError, SafetensorError):
        return False


def _persistent(module: nn.Module) -> list[str]:
    """Names of all parameters and persistent buffers."""
    return [
        name
        for name, slot in slots_of(module).items()
        if slot.key in slot.owner._parameters or slot.key not in slot.owner._non_persistent_buffers_set
    ]


def _contents(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], dict[str, list[int]]]:
    """What the file holds: each tensor once, other names of tied ones, and memory orders that are not the usual one."""
    named, aliases = named_tensors(module), _aliases(module)
    tensors: dict[str, Tensor] = {}
    order: dict[str, list[int]] = {}
    for name in _persistent(module):
        if name in aliases:
            continue
        tensor = named[name].detach()
        if (dimensions := list(dimension_order(tensor))) != sorted(dimensions):
            order[name] = dimensions
        # A clone, for two tensors that share memory without being the same are refused by the format.
        tensors[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    return tensors, aliases, order


def _read(path: Path) -> _Stored:
    if not path.is_file():
        raise SecateurError(f"{path}: {'is a folder' if path.is_dir() else 'there is no such file'}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            description = (file.metadata() or {}).get(KEY)
            if description is None:
                raise SecateurError(
                    f"{path}: a safetensors file, but not one that sc.save wrote: its metadata has no key {KEY!r}"
                )
            # Clones, for what the file lends is mapped from it: unaligned, and gone if the file is.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise SecateurError(f"{path}: not a whole safetensors file ({error}); save it again") from error
    try:
        data = json.loads(description)
        version = int(data["format"])
        if version < 1:
            raise ValueError(f"format {version}")  # noqa: TRY301 - told like any other damage
        if version > FORMAT:
            raise SecateurError(
                f"{path}: has format {version}, written by secateur {data.get('secateur', '?')}; this secateur "
                f"({_version()}) reads up to format {FORMAT}. Install a newer one."
            )
        stored = _Stored(
            path=path,
            model=str(data["model"]),
            plan=CutPlan.from_json(data["plan"]),
            aliases={str(name): str(holder) for name, holder in data["aliases"].items()},
            order={str(name): [int(dim) for dim in dims] for name, dims in data["order"].items()},
            training=bool(data["training"]),
            other_mode=[str(path) for path in data.get("other_mode", ())],
            tensors=tensors,
        )
        checksum = int(data.pop("crc32"))
        shapes = {str(name): [int(size) for size in shape] for name, shape in data.get("sparse", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, CompactionError) as error:
        if isinstance(error, SecateurError) and not isinstance(error, CompactionError):
            raise
        raise SecateurError(
            f"{path}: its description is damaged ({type(error).__name__}: {error}); save it again"
        ) from error
    if checksum != _checksum(data, tensors):
        raise SecateurError(f"{path}: is damaged: the checksum of its contents is not the one it names")
    try:
        return stored._replace(tensors=unpacked(tensors, shapes))
    except (KeyError, ValueError, RuntimeError) as error:
        raise SecateurError(f"{path}: its sparse tensors are damaged ({error}); save it again") from error


def _check_fit(stored: _Stored, model: nn.Module) -> None:
    """Compare the file with the fresh model, before anything is changed."""
    own = plain_class(model).__name__
    if own != stored.model:
        raise SecateurError(f"{stored.path}: was cut from a {stored.model}, and the model given is a {own}")
    if cut_of(model) is not None:
        raise SecateurError(f"{stored.path}: the model given is compact already; give a freshly built full-size one")
    if problems := misfits(model, stored.plan.dense):
        raise SecateurError(
            f"{stored.path}: the {own} given is not the one that was cut: {listed(problems)}. "
            "Build it with the settings that it had."
        )
    # A cut on fake tensors says what the file must hold, and touches nothing.
    with FakeCopyMode(FakeTensorMode(allow_non_fake_inputs=True)):
        small = copy.deepcopy(model)
    try:
        cut_(small, stored.plan)
    except CompactionError as error:
        raise SecateurError(f"{stored.path}: its description is damaged: {error}") from error
    parts = dict(small.named_modules())
    if problems := [path for path in stored.other_mode if path not in parts]:
        raise SecateurError(
            f"{stored.path}: the {own} given has no modules {listed(problems)}, whose mode the file names"
        )
    problems = _differences(_expected(small), {name: tuple(tensor.shape) for name, tensor in stored.tensors.items()})
    problems += _differences(_aliases(small), stored.aliases)
    if problems:
        raise SecateurError(f"{stored.path}: does not hold the tensors of the {own} given: {listed(problems)}")
    if problems := [n for n, tensor in model.named_buffers() if tensor.is_meta and n not in _persistent(model)]:
        raise SecateurError(
            f"{stored.path}: the {own} given is on the meta device, and the file does not hold its non-persistent "
            f"buffers ({listed(problems)}). Build it on a real device."
        )


def _expected(module: nn.Module) -> dict[str, tuple[int, ...]]:
    named, tied = named_tensors(module), _aliases(module)
    return {name: tuple(named[name].shape) for name in _persistent(module) if name not in tied}


def _aliases(module: nn.Module) -> dict[str, str]:
    """Other names of tied tensors, with the name under which the file holds them."""
    first = first_names(module)
    holders: dict[str, str] = {}
    named = {name: holders.setdefault(first[name], name) for name in _persistent(module)}
    return {name: holder for name, holder in named.items() if name != holder}


def _differences(expected: Mapping[str, object], found: Mapping[str, object]) -> list[str]:
    return [
        f"{name}: {found.get(name, 'missing')} in the file, expected {expected.get(name, 'nothing')}"
        for name in dict.fromkeys([*expected, *found])
        if expected.get(name) != found.get(name)
    ]


def _fill(stored: _Stored, model: nn.Module) -> None:
    """Give the cut model the file's tensors; names that share a tensor in the file share one afterwards."""
    slots = slots_of(model)
    made: dict[str, Tensor] = {}
    for name in _persistent(model):
        slot = slots[name]
        holder = stored.aliases.get(name, name)
        if holder not in made:
            device = torch.device("cpu") if slot.tensor.is_meta else slot.tensor.device
            tensor = stored.tensors[holder].to(device)
            tensor = in_order(tensor, stored.order.get(holder, range(tensor.dim())))
            made[holder] = in_place_of(slot.tensor, tensor)
        setattr(slot.owner, slot.key, made[holder])


def _format(plan: CutPlan | None, sparse: bool) -> int:
    """The oldest version that a file can have."""
    if plan is not None and plan.scales:
        return FORMAT
    return FORMAT_WITHOUT_SCALES if sparse or (plan is not None and plan.zeros) else FORMAT_BEFORE


def _checksum(description: Mapping[str, object], tensors: Mapping[str, Tensor]) -> int:
    value = zlib.crc32(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), value))
    return value


def _version() -> str:
    try:
        return metadata.version("secateur")
    except metadata.PackageNotFoundError:
        return "unknown"


@contextlib.contextmanager
def whole_or_not_at_all(target: Path) -> Iterator[Path]:
    """A path beside the target that becomes the target at the end, and is gone if anything interrupts."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask grants; the writer below grants less
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise SecateurError(f"cannot write {target}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
