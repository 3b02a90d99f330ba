"""What each ATen operator does to units, one function per operator family."""

from secateur.structure.rules import (
    attention,
    contraction,
    convolution,
    creation,
    indexing,
    moves,
    normalisation,
    parts,
    pointwise,
    reduction,
    spatial,
    spectral,
    views,
    writing,
)
from secateur.structure.rules.pointwise import pointwise as pointwise_rule
from secateur.structure.rules.registry import Call, RuleEntry, Uncovered, entry_for, known_operators, operator_name

__all__ = [
    "Call",
    "RuleEntry",
    "Uncovered",
    "attention",
    "contraction",
    "convolution",
    "creation",
    "entry_for",
    "indexing",
    "known_operators",
    "moves",
    "normalisation",
    "operator_name",
    "parts",
    "pointwise",
    "pointwise_rule",
    "reduction",
    "spatial",
    "spectral",
    "views",
    "writing",
]
