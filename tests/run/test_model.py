"""model.rope_scaling and a checkpoint's sizes: errors for settings that do not fit."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from flacuna_jax.config.data import DataConfig, SourceConfig
from flacuna_jax.config.model import ModelConfig, RopeScalingConfig
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.architecture import hugging_face_config
from flacuna_jax.model.rope import RopeScaling
from flacuna_jax.run.model import network_sizes, with_rope_scaling
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


def test_longrope_is_limited_to_its_original_context(tmp_path: Path) -> None:
    pairs = SMALL.head_dim // 2
    factors = {"short_factor": (1.0,) * pairs, "long_factor": (2.0,) * pairs}
    scaling = RopeScaling("longrope", 4.0, original_max_position_embeddings=512, **factors)
    sizes = dataclasses.replace(SMALL, family="phi3", fused_projections=True, rope_scaling=scaling)
    written = hugging_face_config(sizes, np.dtype(np.float32))
    (tmp_path / "config.json").write_text(json.dumps(written))
    model = ModelConfig(path=str(tmp_path))

    def rows_of(length: int) -> DataConfig:
        return DataConfig(sources=(SourceConfig(path="x"),), max_length=length)

    assert network_sizes(model, rows_of(512)).context_length == 512
    with pytest.raises(UserError, match=r"data\.max_length 513 exceeds 512, the original context"):
        network_sizes(model, rows_of(513))
