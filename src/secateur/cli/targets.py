"""What ``secateur inspect`` can look at: a recipe's network, a transformers configuration, or a Python factory."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.cli.configurations import example_of, from_configuration
from secateur.errors import SecateurError, TraceError
from secateur.recipes.networks import NETWORKS
from secateur.recipes.task import fresh
from secateur.structure.example import Example, as_examples

__all__ = ["Target", "resolve"]


@dataclass(frozen=True)
class Target:
    """A model and how it is called.

    Args:
        name: as it was asked for.
        model: the model.
        examples: its inputs.
    """

    name: str
    model: nn.Module
    examples: tuple[Example, ...]


def resolve(name: str, shape: tuple[int, ...] | None = None, device: str | None = None) -> Target:
    """The model that a name stands for.

    Args:
        name: a network of the recipes, a ``config.json`` or the folder that holds one, or ``module:factory`` with a
            module on the path or a file.
        shape: of one float input, with its batch, where a factory gives no examples.
        device: where a configuration's model is built, ``"meta"`` by default: shapes without memory.

    Raises:
        SecateurError: there is no such thing, or it does not give a model; the message says what there is.
    """
    path = Path(name)
    if name in NETWORKS:
        inputs = torch.zeros(1, *NETWORKS[name].shape)
        return Target(name, fresh(name, seed=0), as_examples((inputs,)))
    if path.suffix == ".json" or path.is_dir():
        model, example = from_configuration(path / "config.json" if path.is_dir() else path, device or "meta")
        return Target(name, model, (example,))
    if ":" in name:
        return Target(name, *_made(name, shape))
    raise SecateurError(
        f"{name!r} is no network of the recipes ({', '.join(sorted(NETWORKS))}), no .json file of a transformers "
        "configuration, and no module:factory such as my_package.models:build or models.py:build."
    )


def _made(name: str, shape: tuple[int, ...] | None) -> tuple[nn.Module, tuple[Example, ...]]:
    """What a factory returns: a model, or a model and its example inputs."""
    place, _, attribute = name.rpartition(":")
    factory: Any = _module(place)
    try:
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except AttributeError:
        public = [key for key, value in vars(_module(place)).items() if callable(value) and not key.startswith("_")]
        raise SecateurError(
            f"{name}: {place} has no {attribute!r}; it has {', '.join(public) or 'nothing to call'}."
        ) from None
    if not isinstance(factory, nn.Module):
        if not callable(factory):
            raise SecateurError(f"{name}: is a {type(factory).__name__}, expected a callable that returns a model.")
        try:
            factory = factory()
        except Exception as error:
            raise SecateurError(
                f"{name}: calling it without arguments raised {type(error).__name__}: {error}. It must return a model, "
                "or (model, examples), by itself."
            ) from error
    model, examples = factory if isinstance(factory, tuple) and len(factory) == 2 else (factory, None)
    if not isinstance(model, nn.Module):
        raise SecateurError(
            f"{name}: returned {type(factory).__name__}, expected a torch.nn.Module or a pair (model, examples)."
        )
    if examples is not None:
        return model, as_examples(examples)
    if shape is not None:
        return model, as_examples((torch.zeros(shape),))
    if hasattr(model, "main_input_name"):
        return model, (example_of(model, next(model.parameters()).device),)
    raise SecateurError(
        f"{name}: gives a model without example inputs. Let it return (model, examples), such as (model, (x,)), or say "
        "the shape of its one input: --shape 1,3,224,224."
    )


def _module(place: str) -> Any:
    """A module by its dotted name, or from a file."""
    path = Path(place)
    try:
        if path.suffix == ".py":
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(place)
    except (SecateurError, TraceError):
        raise
    except Exception as error:
        raise SecateurError(f"{place}: cannot be imported: {type(error).__name__}: {error}.") from error
