"""The best checkpoints, and early stopping."""

import json
import math

from flacuna_jax.training.history import RECENT_STEPS, History, RecentLosses


def history(values, lower_is_better=True):
    made = History(lower_is_better)
    for number, value in enumerate(values, 1):
        made.add(10 * number, value)
    return made


def test_best_in_both_directions_with_ties_won_by_earlier_steps():
    values = [3.0, 1.0, 2.0, 1.0]
    assert history(values).best(2) == [20, 40]
    assert history(values, lower_is_better=False).best(2) == [10, 30]
    assert history([]).best(3) == []


def test_steps_compare_as_numbers():
    made = History(True, {8: 1.0, 100: 1.0, 20: 1.0})
    assert made.best(2) == [8, 20]


def test_values_that_are_not_finite_are_the_worst():
    for direction in (True, False):
        assert history([math.nan, 5.0, math.inf, 6.0 if direction else 4.0], direction).best(2) == [20, 40]


def test_patience_counts_evaluations_without_a_new_best():
    assert not history([3.0, 2.0, 1.0]).is_exhausted(1)
    assert history([3.0, 2.0, 2.5]).is_exhausted(1)
    assert not history([3.0, 2.0, 2.5]).is_exhausted(2)
    assert history([3.0, 2.0, 2.5, 2.0]).is_exhausted(2), "as good as the best is not better"
    assert not history([3.0, 2.0, 2.5, 1.9]).is_exhausted(2)
    assert not history([3.0, 4.0, 5.0]).is_exhausted(None)
    assert not history([]).is_exhausted(1)


def test_a_history_survives_json():
    made = history([3.0, math.nan, 2.0])
    made.add(40, None)
    again = History.from_json(True, json.loads(json.dumps(made.to_json(), allow_nan=False)))
    assert again.best(3) == made.best(3)
    assert again.last_step == 40
    assert again.since_best == made.since_best


def test_the_mean_of_recent_losses_forgets_old_steps():
    recent = RecentLosses()
    assert recent.mean is None
    for step in range(RECENT_STEPS + 5):
        recent.add(float(step))
    assert recent.mean == 5 + (RECENT_STEPS - 1) / 2
    assert RecentLosses.from_json(json.loads(json.dumps(recent.values))) == recent
