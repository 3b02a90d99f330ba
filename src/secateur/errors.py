"""The errors that Secateur raises, each with what, where, got, expected and what to do."""

from __future__ import annotations

__all__ = ["BudgetError", "CompactionError", "GateError", "LatencyError", "SecateurError", "TraceError"]


class SecateurError(Exception):
    """Any error that Secateur raises on purpose; its message says what to do next."""


class TraceError(SecateurError, ValueError):
    """The model or its example inputs cannot be traced."""


class GateError(SecateurError, ValueError):
    """A gate method, its settings or the place it is asked to act at do not fit."""


class BudgetError(SecateurError, ValueError):
    """A budget is outside its range, contradictory, or cannot be reached."""


class LatencyError(SecateurError, ValueError):
    """A latency cannot be measured there, or what was measured is of something else."""


class CompactionError(SecateurError, RuntimeError):
    """A cut failed its proof; nothing was changed."""
