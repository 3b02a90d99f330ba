"""Secateur trains PyTorch networks to become small: gates, budgets, and exact cutting of what they close."""

from secateur.budgets.budget import Budget
from secateur.budgets.penalty import Penalty
from secateur.compaction.artifact import load, save
from secateur.compaction.compact import compact, cut_of, mask
from secateur.errors import BudgetError, CompactionError, GateError, LatencyError, SecateurError, TraceError
from secateur.gates import (
    ARM,
    DifferentiableSparsification,
    DiffPrune,
    HardConcrete,
    Magnitude,
    Method,
    StraightThrough,
    method_from_name,
)
from secateur.latency.model import LatencyModel, latency_model
from secateur.pruning.activations import output_group
from secateur.pruning.activity import ActivityL2
from secateur.pruning.attach import attach
from secateur.pruning.finalize import Report
from secateur.pruning.pruner import Pruner
from secateur.pruning.rule import Rule
from secateur.pruning.shrink import Shrinkage
from secateur.structure.cut import CutPlan
from secateur.structure.example import Example
from secateur.structure.groups import Cost, Frozen, Group, Keep, Member
from secateur.structure.rounding import rounded_keep
from secateur.structure.structure import Structure
from secateur.structure.trace import trace

__version__ = "0.1.0"

__all__ = [
    "ARM",
    "ActivityL2",
    "Budget",
    "BudgetError",
    "CompactionError",
    "Cost",
    "CutPlan",
    "DiffPrune",
    "DifferentiableSparsification",
    "Example",
    "Frozen",
    "GateError",
    "Group",
    "HardConcrete",
    "Keep",
    "LatencyError",
    "LatencyModel",
    "Magnitude",
    "Member",
    "Method",
    "Penalty",
    "Pruner",
    "Report",
    "Rule",
    "SecateurError",
    "Shrinkage",
    "StraightThrough",
    "Structure",
    "TraceError",
    "attach",
    "compact",
    "cut_of",
    "latency_model",
    "load",
    "mask",
    "method_from_name",
    "output_group",
    "rounded_keep",
    "save",
    "trace",
]
