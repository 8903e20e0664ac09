"""Objectives that none of the package's own settings asks for: what CONTRIBUTING.md shows, on a step and in a run."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax import Objective, StepHook, UserError, load_config, open_run
from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import MeshConfig
from flacuna_jax.model.parameters import ModelSpec, fresh_adapters, init_params
from flacuna_jax.model.sharding import make_mesh
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.objective import SUPERVISED_TOKENS, Terms, Weighted
from flacuna_jax.training.step import StepConfig, loss_and_gradients
from tests.small_run import write_run
from tests.tiny import SMALL, in_steps, packed_batch, to_device

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
DOCUMENTS = [list(range(3 + n, 3 + n + 4 + n % 5)) for n in range(16)]
SPEC = ModelSpec(SMALL, LoraConfig(rank=2), "float32", "float32")


@pytest.fixture(scope="module")
def hard_tokens() -> Objective:
    """The example of CONTRIBUTING.md."""
    names: dict = {}
    exec(re.findall(r"^```python\n(.*?)^```", CONTRIBUTING.read_text(), re.MULTILINE | re.DOTALL)[0], names)
    return names["HARD_TOKENS"]


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, fsdp=2)], ids=str)
@pytest.mark.parametrize("micro_batch", [4, 8])
def test_sums_are_divided_once_however_the_rows_are_cut_up(hard_tokens, mesh, micro_batch):
    devices = make_mesh(mesh)
    base = init_params(SPEC, SPEC.base, 0, devices)
    adapters = fresh_adapters(SPEC, base, 1, devices)
    rows = packed_batch(DOCUMENTS, [[2 * row, 2 * row + 1] for row in range(8)], 16)
    losses = np.asarray(NetworkConfig(SPEC).with_params({**base, **adapters}).token_losses(to_device(rows)))
    threshold = float(np.median(losses[rows["loss_mask"]]))

    def above(network, batch):
        losses_bt = network.token_losses(batch)
        hard_bt = losses_bt > threshold
        count = jnp.sum(hard_bt, dtype=jnp.float32)
        share = Weighted(count, jnp.sum(batch["loss_mask"], dtype=jnp.float32))
        return Terms(Weighted(jnp.sum(losses_bt * hard_bt), count), {"hard_share": share})

    objective = Objective(SUPERVISED_TOKENS.leaves, above, SUPERVISED_TOKENS.measures)
    config = StepConfig(NetworkConfig(SPEC), objective=objective)
    with jax.set_mesh(devices):
        batch = to_device(in_steps(rows, micro_batch))
        loss, scalars, _ = jax.jit(loss_and_gradients, static_argnums=0)(config, adapters, base, batch, jnp.int32(0))
    hard = losses > threshold
    assert float(loss) == pytest.approx(losses[hard].mean(), rel=1e-5)
    assert scalars.keys() == {"hard_share"}
    assert float(scalars["hard_share"]) == pytest.approx(hard.sum() / rows["loss_mask"].sum(), rel=1e-6)


def test_a_runs_scalars_flow_by_name_to_every_place_that_shows_numbers(hard_tokens, tmp_path):
    config = load_config(
        write_run(tmp_path, logging={"every_steps": 1, "tensorboard": True}), ["--training.max_steps=4"]
    )
    seen: list[float] = []
    with open_run(config, objective=hard_tokens, say=lambda _: None) as run:
        run.add_hook(StepHook(every=1, call=lambda record, state: seen.append(record.scalars["hard_share"])))
        run.train(until=2)
        run.save()
    with pytest.raises(UserError, match=r"objective: .*hard_tokens in the checkpoint, absent now"), open_run(config):
        pass
    with open_run(config, objective=hard_tokens, say=lambda _: None) as run:
        run.train()
        run.deliver()
    out = Path(config.output_dir)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["hard_share"] for record in records[:2]] == seen
    assert all(0 < record["hard_share"] <= 1 for record in records)
    assert "hard_share" in (out / "report.html").read_text()
    events = b"".join(path.read_bytes() for path in (out / "tensorboard").iterdir())
    assert events.count(b"train/hard_share") == 4
