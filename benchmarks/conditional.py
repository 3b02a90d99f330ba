"""What a training step costs that leaves out the units which its draw closes.

    python benchmarks/conditional.py           # everything; more rounds with --rounds, less with --only
    python benchmarks/conditional.py --short   # one network, once, for function alone; writes nothing
    python benchmarks/conditional.py --page    # write the page from the record

A dense step, a gated one on all units and one on the open units take turns in one process, each pair of gated steps on
the same draw; every round gives one ratio. The clock is that of the processor. Writes ``results/conditional.json`` and,
from it, ``docs/conditional.md``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.records import keep, recorded  # noqa: E402
from benchmarks.step_cases import CASES  # noqa: E402
from benchmarks.step_clock import stepper  # noqa: E402

import secateur as sc  # noqa: E402
from secateur.pruning.conditional import paying  # noqa: E402
from secateur.recipes.measure import step_ratios  # noqa: E402

RECORD, PAGE = ROOT / "results" / "conditional.json", ROOT / "docs" / "conditional.md"
#: Rate of all parameters: chances stay what they are.
SLOW = 1e-7
#: Open chance of every unit.
SHARES = (0.9, 0.7, 0.5, 0.3, 0.1)
METHODS: dict[str, Callable[[float], sc.Method]] = {
    "ar": lambda share: sc.ARM(estimator="ar", init_open=share),
    "arm": lambda share: sc.ARM(init_open=share),
    "hard-concrete": lambda share: sc.HardConcrete(init_open=share),
}
#: What is measured, with the share of the rounds: networks whose steps take long have fewer.
ROWS = (
    ("LeNet-300-100", "ar", 1.0),
    ("LeNet-300-100", "hard-concrete", 1.0),
    ("LeNet-5", "ar", 1.0),
    ("LeNet-5", "arm", 1.0),
    ("LeNet-5", "hard-concrete", 1.0),
    ("ResNet-20", "hard-concrete", 0.3),
    ("small GPT", "hard-concrete", 0.4),
)
ABOUT = (
    """
    `sc.attach(model, ..., conditional="auto")` lets `pruner.loss` leave units out of a step whose gates it has drawn as
    exactly 0. Weights of their producers and consumers are narrowed before the forward pass and are whole again after
    it; gradients come back in full shape, zero at what was left out. `pruner.shrink` takes units that stay closed for
    good; this is about units that one draw closes.
    """,
    """
    The step gives what the full step gives, up to rounding: loss, gradients of all weights and gates, running
    statistics, random states. So it is decided group by group what may be left out:
    """,
    """
    The first time, a full pass and one without half of the units are compared on the batch at hand; if they differ by
    more than rounding, or the second one fails (activation checkpointing, weights read past the layer that holds them),
    nothing is left out, and `pruner.conditional.off` says why. `"auto"` then times steps at three shares of open units
    against the full step, in turns and in processor time, and from then on leaves units out of draws whose share of
    multiply-accumulates is at most the one from which that saved time (`pruner.conditional.pays_from`). It looks again
    after some thousand steps, and once `pruner.shrink` has taken a third of the model. These passes leave nothing
    behind, but they do call your closure a few times more; and since times decide, a run repeats up to rounding and not
    bit by bit. `True` leaves out whatever may be and takes no times; `False` is the default.
    """,
    """
    Hooks of yours on layers in between see only what is left. Passes of parts of the model, in evaluation mode, under
    `torch.compile`, or with gated layers in evaluation mode are full ones. A closed unit whose activations are not
    finite spoils a full step (0 times infinity) and not this one.
    """,
    """
    Gates are drawn anew in every step, each open with the chance in the first column. Both gated steps have the same
    draw; Adam, fused, on all sides; seconds are those of the processor. Quartiles in brackets. Written by
    `benchmarks/conditional.py`; no figure here is typed by hand.
    """,
)
TABLE = """\
| units | left out |
| --- | --- |
| of ARM, AR, hard concrete, DiffPrune with `backward="exact"` (the default under noise), magnitude | as below |
| of methods that give gates at 0 a gradient (straight-through, DiffPrune's smooth backward, Differentiable \
Sparsification) | never: that gradient needs the unit |
| with running statistics on their way (BatchNorm) | computed, normalised and counted, but not read: convolutions and \
linear layers behind read only the open ones |
| of a model that draws random numbers (dropout) | the same: the masks stay those of the full step |
| all other structured units, heads, units of your own | neither computed nor read |
| single inputs of a layer | not read |
| before an RMSNorm, blocks, single weights, gates on outputs | never |"""


def row(name: str, method: str, share: float, rounds: int, size: int | None = None) -> dict[str, Any]:
    """A dense step, a gated one, and one on open units, at one open chance."""
    case = CASES[name]
    batch = _batch(name, size)
    steps: dict[str, Callable[[], object]] = {}
    torch.manual_seed(0)
    steps["dense"] = stepper(case.build(), batch, None, lr=SLOW)
    for side, when in (("full", False), ("open", True)):
        torch.manual_seed(0)
        model = case.build()
        pruner = sc.attach(model, examples=(batch[0][:2],), method=METHODS[method](share), conditional=when)
        steps[side] = stepper(model, batch, pruner, lr=SLOW)
        steps[side]()  # the proof comes before the clock
    left: list[float] = []
    step = steps["open"]

    def noted() -> None:
        step()
        left.append(pruner.conditional.share)

    ratios = step_ratios(steps | {"open": noted}, "full", rounds)
    found = {side: [round(one.low, 4), round(one.median, 4), round(one.high, 4)] for side, one in ratios.items()}
    return {"network": name, "method": method, "units": share, "macs": round(statistics.mean(left), 4), **found}


def chosen(name: str, method: str, size: int | None = None) -> float:
    """The share of multiply-accumulates from which ``"auto"`` finds that it pays."""
    batch = _batch(name, size)
    torch.manual_seed(0)
    model = CASES[name].build()
    pruner = sc.attach(model, examples=(batch[0][:2],), method=METHODS[method](0.5), conditional="auto")
    step = stepper(model, batch, pruner, lr=SLOW)
    step()
    step()
    assert pruner.conditional.pays_from is not None
    return pruner.conditional.pays_from


def _batch(name: str, size: int | None) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return CASES[name].batch(size or CASES[name].size)


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every network and method that was asked for, with its rows."""
    found = []
    for name, method, part in ROWS[1:2] if args.short else ROWS:
        if args.only and not any(word in f"{name} {method}" for word in args.only):
            continue
        size, rounds = (4, 2) if args.short else (None, max(2, round(part * args.rounds)))
        rows = [row(name, method, share, rounds, size) for share in (SHARES[2:3] if args.short else SHARES)]
        found.append({"network": name, "method": method, "pays_from": chosen(name, method, size), "rows": rows})
        print(name, method, found[-1]["pays_from"], [(one["units"], one["open"][1]) for one in rows], flush=True)
    return found


def page(record: dict[str, Any]) -> str:
    """The page, from the record alone."""
    about = [textwrap.fill(" ".join(part.split()), 120, break_on_hyphens=False) for part in ABOUT]
    lines = [
        "# Conditional computation",
        "",
        about[0],
        "",
        about[1],
        "",
        TABLE,
        "",
        about[2],
        "",
        about[3],
        "",
        "## What it saves",
    ]
    lines += ["", about[4], ""]
    lines += ["| network | method | pays from | measured by `auto` |", "| --- | --- | ---: | ---: |"]
    for one in record["found"]:
        rows = one["rows"]
        share = paying([row["units"] for row in rows], [row["open"][1] for row in rows]) if len(rows) > 1 else 0.0
        units = f"{share:.0%} of the units open" if share else "never"
        macs = f"{one['pays_from']:.0%} of the multiply-accumulates" if one["pays_from"] else "never"
        lines.append(f"| {one['network']} | {one['method']} | {units} | {macs} |")
    lines += [
        "",
        "A share of 100% means that it paid at every share measured, and that the line through the two largest",
    ]
    lines += ["ones does not reach the full step's time before all units are open.", ""]
    for one in record["found"]:
        lines += [f"### {one['network']}, {one['method']}", ""]
        lines += ["| units open | multiply-accumulates left | over the full step | dense over the full step |"]
        lines += ["| ---: | ---: | ---: | ---: |"]
        for row in one["rows"]:
            ratios = " | ".join("{1:.3f} ({0:.3f} to {2:.3f})".format(*row[side]) for side in ("open", "dense"))
            lines.append(f"| {row['units']:.0%} | {row['macs']:.1%} | {ratios} |")
        lines.append("")
    made = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    threads = f"{record['threads']} thread{'s' * (record['threads'] != 1)}"
    return "\n".join(
        [*lines, f"Made with {made}, {threads}, by", "", "```", "python benchmarks/conditional.py", "```", ""]
    )


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="parts of names of networks or methods")
    parser.add_argument("--short", action="store_true", help="one network, once; writes nothing")
    parser.add_argument("--page", action="store_true")
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    from secateur.recipes.record import write_text

    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    found = [] if args.page else measured(args)
    if args.short:
        return
    record = recorded(RECORD, {"found": []})
    if found:
        known = {(one["network"], one["method"]): one for one in (*record["found"], *found)}
        record["found"] = [known[row[:2]] for row in ROWS if row[:2] in known]
        record |= {"threads": args.threads, "rounds": args.rounds}
        keep(RECORD, record)
    write_text(PAGE, page(record))


if __name__ == "__main__":
    main()
