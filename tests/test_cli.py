"""The commands: what they print, what they write, and how they end."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import secateur as sc
from secateur.cli import app
from secateur.recipes.data import MNIST_FILES, digits
from secateur.recipes.record import read_record
from secateur.recipes.task import ORDER, fresh

SRC = Path(__file__).resolve().parents[1] / "src"


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "secateur", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def without_times(path: Path) -> dict:
    content = json.loads(path.read_text())
    del content["seconds"], content["step_ms"]
    for row in content["rows"]:
        del row["latency"]
    return content


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Two runs of the same short command."""
    found: dict[str, object] = {}
    for turn in ("first", "second"):
        directory = tmp_path_factory.mktemp(turn)
        words = [
            "train",
            "--epochs",
            "2",
            "--out",
            f"{directory}/small.safetensors",
            "--record",
            f"{directory}/run.json",
        ]
        found[turn] = CliRunner().invoke(app, words)
        found[f"{turn} directory"] = directory
    return found


def test_train_ends_well_and_writes_the_artifact_and_the_record_alone(trained: dict):
    assert trained["first"].exit_code == 0, trained["first"].output
    assert sorted(path.name for path in trained["first directory"].iterdir()) == ["run.json", "small.safetensors"]


def test_train_prints_the_result_to_stdout_and_the_way_there_to_stderr(trained: dict):
    result = trained["first"]
    assert all(name in result.stdout for name in ORDER)
    assert "largest output difference" in result.stdout
    assert "epoch" not in result.stdout
    assert re.search(r"gated +epoch +1/1 .* expected +\d+\.\d% actual +\d+\.\d%", result.stderr)


def test_the_compact_network_is_within_the_budget_and_equals_the_gated_one(trained: dict):
    outcome = read_record(trained["first directory"] / "run.json")
    dense, gated, compact = (outcome.row(name) for name in ("dense", "gated", "compact"))
    assert compact.params <= 0.1 * dense.params
    assert compact.accuracy == gated.accuracy
    assert outcome.difference["float32"] <= 1e-5
    assert outcome.difference["float64"] <= 1e-10


def test_scratch_has_the_compact_networks_size(trained: dict):
    outcome = read_record(trained["first directory"] / "run.json")
    scratch, compact = outcome.row("scratch"), outcome.row("compact")
    assert (scratch.params, scratch.macs, scratch.bytes) == (compact.params, compact.macs, compact.bytes)


def test_the_same_command_gives_the_same_numbers(trained: dict):
    first, second = (without_times(trained[f"{turn} directory"] / "run.json") for turn in ("first", "second"))
    assert first == second


