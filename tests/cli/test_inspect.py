"""``secateur inspect``: what it finds, what it shows, and how it refuses."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import _declare_torchvision_operators
from torch import nn
from typer.testing import CliRunner

import secateur as sc
from secateur.cli import app
from secateur.cli.configurations import example_of
from secateur.cli.targets import resolve
from secateur.errors import SecateurError

HERE = Path(__file__)

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 12,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 10}
VIT = {**SMALL, "model_type": "vit", "image_size": 8, "patch_size": 4}
HEARS = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
#: Configurations, and the shapes of the inputs that they imply.
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, list[int]]]] = {
    "words": ({**GPT2, "architectures": ["GPT2LMHeadModel"]}, {"input_ids": [2, 10]}),
    "no architecture": ({**SMALL, "model_type": "bert"}, {"input_ids": [2, 12]}),
    "unknown architecture": ({**SMALL, "model_type": "bert", "architectures": ["Mine"]}, {"input_ids": [2, 12]}),
    "pictures": (VIT, {"pixel_values": [2, 3, 8, 8]}),
    "sounds and words": (
        {**HEARS, "model_type": "whisper", "vocab_size": 40, "num_mel_bins": 8, "max_source_positions": 10,
         "encoder_ffn_dim": 20, "decoder_ffn_dim": 24, "max_target_positions": 9, "pad_token_id": 0,
         "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2},
        {"input_features": [2, 8, 20], "decoder_input_ids": [2, 8]},
    ),
    "pictures and words": (
        {"model_type": "clip", "projection_dim": 8, "vision_config": {**VIT, "model_type": "clip_vision_model"},
         "text_config": {**SMALL, "model_type": "clip_text_model"}},
        {"input_ids": [2, 12], "pixel_values": [2, 3, 8, 8]},
    ),
}  # fmt: skip


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["inspect", *words], env={"COLUMNS": "300"})


def refused(*words: str) -> str:
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def net() -> nn.Module:
    """A factory that gives no examples."""
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def pair() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return net(), (torch.zeros(3, 4),)


def fails() -> nn.Module:
    raise ZeroDivisionError("no model today")


def nothing() -> str:
    return "no model"


NET = net()


class TestFactories:
    def test_a_file_with_a_factory_that_gives_examples(self) -> None:
        content = json.loads(run(f"{HERE}:pair", "--json").stdout)
        assert content["inputs"] == [{"0": [3, 4]}]
        assert [(group["name"], group["size"]) for group in content["groups"]] == [("0", 8)]

    def test_a_module_on_the_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a_model_of_mine.py").write_text(
            "import torch\nclass Built:\n    @staticmethod\n    def small():\n"
            "        return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))\n"
        )
        monkeypatch.chdir(tmp_path)
        result = run("a_model_of_mine:Built.small", "--shape", "5,4")
        assert result.exit_code == 0, result.output
        assert "a_model_of_mine:Built.small: Sequential, called with 0 (5, 4)" in result.stdout
        assert "1 groups, 6 units" in result.stdout

    @pytest.mark.parametrize("name", ["net", "NET"])
    def test_one_input_by_its_shape(self, name: str) -> None:
        target = resolve(f"{HERE}:{name}", (7, 4))
        assert target.examples[0].args[0].shape == (7, 4)
        assert sc.trace(target.model, list(target.examples)).groups

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([f"{HERE}:net"], "gives a model without example inputs. Let it return (model, examples)"),
            ([f"{HERE}:fails"], "raised ZeroDivisionError: no model today"),
            ([f"{HERE}:nothing"], "returned str, expected a torch.nn.Module or a pair"),
            ([f"{HERE}:GPT2"], "is a dict, expected a callable"),
            ([f"{HERE}:absent"], "has no 'absent'; it has "),
            (["no_such_module:build"], "no_such_module: cannot be imported: ModuleNotFoundError"),
            (["no_such_file.py:build"], "no_such_file.py: cannot be imported: FileNotFoundError"),
            ([f"{HERE}:net", "--shape", "3,x"], "--shape '3,x': expected whole numbers"),
            ([f"{HERE}:net", "--shape", "3,0"], "--shape '3,0': expected sizes of at least 1"),
            ([f"{HERE}:net", "--shape", "3,5"], "does not run through the model in evaluation mode: in 0"),
        ],
    )
    def test_refusals(self, words: list[str], message: str) -> None:
        assert message in refused(*words)


class TestConfigurations:
    @pytest.fixture(autouse=True)
    def _transformers(self) -> None:
        pytest.importorskip("transformers")
        _declare_torchvision_operators()

    @pytest.mark.parametrize("case", CONFIGS)
    def test_models_and_inputs_come_from_a_configuration(self, case: str, tmp_path: Path) -> None:
        config, inputs = CONFIGS[case]
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        content = json.loads(run(str(path), "--json").stdout)
        assert content["inputs"] == [inputs]
        assert content["groups"]
        assert content["least"]["params"] < content["cost"]["params"]
        if case == "words":
            assert content["model"] == "GPT2LMHeadModel"
        if "architecture" in case:
            assert content["model"] == "BertModel"

    def test_meta_and_cpu_find_the_same(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS["words"][0]))
        on_meta, on_cpu = (run(str(tmp_path), "--device", device, "--json").stdout for device in ("meta", "cpu"))
        assert on_meta == on_cpu
        assert resolve(str(tmp_path)).model.transformer.wte.weight.is_meta
        assert not resolve(str(tmp_path), device="cpu").model.transformer.wte.weight.is_meta

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is no JSON"),
            ("[1]", "is no configuration of transformers"),
            ("{}", 'expected an object with a "model_type"'),
            ('{"model_type": "abacus"}', "model_type 'abacus' is unknown to transformers"),
            (json.dumps({**GPT2, "n_head": 3}), "transformers cannot build this gpt2 model: "),
        ],
    )
    def test_files_that_are_no_configuration(self, content: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(content)
        assert message in refused(str(tmp_path / "config.json"))

    def test_a_missing_file_device_or_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "cannot be read: No such file" in refused(str(tmp_path / "config.json"))
        assert "cannot be read: No such file" in refused(str(tmp_path))
        (tmp_path / "config.json").write_text(json.dumps(GPT2))
        assert "device 'abacus'" in refused(str(tmp_path), "--device", "abacus")

        def absent(name: str) -> Any:
            raise ImportError(name)

        monkeypatch.setattr(importlib, "import_module", absent)
        assert "needs the package transformers" in refused(str(tmp_path))

    def test_an_input_that_no_configuration_implies(self) -> None:
        from transformers import BertConfig, BertModel

        model = BertModel(BertConfig(**SMALL))
        model.main_input_name = "smells"
        with pytest.raises(SecateurError, match="no example of its input 'smells'"):
            example_of(model, torch.device("cpu"))


class TestOutput:
    def test_why_says_only_the_reasons(self) -> None:
        result = run("lenet-5", "--why", "fc2", "--why", "conv1")
        assert result.exit_code == 0
        lines = result.stdout.splitlines()
        assert any(line.startswith("fc2.weight, dimension 0: 10 positions: each is a model output") for line in lines)
        assert all(line.startswith(("fc2", "conv1")) for line in lines)
        assert "is not a parameter, a buffer or a module" in refused("lenet-5", "--why", "fc9")

    def test_json_holds_what_its_page_says(self) -> None:
        content = json.loads(run("lenet-5", "--json", "--why", "fc2").stdout)
        page = (HERE.parents[2] / "docs" / "inspect.md").read_text()
        assert content.keys() == {
            "format", "target", "model", "inputs", "cost", "least", "groups", "frozen", "notes", "why"
        }  # fmt: skip
        group, frozen = content["groups"][0], content["frozen"][0]
        for key in [*content, *group, *group["members"][0], *frozen, *content["cost"]]:
            assert f"`{key}`" in page, key
        assert content["format"] == 1
        assert content["least"]["params"] == sum((26, 26, 17, 20))
        assert (group["name"], group["params_per_unit"]) == ("conv1", 26 + 50 * 25)
        gated = {(member["tensor"], member["dim"]) for member in group["members"] if member["gated"]}
        assert gated == {("conv2.weight", 1)}

    def test_without_a_target_it_shows_the_first_recipe(self) -> None:
        assert run().stdout.startswith("resnet-7: ResNet7, called with 0 (1, 1, 8, 8)")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["lenet-6"], "'lenet-6' is no network of the recipes (lenet-300-100, lenet-5, "),
            (["--net", "lenet-6"], "unknown network 'lenet-6'"),
            (["lenet-5", "--net", "lenet-5"], "name one of them"),
        ],
    )
    def test_unknown_targets(self, words: list[str], message: str) -> None:
        assert message in refused(*words)
