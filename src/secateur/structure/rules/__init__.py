"""What each ATen operator does to units, one function per operator family."""

from secateur.structure.rules import contraction, creation, indexing, pointwise, reduction, shape
from secateur.structure.rules.pointwise import pointwise as pointwise_rule
from secateur.structure.rules.registry import Call, RuleEntry, entry_for, known_operators, operator_name

__all__ = [
    "Call",
    "RuleEntry",
    "contraction",
    "creation",
    "entry_for",
    "indexing",
    "known_operators",
    "operator_name",
    "pointwise",
    "pointwise_rule",
    "reduction",
    "shape",
]
