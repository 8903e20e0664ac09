"""A small network and run to plan for, and machines that need a compiler plugin."""

import pytest

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.training import TrainingConfig
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.planning.targets import CompilerMissing, absent_devices, parse_target
from flacuna_jax.planning.workload import Statistics, Workload
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.step import StepConfig

LENGTH = 128
NETWORK = LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=352, num_layers=4, num_heads=8, num_kv_heads=8, head_dim=16
)


@pytest.fixture(scope="session")
def workload() -> Workload:
    return make_workload()


def make_workload(network=NETWORK, lora=LoraConfig(), length=LENGTH, rows=16, dtype="bfloat16"):  # noqa: B008
    spec = ModelSpec(network, lora, dtype, dtype if lora else "float32")
    statistics = Statistics(
        rows_per_step=rows,
        steps=100,
        examples_per_step=4 * rows,
        fill=0.95,
        supervised=0.3,
        document_length=length / 4,
        assumed=True,
    )
    return Workload(StepConfig(NetworkConfig(spec)), TrainingConfig(warmup_steps=2), length, statistics)


@pytest.fixture(scope="session")
def absent():
    """Devices of a machine by name; skips where its compiler is not installed."""

    def devices(text: str):
        try:
            return absent_devices(parse_target(text))
        except CompilerMissing as missing:
            pytest.skip(str(missing))

    return devices
