"""The zoo's page: every architecture traced, cut in half and proven in its tiny size, traced in its real size.

    python benchmarks/zoo.py                 # all of them
    python benchmarks/zoo.py hf-bert unet    # some; the others keep what the record holds
    python benchmarks/zoo.py --expect        # and raise what the tests expect to what was found

Each model runs in a process of its own with a time limit. Writes ``results/zoo.json`` and, from it, ``docs/zoo.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import platform
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.conftest import _declare_torchvision_operators  # noqa: E402
from tests.zoo import EXPECTED, ZOO, Row, missing  # noqa: E402
from tests.zoo_exam import Exam, counted_macs, held_back, one_each  # noqa: E402

import secateur as sc  # noqa: E402 - the zoo lives beside the package
from secateur.recipes.record import write_text  # noqa: E402

RECORD, PAGE = ROOT / "results" / "zoo.json", ROOT / "docs" / "zoo.md"
EXPECTATIONS = ROOT / "tests" / "zoo_expected.json"
#: Address space of a model's process: more than any model of the zoo has needed, less than the machine has.
MEMORY = 16 << 30


def tiny(row: Row) -> dict[str, Any]:
    """Everything that the zoo is held against, in the tiny size."""
    torch.manual_seed(0)
    model, example = row.tiny()
    exam = Exam(model, example)
    proof, uneven = exam.proof(), exam.proof_uneven()
    dense, cut = exam.structure.cost(), exam.structure.cost(exam.keep)
    found = {
        "seconds": exam.seconds,
        "params": dense.params,
        "groups": len(exam.structure.groups),
        "units": exam.units,
        "gone": exam.gone,
        "difference": max(proof.relative, uneven.relative),
        "settings": len(proof.checked),
        "skipped": list(proof.skipped),
        "effect": exam.effect(),
        "params_agree": exam.n_params() == cut.params,
        "held_back": held_back(exam.structure),
        "notes": list(exam.structure.notes),
    }
    if row.uncounted:
        found["macs_agree"] = None
    else:
        counted = counted_macs(exam.model, example), counted_macs(exam.small, example)
        found["macs_agree"] = counted == (dense.macs, cut.macs)
    if row.causal:
        same, apart = exam.generated()
        found["generates"] = {"same": same, "difference": apart}
    return found


def real(row: Row) -> dict[str, Any]:
    """The trace in the real size, and the smallest model that it promises, built and run on meta."""
    assert row.real is not None
    with torch.device("meta"):
        model, example = row.real()
    model.to("meta")  # what some build from numbers of their own is on the processor
    start = time.process_time()
    structure = sc.trace(model, example)
    seconds = time.process_time() - start
    dense, least = structure.cost(), structure.cost(one_each(structure))
    found = {
        "seconds": seconds,
        "params": dense.params,
        "macs": dense.macs,
        "groups": len(structure.groups),
        "units": sum(group.size for group in structure.groups),
        "gone": 1 - least.params / dense.params,
        "held_back": held_back(structure),
        "notes": list(structure.notes),
    }
    # The smallest model must run, and its own trace must count what was promised.
    small = sc.compact(model, structure, one_each(structure))
    found["smallest"] = asdict(sc.trace(small, example).cost())
    found["smallest_agrees"] = found["smallest"] == asdict(least)
    return found


def _child(examine: Callable[[Row], dict[str, Any]], row: Row, pipe: Any, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    try:
        pipe.send(examine(row))
    except sc.SecateurError as error:
        pipe.send({"refused": f"{type(error).__name__}: {error}"})
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs on the page
        pipe.send({"raised": f"{type(error).__name__}: {error}"})


def isolated(examine: Callable[[Row], dict[str, Any]], row: Row, limit: int) -> dict[str, Any]:
    """The same in a process of its own; what does not end in ``limit`` seconds of the processor is ended."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(examine, row, sender, limit))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        found = {"raised": f"the process ended with {process.exitcode}, within {limit} s of the processor"}
    process.join()
    return found


def _load(package: str) -> None:
    with contextlib.suppress(ImportError):
        if importlib.util.find_spec("torchvision") is not None:
            _declare_torchvision_operators()
        importlib.import_module(package)


def versions() -> dict[str, str]:
    installed = [name for name in ("torch", "transformers", "timm", "torchvision") if importlib.util.find_spec(name)]
    return {"python": platform.python_version(), **{name: version(name) for name in installed}}


def failed(found: dict[str, Any] | None) -> bool:
    return found is not None and ("refused" in found or "raised" in found)


