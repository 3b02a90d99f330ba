"""Jobs: their order, and what a failure leaves behind, in this process and in others."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.recipes.jobs import Job, run_jobs
from secateur.recipes.train import Epoch, Watch


def write(path: Path, needs: Path | None, watch: Watch) -> None:
    """Work that succeeds only after what it waits for."""
    path.write_text("" if needs is None else needs.read_text() + "x")


def fail(watch: Watch) -> None:
    raise SecateurError("the disk is full; make room")


def blind(epoch: Epoch) -> None:
    """Looks at nothing."""


def test_a_job_begins_after_those_that_it_waits_for(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    done: list[str] = []
    jobs = [
        Job("a", functools.partial(write, a, None)),
        Job("b", functools.partial(write, b, a), after=("a",)),
        Job("c", functools.partial(write, c, b), after=("a", "b")),
    ]
    run_jobs(jobs, 1, blind, done.append)
    assert done == ["a", "b", "c"]
    assert c.read_text() == "xx"


@pytest.mark.parametrize("n", [1, 2])
def test_a_failure_is_told_and_nothing_that_waits_for_it_begins(tmp_path: Path, n: int) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    done: list[str] = []
    jobs = [
        Job("before", functools.partial(write, before, None)),
        Job("bad", fail, after=("before",)),
        Job("after", functools.partial(write, after, None), after=("bad",)),
    ]
    with pytest.raises(SecateurError, match="the disk is full; make room"):
        run_jobs(jobs, n, blind, done.append)
    assert done == ["before"]
    assert before.exists()
    assert not after.exists()


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(SecateurError, match="jobs=0; expected at least 1"):
        run_jobs([], 0, blind, print)
    with pytest.raises(SecateurError, match="'b' is there twice, or waits for one that is not before it"):
        run_jobs([Job("b", fail, after=("a",)), Job("a", fail)], 1, blind, print)
