"""model.rope_scaling and a checkpoint's sizes: errors for settings that do not fit."""

import dataclasses

import pytest

from flacuna_jax.config.schema import ModelConfig, RopeScalingConfig
from flacuna_jax.errors import UserError
from flacuna_jax.model.rope import RopeScaling
from flacuna_jax.run.model import with_rope_scaling
from tests.tiny import SMALL


@pytest.mark.parametrize(
    ("sizes", "scaling", "says"),
    [
        ({}, {"type": "linear"}, "data.max_length 1024 is within the model's own context of 2048"),
        ({}, {"type": "ntk", "factor": 1e300}, "factor 1e\\+300: positions must fit in 32 bits"),
        ({"head_dim": 2}, {"type": "ntk", "factor": 2.0}, "heads of size 2 have only one"),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, {"type": "ntk", "factor": 2.0}, "scales its positions already"),
    ],
)
def test_invalid_rope_scaling_is_an_error(sizes: dict, scaling: dict, says: str) -> None:
    model = ModelConfig(path="x", rope_scaling=RopeScalingConfig(**scaling))
    with pytest.raises(UserError, match=says):
        with_rope_scaling(dataclasses.replace(SMALL, **sizes), model, 1024)