def wrong(found: dict[str, Any]) -> list[str]:
    """What of a tiny model is not as promised; "" where all is."""
    if failed(found):
        return []
    problems = [] if found["params_agree"] else ["parameters"]
    if found["macs_agree"] is False:
        problems.append("MACs")
    if "generates" in found and not found["generates"]["same"]:
        problems.append("generated words")
    return problems


def page(record: dict[str, Any]) -> str:
    """The page, from the record alone."""
    rows = {name: record["rows"][name] for name in ZOO if name in record["rows"]}
    return "\n".join([_summary(record, rows), _tiny_table(rows), _real_table(rows), _held_back(rows), _failures(rows)])


def _summary(record: dict[str, Any], rows: dict[str, Any]) -> str:
    tinies = {name: row["tiny"] for name, row in rows.items() if "tiny" in row}
    good = {name: found for name, found in tinies.items() if not failed(found)}
    reals = {name: row["real"] for name, row in rows.items() if "real" in row}
    traced = {name: found for name, found in reals.items() if not failed(found)}
    half = [name for name, found in traced.items() if found["gone"] >= 0.5]
    counted = [found for found in good.values() if found["macs_agree"] is not None]
    generated = [found for found in good.values() if "generates" in found]
    unequal = [name for name, found in tinies.items() if "differs by" in found.get("refused", "")]
    refused = [name for name, found in tinies.items() if failed(found) and name not in unequal]
    made = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    counts = Counter(ZOO[name].origin for name in rows)
    origins = ", ".join(f"{count} {_who(origin)}" for origin, count in counts.most_common())
    largest = max((found["difference"] for found in good.values()), default=math.nan)
    agree = sum(found["params_agree"] for found in good.values())
    equal = sum(found["macs_agree"] for found in counted)
    same = sum(found["generates"]["same"] for found in generated)
    return f"""# The zoo

{len(rows)} architectures: {origins}. Each is built small, traced without a line about
it, and cut twice at random: to half of every group, and to anything between one unit and all but one. The masked and
the compact model are then compared in float64 with every parameter and buffer drawn anew, in evaluation and training
mode, with and without grad, with the given and the doubled batch. In its real size each is built and traced on
`meta`, and cut down to one unit of every group; that smallest model is traced again, and must count the parameters and
MACs that were promised. Written by `make zoo`; no figure here is typed by hand.

| | |
| --- | ---: |
| wrong outputs | {len(unequal)} |
| architectures refused (listed below) | {len(refused)} of {len(tinies)} |
| largest difference of masked and compact | {largest:.1e} |
| parameters as `cost(keep)` says | {agree} of {len(good)} |
| MACs as `torch.utils.flop_counter` counts, dense and compact | {equal} of {len(counted)} |
| same words from `generate` with a cache | {same} of {len(generated)} |
| real sizes traced on `meta` | {len(traced)} of {len(reals)} |
| of all real sizes, smallest model as promised | {sum(found["smallest_agrees"] for found in traced.values())} |
| of all real sizes, with at least half of the parameters gone | {len(half)} ({len(half) / max(len(reals), 1):.0%}) |

Differences are relative to the largest value of an output. Where a weight is rescaled (the RMSNorm over a dimension
that was cut), it is rounded to the model's own float32 once, and that rounding is what shows.

Times are of the processor, in one thread; [tracing side by side with another library](trace-benchmark.md) has a page of
its own. Made with {made}.
"""


