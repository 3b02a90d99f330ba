"""Language models that generate token by token: masked and compact agree in every token and with a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.conftest import _declare_torchvision_operators
from torch import Tensor, nn

import secateur as sc
from secateur.compaction.exact import Exact
from secateur.compaction.proof import _PRECISIONS

transformers = pytest.importorskip("transformers")

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
#: Model and configuration by name, and the number of heads in it that can go.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, **SPECIAL},
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "vocab_size": 61,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 44,
            "max_position_embeddings": 64,
            **SPECIAL,
        },
    ),
}


def built(name: str) -> nn.Module:
    _declare_torchvision_operators()
    model, config, options = MODELS[name]
    torch.manual_seed(0)
    net = getattr(transformers, model)(getattr(transformers, config)(**options)).double().eval()
    with torch.no_grad():  # fresh models are nearly uniform over words: larger weights make generation depend on them
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter == 1))
    return net


def words(n: int, batch: int = 2) -> Tensor:
    return torch.randint(3, 61, (batch, n), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Dense, masked and compact."""
    dense = built(request.param)
    example = sc.Example(kwargs={"input_ids": words(7), "use_cache": False})
    structure = sc.trace(dense, example)
    kinds = {group.size for group in structure.groups}
    assert len(kinds) > 1, "heads and features are units"
    generator = torch.Generator().manual_seed(2)
    keep = {
        group.name: torch.randperm(group.size, generator=generator)[: max(1, group.size // 2)]
        for group in structure.groups
    }
    return dense, sc.mask(dense, structure, keep), sc.compact(dense, structure, keep, examples=example)


def test_heads_are_gone(pair: tuple[nn.Module, ...]) -> None:
    _, masked, small = pair
    attention = [module for path, module in small.named_modules() if path.endswith(("attn", "self_attn"))]
    assert attention
    dense = [module for path, module in masked.named_modules() if path.endswith(("attn", "self_attn"))]
    for before, after in zip(dense, attention, strict=True):
        sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (before, after)]
        assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.9}], ids=str)
def test_the_same_tokens_are_generated(pair: tuple[nn.Module, ...], options: dict[str, Any]) -> None:
    dense, masked, small = pair
    asked = {"max_new_tokens": 12, "min_new_tokens": 12, **options}
    found = []
    for model in (masked, small, dense):
        torch.manual_seed(5)
        found.append(model.generate(words(5), attention_mask=torch.ones(2, 5, dtype=torch.int64), **asked))
    assert found[0].shape == (2, 17)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])  # what was closed mattered


def test_logits_with_a_cache_are_those_without(pair: tuple[nn.Module, ...]) -> None:
    _, masked, small = pair
    tokens = words(9)
    # Llama casts to float32 inside of its RMSNorm; what a proof does to such casts is done here too.
    with torch.no_grad(), Exact(_PRECISIONS[0].raised):
        whole = small(input_ids=tokens, use_cache=False).logits
        steps = []
        for model in (masked, small):
            cache, parts = None, []
            for part in tokens.split([4, 1, 3, 1], dim=1):
                out = model(input_ids=part, past_key_values=cache, use_cache=True)
                cache, parts = out.past_key_values, [*parts, out.logits]
            steps.append(torch.cat(parts, 1))
    torch.testing.assert_close(steps[1], steps[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(steps[1], whole, rtol=0, atol=1e-10)


def test_the_cache_of_the_small_model_is_smaller(pair: tuple[nn.Module, ...]) -> None:
    _, masked, small = pair
    sizes = []
    for model in (masked, small):
        cache = model(input_ids=words(6), use_cache=True).past_key_values
        sizes.append(sum(layer.keys.numel() for layer in cache.layers))
    assert sizes[1] <= 0.5 * sizes[0]


def test_a_copy_generates_too(pair: tuple[nn.Module, ...]) -> None:
    small = pair[2]
    asked = {"max_new_tokens": 6, "do_sample": False}
    twin = copy.deepcopy(small)
    assert torch.equal(twin.generate(words(4), **asked), small.generate(words(4), **asked))
