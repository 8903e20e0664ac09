"""Factors fitted to measured steps: exact where the steps are, kept for these devices, and used and named by plans."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.optimize import nnls

import flacuna_jax.verbs.plan
from flacuna_jax import plan
from flacuna_jax.cli import run_verb
from flacuna_jax.planning import calibration
from flacuna_jax.planning.calibration import (
    Factors,
    Measured,
    fit,
    new_calibration,
    read_calibration,
    write_calibration,
)
from flacuna_jax.planning.estimate import Work
from flacuna_jax.planning.hlo import Collective
from flacuna_jax.planning.measure import Case, calibration_cases, step_seconds
from flacuna_jax.planning.plans import UNCALIBRATED, compiled_plan, estimated_plan
from flacuna_jax.planning.roofline import step_time
from flacuna_jax.planning.targets import Machine, parse_target, present_machine
from tests.tiny import SMALL

FACTORS = Factors(seconds_per_flop=2e-11, seconds_per_byte=1e-10, overhead=0.004)
WORK = ((1e9, 4e7), (2e10, 3e8), (8e10, 2e9), (4e10, 4e9))
STEPS = [Measured(str(flops), flops, traffic, 2e-11 * flops + 1e-10 * traffic + 0.004) for flops, traffic in WORK]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLACUNA_CACHE", str(tmp_path))


def calibrated():
    return new_calibration(jax.devices(), {"float32": STEPS})


def test_steps_that_follow_the_factors_give_the_factors() -> None:
    assert dataclasses.astuple(fit(STEPS)) == pytest.approx(dataclasses.astuple(FACTORS), rel=1e-6)
    assert [one.predicted(FACTORS) for one in STEPS] == pytest.approx([one.seconds for one in STEPS])


def test_noisy_steps_are_fitted_as_scipy_does_without_negative_factors() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        noisy = [dataclasses.replace(one, seconds=one.seconds * rng.uniform(0.5, 2)) for one in STEPS]
        terms = np.array([[one.flops / 1e10, one.memory_traffic / 1e9, 1.0] for one in noisy])
        expected, _ = nnls(terms / np.array([[one.seconds] for one in noisy]), np.ones(4))
        found = np.array(dataclasses.astuple(fit(noisy)))
        assert found.min() >= 0
        np.testing.assert_allclose(found * (1e10, 1e9, 1), expected, rtol=1e-8, atol=1e-12)


def test_a_calibration_is_read_by_the_same_devices_and_release_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_calibration(jax.devices()) is None
    written = calibrated()
    write_calibration(written)
    assert read_calibration(jax.devices()) == written
    assert present_machine(jax.devices()).calibration == written
    assert read_calibration(jax.devices()[:2]) is None
    monkeypatch.setattr(calibration.jax, "__version__", "0.0")
    assert read_calibration(jax.devices()) is None


def test_the_time_of_a_step_is_that_of_its_factors() -> None:
    machine = Machine(parse_target("4xA6000").target, 1, 4, calibration=calibrated())
    for flops, traffic in WORK:
        time = step_time(Work(flops - 1, 1, traffic, []), machine, "float32")
        assert time.step == pytest.approx(2e-11 * flops + 1e-10 * traffic + 0.004)
        assert (time.compute, time.overhead) == (pytest.approx(2e-11 * flops), pytest.approx(0.004))
    exchange = Collective("all-gather", int(1e9), (0, 1, 2, 3), 1, False, "")
    alone, with_exchange = (step_time(Work(1e9, 0, 4e7, found), machine, "float32") for found in ([], [exchange]))
    assert with_exchange.step == pytest.approx(alone.step + with_exchange.exposed)
    assert with_exchange.exposed > 0
    uncalibrated = dataclasses.replace(machine, calibration=None)
    assert step_time(Work(1e9, 0, 4e7, []), machine, "bfloat16") == step_time(
        Work(1e9, 0, 4e7, []), uncalibrated, "bfloat16"
    )


def test_plans_say_where_their_seconds_come_from() -> None:
    case = Case(SMALL, 64, 1, "float32")
    before = estimated_plan(case.workload, case.layout, present_machine(jax.devices()))
    assert before.origin_of_seconds == UNCALIBRATED == before.to_json()["seconds"]["origin"]
    write_calibration(calibrated())
    after = estimated_plan(case.workload, case.layout, present_machine(jax.devices()))
    assert after.origin_of_seconds == calibrated().origin == after.to_json()["seconds"]["origin"]
    assert f"jax {jax.__version__}" in after.origin_of_seconds
    work = after.work
    assert after.time.step - after.time.exposed == pytest.approx(
        2e-11 * work.flops + 1e-10 * work.memory_traffic + 0.004
    )
    other = Case(SMALL, 64, 1, "bfloat16")
    assert estimated_plan(other.workload, other.layout, after.machine).origin_of_seconds == UNCALIBRATED


def test_calibrate_measures_and_keeps_the_factors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One real case per dtype; its seconds are the real ones."""
    cases = [Case(SMALL, length, 1, dtype) for dtype in ("float32",) for length in (32, 64)]
    monkeypatch.setattr(flacuna_jax.verbs.plan, "calibration_cases", lambda: cases)
    assert run_verb(plan.main, ["--calibrate"]) == 0
    said = capsys.readouterr().out
    found = read_calibration(jax.devices())
    assert found is not None
    assert said.count("s per step\n") == 2
    assert said.splitlines()[-1].startswith(found.origin)
    case = cases[0]
    plan_of_case = compiled_plan(case.workload, case.layout, present_machine(jax.devices()), jax.devices())
    assert plan_of_case.origin_of_seconds == found.origin
    assert 0 < plan_of_case.time.step < 100 * min(step_seconds(case))


def test_the_cases_have_different_ratios_of_arithmetic_and_memory() -> None:
    for dtype in ("float32", "bfloat16"):
        works = [
            estimated_plan(case.workload, case.layout, Machine(parse_target("a6000").target)).work
            for case in calibration_cases()
            if case.dtype == dtype
        ]
        ratios = [work.flops / work.memory_traffic for work in works]
        assert max(ratios) > 2 * min(ratios)
        assert max(work.flops for work in works) > 20 * min(work.flops for work in works)


@pytest.mark.parametrize("words", [[], ["--calibrate", "--config", "c.yaml"], ["--calibrate", "--seed=1"]])
def test_calibrate_is_instead_of_a_config(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        plan.main(words)
    assert ended.value.code == 2
    assert "--calibrate" in capsys.readouterr().err
