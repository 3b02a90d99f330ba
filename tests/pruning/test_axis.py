from __future__ import annotations

import numpy as np

from secateur.pruning.axis import Axis


def test_positions_stay_where_all_their_gates_are_open():
    whole = np.array([[0, 1, 2, 3], [4, 4, 4, 4]])
    axis = Axis(whole, np.array([[5, 4, 4, 4]]), 4)
    assert not axis.look(np.array([True, False, True, True, True, True]))
    assert axis.positions().tolist() == [0, 2, 3]
    assert axis.selected is None
    assert axis.share == 0.75
    assert not axis.look(np.array([True, False, True, True, True, False]))
    assert axis.positions().tolist() == [2, 3]
    assert axis.selected.tolist() == [1, 2]
    assert not axis.look(np.ones(6, dtype=bool))
    assert axis.positions() is None
    assert axis.index is None


def test_runs_are_as_long_as_gates_allow():
    assert Axis(np.repeat(np.arange(5), 6)[None], None, 30).run == 6
    assert Axis(np.repeat(np.arange(5), 6)[None], np.repeat(np.arange(10), 3)[None], 30).run == 3
    assert Axis(np.tile(np.arange(5), 6)[None], None, 30).run == 1
    assert Axis(np.zeros((1, 4), dtype=np.int64), None, 4).run == 4


def test_one_position_is_read_even_if_all_are_closed():
    axis = Axis(None, np.array([[0, 0, 1, 1]]), 4)
    assert axis.look(np.array([False, False, True]))
    assert axis.positions().tolist() == [0, 1]
