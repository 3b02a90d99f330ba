"""Models of transformers from their configuration alone, with example inputs that it implies. Nothing is downloaded."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.structure.example import Example

__all__ = ["example_of", "from_configuration"]

#: Sizes of example inputs where the configuration says none: sequences are short, for units do not depend on them.
BATCH, WORDS, ANSWER, SAMPLES, FRAMES, PIXELS = 2, 16, 8, 16_000, 16, 224


def from_configuration(path: Path, device: str) -> tuple[nn.Module, Example]:
    """The model that a ``config.json`` describes, with fresh weights, and inputs for it.

    The class is the first of ``architectures`` where transformers has it, else what ``AutoModel`` chooses.

    Args:
        path: the file.
        device: where the model is built; on ``"meta"`` it takes no memory.

    Raises:
        SecateurError: the file is none, transformers is not installed or does not know the model, or it fails.
    """
    content = _read(path)
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise SecateurError(
            f"{path}: needs the package transformers ({error}); python -m pip install transformers"
        ) from error
    kind = content.pop("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise SecateurError(
            f"{path}: model_type {kind!r} is unknown to transformers {transformers.__version__}; for a model with "
            "code of its own, write a factory that builds it: module:factory."
        )
    try:
        config = transformers.CONFIG_MAPPING[kind].from_dict(content)
        if hasattr(config, "use_cache"):
            config.use_cache = False
        named = [getattr(transformers, name, None) for name in config.architectures or ()]
        with torch.device(_device(device)):
            model = named[0](config) if named and named[0] is not None else transformers.AutoModel.from_config(config)
    except SecateurError:
        raise
    except Exception as error:
        raise SecateurError(
            f"{path}: transformers cannot build this {kind} model: {type(error).__name__}: {error}."
        ) from error
    model.to(device)  # some models make a tensor or two elsewhere
    return model, example_of(model, torch.device(device))


def example_of(model: Any, device: torch.device) -> Example:
    """Inputs for a model of transformers: its main input, a decoder's words, and both of what sees and reads.

    Raises:
        SecateurError: the main input is none that is known here.
    """
    config, takes = model.config, inspect.signature(model.forward).parameters
    names = [model.main_input_name]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        names.append("decoder_input_ids")
    # Models that read words between which pictures stand (image_token_id) run on words alone.
    pair = hasattr(config, "text_config") and hasattr(config, "vision_config")
    if pair and not any(hasattr(config, name) for name in ("image_token_id", "image_token_index")):
        names += [name for name in ("input_ids", "pixel_values") if name in takes]
    if unknown := [name for name in names if name not in _INPUTS]:
        raise SecateurError(
            f"{type(model).__name__}: no example of its input {unknown[0]!r} can be made from its configuration; write "
            "a factory that returns (model, examples): module:factory."
        )
    return Example(kwargs={name: _INPUTS[name](config, device) for name in dict.fromkeys(names)})


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SecateurError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise SecateurError(f"{path}: is no JSON: {error}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise SecateurError(f'{path}: is no configuration of transformers; expected an object with a "model_type".')
    return content


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise SecateurError(f"device {name!r}: {str(error).splitlines()[0]}") from error


def _words(config: Any, device: torch.device, length: int = WORDS) -> Tensor:
    text = config.get_text_config()
    length = min(length, getattr(text, "max_position_embeddings", None) or length)
    low = min(3, text.vocab_size - 1)
    return torch.randint(low, text.vocab_size, (BATCH, length), device=device)


def _answer(config: Any, device: torch.device) -> Tensor:
    return _words(config, device, ANSWER)


def _pictures(config: Any, device: torch.device) -> Tensor:
    vision = getattr(config, "vision_config", None) or getattr(config, "backbone_config", None) or config
    size = getattr(config, "image_size", None) or getattr(vision, "image_size", None) or PIXELS
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", None) or getattr(vision, "num_channels", None) or 3
    frames = [config.num_frames] if getattr(config, "num_frames", None) else []
    return torch.randn(BATCH, *frames, channels, height, width, device=device)


def _sound(config: Any, device: torch.device) -> Tensor:
    if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
        return torch.randn(BATCH, config.max_length, config.num_mel_bins, device=device)
    return torch.randn(BATCH, SAMPLES, device=device)


def _features(config: Any, device: torch.device) -> Tensor:
    if hasattr(config, "input_feat_per_channel"):
        return torch.randn(BATCH, 4 * FRAMES, config.input_feat_per_channel, device=device)
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_projection_input_dim", None) or 80
    if hasattr(config, "max_source_positions"):
        return torch.randn(BATCH, bins, 2 * config.max_source_positions, device=device)
    return torch.randn(BATCH, 4 * FRAMES, bins, device=device)


#: How each input is made.
_INPUTS: dict[str, Callable[[Any, torch.device], Tensor]] = {
    "input_ids": _words,
    "decoder_input_ids": _answer,
    "pixel_values": _pictures,
    "pixel_values_videos": _pictures,
    "input_values": _sound,
    "input_features": _features,
}
