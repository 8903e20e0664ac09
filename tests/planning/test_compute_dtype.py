"""`model.dtype: auto`: bfloat16 on accelerators; on CPUs what is multiplied faster, measured once for each machine."""

import math
from types import SimpleNamespace

import jax
import pytest

from flacuna_jax.config.files import parse_config
from flacuna_jax.planning import compute_dtype
from flacuna_jax.planning.compute_dtype import choose_dtype, relative_speed
from flacuna_jax.run.setup import resolve_dtype


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLACUNA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def measure(monkeypatch):
    """Replaces the measurement by one that returns a given speed, or, for None, by one that fails."""

    def finds(speed: float | None) -> None:
        def measured() -> float:
            assert speed is not None, "measured again"
            return speed

        monkeypatch.setattr(compute_dtype, "relative_speed", measured)

    return finds


def config_of(directory, *overrides):
    tree = {"output_dir": str(directory), "model": {"path": "base"}, "data": {"sources": [{"path": "a.json"}]}}
    return parse_config(tree, overrides)


@pytest.mark.parametrize("platform", ["gpu", "cuda", "tpu"])
def test_accelerators_compute_in_bfloat16_without_a_measurement(platform, measure) -> None:
    measure(None)
    assert str(choose_dtype([SimpleNamespace(platform=platform)])) == "bfloat16 (auto)"


@pytest.mark.parametrize(("speed", "expected"), [(1.93, "bfloat16"), (1.2, "bfloat16"), (1.1, "float32")])
def test_a_cpu_computes_in_what_it_multiplies_faster_and_says_so(speed, expected, measure) -> None:
    measure(speed)
    chosen = choose_dtype(jax.devices())
    assert str(chosen) == f"{expected} (auto: this processor multiplies bfloat16 {speed} × as fast as float32)"


def test_the_measurement_is_kept_for_this_machine_and_release_of_jax(measure, monkeypatch) -> None:
    measure(2.5)
    first = choose_dtype(jax.devices())
    measure(None)
    assert choose_dtype(jax.devices()) == first
    monkeypatch.setattr(jax, "__version__", "99.0")
    measure(0.5)
    assert choose_dtype(jax.devices()).name == "float32"


def test_the_measurement_is_a_ratio_of_times() -> None:
    speed = relative_speed()
    assert math.isfinite(speed)
    assert speed > 0


def test_a_dtype_in_the_config_is_kept_without_a_measurement(tmp_path, measure) -> None:
    measure(None)
    config = config_of(tmp_path, "--model.dtype=bfloat16")
    assert resolve_dtype(config) == (config, None)


def test_a_resumed_run_keeps_the_dtype_that_it_began_with(tmp_path, measure) -> None:
    measure(3.0)
    begun, chosen = resolve_dtype(config_of(tmp_path))
    assert begun.model.dtype == chosen.name == "bfloat16"
    (tmp_path / "config.yaml").write_text(begun.to_yaml())
    measure(None)  # as on a machine that would choose another one
    resumed, why = resolve_dtype(config_of(tmp_path))
    assert resumed.model.dtype == "bfloat16"
    assert str(why) == "bfloat16 (auto: as this run began)"


@pytest.mark.parametrize("text", ["model: [", "model: {dtype: auto}"])
def test_without_a_readable_choice_a_resumed_run_chooses_again(text, tmp_path, measure) -> None:
    """If it is another one, the comparison with the checkpoint refuses it."""
    (tmp_path / "config.yaml").write_text(text)
    measure(0.4)
    assert resolve_dtype(config_of(tmp_path))[0].model.dtype == "float32"
