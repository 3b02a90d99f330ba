"""Time of tracing, side by side with torch-pruning's graph and groups, and how it grows with depth.

    python benchmarks/trace.py              # everything; more rounds with --rounds
    python benchmarks/trace.py --page       # write the page from the record

Each model has a process of its own in which both sides take turns, under a limit of memory and time: on some models the
other side does not end. Writes ``results/trace.json`` and, from it, ``docs/trace-benchmark.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
RECORD, PAGE = ROOT / "results" / "trace.json", ROOT / "docs" / "trace-benchmark.md"
#: Bytes of address space of a process in which torch-pruning runs.
MEMORY = 8 << 30

Build = Callable[[], tuple[Any, Any]]


def _vision(name: str) -> Build:
    def build() -> tuple[Any, Any]:
        import torch
        import torchvision

        model = torchvision.models.resnet50() if name == "resnet50" else getattr(torchvision.models, name)()
        return model, {"args": (torch.randn(1, 3, 224, 224),), "kwargs": {}}

    return build


def _resnet(blocks: list[int]) -> Build:
    def build() -> tuple[Any, Any]:
        import torch
        from torchvision.models.resnet import Bottleneck, ResNet

        return ResNet(Bottleneck, blocks), {"args": (torch.randn(1, 3, 224, 224),), "kwargs": {}}

    return build


def _text(model: str, config: str, **options: Any) -> Build:
    def build() -> tuple[Any, Any]:
        import torch
        import transformers

        made = getattr(transformers, config)(**options)
        made.use_cache = False
        words = torch.zeros(1, 16, dtype=torch.long)
        return getattr(transformers, model)(made), {"args": (), "kwargs": {"input_ids": words}}

    return build


def _picture_transformer() -> tuple[Any, Any]:
    import torch
    import transformers

    model = transformers.ViTForImageClassification(transformers.ViTConfig())
    return model, {"args": (), "kwargs": {"pixel_values": torch.randn(1, 3, 224, 224)}}


def _llama(layers: int, **options: Any) -> Build:
    return _text("LlamaForCausalLM", "LlamaConfig", num_hidden_layers=layers, **options)


#: Name, how to build it, and whether torch-pruning is asked too.
PAIRS: dict[str, Build] = {
    "ResNet-50": _vision("resnet50"),
    "DenseNet-121": _vision("densenet121"),
    "ConvNeXt-T": _vision("convnext_tiny"),
    "BERT-base": _text("BertModel", "BertConfig"),
    "ViT-B/16 (transformers)": _picture_transformer,
    "ViT-B/16 (torchvision)": _vision("vit_b_16"),
    "Llama, 2 layers of the 7B width": _llama(2),
    "Llama, 4 layers of the 7B width": _llama(4),
    "Llama, 2 layers, grouped queries": _llama(2, num_key_value_heads=8),
}
DEEPER: dict[str, tuple[Build, Build]] = {
    "ResNet-50 to twice its blocks": (_resnet([3, 4, 6, 3]), _resnet([6, 8, 12, 6])),
    "BERT-base, 12 to 24 layers": (
        _text("BertModel", "BertConfig"),
        _text("BertModel", "BertConfig", num_hidden_layers=24),
    ),
    "Llama 7B width, 8 to 16 layers": (_llama(8), _llama(16)),
    "Llama 7B width, 16 to 32 layers": (_llama(16), _llama(32)),
}
LARGE = "Llama 7B"


def _on(device: str, build: Build) -> tuple[Any, Any]:
    import torch

    with torch.device(device):
        model, call = build()
    return model.eval(), call


def _ours(built: tuple[Any, Any]) -> dict[str, Any]:
    import secateur as sc

    model, call = built
    start, wall = time.process_time(), time.perf_counter()
    structure = sc.trace(model, sc.Example(call["args"], call["kwargs"]))
    end, wall_end = time.process_time(), time.perf_counter()
    return {"side": "ours", "seconds": end - start, "wall": wall_end - wall, "groups": len(structure.groups)}


def _theirs(built: tuple[Any, Any]) -> dict[str, Any]:
    import torch
    import torch_pruning as tp

    model, call = built
    start, wall = time.process_time(), time.perf_counter()
    inputs = call["kwargs"] or call["args"]
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=inputs)
    built_at = time.process_time()
    groups = list(graph.get_all_groups(root_module_types=[torch.nn.modules.conv._ConvNd, torch.nn.Linear]))
    end, wall_end = time.process_time(), time.perf_counter()
    graph_seconds = built_at - start
    return {
        "side": "theirs",
        "seconds": end - start,
        "wall": wall_end - wall,
        "graph": graph_seconds,
        "groups": len(groups),
    }


def _say(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def _prepared() -> None:
    import warnings

    import torch
    from tests.conftest import _declare_torchvision_operators

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    _declare_torchvision_operators()


def _warmed(*, both: bool) -> None:
    """What is loaded at a first use is not the time of a trace."""
    import torch

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 2))
    built = model, {"args": (torch.randn(2, 3, 8, 8),), "kwargs": {}}
    _ours(built)
    if both:
        _theirs(built)


def child(task: str, name: str, device: str, rounds: int) -> None:
    """What one process measures; one JSON line for each measurement."""
    _prepared()
    _warmed(both=task == "pair")
    if task == "pair":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for _ in range(rounds):
            _say(_ours(_on(device, PAIRS[name])))
            _say({"side": "theirs", "started": True})
            _say(_theirs(_on(device, PAIRS[name])))
    elif task == "ours":
        for _ in range(rounds):
            _say(_ours(_on("meta", PAIRS[name])))
    elif task == "depth":
        for _ in range(rounds):
            for depth, build in zip(("shallow", "deep"), DEEPER[name], strict=True):
                _say({**_ours(_on("meta", build)), "depth": depth})
    else:
        import secateur  # noqa: F401 - what is resident before the trace is not the trace's

        built = _on("meta", _llama(32))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _say({**_ours(built), "before_mb": before / 1024,
              "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})  # fmt: skip


def measured(task: str, name: str, device: str, rounds: int, limit: float) -> tuple[list[dict[str, Any]], str]:
    """The lines of a child process, and why it ended early, or ""."""
    command = [sys.executable, __file__, "--child", task, "--name", name, "--device", device, "--rounds", str(rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    process = subprocess.Popen(  # noqa: S603 - this file itself
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def drain() -> None:
        assert process.stderr is not None
        errors.extend(process.stderr)

    readers = [threading.Thread(target=target, daemon=True) for target in (read, drain)]
    for reader in readers:
        reader.start()
    found: list[dict[str, Any]] = []
    try:
        while (line := lines.get(timeout=limit)) is not None:
            found.append(json.loads(line))
    except queue.Empty:
        process.kill()
        process.wait()
        return found, f"no result after {limit:.0f} s"
    for reader in readers:
        reader.join(5)
    if process.wait() != 0:
        return found, (errors[-1].strip() if errors else f"ended with {process.returncode}")[:300]
    return found, ""


def pair(name: str, rounds: int, limit: float) -> dict[str, Any]:
    """Both sides on `meta`; where torch-pruning cannot, both on the CPU; where it cannot at all, ours alone."""
    tried: dict[str, str] = {}
    for device in ("meta", "cpu"):
        found, why = measured("pair", name, device, rounds, limit)
        done = [one for one in found if "seconds" in one]
        if any(one["side"] == "theirs" for one in done):
            return {"device": device, "measured": done, "failed": tried}
        tried[device] = why
    found, why = measured("ours", name, "meta", rounds, limit)
    return {"device": "meta", "measured": found, "failed": tried, **({"ours_failed": why} if why else {})}


def _record() -> dict[str, Any]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"pairs": {}, "depth": {}}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "rounds": len(values)}


def seconds(measured: list[dict[str, Any]], **where: Any) -> list[float]:
    return [one["seconds"] for one in measured if all(one.get(key) == value for key, value in where.items())]


def _shown(values: list[float]) -> str:
    found = spread(values)
    return f"{found['median']:.2f} ({found['least']:.2f} to {found['most']:.2f})"


def _ratio(row: dict[str, Any]) -> float:
    """Median of ours over theirs, turn by turn."""
    ours, theirs = seconds(row["measured"], side="ours"), seconds(row["measured"], side="theirs")
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=False))


def _between(record: dict[str, Any]) -> list[str]:
    """Which models take longer than theirs, and what that is spent on."""
    above = {
        name: _ratio(row)
        for name, row in record["pairs"].items()
        if seconds(row["measured"], side="theirs") and _ratio(row) > 1
    }
    if not above:
        return ["No model takes longer than theirs."]
    listed = ", ".join(f"{name} ({ratio:.2f} times)" for name, ratio in sorted(above.items(), key=lambda one: -one[1]))
    return [
        f"Above theirs: {listed}.",
        "What stands between: theirs runs the model once. Ours runs copies of it, dense in evaluation and in training",
        "mode, then cut in two ways, in training mode as well where its own code does something else there. Each run",
        "follows ids through every operator, on fake tensors, which cost more than plain ones on `meta`, and the",
        "trials compare every operator with the dense one; theirs knows types of layers and looks at no operator in",
        "them.",
    ]


def page(record: dict[str, Any]) -> str:
    """The page, from the record alone."""
    made = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    lines = [
        "# Tracing: time and memory",
        "",
        "Ours is `sc.trace`: the runs in evaluation and training mode, the coupling, the groups, the costs, and the",
        "trial cuts with everything that they repeat. Theirs is torch-pruning's `build_dependency` and all of its",
        "`get_all_groups`, which run no trial. Both take turns in one process, on the same model in its real size:",
        "median seconds of the processor in one thread, with the least and the most (others used the machine too; the",
        "record has the times on the clock). Written by `benchmarks/trace.py`; no figure here is typed by hand.",
        "",
        "| model | device | ours, s | theirs, s | of it their graph | ours / theirs | groups, ours and theirs |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in record["pairs"].items():
        ours, theirs = seconds(row["measured"], side="ours"), seconds(row["measured"], side="theirs")
        groups = {one["side"]: one["groups"] for one in row["measured"]}
        if theirs:
            ratio = f"{_ratio(row):.2f}"
            graph = f"{statistics.median(one['graph'] for one in row['measured'] if one['side'] == 'theirs'):.2f}"
            shown = f"{_shown(theirs)} | {graph} | {ratio} | {groups['ours']} and {groups['theirs']}"
        else:
            shown = f"fails | | | {groups.get('ours', '')}"
        lines.append(f"| {name} | {row['device']} | {_shown(ours) if ours else 'fails'} | {shown} |")
    lines += ["", *_between(record), ""]
    lines += [
        f"- {name}, torch-pruning on {device}: {why}"
        for name, row in record["pairs"].items()
        for device, why in row["failed"].items()
    ]
    lines += ["", "## Twice as deep", "", "| | shallow, s | deep, s | ratio |", "| --- | ---: | ---: | ---: |"]
    for name, measured in record["depth"].items():
        shallow, deep = seconds(measured, depth="shallow"), seconds(measured, depth="deep")
        ratio = statistics.median(b / a for a, b in zip(shallow, deep, strict=True))
        lines.append(f"| {name} | {_shown(shallow)} | {_shown(deep)} | {ratio:.2f} |")
    if large := record.get("large"):
        lines += [
            "",
            "## A large model",
            "",
            f"{LARGE} (32 layers, hidden size 4096, on `meta`), in its own process: {large['seconds']:.1f} s of the",
            f"processor, {large['groups']} groups; resident memory {large['before_mb']:.0f} MB before it, with all",
            f"loaded, and {large['peak_mb']:.0f} MB at its peak.",
        ]
    return "\n".join([*lines, "", f"Made with {made}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300, help="seconds on the clock for one trace")
    parser.add_argument("--only", nargs="*", help="parts of names")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--child", choices=("pair", "ours", "depth", "large"), help=argparse.SUPPRESS)
    parser.add_argument("--name", default="", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="meta", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.name, args.device, args.rounds)
        return
    from secateur.recipes.record import write_text

    def keep(part: str, name: str, found: Any) -> None:
        """Into the record at once, beside what others may have put there."""
        print(name, found, flush=True)
        record = _record()
        if name:
            record[part][name] = found
        else:
            record[part] = found
        packages = ("torch", "torch-pruning", "transformers", "torchvision")
        record["versions"] = {"python": platform.python_version(), **{name: version(name) for name in packages}}
        RECORD.parent.mkdir(exist_ok=True)
        write_text(RECORD, json.dumps(record, indent=1) + "\n")

    def wanted(name: str) -> bool:
        return not args.page and (not args.only or any(part in name for part in args.only))

    for name in filter(wanted, PAIRS):
        keep("pairs", name, pair(name, args.rounds, args.limit))
    for name in filter(wanted, DEEPER):
        found, why = measured("depth", name, "meta", args.rounds, args.limit)
        if not why:
            keep("depth", name, found)
    if wanted(LARGE):
        found, why = measured("large", LARGE, "meta", 1, args.limit)
        if not why:
            keep("large", "", found[0])
    write_text(PAGE, page(_record()))


if __name__ == "__main__":
    main()