def test_the_artifact_loads_bit_for_bit_in_a_new_process(trained: dict, tmp_path: Path):
    path = trained["first directory"] / "small.safetensors"
    x = digits().x_test[:64]
    torch.set_num_threads(1)
    here = sc.load(path, fresh("resnet-7", seed=7)).eval()(x)
    program = f"""
import torch, secateur as sc
from secateur.recipes.data import digits
from secateur.recipes.task import fresh
torch.set_num_threads(1)
small = sc.load({str(path)!r}, fresh("resnet-7", seed=8)).eval()
torch.save(small(digits().x_test[:64]).detach(), {str(tmp_path / "there.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True)
    assert torch.equal(here, torch.load(tmp_path / "there.pt", weights_only=True))


def test_report_writes_the_page_of_a_record(trained: dict, tmp_path: Path):
    record = trained["first directory"] / "run.json"
    result = CliRunner().invoke(app, ["report", str(record), "--out", str(tmp_path / "page.md")])
    assert result.exit_code == 0
    text = (tmp_path / "page.md").read_text()
    final = read_record(record).rows[-1]
    assert f"**{100 - final.accuracy:.2f}% test error** at {final.params:,} parameters" in text
    assert "secateur train --data digits --net resnet-7" in text


def test_report_refuses_what_is_no_record(tmp_path: Path):
    (tmp_path / "other.json").write_text('{"format": 99}')
    for name in ("missing.json", "other.json"):
        result = CliRunner().invoke(app, ["report", str(tmp_path / name)])
        assert result.exit_code == 2
        assert name in result.stderr


def test_inspect_shows_groups_and_reasons():
    result = CliRunner().invoke(app, ["inspect"])
    assert result.exit_code == 0
    assert "block1.conv1" in result.stdout
    assert "is a model output" in result.stdout


def test_inspect_as_json_agrees_with_the_trace():
    result = CliRunner().invoke(app, ["inspect", "--net", "lenet-5", "--json"])
    content = json.loads(result.stdout)
    assert content["cost"] == {"params": 431_080, "macs": 2_293_000}
    assert [(group["name"], group["size"]) for group in content["groups"]] == [
        ("conv1", 20),
        ("conv2", 50),
        ("fc1", 500),
    ]
    assert {"fc2.weight", "conv1.weight"} <= {frozen["tensor"] for frozen in content["frozen"]}


#: Arguments that must be refused, and what the message must name.
BAD = {
    "unknown method": (["--method", "hard-discrete"], "unknown method 'hard-discrete'; there are: hard-concrete"),
    "unknown net": (
        ["--net", "lenet-6"],
        "unknown network 'lenet-6'; there are: resnet-7, lenet-300-100, lenet-5",
    ),
    "unknown data": (["--data", "letters"], "unknown data set 'letters'; there are: digits, mnist"),
    "net of other data": (["--net", "lenet-5"], "these networks fit it: resnet-7"),
    "budget of nothing": (["--keep-params", "0"], "keep_params"),
    "budget above one": (["--keep-params", "1.5"], "keep_params"),
    "budget that is no number": (["--keep-macs", "nan"], "keep_macs"),
    "unreachable budget": (["--keep-params", "0.001"], "cannot be reached"),
    "no epochs": (["--epochs", "0"], "epochs=0"),
    "one epoch": (["--epochs", "1"], "epochs=1"),
    "negative seed": (["--seed", "-1"], "seed=-1"),
    "unknown device": (["--device", "abacus"], "device 'abacus'"),
    "device without values": (["--device", "meta"], "device 'meta'"),
    "mnist without a directory": (["--data", "mnist"], "--data-dir"),
    "unknown option": (["--keep", "0.1"], "--keep"),
    "epochs that are no number": (["--epochs", "many"], "Invalid value for '--epochs'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_message_and_exit_code_2(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    words, message = BAD[case]
    result = CliRunner().invoke(app, ["train", *words], env={"COLUMNS": "300"})
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr == result.stderr.lstrip()
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_data_directory_without_the_files_is_refused_with_their_names(tmp_path: Path):
    result = CliRunner().invoke(app, ["train", "--data", "mnist", "--data-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert all(name in result.stderr for name in MNIST_FILES)


def test_corrupt_idx_files_are_refused_by_name(tmp_path: Path):
    for name in MNIST_FILES:
        (tmp_path / name).write_bytes(b"\x89PNG not an idx file")
    result = CliRunner().invoke(app, ["train", "--data", "mnist", "--data-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "train-images-idx3-ubyte: not an idx file" in result.stderr


@pytest.mark.parametrize("option", ["--out", "--record"])
@pytest.mark.parametrize("place", ["a directory", "below a file"])
def test_paths_that_cannot_be_written_are_refused_before_training(option: str, place: str, tmp_path: Path):
    (tmp_path / "file").write_text("")
    path = tmp_path if place == "a directory" else tmp_path / "file" / "small.safetensors"
    words = ["train", "--out", str(tmp_path / "fine.safetensors"), option, str(path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert f"cannot write {path}" in result.stderr
    assert "epoch" not in result.stderr


def test_commands_are_listed_where_none_is_given():
    result = CliRunner().invoke(app, [])
    assert all(name in result.output for name in ("train", "inspect", "report"))


def test_a_refusal_in_a_process_of_its_own_is_one_line_and_exit_code_2(tmp_path: Path):
    done = subprocess.run(
        command("train", "--method", "none"),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_ctrl_c_leaves_no_file_and_exit_code_130(tmp_path: Path):
    # A shell lets what it starts in the background ignore the signal, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        process = subprocess.Popen(
            command("train", "--epochs", "500", "--out", "small.safetensors", "--record", "run.json"),
            cwd=tmp_path,
            env={**environment(), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stderr is not None
    process.stderr.readline()  # the first epoch is done
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert out == ""
    assert not list(tmp_path.iterdir())
