"""A small GPT on tiny-shakespeare: heads and MLP units gated to a share of the MACs, beside dense and from scratch.

    python benchmarks/gpt_shakespeare.py --data-dir DIR

DIR holds ``input.txt``. Writes ``results/gpt-shakespeare.json`` and, from it, ``docs/gpt.md``. All networks see as many
batches; the compact one is trained on after the cut.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.recipes.measure import n_params
from secateur.recipes.record import versions, write_text
from secateur.structure.cut import CutPlan, cut_

ROOT = Path(__file__).resolve().parents[1]
#: Share of the text that trains, as usual; the rest validates.
TRAINING = 0.9
#: Windows of the validation text that a loss is the mean over.
WINDOWS = 400


@dataclass(frozen=True)
class Settings:
    """One run.

    Args:
        keep_macs: share of the dense network's multiply-accumulates to keep.
        steps: optimizer steps of each network.
        tuned: share of them that the compact network makes after the cut.
        layers: blocks.
        heads: of each block.
        width: of the residual stream.
        context: characters that the network sees.
        batch: windows in a batch.
        lr: Adam's rate for weights at its height; gates have 20 times that, constant.
        weight_decay: of the weights.
        method: of the gates.
        seed: of everything that is drawn.
    """

    keep_macs: float = 0.5
    steps: int = 2000
    tuned: float = 0.4
    layers: int = 3
    heads: int = 8
    width: int = 64
    context: int = 64
    batch: int = 16
    lr: float = 2e-3
    weight_decay: float = 0.1
    method: str = "hard-concrete"
    seed: int = 0


class Block(nn.Module):
    """Causal attention and an MLP, each behind a LayerNorm and added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` to the same shape."""
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Characters to the logits of the next ones: ``(B, T)`` to ``(B, T, V)``."""

    def __init__(self, settings: Settings, vocabulary: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, settings.width)
        self.positions = nn.Parameter(0.02 * torch.randn(settings.context, settings.width))
        self.blocks = nn.Sequential(*(Block(settings.width, settings.heads) for _ in range(settings.layers)))
        self.norm = nn.LayerNorm(settings.width)
        self.head = nn.Linear(settings.width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits at every position."""
        return self.head(self.norm(self.blocks(self.characters(ids) + self.positions)))


def texts(directory: Path) -> tuple[Tensor, Tensor, int]:
    """Training and validation text as numbers of characters, and how many characters there are."""
    text = (directory / "input.txt").read_text(encoding="ascii")
    number = {character: place for place, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([number[character] for character in text])
    split = int(TRAINING * len(ids))
    return ids[:split], ids[split:], len(number)


def windows(ids: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Windows of the text, and the same one character on."""
    at = starts[:, None] + torch.arange(length)
    return ids[at], ids[at + 1]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of the next character, in nats."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.inference_mode()
def validation_loss(model: nn.Module, ids: Tensor, settings: Settings) -> float:
    """The mean over evenly spaced windows, in evaluation mode."""
    starts = torch.linspace(0, len(ids) - settings.context - 1, WINDOWS).long()
    model.eval()
    parts = [loss_of(model, *windows(ids, part, settings.context)).item() for part in starts.split(50)]
    return sum(parts) / len(parts)


def train(
    model: nn.Module, ids: Tensor, settings: Settings, steps: range, seed: int, pruner: sc.Pruner | None = None
) -> float:
    """Makes these of all steps, in place, at the rates that they have; returns the mean processor seconds of a step."""
    decay = settings.weight_decay
    if pruner is None:
        groups = [{"params": list(model.parameters()), "lr": settings.lr, "weight_decay": decay}]
    else:
        groups = pruner.param_groups(lr=settings.lr, weight_decay=decay)
    optimizer = torch.optim.AdamW(groups)
    rise, whole = max(1, settings.steps // 20), settings.steps
    rates: list[Callable[[int], float]] = [
        lambda step: min(
            (steps.start + step + 1) / rise, 0.55 + 0.45 * math.cos(math.pi * (steps.start + step) / whole)
        ),
        lambda _: 1.0,
    ]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates[: len(groups)])
    generator = torch.Generator().manual_seed(seed)
    model.train()
    started = time.process_time()
    for _ in steps:
        starts = torch.randint(len(ids) - settings.context - 1, (settings.batch,), generator=generator)
        x, y = windows(ids, starts, settings.context)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            return loss_of(model, x, y)

        (closure() if pruner is None else pruner.loss(closure)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if pruner is not None:
            pruner.step()
    return (time.process_time() - started) / max(1, len(steps))


def fresh(settings: Settings, vocabulary: int, plan: CutPlan | None = None) -> GPT:
    """A network with its initial weights, at full widths or at those of a plan."""
    torch.manual_seed(settings.seed)
    model = GPT(settings, vocabulary)
    if plan is not None:
        cut_(model, plan)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return model


def run(settings: Settings, directory: Path) -> dict[str, object]:
    """Dense, gated, compact, tuned and scratch; what the record holds."""
    ids, held_out, vocabulary = texts(directory)
    example = (ids[: 2 * settings.context].view(2, -1),)
    rows: dict[str, dict[str, float]] = {}

    def note(name: str, model: nn.Module, macs: int, seconds: float | None = None) -> None:
        loss = validation_loss(model, held_out, settings)
        rows[name] = {"loss": loss, "params": n_params(model), "macs": macs}
        if seconds is not None:
            rows[name]["seconds"] = seconds
        print(f"{name:<8} validation loss {loss:.4f}, {rows[name]['params']:,} parameters, {macs:,} MACs", flush=True)

    after = round(settings.tuned * settings.steps)
    before = settings.steps - after
    gated = fresh(settings, vocabulary)
    structure = sc.trace(gated, example)
    budget = sc.Budget(keep_macs=settings.keep_macs, steps=before)
    pruner = sc.attach(
        gated, examples=example, structure=structure, method=settings.method, budget=budget, seed=settings.seed
    )
    seconds = train(gated, ids, settings, range(before), settings.seed, pruner)
    small, report = pruner.finalize()
    plan = sc.cut_of(small)
    note("gated", gated, report.dense.macs, seconds)
    note("compact", small, report.compact.macs)
    train(small, ids, settings, range(before, settings.steps), settings.seed + 1)
    note("tuned", small, report.compact.macs)
    scratch = fresh(settings, vocabulary, plan)
    seconds = train(scratch, ids, settings, range(settings.steps), settings.seed)
    note("scratch", scratch, report.compact.macs, seconds)
    dense = fresh(settings, vocabulary)
    seconds = train(dense, ids, settings, range(settings.steps), settings.seed)
    note("dense", dense, report.dense.macs, seconds)
    kinds = {group.name: group.kind for group in structure.groups}
    return {
        "settings": asdict(settings),
        "versions": versions(),
        "characters": [len(ids), len(held_out)],
        "rows": rows,
        "widths": {name: [*width, kinds.get(name, "")] for name, width in report.widths.items()},
        "difference": {"float32": report.difference_float32, "float64": report.difference_float64},
        "flipped": report.flipped,
    }


def page(record: dict, command: str) -> str:
    """The page, from the record alone."""
    s, rows = record["settings"], record["rows"]
    dense = rows["dense"]
    after = round(s["tuned"] * s["steps"])
    share = {key: {name: row[key] / dense[key] for name, row in rows.items()} for key in ("params", "macs")}
    table = "\n".join(
        f"| {name} | {rows[name]['loss']:.3f} | {rows[name]['params']:,} | {share['params'][name]:.1%} |"
        f" {rows[name]['macs']:,} | {share['macs'][name]:.1%} |"
        for name in ("dense", "scratch", "gated", "compact", "tuned")
    )
    kept = "\n".join(
        f"| `{name}` | {'heads' if kind == 'heads' else 'units'} | {left} of {size} |"
        for name, (left, size, kind) in record["widths"].items()
    )
    apart, tuned = record["difference"], rows["tuned"]["loss"]
    slower = rows["gated"]["seconds"] / dense["seconds"]
    return f"""# A small GPT on tiny-shakespeare

{s["layers"]} blocks of {s["heads"]} heads, width {s["width"]}, {s["context"]} characters seen. Heads and MLP units
have `{s["method"]}` gates, to {s["keep_macs"]:.0%} of all multiply-accumulates; what lies along the residual stream is
frozen, for LayerNorm runs over it. Each network sees {s["steps"]:,} batches of {s["batch"]} windows: `tuned` is the
compact network after {s["steps"] - after:,} with gates and {after:,} without; `scratch` has its widths from the start
and no gates. The rate falls along one cosine over all of a network's steps. The loss is that of the next character in
nats, the mean over {WINDOWS} windows of the last {1 - TRAINING:.0%} of the text, after the last step, of one seed.

| network | validation loss | parameters | share | MACs | share |
| --- | ---: | ---: | ---: | ---: | ---: |
{table}

`tuned` is at {tuned - dense["loss"]:+.3f} nats from `dense` and at {tuned - rows["scratch"]["loss"]:+.3f} from
`scratch`. A step with gates took {slower:.2f} times the processor time of a dense one. Largest output difference of
gated and compact: {apart["float32"]:.1e} in float32, {apart["float64"]:.1e} in float64; units flipped at the end to
meet the budget: {record["flipped"]}.

| group | | kept |
| --- | --- | ---: |
{kept}

```
{command}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds input.txt")
    parser.add_argument("--record", type=Path, default=ROOT / "results" / "gpt-shakespeare.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpt.md")
    own = asdict(Settings())
    for name, value in own.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    chosen = {name: getattr(args, name) for name in own}
    record = run(Settings(**chosen), args.data_dir)
    words = [f"--{name.replace('_', '-')} {value}" for name, value in chosen.items() if value != own[name]]
    for path in (args.record, args.out):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.record, json.dumps(record, indent=2) + "\n")
    write_text(args.out, page(record, " ".join(["python benchmarks/gpt_shakespeare.py --data-dir DIR", *words])))


if __name__ == "__main__":
    main()
