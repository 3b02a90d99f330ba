"""Pieces of work that wait for one another, one after the other or in parallel processes."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from secateur.errors import SecateurError
from secateur.recipes.memory import keep_memory
from secateur.recipes.train import Epoch, Watch

__all__ = ["Job", "run_jobs"]


@dataclass(frozen=True)
class Job:
    """One piece of work; what it finds it leaves in files.

    Args:
        name: unique among those that run together.
        work: called with what is told about epochs; it goes to another process, so it is a module's own function, or a
            `functools.partial` of one.
        after: names of jobs that end before this one begins.
    """

    name: str
    work: Callable[[Watch], object]
    after: tuple[str, ...] = ()


def run_jobs(jobs: Sequence[Job], n: int, watch: Watch, done: Callable[[str], None]) -> None:
    """Do all of the work, at most ``n`` pieces at a time.

    Args:
        jobs: each after all that it waits for.
        n: 1 for one after the other in this process; else processes, which share torch's threads.
        watch: told about epochs that are trained in this process.
        done: told the name of each job that has ended.

    Raises:
        SecateurError: ``n`` is under 1, a job waits for none of those before it, or one in another process failed: its
            message, after the others that were running have been ended.
    """
    if n < 1:
        raise SecateurError(f"jobs={n}; expected at least 1")
    before: set[str] = set()
    for job in jobs:
        if job.name in before or not before.issuperset(job.after):
            raise SecateurError(f"job {job.name!r} is there twice, or waits for one that is not before it: {job.after}")
        before.add(job.name)
    if n == 1:
        for job in jobs:
            job.work(watch)
            done(job.name)
        return
    _in_processes(jobs, n, done)


def _in_processes(jobs: Sequence[Job], n: int, done: Callable[[str], None]) -> None:
    # Spawned: a fork of a process in which torch has threads can hang.
    context = multiprocessing.get_context("spawn")
    threads = max(torch.get_num_threads() // n, 1)
    left = list(jobs)
    ended: set[str] = set()
    running: dict[int, tuple[Job, SpawnProcess, Connection]] = {}
    try:
        while left or running:
            for job in [job for job in left if ended.issuperset(job.after)][: n - len(running)]:
                left.remove(job)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(job, threads, theirs), daemon=True)
                process.start()
                theirs.close()
                running[process.sentinel] = job, process, ours
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                job, process, messages = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    raise SecateurError(f"{job.name}: {_message(messages, process.exitcode)}")
                ended.add(job.name)
                done(job.name)
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.join()


def _message(messages: Connection, code: int) -> str:
    try:
        return str(messages.recv())
    except EOFError:
        return f"its process ended with code {code} and said nothing; what was recorded is kept, so start it again"


def _work(job: Job, threads: int, messages: Connection) -> None:
    torch.set_num_threads(threads)
    keep_memory()
    try:
        job.work(_unseen)
    except KeyboardInterrupt:
        raise SystemExit(1) from None
    except SecateurError as error:
        messages.send(str(error))
        raise SystemExit(1) from None
    except Exception as error:
        messages.send("".join(traceback.format_exception(error)))
        raise SystemExit(1) from error


def _unseen(epoch: Epoch) -> None:
    """Nobody looks at the epochs of another process."""
