"""Clocks: which device has one, and that it runs forward."""

from __future__ import annotations

import pytest
import torch

from secateur.errors import LatencyError
from secateur.latency.clock import ThreadTime, WallTime, clock_of, processor


@pytest.mark.parametrize("clock", [ThreadTime(), WallTime()])
def test_readings_are_nanoseconds_from_the_first_mark(clock: ThreadTime) -> None:
    marks = [clock.mark()]
    sum(range(20_000))
    marks += [clock.mark(), clock.mark()]
    readings = clock.read(marks).tolist()
    assert readings == sorted(readings)
    assert readings[0] == 0.0 < readings[1]


def test_one_thread_counts_its_own_time_and_several_are_timed_by_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    for threads, kind in ((1, ThreadTime), (4, WallTime)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert type(clock_of(torch.device("cpu"))) is kind


@pytest.mark.parametrize("device", ["meta", "mps"])
def test_devices_without_a_clock_are_refused(device: str) -> None:
    with pytest.raises(LatencyError, match=f"device '{device}' has no clock here; expected cpu or cuda"):
        clock_of(torch.device(device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(LatencyError, match="torch finds no CUDA device here"):
        clock_of(torch.device("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_events_are_read_in_nanoseconds() -> None:
    clock = clock_of(torch.device("cuda"))
    x = torch.randn(2000, 2000, device="cuda")
    marks = [clock.mark()]
    for _ in range(10):
        x = x @ x
    assert clock.read([*marks, clock.mark()])[1] > 1e4
    assert processor(torch.device("cuda")) == torch.cuda.get_device_name()
