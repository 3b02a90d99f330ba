"""Train LeNet-5 on MNIST until it keeps 5% of its parameters. One file, no framework: your loop and five lines.

    python examples/mnist.py --data-dir ../shared/data/mnist

The lines that are Secateur's end in ``# <- secateur``. Everything else is a training loop as you have it already.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir", type=Path, default=Path(__file__).resolve().parents[2] / "shared/data/mnist")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--limit", type=int, default=60_000, help="use only the first so many images of each set")
parser.add_argument("--out", type=Path, default=Path("lenet-5.safetensors"))
args = parser.parse_args()
torch.manual_seed(0)


# ---- data: the four .gz files of MNIST -----------------------------------------------------------------------------
def images(name: str) -> torch.Tensor:
    raw = np.frombuffer(gzip.decompress((args.data_dir / name).read_bytes()), np.uint8, offset=16)
    return (torch.tensor(raw).reshape(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081


def labels(name: str) -> torch.Tensor:
    raw = np.frombuffer(gzip.decompress((args.data_dir / name).read_bytes()), np.uint8, offset=8)
    return torch.tensor(raw).long()


x_train, y_train = images("train-images-idx3-ubyte.gz"), labels("train-labels-idx1-ubyte.gz")
x_test, y_test = images("t10k-images-idx3-ubyte.gz"), labels("t10k-labels-idx1-ubyte.gz")
x_train, y_train, x_test, y_test = (each[: args.limit] for each in (x_train, y_train, x_test, y_test))


# ---- model: LeNet-5 as Caffe ships it -------------------------------------------------------------------------------
def lenet5() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def test_error(net: nn.Module) -> float:
    net.eval()
    with torch.inference_mode():
        return 100 * (net(x_test).argmax(1) != y_test).float().mean().item()


model = lenet5()
budget = sc.Budget(keep_params=0.05)
pruner = sc.attach(model, examples=(x_train[:2],), method=sc.HardConcrete(), budget=budget)  # <- secateur
optimizer = torch.optim.Adam(pruner.param_groups(lr=1e-3, gate_lr=2e-2))  # <- secateur

# ---- training -------------------------------------------------------------------------------------------------------
for epoch in range(args.epochs):
    model.train()
    for batch in torch.randperm(len(x_train)).split(128):
        x, y = x_train[batch], y_train[batch]
        loss = pruner.loss(lambda: F.cross_entropy(model(x), y))  # <- secateur
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()  # <- secateur
    error, share = test_error(model), pruner.exact.params / pruner.costs.dense.params
    print(f"epoch {epoch + 1:2d}  loss {loss.item():.3f}  test error {error:.2f}%  open {share:.1%}", flush=True)

# ---- the small network: plain torch, same outputs, and a file of it -------------------------------------------------
small, report = pruner.finalize()  # <- secateur
print(small)
print(report)
print(f"test error {test_error(small):.2f}% with {sum(p.numel() for p in small.parameters()):,} parameters")

sc.save(small, args.out)
again = sc.load(args.out, lenet5())
assert torch.equal(again(x_test[:100]), small(x_test[:100]))
