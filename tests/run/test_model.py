"""model.rope_scaling on a checkpoint's sizes: what does not fit is named."""

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
        ({}, {"type": "ntk", "factor": 1e300}, "factor 1e\\+300: positions are counted in 32 bits"),
        ({"head_dim": 2}, {"type": "ntk", "factor": 2.0}, "heads of 2 have one pair"),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, {"type": "ntk", "factor": 2.0}, "scales its positions already"),
    ],
)
def test_what_cannot_be_stretched(sizes: dict, scaling: dict, says: str) -> None:
    model = ModelConfig(path="x", rope_scaling=RopeScalingConfig(**scaling))
    with pytest.raises(UserError, match=says):
        with_rope_scaling(dataclasses.replace(SMALL, **sizes), model, 1024)
