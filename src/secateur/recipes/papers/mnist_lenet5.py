"""LeNet-5-Caffe on MNIST: gates on feature maps and on the inputs of both dense layers."""

from __future__ import annotations

from secateur.recipes.papers.recipe import Distillation, Point, Recipe, opened
from secateur.recipes.train import Phase

__all__ = ["OURS", "PAPER"]

#: As published: Adam for gates and weights alike, 200 epochs, inputs in [0, 1], drop rate 0.5 everywhere. The authors'
#: weight decay of LeNet-5 is divided by the number of images twice, and so is none.
PAPER = Recipe(
    experiment="mnist-lenet5",
    name="paper",
    version=1,
    data="mnist",
    net="lenet-5",
    methods={
        "hard-concrete": {"init_open": opened(0.5)},
        "arm": {"init_open": 0.5},
        "ar": {"init_open": 0.5},
    },
    points=(Point(lambdas=(0.1, 0.1, 0.1, 0.1)), Point(lambdas=(10.0, 0.5, 0.1, 10.0))),
    dense=Phase("dense", 200, batch=100, lr=1e-3, milestones=(200,)),
    gated=Phase("gated", 200, batch=100, lr=1e-3, gate_lr=1e-3, milestones=(200,), average=0.999),
)

#: Whatever reaches the size with the least error, within 60 epochs. The maps of the second convolution are the dearest
#: units while the hidden layer is wide, and cheap once it is narrow: a budget alone closes nearly all of them before,
#: and what has closed hardly returns. So they start as good as surely open, which delays them by some epochs, and the
#: hidden layer has a bound of its own.
OURS = Recipe(
    experiment="mnist-lenet5",
    name="ours",
    version=3,
    data="mnist",
    net="lenet-5",
    methods={
        "hard-concrete": {"clamp": None, "conv2": {"init_open": 0.9999}},
        # A chance moves k times as far in a step; 4 at this rate is as fast as 1 at that of the MLP.
        "arm": {"k": 4.0, "rao_blackwell": True, "conv2": {"k": 1.0, "init_open": 0.9999}},
        "ar": {
            "k": 4.0,
            "rao_blackwell": True,
            "control_variate": True,
            "conv2": {"k": 1.0, "init_open": 0.9999},
        },
        # Thrice the scale of noise and gate is a third of the speed.
        "diffprune": {"mode": "stochastic", "conv2": {"scale": 3.0, "tau": 0.75, "init_open": 0.99}},
        # Its competing gates keep hidden units that have died, and grow survivors until their steps kill them.
        "diff-sparse": {"renormalised": True, "weight_decay": 0.05},
        "magnitude": {},
    },
    points=(Point(keep_params=0.0138), Point(keep_params=0.00505)),
    dense=Phase("dense", 20, batch=128, lr=1e-3, fused=True),
    gated=Phase("gated", 24, batch=128, lr=2e-3, gate_lr=0.005, milestones=(24,), fused=True, checks=24),
    tuned=Phase("tuned", 36, batch=64, lr=4e-3, fused=True),
    dropout={"fc1": 0.25, "fc2": 0.5},
    distillation=Distillation(temperature=2.0, share=0.9),
    hold=0.05,
    ramp=0.8,
    per={"fc1": {"keep_units": 0.03}},
    half=True,
    # Two thousand parameters underfit: all that the teacher says of an image is of use to them, and fewer hidden units
    # leave room for another feature map.
    smaller={
        0.0075: {"distillation": Distillation(temperature=3.0, share=1.0), "per": {"fc1": {"keep_units": 0.02}}},
    },
)
