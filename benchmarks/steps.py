"""What a gated training step costs, side by side with a dense one, and whether a compact model is as fast as it should.

    python benchmarks/steps.py                 # everything; more rounds with --rounds, less with --only
    python benchmarks/steps.py --threads 2     # two threads beside one
    python benchmarks/steps.py --short         # each part once, for function alone; writes nothing
    python benchmarks/steps.py --page          # write the page from the record

Dense and gated steps take turns in one process, and each round gives one ratio; the tables have the median of the
ratios and their quartiles. The clock is that of the processor, for other work may run on the machine. Memory is the
largest sum of what torch's allocator has handed out within a step. Writes ``results/steps.json`` and, from it,
``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.records import keep, recorded  # noqa: E402
from benchmarks.step_cases import CASES, METHODS, by_hand  # noqa: E402
from benchmarks.step_clock import made, stepper, timed  # noqa: E402
from benchmarks.step_costs import cost_rows, floor_rows, n_operators  # noqa: E402

import secateur as sc  # noqa: E402
from secateur.pruning.pressure import STEPS_BETWEEN  # noqa: E402
from secateur.recipes.memory import keep_memory  # noqa: E402

RECORD, PAGE = ROOT / "results" / "steps.json", ROOT / "docs" / "benchmarks.md"
#: Steps in a turn: a budget moves its multipliers every few steps only, and a turn has all kinds of steps.
TURN = STEPS_BETWEEN
ABOUT = (
    f"A gated step over a dense one: both take turns of {TURN} steps in one process, each round gives one ratio, and "
    "the tables have the median of the ratios with their quartiles. Seconds are those of the processor (others used "
    "the machine too), the optimizer is Adam, fused, on both sides, and the allocator keeps what a step frees. Memory "
    "is a ratio too, of the most that torch's allocator had handed out at once in a step, with model and optimizer. "
    "Operators are those that torch dispatches in a step, without and with gates. The budget's target falls all the "
    f"time, over 50,000 steps; in a training as long as that its multipliers move at every {STEPS_BETWEEN}th step. "
    "Written by `benchmarks/steps.py`; no figure here is typed by hand."
)
#: Heading of each part, and what it measures.
TITLES = {
    "steps": ("Structured gates", "Gates on every group of the trace, one budget"),
    "weights": ("Gates on single weights", "A gate on every weight, one budget"),
    "arm": ("L0-ARM", "Two passes; a share of all units gone by `pruner.shrink`"),
    "shrunk": (
        "After `pruner.shrink`",
        "A share of all units gone, over the dense step of the whole network",
    ),
    "compact": (
        "Compact over hand-built",
        "A forward pass, over that of the same widths written by hand",
    ),
    "cost": ("What a budget takes", "Beside a dense step, over that step"),
    "floor": (
        "What stands between",
        "The least that gates add to a step, over the dense step",
    ),
    "compiled": ("Under torch.compile", "Both sides compiled"),
}


def _peak(step: Callable[[], None]) -> int:
    """The most bytes that torch's allocator had handed out at once within a step, beyond what it had before."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def step_row(name: str, method: str, units: str, rounds: int, size: int | None = None) -> dict[str, Any]:
    """Gated over dense: time of a step, and peak memory."""
    case = CASES[name]
    gates = None if units == "structured" else [sc.Rule(units="weights")]
    (_, base), (_, ours), _ = made(case, METHODS[method](), gates, size or case.size)
    found = timed(base, ours, max(1, rounds // TURN), TURN)
    held = _resident(base), _resident(ours)
    peaks = [_peak(step) for step in (base, ours)]
    operators = [n_operators(step) for step in (base, ours)]
    row = {"network": name, "method": method, "units": units, **found, "peak": peaks, "held": held}
    return row | {"operators": operators}


def _resident(step: Callable[[], None]) -> int:
    """Bytes of what a step keeps between two calls: model, optimizer, batch."""
    cells = [cell.cell_contents for cell in step.__closure__ or ()]
    found: dict[int, int] = {}
    for item in cells:
        state = item.state.values() if isinstance(item, torch.optim.Optimizer) else ()
        tensors = [value for one in state for value in one.values() if isinstance(value, Tensor)]
        if isinstance(item, torch.optim.Optimizer):
            tensors += [p for group in item.param_groups for p in group["params"]]
        found.update({t.data_ptr(): t.numel() * t.element_size() for t in tensors})
    return sum(found.values())


def arm_rows(rounds: int) -> list[dict[str, Any]]:
    """ARM on LeNet-5 at the start, and once half of the units are gone."""
    rows = []
    case = CASES["LeNet-5"]
    for share in (0.0, 0.5):
        torch.manual_seed(0)
        dense, model, batch = case.build(), case.build(), case.batch(case.size)
        pruner = sc.attach(model, examples=(batch[0][:2],), method=sc.ARM())
        with torch.no_grad():
            phi = next(iter(pruner.gates.parameters()))
            phi[torch.rand(len(phi)) < share] = -5.0
        if share:
            pruner.shrink([], checks=1)
        found = timed(stepper(dense, batch, None), stepper(model, batch, pruner), rounds)
        rows.append({"network": "LeNet-5", "gone": share, **found})
    return rows


def compact_row(name: str, keep: float, rounds: int) -> dict[str, Any]:
    """A compact model over the same widths built by hand: time of a forward pass."""
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().eval()
    x, _ = case.batch(case.size)
    structure = sc.trace(model, (x[:2],))
    kept = {group.name: torch.arange(max(1, int(keep * group.size))) for group in structure.groups}
    small = sc.compact(model, structure, kept).eval()
    hand = by_hand(name, {group.name: len(kept[group.name]) for group in structure.groups}).eval()
    shapes = [[tuple(t.shape) for t in net.parameters()] for net in (hand, small)]
    if shapes[0] != shapes[1]:
        raise SystemExit(f"{name}: built by hand {shapes[0]}, compact {shapes[1]}")

    def call(net: nn.Module) -> Callable[[], None]:
        def once() -> None:
            with torch.inference_mode():
                net(x)

        return once

    return {"network": name, "keep": keep, **timed(call(hand), call(small), rounds)}


def shrunk_row(name: str, gone: float, rounds: int) -> dict[str, Any]:
    """A gated step once a share of all units is gone, over the dense step."""
    case = CASES[name]
    torch.manual_seed(0)
    dense, model, batch = case.build(), case.build(), case.batch(case.size)
    pruner = sc.attach(model, examples=(batch[0][:2],), method=sc.HardConcrete(clamp=None))
    with torch.no_grad():
        for parameter in pruner.gates.parameters():
            parameter[torch.rand(len(parameter)) < gone] = -60.0
    pruner.shrink([], checks=1)
    found = timed(stepper(dense, batch, None), stepper(model, batch, pruner), rounds)
    return {"network": name, "gone": gone, **found}


def compiled_row(name: str, rounds: int) -> dict[str, Any]:
    """Gated over dense under ``torch.compile`` on the CPU, in training mode; or why it does not run."""
    case = CASES[name]
    torch.manual_seed(0)
    dense, model, batch = case.build(), case.build(), case.batch(case.size)
    pruner = sc.attach(model, examples=(batch[0][:2],), budget=sc.Budget(keep_params=0.5, steps=100_000))
    try:
        base = stepper(dense, batch, None, torch.compile(dense))  # type: ignore[arg-type]
        ours = stepper(model, batch, pruner, torch.compile(model))  # type: ignore[arg-type]
        return {"network": name, **timed(base, ours, rounds)}
    except Exception as error:  # noqa: BLE001 - a compiler may lack, and fails in many ways
        return {"network": name, "fails": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}


Row = tuple[str, dict[str, Any]]


def _wanted(args: argparse.Namespace, *words: str) -> bool:
    return not args.only or any(one in " ".join(words) for one in args.only)


def _training(args: argparse.Namespace) -> Iterator[Row]:
    """Gated steps of every network, structured and per-weight."""
    size = 2 if args.short else None
    for name, method in itertools.product(CASES, METHODS):
        small = name.startswith("LeNet")
        if args.short and not small:
            continue
        rounds = max(1, args.rounds // (1 if small else 4))
        if (small or method == "hard-concrete") and _wanted(args, "steps", name, method):
            yield "steps", step_row(name, method, "structured", rounds, size)
        if CASES[name].weights and method != "arm" and _wanted(args, "weights", name, method):
            yield "weights", step_row(name, method, "weights", rounds, size)


def _beside(args: argparse.Namespace) -> Iterator[Row]:
    """What a budget takes of a step, and what gates take at the least."""
    size = 2 if args.short else None
    for name in [name for name in ("LeNet-5", "ResNet-20", "small GPT") if name in CASES and not args.short]:
        if _wanted(args, "cost", name):
            yield from (("cost", row) for row in cost_rows(name, max(1, args.rounds // 2)))
    if args.short:
        yield from (("cost", row) for row in cost_rows("LeNet-5", 1, size))
    for name in ("LeNet-300-100", "LeNet-5"):
        if _wanted(args, "floor", name):
            yield from (("floor", row) for row in floor_rows(name, args.rounds, size))


def _smaller(args: argparse.Namespace) -> Iterator[Row]:
    """Networks that have lost units."""
    if _wanted(args, "arm"):
        yield from (("arm", row) for row in arm_rows(args.rounds))
    for name, share in itertools.product(("LeNet-300-100", "LeNet-5"), (0.5, 0.9)):
        if _wanted(args, "shrunk", name):
            yield "shrunk", shrunk_row(name, share, args.rounds)
        if _wanted(args, "compact", name):
            yield "compact", compact_row(name, round(1 - share, 2), args.rounds)
    for name in ("LeNet-300-100", "LeNet-5") if args.compile else ():
        yield "compiled", compiled_row(name, args.rounds)


def measured(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All parts that were asked for."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for part, row in itertools.chain(_training(args), _beside(args), _smaller(args)):
        print(part, *(row.get(key, "") for key in ("network", "method", "gone", "keep", "ratio", "fails")), flush=True)
        parts.setdefault(part, []).append(row)
    return parts


def _ratio(row: dict[str, Any]) -> str:
    low, middle, high = row["ratio"]
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def _line(row: dict[str, Any]) -> str:
    shares = {"gone": "{:.0%} gone", "keep": "{:.0%} kept"}
    kind = row.get("method") or " ".join(text.format(row[key]) for key, text in shares.items() if key in row)
    if "fails" in row:
        return f"| {row['network']} | {kind} | fails: {row['fails']} | | | | |"
    memory = operators = ""
    if "operators" in row:
        operators = " to ".join(str(count) for count in row["operators"])
    if "peak" in row:
        dense, ours = (peak + held for peak, held in zip(row["peak"], row["held"], strict=True))
        memory = f"{ours / dense:.3f}"
    times = " | ".join(f"{row[key][1]:.2f}" for key in ("base_ms", "ours_ms"))
    return f"| {row['network']} | {kind} | {_ratio(row)} | {times} | {memory} | {operators} |"


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    shares = (round(row.get(key, -1.0), 3) for key in ("gone", "keep"))
    return row["network"], row.get("method"), *shares


def _between(parts: dict[str, list[dict[str, Any]]]) -> str:
    """What gates add to a step, in milliseconds, and what of it the rows of the floor explain."""
    told = []
    for row in parts.get("steps", []):
        least = [one for one in parts["floor"] if one["network"] == row["network"] and "one" in one["method"].split()]
        if row["method"] == "hard-concrete" and least:
            shares = ", ".join(f"{one['method']} {one['ours_ms'][1]:.2f}" for one in least)
            added = (row["ratio"][1] - 1.0) * row["base_ms"][1]
            told.append(f"{row['network']} {added:.2f} ms, of which {shares}")
    return (
        f"Structured hard concrete gates add: {'; '.join(told)}. The rest is Python between the operators (hooks, "
        "parametrizations, autograd's calls), and one pass over each gated weight or input forwards, two back. ARM "
        "cannot take less than 1 and its second pass. Gates on single weights cannot take less than 1 and the last "
        "three rows; what they take beyond is the sigmoid and its slope, and what a budget asks of every gate."
    )


def page(record: dict[str, Any]) -> str:
    """The page, from the record alone."""
    lines = ["# Training steps", "", *textwrap.wrap(ABOUT, 120)]
    for threads, parts in record["threads"].items():
        for part, rows in parts.items():
            heading, what = TITLES[part]
            lines += ["", f"## {heading}, {threads} thread{'s' * (threads != '1')}", "", f"{what}.", ""]
            lines += [
                "| network | | ratio | base, ms | ours, ms | memory | operators |",
                "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
            ]
            lines += [_line(row) for row in rows]
            if part == "floor":
                lines += ["", *textwrap.wrap(_between(parts), 120)]
    made = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    return "\n".join([*lines, "", f"Made with {made}, by", "", "```", "python benchmarks/steps.py", "```", ""])


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="parts of names of parts, networks or methods")
    parser.add_argument("--compile", action="store_true", help="also under torch.compile")
    parser.add_argument(
        "--short", action="store_true", help="two networks, each part once, for function alone; writes nothing"
    )
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args(given)
    args.rounds = 1 if args.short else args.rounds
    return args


def main() -> None:
    args = arguments()
    from secateur.recipes.record import write_text

    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    keep_memory()
    found = {} if args.page else measured(args)
    if args.short:
        return
    record = recorded(RECORD, {"threads": {}})
    if found:
        here = record["threads"].setdefault(str(args.threads), {})
        for part, rows in found.items():
            known = {_key(row): row for row in here.get(part, [])} | {_key(row): row for row in rows}
            here[part] = list(known.values())
        keep(RECORD, record)
    write_text(PAGE, page(record))


if __name__ == "__main__":
    main()
