"""Saving and loading: the same numbers in another process, tied and odd tensors, and every file that is not one."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

from secateur.compaction import artifact
from secateur.compaction.artifact import FORMAT, check_writable, load, save
from secateur.compaction.compact import cut_of
from secateur.errors import SecateurError
from secateur.structure.cut import CutPlan, cut_

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width * 36, 4)
        self.register_buffer("scale", torch.arange(1.0, width + 1), persistent=False)

    def forward(self, x):
        h = self.norm(self.conv(x)).relu() * self.scale[:, None, None]
        return self.fc(h.flatten(1))
"""
namespace: dict[str, type[nn.Module]] = {}
exec(SOURCE, namespace)  # the same text builds the net in the other process
Net = namespace["Net"]

KEEP = (0, 3, 4)
PIXELS = tuple(36 * channel + pixel for channel in KEEP for pixel in range(36))
PLAN = CutPlan(
    tensors={
        **{name: {0: KEEP} for name in ("conv.weight", "conv.bias", "norm.weight", "norm.bias", "scale")},
        "norm.running_mean": {0: KEEP},
        "norm.running_var": {0: KEEP},
        "fc.weight": {1: PIXELS},
    }
)


def compacted(net: nn.Module, plan: CutPlan) -> nn.Module:
    cut_(net, plan)
    net.cut_plan = CutPlan(plan.tensors, plan.attributes, plan.selects, {})
    return net


def small_net() -> nn.Module:
    net = Net()
    net(torch.randn(8, 1, 8, 8))
    from secateur.structure.tensors import shapes_of

    dense = shapes_of(net)
    cut_(net, PLAN)
    net.cut_plan = CutPlan(PLAN.tensors, dense=dense)
    return net.eval()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    save(small_net(), path)
    return path


def rewritten(path: Path, **changes: object) -> Path:
    """The file with a changed description."""
    with safe_open(path, framework="pt") as opened:
        description = json.loads(opened.metadata()["secateur"])
    description.update(changes)
    save_file(load_file(path), path, metadata={"secateur": json.dumps(description)})
    return path


def test_a_new_process_computes_the_same_bit_for_bit(tmp_path):
    net = small_net().to(memory_format=torch.channels_last)
    x = torch.randn(5, 1, 8, 8)
    save(net, tmp_path / "small.safetensors")
    save_file({"x": x, "y": net(x).detach()}, tmp_path / "io.safetensors")
    code = SOURCE + textwrap.dedent("""
        import sys
        from pathlib import Path
        from safetensors.torch import load_file
        from secateur.compaction.artifact import load
        folder = Path(sys.argv[1])
        torch.manual_seed(123)
        torch.set_num_threads(1)
        io = load_file(folder / "io.safetensors")
        net = load(folder / "small.safetensors", Net())
        assert not net.training
        assert torch.equal(net(io["x"]), io["y"])
    """)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_everything_comes_back(file):
    net = load(file, Net())
    original = load(file, Net())
    assert net.conv.out_channels == net.norm.num_features == 3
    assert net.fc.in_features == 108
    assert net.scale.tolist() == [1.0, 4.0, 5.0]
    assert cut_of(net) == cut_of(original)
    assert cut_of(net).tensors == PLAN.tensors
    assert all(p.requires_grad for p in net.parameters())
    assert "scale" not in load_file(file)


def described(path: Path, **changes: object) -> Path:
    """The file with a changed description and the checksum of that; without what is None."""
    with safe_open(path, framework="pt") as opened:
        description = json.loads(opened.metadata()["secateur"]) | changes
    description = {key: value for key, value in description.items() if value is not None and key != "crc32"}
    description["crc32"] = artifact._checksum(description, load_file(path))
    save_file(load_file(path), path, metadata={"secateur": json.dumps(description)})
    return path


def test_what_was_loaded_can_be_saved_again(file, tmp_path):
    again = tmp_path / "again.safetensors"
    save(load(file, Net()), again)
    assert again.read_bytes() == file.read_bytes()


def test_dtype_layout_mode_and_frozen_parameters_come_back(tmp_path):
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    net = net.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    net[1].register_buffer("codes", torch.arange(4, dtype=torch.int8))
    save(net, tmp_path / "net.safetensors")
    fresh = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    fresh[1].register_buffer("codes", torch.zeros(4))
    fresh[0].weight.requires_grad_(False)
    loaded = load(tmp_path / "net.safetensors", fresh)
    assert loaded is fresh
    assert loaded.training
    assert loaded[0].weight.dtype is torch.bfloat16
    assert loaded[0].weight.stride() == net[0].weight.stride()
    assert not loaded[0].weight.requires_grad
    assert loaded[1].codes.dtype is torch.int8
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), loaded.state_dict().values(), strict=True))