def _who(origin: str) -> str:
    return "written for these tests" if origin == "own" else f"of {origin}"


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def _tiny_table(rows: dict[str, Any]) -> str:
    lines = [
        "## Tiny sizes, cut in half",
        "",
        "`can go` is the share of the parameters that is gone with one unit left in every group, in percent;",
        "`effect` is how far the cut moves the outputs of a re-drawn model: equality would mean nothing without it.",
        "",
        "| architecture | kind | trace, s | groups | units | can go | difference | effect | MACs | what froze most |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for name, row in rows.items():
        found = row.get("tiny")
        if found is None or failed(found):
            continue
        macs = {None: "by hand", True: "equal", False: "differ"}[found["macs_agree"]]
        reason = next((reason for reason in found["held_back"] if reason != "one unit of a group stays"), "")
        lines.append(
            f"| {name} | {ZOO[name].family} | {found['seconds']:.2f} | {found['groups']} | {found['units']} | "
            f"{_share(found['gone'])} | {found['difference']:.0e} | {found['effect']:.0e} | {macs} | {reason} |"
        )
    return "\n".join([*lines, ""])


def _real_table(rows: dict[str, Any]) -> str:
    lines = [
        "## Real sizes, on `meta`",
        "",
        "| architecture | parameters | trace, s | groups | units | can go | what holds back most |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, row in rows.items():
        found = row.get("real")
        if found is None or failed(found):
            continue
        held = [
            f"{100 * count / found['params']:.0f} %: {reason}"
            for reason, count in found["held_back"].items()
            if count >= 0.05 * found["params"]
        ]
        lines.append(
            f"| {name} | {found['params']:,} | {found['seconds']:.1f} | {found['groups']} | {found['units']:,} | "
            f"{_share(found['gone'])} | {'; '.join(held[:2])} |"
        )
    return "\n".join([*lines, ""])


def _held_back(rows: dict[str, Any]) -> str:
    """Reasons over all real sizes."""
    total: Counter[str] = Counter()
    where: dict[str, int] = Counter()
    for row in rows.values():
        found = row.get("real")
        if found is None or failed(found):
            continue
        for reason, count in found["held_back"].items():
            total[reason] += count / found["params"]
            where[reason] += 1
    n = sum(1 for row in rows.values() if "real" in row and not failed(row["real"]))
    lines = [
        "## What holds back",
        "",
        "Mean share of the parameters of a real-size model that stays at the smallest keep-set, by the reason that",
        "froze the largest dimension of the tensor.",
        "",
        "| reason | share, % | architectures |",
        "| --- | ---: | ---: |",
        *(f"| {reason} | {100 * share / max(n, 1):.2f} | {where[reason]} |" for reason, share in total.most_common(20)),
    ]
    return "\n".join([*lines, ""])


def _failures(rows: dict[str, Any]) -> str:
    lines = ["## Refused, and counted otherwise", ""]
    for name, row in rows.items():
        for size in ("tiny", "real"):
            found = row.get(size)
            if failed(found):
                lines.append(f"- {name}, {size}: {found.get('refused') or found.get('raised')}")
        problems = wrong(row["tiny"]) if "tiny" in row else []
        if problems:
            lines.append(f"- {name}: {' and '.join(problems)} differ from what was promised")
        if ZOO[name].uncounted:
            lines.append(f"- {name}: MACs not compared: {ZOO[name].uncounted}")
    lines += [f"- {name}: {note}" for name, row in rows.items() for note in row.get("tiny", {}).get("notes", ())]
    return "\n".join([*lines, ""])


def expect(record: dict[str, Any]) -> None:
    """Raise what the tests expect to what was found; never lower it."""
    expected = {name: dict(EXPECTED.get(name, {})) for name in ZOO}
    for name, row in record["rows"].items():
        found = row.get("tiny")
        if name not in expected or found is None or failed(found) or wrong(found):
            continue
        for key in ("groups", "units", "gone"):
            # Two figures are enough to see a loss, and few enough to survive another release of a package.
            value = math.floor(found[key] * 100) / 100 if key == "gone" else found[key]
            expected[name][key] = max(expected[name].get(key, 0), value)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in expected.items() if row)
    write_text(EXPECTATIONS, f"{{\n{lines}\n}}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; all without any")
    parser.add_argument("--size", choices=("tiny", "real", "both"), default="both")
    parser.add_argument("--limit", type=int, default=300, help="seconds of the processor for one model in one size")
    parser.add_argument("--page", action="store_true", help="write the page from the record, run nothing")
    parser.add_argument("--expect", action="store_true", help="raise what the tests expect to what was found")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in ZOO]:
        parser.error(f"no architecture is named {', '.join(unknown)}; there are {', '.join(ZOO)}")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"rows": {}}
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    names = [] if args.page else args.names or list(ZOO)
    # Loaded once here, so that the processes of the models have them already.
    for package in sorted({ZOO[name].origin for name in names} - {"own"}):
        _load(package)
    for name in names:
        row = ZOO[name]
        if lacking := missing(row):
            print(f"{name}: left out, {' and '.join(lacking)} not installed", flush=True)
            continue
        for size, examine in (("tiny", tiny), ("real", real)):
            if args.size not in (size, "both") or (size == "real" and row.real is None):
                continue
            found = record["rows"].setdefault(name, {})[size] = isolated(examine, row, args.limit)
            shown = (
                found.get("refused") or found.get("raised") or f"{found['gone']:.1%} can go, {found['seconds']:.1f} s"
            )
            print(f"{name} {size}: {shown[:200]} {wrong(found) if size == 'tiny' else ''}", flush=True)
        record["versions"] = versions()
        RECORD.parent.mkdir(exist_ok=True)
        write_text(RECORD, json.dumps(record, indent=1) + "\n")
    PAGE.parent.mkdir(exist_ok=True)
    write_text(PAGE, page(record))
    if args.expect:
        expect(record)


if __name__ == "__main__":
    main()
