"""Candidate layouts, their ranking, and the resolution of `mesh: auto` and `remat: auto`."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import MeshConfig, RunConfig
from flacuna_jax.config.training import TrainingConfig
from flacuna_jax.errors import UserError
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.sharding import make_mesh, parameter_shardings
from flacuna_jax.planning import search as search_module
from flacuna_jax.planning.estimate import argument_bytes
from flacuna_jax.planning.plans import estimated_plan
from flacuna_jax.planning.search import candidates, choices, choose_layout, nearest_fit, search
from flacuna_jax.planning.targets import Machine, parse_target
from flacuna_jax.planning.workload import Layout, assumed_statistics
from flacuna_jax.training.state import StateLayout
from flacuna_jax.training.step import StepConfig
from tests.planning.conftest import make_workload

PAPER = make_workload(LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128), LoraConfig(), 1280, 27)


def test_candidates_use_every_device_and_split_no_head():
    workload = make_workload(LlamaConfig(512, 128, 352, 2, 6, 6, 16))
    found = {layout.mesh for layout in candidates(workload, parse_target("2x4xA6000"))}
    assert all(mesh.devices == 8 for mesh in found)
    assert {mesh.tensor for mesh in found} == {1, 2}, "six heads cannot be divided by four"
    assert MeshConfig(replica=2, fsdp=4) in found, "a copy of the weights per host"
    assert MeshConfig(fsdp=8) in found


def test_rows_are_divided_exactly_if_the_config_fixes_them():
    training = PAPER.training.model_copy(update={"batch_unit": "rows", "batch_size": 24})
    workload = dataclasses.replace(PAPER, training=training)
    assert all(24 % (c.micro_batch * c.shards) == 0 for c in candidates(workload, parse_target("4xA6000")))


def test_the_best_layout_for_the_papers_machine():
    """With PCIe, replicated weights are faster than sharded ones; full recomputation is never best if memory
    suffices."""
    machine = parse_target("4xA6000")
    ranking = search(choices(PAPER, machine), machine, None)
    best = ranking[0]
    assert best.fits
    assert best.layout.mesh == MeshConfig(data=4)
    assert best.layout.remat != "full"
    sharded = estimated_plan(PAPER, Layout(MeshConfig(fsdp=4), "dots", 2), parse_target("4xA6000"))
    assert best.time.step < sharded.time.step
    assert sharded.time.bound == "PCIe 4"
    assert [plan.fits for plan in ranking] == sorted((plan.fits for plan in ranking), reverse=True)


@pytest.mark.parametrize("optimizer", get_args(TrainingConfig.model_fields["optimizer"].annotation))
@pytest.mark.parametrize("lora", [LoraConfig(), None], ids=["lora", "full"])
def test_the_optimizer_state_has_the_estimated_size(optimizer, lora):
    workload = make_workload(lora=lora, dtype="float32")
    training = workload.training.model_copy(update={"optimizer": optimizer})
    workload = dataclasses.replace(workload, training=training)
    mesh, spec = MeshConfig(fsdp=2, tensor=2), workload.spec
    zeros = {path: jnp.zeros(parameter.shape) for path, parameter in spec.trainable.items()}
    shardings = parameter_shardings(spec.trainable, make_mesh(mesh))
    layout = StateLayout(spec, workload.optimizer, make_mesh(mesh))
    state = layout.begin(jax.device_put(zeros, shardings)).opt_state
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert argument_bytes(workload, Layout(mesh, "dots", 2))["optimizer state"] == held


def test_faster_links_change_the_result():
    layout = Layout(MeshConfig(fsdp=8), "dots", 2)
    assert estimated_plan(PAPER, layout, parse_target("8xH100")).time.bound == "arithmetic"


def test_the_nearest_layout_that_fits():
    machine = parse_target("4x3090")
    tight = estimated_plan(PAPER, Layout(MeshConfig(fsdp=4), "none", 2), machine)
    assert not tight.fits
    nearest = nearest_fit(tight, None)
    assert nearest.fits
    assert nearest.layout == Layout(MeshConfig(fsdp=4), "dots", 2), "one change is enough, without changing the mesh"
    single = estimated_plan(PAPER, Layout(MeshConfig(), "dots", 1), parse_target("3090"))
    in_fewer_bits = nearest_fit(single, None)
    assert in_fewer_bits.fits
    assert in_fewer_bits.workload.spec.quantization is not None, "26 GB do not fit into 24"
    tiny = dataclasses.replace(parse_target("3090").target, memory=6 * 10**9)
    assert nearest_fit(dataclasses.replace(single, machine=Machine(tiny)), None) is None


def test_a_search_ranks_quantised_bases_if_they_are_needed():
    card = parse_target("3090")
    best = search(choices(PAPER, card), card, None)[0]
    assert best.fits
    assert best.workload.spec.quantization is not None
    assert best.name.endswith(f", base {best.workload.spec.quantization}")
    roomy = parse_target("1xA100")
    assert search(choices(PAPER, roomy), roomy, None)[0].workload.spec.quantization is None, "no faster, and rounded"
    given = PAPER.with_spec(dataclasses.replace(PAPER.spec, quantization="int8"))
    assert {form.spec.quantization for form, _ in choices(given, card)} == {"int8"}, "what the config says is kept"
    full = PAPER.with_spec(dataclasses.replace(PAPER.spec, lora=None))
    assert {form.spec.quantization for form, _ in choices(full, card)} == {None}


def run_config(**changes) -> RunConfig:
    tree = {"output_dir": "x", "model": {"path": "m"}, "data": {"sources": ({"path": "d", "format": "flan_mini"},)}}
    return RunConfig.model_validate({**tree, **changes})


def test_on_cpus_the_result_is_immediate():
    devices = jax.devices()[:4]
    assert choose_layout(run_config(), PAPER.spec, devices) == (MeshConfig(fsdp=4), "dots")
    kept = run_config(mesh={"data": 2}, training={"remat": "full"})
    assert choose_layout(kept, PAPER.spec, devices) == (MeshConfig(data=2), "full")


@dataclasses.dataclass
class FakeGpu:
    id: int
    device_kind: str = "NVIDIA RTX A6000"
    platform: str = "gpu"
    process_index: int = 0


def test_on_accelerators_at_most_four_are_compiled_and_the_result_is_cached(monkeypatch, tmp_path):
    monkeypatch.setenv("FLACUNA_CACHE", str(tmp_path))
    tried = []

    def pretend(workload, layout, machine, devices):
        tried.append(layout)
        return estimated_plan(workload, layout, machine)

    monkeypatch.setattr(search_module, "compiled_plan", pretend)
    devices = [FakeGpu(i) for i in range(4)]
    chosen = choose_layout(run_config(), PAPER.spec, devices)
    assert chosen == (MeshConfig(data=4), "dots")
    assert 1 <= len(tried) <= 4
    assert {layout.micro_batch for layout in tried} == {2}
    assert choose_layout(run_config(), PAPER.spec, devices) == chosen
    assert len(tried) <= 4, "the second result comes from the cache"
    tried.clear()
    mesh, _ = choose_layout(run_config(mesh={"fsdp": 4}), PAPER.spec, devices)
    assert mesh == MeshConfig(fsdp=4)
    assert {layout.mesh for layout in tried} == {mesh}


def test_the_step_that_is_compiled_is_the_one_that_the_config_describes(monkeypatch, tmp_path):
    """`attention: cudnn` refuses rows that may be packed, so a candidate must know that these are not."""
    monkeypatch.setenv("FLACUNA_CACHE", str(tmp_path))
    compiled = []

    def pretend(workload, layout, machine, devices):
        compiled.append(workload.step)
        return estimated_plan(workload, layout, machine)

    monkeypatch.setattr(search_module, "compiled_plan", pretend)
    data = {"sources": ({"path": "d", "format": "flan_mini"},), "packing": "none"}
    config = run_config(data=data, training={"attention": "cudnn"}, seed=3)
    choose_layout(config, PAPER.spec, [FakeGpu(i) for i in range(4)])
    assert set(compiled) == {StepConfig.of_run(PAPER.spec, config)}
    assert compiled[0].network.one_document


def test_where_the_compiler_refuses_the_estimate_decides_and_is_not_kept(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("FLACUNA_CACHE", str(tmp_path))

    def refuse(workload, layout, machine, devices):
        return dataclasses.replace(estimated_plan(workload, layout, machine), refused="XlaError: gone")

    monkeypatch.setattr(search_module, "compiled_plan", refuse)
    devices = [FakeGpu(i) for i in range(4)]
    assert choose_layout(run_config(), PAPER.spec, devices) == (MeshConfig(data=4), "dots")
    assert "XlaError: gone" in caplog.text
    assert not list(tmp_path.rglob("*.json"))


def test_nothing_fits(monkeypatch, tmp_path):
    monkeypatch.setenv("FLACUNA_CACHE", str(tmp_path))
    monkeypatch.setattr(search_module, "compiled_plan", lambda w, layout, m, d: estimated_plan(w, layout, m))
    config = run_config(lora=None)
    spec = make_workload(PAPER.spec.config, None, 1280, 27).spec
    with pytest.raises(UserError, match="micro_batch_size"):
        choose_layout(config, spec, [FakeGpu(i) for i in range(2)])


def test_assumed_statistics_follow_the_config():
    config = run_config()
    packed = assumed_statistics(config.data, config.training)
    assert packed.assumed
    assert packed.rows_per_step == 27  # 128 examples of 256 tokens in rows of 1280, almost full
    assert 128 <= packed.examples_per_step < 128 + 5  # those of 27 whole rows
    assert packed.steps * packed.examples_per_step == pytest.approx(1_340_153, rel=0.001)
    unpacked = run_config(data={"sources": ({"path": "d"},), "packing": "none"}, training={"batch_unit": "rows"})
    single = assumed_statistics(unpacked.data, unpacked.training)
    assert (single.rows_per_step, single.steps) == (128, None)
    assert assumed_statistics(unpacked.data, unpacked.training, examples=1280).steps == 10


def test_a_pair_is_assumed_to_have_two_documents():
    config = run_config(training={"objective": {"name": "dpo"}})
    pairs = assumed_statistics(config.data, config.training)
    answers = assumed_statistics(config.data, run_config().training)
    assert pairs.examples_per_step == pytest.approx(answers.examples_per_step, abs=5)
    assert pairs.rows_per_step == pytest.approx(2 * answers.rows_per_step, abs=1)
    assert (pairs.document_length, pairs.fill) == (answers.document_length, pytest.approx(answers.fill, abs=0.01))