def test_each_module_comes_back_in_its_mode(tmp_path):
    """A BatchNorm that a fine-tuning keeps in evaluation mode, and old files, which say nothing of such ones."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))

    for training in (True, False):
        net, path = build().train(training), tmp_path / "net.safetensors"
        net[1][0].train(not training)
        save(net, path)
        modes = [part.training for part in load(path, build()).modules()]
        assert modes == [training, training, training, not training, training]
        described(path, other_mode=None)
        assert [part.training for part in load(path, build()).modules()] == [training] * 5


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint16, torch.bool])
def test_every_type_that_the_format_knows_comes_back(tmp_path, dtype):
    net, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    net.register_buffer("odd", torch.tensor([0.0, 1.0, 3.0] * 200).to(dtype))
    fresh.register_buffer("odd", torch.zeros(600).to(dtype))
    save(net, tmp_path / "net.safetensors")
    assert load(tmp_path / "net.safetensors", fresh).odd.dtype is dtype
    assert torch.equal(fresh.odd.view(torch.uint8), net.odd.view(torch.uint8))


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    def build() -> nn.Module:
        net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        net[1].weight = net[0].weight
        return net

    path = tmp_path / "tied.safetensors"
    net = build()
    cut_(net, CutPlan({"0.weight": {1: (0, 2)}}))
    net.cut_plan = CutPlan({"0.weight": {1: (0, 2)}}, dense={"0.weight": (5, 3)})
    save(net, path)
    assert list(load_file(path)) == ["0.weight"]
    loaded = load(path, build())
    assert loaded[1].weight is loaded[0].weight
    assert torch.equal(loaded[0].weight, net[0].weight)
    untied = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    with pytest.raises(SecateurError, match=r"1\.weight: not expected"):
        load(path, untied)


def test_a_selected_input_comes_back(tmp_path):
    net = nn.Sequential(nn.Linear(5, 2))
    plan = CutPlan({"0.weight": {1: (1, 4)}}, selects={"0": (1, 4)}, dense={"0.weight": (2, 5), "0.bias": (2,)})
    cut_(net, plan)
    net.cut_plan = plan
    save(net, tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors", nn.Sequential(nn.Linear(5, 2)))
    x = torch.randn(3, 5)
    assert torch.equal(loaded(x), net(x))
    assert cut_of(loaded) == plan


def test_a_root_that_selects_its_input_keeps_its_class_name(tmp_path):
    net = nn.Linear(5, 2)
    plan = CutPlan({"weight": {1: (1, 4)}}, selects={"": (1, 4)}, dense={"weight": (2, 5), "bias": (2,)})
    cut_(net, plan)
    net.cut_plan = plan
    save(net, tmp_path / "net.safetensors")
    assert load(tmp_path / "net.safetensors", nn.Linear(5, 2)).in_features == 2


def test_a_model_on_meta_is_filled_on_the_cpu(tmp_path):
    net = nn.Linear(3, 2)
    save(net, tmp_path / "net.safetensors")
    with torch.device("meta"):
        fresh = nn.Linear(3, 2)
    assert torch.equal(load(tmp_path / "net.safetensors", fresh).weight, net.weight)


def test_buffers_that_the_file_lacks_cannot_come_from_meta(file):
    with torch.device("meta"):
        fresh = Net()
    with pytest.raises(SecateurError, match=r"non-persistent buffers \(scale\)"):
        load(file, fresh)


class TestOtherFiles:
    """Each is told in one `SecateurError`, and leaves the model as it was."""

    def refused(self, path: Path, message: str, net: nn.Module | None = None) -> None:
        net = net or Net()
        before = {name: (tensor, tensor.clone()) for name, tensor in net.state_dict(keep_vars=True).items()}
        with pytest.raises(SecateurError, match=message):
            load(path, net)
        after = net.state_dict(keep_vars=True)
        assert all(after[name] is tensor and torch.equal(tensor, copy) for name, (tensor, copy) in before.items())

    def test_none(self, tmp_path):
        self.refused(tmp_path / "none.safetensors", "there is no such file")
        self.refused(tmp_path, "is a folder")

    def test_truncated(self, file):
        file.write_bytes(file.read_bytes()[:-7])
        self.refused(file, "not a whole safetensors file")

    def test_empty(self, file):
        file.write_bytes(b"")
        self.refused(file, "not a whole safetensors file")

    def test_pickle(self, file):
        torch.save(nn.Linear(2, 2), file)
        self.refused(file, "not a whole safetensors file")

    def test_flipped_number(self, file):
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
        self.refused(file, "checksum")

    def test_flipped_plan(self, file):
        with safe_open(file, framework="pt") as opened:
            plan = json.loads(opened.metadata()["secateur"])["plan"]
        plan["positions"][0][0] += 1
        self.refused(rewritten(file, plan=plan), "checksum")

    def test_modes_of_modules_that_are_not_there(self, file):
        self.refused(described(file, other_mode=["head.norm"]), "no modules head.norm")

    def test_without_description(self, file):
        save_file(load_file(file), file)
        self.refused(file, "not one that sc.save wrote")

    @pytest.mark.parametrize(
        "changes", [{"plan": {}}, {"aliases": 3}, {"format": "x"}, {"format": 0}, {"order": {"a": ["b"]}}]
    )
    def test_damaged_description(self, file, changes):
        self.refused(rewritten(file, **changes), "description is damaged")

    def test_newer_format(self, file):
        self.refused(rewritten(file, format=FORMAT + 1), "Install a newer one")

    def test_other_class(self, file):
        self.refused(file, "was cut from a Net, and the model given is a Linear", nn.Linear(3, 2))

    def test_other_shapes(self, file):
        self.refused(file, r"conv\.weight: shape \(8, 1, 3, 3\), expected \(6, 1, 3, 3\)", Net(width=8))

    def test_compact_model(self, file):
        self.refused(file, "compact already", load(file, Net()))

    def test_tensors_that_do_not_belong(self, file):
        with safe_open(file, framework="pt") as opened:
            description = json.loads(opened.metadata()["secateur"])
        tensors = load_file(file)
        tensors["conv.weight"] = tensors["conv.weight"][:2].clone()
        del description["crc32"], tensors["fc.bias"]
        description["crc32"] = artifact._checksum(description, tensors)
        save_file(tensors, file, metadata={"secateur": json.dumps(description)})
        self.refused(
            file, r"conv\.weight: \(2, 1, 3, 3\) in the file, .*fc\.bias: missing in the file, expected \(4,\)"
        )

    def test_a_plan_that_does_not_fit(self, file):
        plan = {**small_net().cut_plan.to_json(), "attributes": {"forward": 3}}
        self.refused(described(file, plan=plan), "forward: is a method")


class TestWriting:
    def test_a_file_is_replaced_and_nothing_else_is_left(self, file):
        before = file.read_bytes()
        save(nn.Linear(2, 2), file)
        assert file.read_bytes() != before
        assert os.listdir(file.parent) == [file.name]
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask

    def test_an_interruption_leaves_the_old_file_alone(self, file, monkeypatch):
        before = file.read_bytes()

        def interrupted(tensors: object, path: Path, metadata: object) -> None:
            path.write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(artifact, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(nn.Linear(2, 2), file)
        assert file.read_bytes() == before
        assert os.listdir(file.parent) == [file.name]

    def test_a_full_disk_is_told(self, file, monkeypatch):
        def full(tensors: object, path: Path, metadata: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(artifact, "save_file", full)
        with pytest.raises(SecateurError, match="No space left"):
            save(nn.Linear(2, 2), file)

    def test_a_link_keeps_pointing_to_the_file(self, file, tmp_path):
        link = tmp_path / "link.safetensors"
        link.symlink_to(file)
        save(nn.Linear(2, 2), link)
        assert link.is_symlink()
        load(file, nn.Linear(2, 2))

    def test_paths_are_checked_first(self, tmp_path):
        assert check_writable(tmp_path / "new.safetensors") == (tmp_path / "new.safetensors").resolve()
        assert not os.listdir(tmp_path)
        with pytest.raises(SecateurError, match="is a folder"):
            check_writable(tmp_path)
        with pytest.raises(SecateurError, match="there is no folder"):
            check_writable(tmp_path / "missing" / "net.safetensors")

    def test_a_folder_that_refuses_is_told(self, tmp_path, monkeypatch):
        def refuses(**_: object) -> None:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(artifact.tempfile, "TemporaryFile", refuses)
        with pytest.raises(SecateurError, match="Read-only file system"):
            check_writable(tmp_path / "net.safetensors")

    def test_what_the_file_cannot_hold_is_refused(self, tmp_path):
        class Extra(nn.Linear):
            def get_extra_state(self) -> object:
                return 3

        with torch.device("meta"):
            meta = nn.Linear(2, 2)
        gated = parametrizations.weight_norm(nn.Linear(2, 2))
        sparse = nn.Linear(2, 2)
        sparse.register_buffer("graph", torch.eye(2).to_sparse())
        wide = nn.ParameterList([torch.zeros(2, dtype=torch.complex128)])
        for net, message in (
            (Extra(2, 2), "extra state"),
            (meta, "no numbers"),
            (gated, "parametrizations"),
            (wide, r"0: .* torch.complex128 .* convert it, as by tensor.to\(torch.complex64\)"),
            (sparse, "graph: is a tensor of torch.float32 and torch.sparse_coo"),
        ):
            with pytest.raises(SecateurError, match=message):
                save(net, tmp_path / "net.safetensors")
        assert not os.listdir(tmp_path)
