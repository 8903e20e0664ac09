"""The order of hooks around the step, with a step that only counts."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flacuna_jax.config.run import MeshConfig
from flacuna_jax.model.sharding import make_mesh
from flacuna_jax.training.loop import STEPS_IN_FLIGHT, Loop, Request, StateHook, StepHook, StepRecord
from flacuna_jax.training.state import TrainState
from flacuna_jax.training.step import StepMetrics


class Diary:
    """Records the events of the loop; `stop_at` and `requests` control it."""

    def __init__(self, total=10, stop_at=None, requests=None, bad=(), save_every=4, evaluate_every=None, hooks=()):
        self.events, self.stop_at, self.requests, self.bad = [], stop_at, requests or {}, bad
        self.done = 0
        self.loop = Loop(
            step=self.step,
            frozen={},
            batches=iter([{"tokens": np.zeros(1)}] * 100),
            batch_sharding=NamedSharding(make_mesh(MeshConfig()), PartitionSpec()),
            total_steps=total,
            hooks=(
                StateHook(every=save_every, call=lambda state: self.events.append(("save", state.step)), saves=True),
                StateHook(every=evaluate_every, call=self.evaluate),
                StepHook(every=1, call=lambda record, state: self.events.append(("observe", record.step))),
                StepHook(every=1, call=self.notice_bad),
                *hooks,
            ),
            stop=lambda: self.done == self.stop_at,
        )

    def step(self, trainable, opt_state, frozen, batch, index):
        self.done = int(index) + 1
        bad = int(self.done in self.bad)
        one = jax.numpy.float32(1)
        return trainable, opt_state, StepMetrics(one, one, np.int32(bad), np.int32(bad), {"margin": one / 4})

    def notice_bad(self, record, state):
        if record.is_bad:
            self.events.append(("bad", record.step, state.step))

    def evaluate(self, state):
        self.events.append(("evaluate", state.step))
        return self.requests.get(state.step)

    def run(self, begin=0, until=None):
        state, end = self.loop.run(TrainState(begin, {}, None), until)
        return state.step, end

    def of(self, kind):
        return [event[1] for event in self.events if event[0] == kind]


def test_saves_at_the_interval_and_at_the_end_and_observes_every_step_in_order():
    diary = Diary()
    assert diary.run() == (10, "finished")
    assert diary.of("save") == [4, 8, 10]
    assert diary.of("observe") == list(range(1, 11))
    for step in (4, 8, 10):
        assert diary.events.index(("observe", step)) < diary.events.index(("save", step))


@pytest.mark.parametrize("at", [1, 3, 4, 9])
def test_a_stop_saves_the_last_finished_step(at):
    diary = Diary(stop_at=at)
    assert diary.run() == (at, "stopped")
    assert diary.of("save")[-1] == at
    assert diary.of("observe") == list(range(1, at + 1))


def test_a_stop_before_the_first_step_runs_no_step():
    diary = Diary(stop_at=0)
    assert diary.run() == (0, "stopped")
    assert diary.events == []


def test_evaluations_come_before_saves_and_may_request_one():
    diary = Diary(evaluate_every=3, requests={6: Request(save=True)})
    diary.run()
    assert diary.of("evaluate") == [3, 6, 9, 10]
    assert diary.of("save") == [4, 6, 8, 10]
    assert diary.events.index(("evaluate", 10)) < diary.events.index(("save", 10))


def test_a_hook_may_finish_the_run():
    diary = Diary(evaluate_every=3, requests={6: Request(finish=True)})
    assert diary.run() == (6, "enough")
    assert diary.of("save") == [4, 6]


def test_a_stop_at_a_step_with_a_due_evaluation_skips_the_evaluation():
    diary = Diary(evaluate_every=3, stop_at=3)
    assert diary.run() == (3, "stopped")
    assert diary.of("evaluate") == []


def test_a_bad_step_is_reported_with_a_recent_state():
    diary = Diary(bad={5})
    diary.run()
    (event,) = [event for event in diary.events if event[0] == "bad"]
    assert event[1] == 5
    assert event[2] - event[1] in (0, 1)


def test_hooks_are_called_at_their_intervals_and_at_single_steps():
    steps, states, scalars = [], [], []
    diary = Diary(
        hooks=(
            StepHook(every=4, call=lambda record, state: steps.append(record.step)),
            StepHook(at=(1, 7), call=lambda record, state: scalars.append((record.step, dict(record.scalars)))),
            StateHook(every=5, at=(2,), call=lambda state: states.append(state.step)),
        )
    )
    diary.run()
    assert steps == [4, 8, 10]
    assert scalars == [(1, {"margin": 0.25}), (7, {"margin": 0.25})]
    assert states == [2, 5, 10]


def test_a_run_can_be_trained_in_pieces():
    diary = Diary(evaluate_every=6)
    assert diary.run(until=3) == (3, "paused")
    assert diary.of("observe") == [1, 2, 3]
    assert diary.of("save") == []
    assert diary.run(begin=3, until=7) == (7, "paused")
    assert diary.run(begin=7) == (10, "finished")
    assert diary.of("observe") == list(range(1, 11))
    assert diary.of("evaluate") == [6, 10]
    assert diary.of("save") == [4, 8, 10]


def test_a_finished_run_does_nothing():
    diary = Diary()
    assert diary.run(begin=10) == (10, "finished")
    assert diary.events == []


def test_records_count_the_updates_before_them():
    assert StepRecord(5, 1.0, 1.0).updates_before == 4
    assert StepRecord(5, 1.0, 1.0, skipped=2).updates_before == 2
    assert StepRecord(5, 1.0, 1.0, skipped=2, in_a_row=1).updates_before == 3


class Unread:
    """A result in flight, which records when the host reads it."""

    def __init__(self, diary, step, value):
        self.diary, self.step, self.value = diary, step, value

    def __array__(self, dtype=None, copy=None):
        self.diary.events.append(("read", self.step))
        return np.asarray(self.value, dtype)


def test_the_host_runs_ahead_of_the_device():
    """The results of a step are read only after the next step was started; its batch was placed meanwhile."""

    class Ahead(Diary):
        def step(self, trainable, opt_state, frozen, batch, index):
            self.done = int(index) + 1
            assert isinstance(batch["tokens"], jax.Array), "the step never waits for a batch"
            self.events.append(("start", self.done))
            loss = Unread(self, self.done, 1.0)
            return trainable, opt_state, StepMetrics(loss, np.float32(0), np.int32(0), np.int32(0), {})

    def placed(diary):
        for number in range(1, 100):
            diary.events.append(("batch", number))
            yield {"tokens": np.zeros(1)}

    diary = Ahead(total=9, save_every=100)
    diary.loop = dataclasses.replace(diary.loop, batches=placed(diary))
    diary.run()
    at = {event: index for index, event in enumerate(diary.events)}
    for step in range(2, 7):  # the host waits for the first step, which compiles, and for the last
        assert at["start", step + STEPS_IN_FLIGHT] < at["read", step] < at["start", step + STEPS_IN_FLIGHT + 1]
        assert at["batch", step + STEPS_IN_FLIGHT] < at["read", step], "placed while the device has work"
