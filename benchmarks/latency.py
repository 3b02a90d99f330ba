"""Predicted against measured latency of random cuts of ResNet-20 and LeNet-5, in one process on one thread.

    python benchmarks/latency.py            # measure, and write the page
    python benchmarks/latency.py --page     # write the page from the record

A latency model of each network is measured first, without a cache. Then networks that it has not seen, cut to widths of
another seed, take turns with the dense one. Writes ``results/latency.json`` and, from it, ``docs/latency.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

import secateur as sc
from secateur.latency.clock import clock_of
from secateur.latency.measure import LOW, WARM_UP, keep_of, widths
from secateur.recipes.networks import network
from secateur.recipes.record import write_text
from secateur.recipes.task import fresh

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "results" / "latency.json", ROOT / "docs" / "latency.md"
#: Networks and batch sizes.
CASES = (("lenet-5", 1), ("lenet-5", 64), ("resnet-20", 1), ("resnet-20", 16))
CUTS = 10
#: Passes of one cut in its turn: one after the other, as those of a network that is alone on a machine.
PASSES = 3
#: Seed of the cuts; the models draw theirs from another.
CUTS_SEED = 1000


def measured(name: str, batch: int, seconds: float, rounds: int) -> dict[str, Any]:
    """A latency model, and networks that it has not seen."""
    net, x = fresh(name, seed=0).eval(), torch.randn(batch, *network(name).shape)
    structure = sc.trace(net, examples=(x,))
    latency = sc.latency_model(net, structure, examples=(x,), device="cpu", cache=False, seconds=seconds)
    print(latency, flush=True)
    patterns = widths(structure, CUTS, np.random.default_rng(CUTS_SEED), grid=False)
    keeps = [{}, *(keep_of(structure, n) for n in patterns)]
    models = [sc.compact(net, structure, keep).eval() for keep in keeps]
    clock = clock_of(torch.device("cpu"))
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(rounds):
            for model, seen in zip(models, times, strict=True):
                for number in range(WARM_UP + PASSES):
                    marks = [clock.mark()]
                    model(x)
                    took = float(clock.read([*marks, clock.mark()])[1])
                    if number >= WARM_UP:
                        seen.append(took / 1e6)
    half = rounds * PASSES // 2
    rows = [
        {
            "macs": structure.cost(keep).macs,
            "predicted": latency.predict(keep),
            "measured": float(np.quantile(seen, LOW)),
            "median": float(np.median(seen)),
            "third_quartile": float(np.quantile(seen, 0.75)),
            "again": abs(float(np.quantile(seen[:half], LOW) / np.quantile(seen[half:], LOW)) - 1.0),
        }
        for keep, seen in zip(keeps, times, strict=True)
    ]
    error = statistics.median(abs(row["predicted"] / row["measured"] - 1.0) for row in rows[1:])
    print(f"{name}, batch {batch}: median error of {CUTS} cuts {error:.1%}", flush=True)
    layers = sorted(latency.by_layer().items(), key=lambda item: -item[1])[:5]
    return {
        "net": name,
        "batch": batch,
        "conditions": {key: value for key, value in latency.conditions.items() if key != "layers"},
        "clock": latency.clock,
        "held_back": {"error": latency.error, "noise": latency.noise, "rounds": latency.rounds},
        "passes": rounds * PASSES,
        "layers": layers,
        "rows": rows,
    }


TEXT = """# Latency as a budget

```python
import torch, secateur as sc

torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(256, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 10))
x = torch.randn(64, 256)
structure = sc.trace(model, examples=(x,))
latency = sc.latency_model(model, structure, examples=(x,), seconds=0.3, cache=False)
print(latency)
pruner = sc.attach(model, structure=latency.structure, examples=(x,), budget=sc.Budget(latency=0.8))
```

`sc.latency_model` cuts the model to a grid of widths and to random ones, runs each on this machine, and reads off with
hooks what every module takes for itself, in its place in the whole pass. Each module gets a polynomial with
non-negative coefficients: a constant for the call, the products of widths that its multiply-accumulates count, and the
widths that it reads and writes. Their sum is a third cost beside parameters and multiply-accumulates: differentiable in
the gates' chances, and never smaller when a unit opens.

- **What is measured**: one forward pass of the first example in evaluation mode, so the batch size is the example's
  and the threads are those that torch has then. With one thread it is that thread's processor time, which others on the
  machine do not count in; with more it is wall time; on CUDA it is the time in the stream. A time is the 2% quantile
  of many passes, gone through in four sweeps.
- **Budgets**: `sc.Budget(latency=0.5)` is a share of what the model predicts for the dense network, and
  `sc.Budget(latency_ms=3.0)` is absolute. Both go together with `keep_params` and `keep_macs`. Much of a small
  network's time is calls, which no unit's going saves: a budget below what is left with one unit in every group is
  refused, with that number.
- **The cache**: a file whose name follows from processor, device, torch, threads, inputs and layers, in
  `$SECATEUR_CACHE`, else `$XDG_CACHE_HOME`, else `~/.cache`, below `secateur/latency`. `cache="file.json"` names one,
  and one of other conditions is refused; `cache=False` measures anew.
- **What it does not see**: jumps between algorithms of a layer at certain widths, which a polynomial smooths (the
  largest errors below), and time that gates on single inputs without units, or on single weights, might save.

## Predicted and measured

"""


def page(record: dict[str, Any]) -> str:
    """The page, from the record alone."""
    known = record["cases"][0]["conditions"]
    text = TEXT + (
        f"{CUTS} random cuts of each network that its latency model has not seen, measured in one process, in turns, "
        f"each time the {LOW:.0%} quantile of {record['cases'][0]['passes']} passes ({record['cases'][0]['clock']}) on"
        f" {known['processor']}, {known['threads']} thread{'s' * (known['threads'] != 1)}, torch {known['torch']}.\n"
        "`noise` is by how much a network's times from the first and the second half of its passes differ (median),"
        " `spread` by how much its median pass is above the quantile that counts (median).\n\n"
        "| network | batch | dense ms, predicted | measured | median error of the cuts | largest | noise | spread |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
    )
    for case in record["cases"]:
        dense, *cuts = case["rows"]
        errors = [abs(row["predicted"] / row["measured"] - 1.0) for row in cuts]
        noise = statistics.median(row["again"] for row in cuts)
        spread = statistics.median(row["median"] / row["measured"] - 1.0 for row in cuts)
        text += (
            f"| {case['net']} | {case['batch']} | {dense['predicted']:.3f} | {dense['measured']:.3f} | "
            f"**{statistics.median(errors):.1%}** | {max(errors):.1%} | {noise:.1%} | {spread:.1%} |\n"
        )
    for case in record["cases"]:
        layers = ", ".join(f"{path or 'the model itself'} {ms:.3f}" for path, ms in case["layers"])
        text += (
            f"\n### {case['net']}, batch {case['batch']}\n\n"
            f"Most of the dense network's predicted milliseconds: {layers}.\n\n"
            "| MACs kept | ms, predicted | measured | error |\n| ---: | ---: | ---: | ---: |\n"
        )
        dense = case["rows"][0]
        for row in case["rows"]:
            text += (
                f"| {row['macs'] / dense['macs']:.1%} | {row['predicted']:.3f} | {row['measured']:.3f} |"
                f" {row['predicted'] / row['measured'] - 1.0:+.1%} |\n"
            )
    return f"{text}\n```\n{record['command']}\n```\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page from the record")
    parser.add_argument("--seconds", type=float, default=40.0, help="about how long each model is measured")
    parser.add_argument("--rounds", type=int, default=40, help="turns of each cut that is compared")
    args = parser.parse_args()
    if not args.page:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        cases = [measured(name, batch, args.seconds, args.rounds) for name, batch in CASES]
        command = "python benchmarks/latency.py"
        command += "".join(
            f" --{name} {getattr(args, name):g}"
            for name in ("seconds", "rounds")
            if getattr(args, name) != parser.get_default(name)
        )
        write_text(RECORD, json.dumps({"command": command, "cases": cases}, indent=1) + "\n")
    write_text(PAGE, page(json.loads(RECORD.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
