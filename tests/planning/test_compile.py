"""The compiled step: its communication, products and memory, on CPU devices and for absent machines."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import jax
import pytest

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import MeshConfig
from flacuna_jax.kernels.cross_entropy import LOOP_SCOPE, chunk_size
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.planning.compile import CompiledStep, compile_step, lower_step
from flacuna_jax.planning.estimate import argument_bytes, estimate_work, head_chunks, temporary_bytes
from flacuna_jax.planning.plans import compiled_plan, estimated_plan
from flacuna_jax.planning.targets import parse_target, present_machine
from flacuna_jax.planning.workload import Layout, Statistics
from tests.planning.conftest import NETWORK, make_workload

LLAMA_13B = LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128)


def compiled(workload, layout, devices):
    """The step, which must compile."""
    step = compile_step(workload, layout, devices)
    assert isinstance(step, CompiledStep), step
    return step


def exchanged(collectives, at_least=1000):
    """(kind, bytes, partners) → count, without collectives of a few numbers."""
    found = Counter()
    for collective in collectives:
        if collective.nbytes >= at_least:
            found[collective.kind, collective.nbytes, len(collective.group)] += collective.times
    return found


@pytest.fixture(scope="module")
def sharded():
    """A LoRA step on four CPU devices; float32, so that the CPU compiler converts nothing."""
    workload = make_workload(dtype="float32")
    layout = Layout(MeshConfig(fsdp=4), "dots", 2)
    return workload, layout, compiled(workload, layout, jax.devices()[:4])


def test_exactly_the_expected_collectives(sharded):
    """Every layer's weights gathered once forward and once backward, the tables once, the gradients reduced once."""
    workload, layout, step = sharded
    found, micro_batches = exchanged(step.work.collectives), workload.micro_batches(layout)
    gathers = Counter({key: times for key, times in found.items() if key[0] == "all-gather"})
    square, rectangular = 4 * 128 * 128, 4 * 128 * 352
    per_step = micro_batches * NETWORK.num_layers
    tables = gathers.pop(("all-gather", 4 * 512 * 128, 4))
    assert 2 <= tables <= 2 * micro_batches  # XLA:CPU may gather them once for all micro-batches
    assert gathers == {
        ("all-gather", square, 4): 2 * 4 * per_step,
        ("all-gather", rectangular, 4): 2 * 3 * per_step,
    }
    # XLA:CPU reduces each array separately, other compilers join them, so compare the sum of bytes.
    reductions = {key: times for key, times in found.items() if key[0] != "all-gather"}
    assert {kind for kind, *_ in reductions} == {"all-reduce"}
    adapters = 4 * sum(2 * NETWORK.num_layers * 8 * 128 for _ in workload.spec.lora.targets)
    assert sum(key[1] * times for key, times in reductions.items()) == pytest.approx(adapters, rel=0.01)


def test_estimates_agree_with_the_program(sharded):
    workload, layout, step = sharded
    estimated = estimate_work(workload, layout)
    # Only attention uses batched products on the CPU.
    products = [p for p in step.program.matrix_products() if "batch_dims" not in p[0].instruction.attributes]
    assert sum(use.times * flops for use, flops in products) == pytest.approx(estimated.matrix_flops, rel=0.02)
    assert step.arguments == pytest.approx(sum(argument_bytes(workload, layout).values()), rel=0.01)
    layer_gathers = [
        sum(c.received * c.times for c in work.collectives if c.kind == "all-gather" and c.nbytes < 4 * 512 * 128)
        for work in (estimated, step.work)
    ]
    assert layer_gathers[0] == layer_gathers[1]


def test_every_layer_costs_the_same():
    """XLA does not know the trip counts of the loops over key tiles, whose loop is nested in that over the layers."""
    documents = Statistics(
        rows_per_step=2, steps=10, examples_per_step=8, fill=1.0, supervised=0.3, document_length=128, assumed=True
    )
    flops = {}
    for layers in (4, 8, 16):
        workload = make_workload(replace(NETWORK, num_layers=layers), length=512, dtype="float32")
        workload = replace(workload, statistics=documents)
        flops[layers] = compiled(workload, Layout(MeshConfig(), "none", 2), jax.devices()[:1]).work.matrix_flops
    assert flops[16] - flops[8] == pytest.approx(2 * (flops[8] - flops[4]), rel=0.01)
    # Products with a layer's weights forward and for the activations' gradient; attention's in tiles of 64 on top.
    weights = 4 * 128 * 128 + 3 * 128 * 352
    attention = (2 + 5) * 2 * (128 / 2 / 64 + 1) * 64 * 128  # two products forward and five backward, per query
    assert (flops[16] - flops[8]) / 8 == pytest.approx(2 * 512 * (2 * 2 * weights + attention), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["a6000", "v5e:1x1"])
def test_windows_in_some_layers_and_soft_caps_compile(absent, target):
    """Gemma 2's layers, in a small network."""
    network = replace(
        NETWORK,
        norms="around",
        norm_offset=1.0,
        sliding_window=48,
        windowed_layers=(0, 2),
        attention_softcap=50.0,
        logits_softcap=30.0,
    )
    workload, layout = make_workload(network), Layout(MeshConfig(), "dots", 2)
    step = compiled(workload, layout, absent(target))
    assert step.arguments == pytest.approx(sum(argument_bytes(workload, layout).values()), rel=0.02)


def test_full_fine_tuning_communicates_one_layer_at_a_time():
    workload = make_workload(lora=None, dtype="float32")
    layout = Layout(MeshConfig(fsdp=4), "full", 2)
    step = compiled(workload, layout, jax.devices()[:4])
    # At most one layer's gradients at once (XLA:CPU joins and does not scatter them) or the two tables', no whole
    # stack.
    layer = 4 * (4 * 128 * 128 + 3 * 128 * 352 + 2 * 128)
    assert max(nbytes for _, nbytes, _ in exchanged(step.work.collectives)) <= layer
    assert step.arguments == pytest.approx(sum(argument_bytes(workload, layout).values()), rel=0.01)


def test_the_program_does_not_grow_with_depth():
    sizes = []
    for layers in (2, 40):
        network = LlamaConfig(512, 128, 352, layers, 8, 8, 16)
        lowered = lower_step(make_workload(network), Layout(MeshConfig(fsdp=4), "dots", 2), jax.devices()[:4])
        sizes.append(len(lowered.as_text()))
    assert sizes[1] <= 1.02 * sizes[0]


MEASURE = """
import json, sys, jax, numpy as np
from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import MeshConfig
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.sharding import make_mesh
from flacuna_jax.planning.compile import _batch, _frozen, compile_step, lower_step
from flacuna_jax.planning.workload import Layout
from flacuna_jax.training.state import StateLayout
from tests.planning.conftest import make_workload

network = LlamaConfig(8192, 512, 1408, 6, 8, 8, 64)
workload = make_workload(network, LoraConfig(), 512, 8, "float32")
layout = Layout(MeshConfig(), "none", 8)
devices = jax.devices()[:1]
predicted = compile_step(workload, layout, devices)
compiled = lower_step(workload, layout, devices).compile()
mesh = make_mesh(layout.mesh, devices)
state = StateLayout(workload.spec, workload.optimizer, mesh)

def status(field):
    return int(open("/proc/self/status").read().split(field + ":")[1].split()[0]) * 1024

before = status("VmRSS")
make = lambda a: jax.device_put(np.ones(a.shape, a.dtype), a.sharding)
arguments = [jax.tree.map(make, tree) for tree in
             (state.trainable, state.opt_state, _frozen(workload, mesh), _batch(workload, layout, mesh))]
held = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments))
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
jax.block_until_ready(compiled(*arguments, np.int32(0)))
print(json.dumps({"held": held, "arguments": predicted.arguments, "peak": predicted.peak,
                  "measured": status("VmHWM") - before}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the high-water mark from /proc")
def test_predicted_memory_equals_that_of_a_run():
    """The same program, predicted and run: arguments to the byte, the peak to 10 %, without the memory that the process
    already had."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers["arguments"] == pytest.approx(numbers["held"], abs=64)
    assert numbers["measured"] == pytest.approx(numbers["peak"], rel=0.10)


@pytest.mark.parametrize("devices", [1, 4])
def test_the_head_multiplies_each_chunk_twice(devices):
    """Logits, and the gradient of the activations. The planner gives the count, which the compiler does not know."""
    workload, layout = make_workload(dtype="float32"), Layout(MeshConfig(fsdp=devices), "dots", 2)
    step = compiled(workload, layout, jax.devices()[:devices])
    head = sum(
        flops * use.times for use, flops in step.program.matrix_products() if LOOP_SCOPE in use.instruction.op_name
    )
    chunks = head_chunks(workload, layout) * workload.micro_batches(layout)
    rows = chunk_size(workload.tokens_per_pass(layout))
    assert head == 2 * chunks * 2 * rows * NETWORK.vocab_size * NETWORK.hidden_size


def test_a_plan_for_the_present_devices(workload):
    machine = present_machine(jax.devices()[:4])
    layout = Layout(MeshConfig(fsdp=2, data=2), "dots", 2)
    plan = compiled_plan(workload, layout, machine, jax.devices()[:4])
    assert plan.fits
    assert plan.compiled
    document = json.loads(json.dumps(plan.to_json(price=2.0)))
    assert document["memory"]["peak"] == plan.peak
    assert document["cost"] == pytest.approx(plan.hours * 4 * 2.0)
    assert sum(document["memory"]["arguments_by_kind"].values()) == plan.peak - plan.temporaries


# ---------------------------------------------------------------------------------------------------------------------
# LLaMA-13B with the paper's training for absent machines.


@pytest.fixture(scope="module")
def paper():
    return make_workload(LLAMA_13B, LoraConfig(), 1280, 27)


@pytest.mark.parametrize(
    ("mesh", "limit"),
    [
        pytest.param(MeshConfig(fsdp=4), 22e9, id="sharded"),
        pytest.param(MeshConfig(data=4), 41e9, id="replicated", marks=pytest.mark.slow),
    ],
)
def test_13b_on_four_a6000(absent, paper, mesh, limit):
    layout = Layout(mesh, "dots", 2)
    step = compiled(paper, layout, absent("4xA6000"))
    micro_batches = paper.micro_batches(layout)
    assert step.peak <= limit
    assert step.peak == pytest.approx(estimated_plan(paper, layout, parse_target("4xA6000")).peak, rel=0.1)

    # With `dots` no product with a weight is recomputed: seven products forward, seven backward.
    weights = {(5120, 5120), (13824, 5120), (5120, 13824)}
    products = Counter()
    for use, _ in step.program.matrix_products():
        for name in use.instruction.operands[:2]:
            dims = use.computation.instructions[name].arrays[0][1]
            if dims in weights:
                products[dims] += use.times
    per_pass = micro_batches * LLAMA_13B.num_layers
    assert sum(products.values()) == 2 * 7 * per_pass

    found = exchanged(step.work.collectives)
    reductions = {key: times for key, times in found.items() if key[0] == "all-reduce"}
    assert reductions == {("all-reduce", 4 * (6_553_600 + 2), 4): 1}, "adapter gradients, loss and weight, once"
    assert {kind for kind, *_ in found} == {"all-reduce"} | ({"all-gather"} if mesh.fsdp > 1 else set())
    if mesh.fsdp > 1:
        gathers = Counter({key: times for key, times in found.items() if key[0] == "all-gather"})
        # Both tables once per micro-batch, or (jax 0.12) once per step.
        assert gathers.pop(("all-gather", 2 * 32000 * 5120, 4)) in (2, 2 * micro_batches)
        assert gathers == {
            ("all-gather", 2 * 5120 * 5120, 4): 8 * per_pass,
            ("all-gather", 2 * 5120 * 13824, 4): 6 * per_pass,
        }


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "micro_batch"), [(MeshConfig(fsdp=4), 2), (MeshConfig(data=4), 1)])
def test_without_remat_no_gathered_weight_is_saved(absent, paper, mesh, micro_batch):
    layout = Layout(mesh, "none", micro_batch)
    step = compiled(paper, layout, absent("4xA6000"))
    assert step.peak == pytest.approx(estimated_plan(paper, layout, parse_target("4xA6000")).peak, rel=0.1)
    assert step.peak <= 41e9, "a stack of gathered weights would need 25 GB more"


@pytest.mark.slow
def test_8_bit_weights_are_not_held_twice(absent, paper):
    """Turned for the backward pass they would be 12.4 GB more."""
    workload = paper.with_spec(replace(paper.spec, quantization="int8_product"))
    step = compiled(workload, Layout(MeshConfig(), "dots", 8), absent("h200"))
    assert step.arguments <= 13.5e9
    assert step.temporaries <= 51e9, "with bfloat16 weights 49.7 GB"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "quantization", "remat", "micro_batch"),
    [
        ("1x4090", "nf4", "full", 1),
        ("1x4090", "nf4", "full", 4),
        ("1x4090", "nf4", "attention", 1),
        ("1x4090", "nf4", "dots", 1),
        ("1x4090", "int8", "full", 1),
        ("4xA6000", "nf4", "full", 1),
        ("4xA6000", "int8", "full", 1),
    ],
)
def test_the_quick_estimate_of_a_quantised_base(absent, paper, target, quantization, remat, micro_batch):
    """Where little else is held, what one layer takes counts."""
    workload = paper.with_spec(replace(paper.spec, quantization=quantization))
    devices = absent(target)
    layout = Layout(MeshConfig(fsdp=len(devices)), remat, micro_batch)
    step = compiled(workload, layout, devices)
    assert step.temporaries == pytest.approx(temporary_bytes(workload, layout), rel=0.15)


def test_13b_on_a_tpu_slice(absent, paper):
    layout = Layout(MeshConfig(fsdp=16), "dots", 1)
    step = compiled(paper, layout, absent("v5e:4x4"))
    assert step.peak <= 9e9
    found = exchanged(step.work.collectives)
    assert {kind for kind, *_ in found} == {"all-gather", "all-reduce"}
    # With its lowest effort the compiler does not join the reductions of arrays.
    reductions = {key: times for key, times in found.items() if key[0] == "all-reduce"}
    assert sum(nbytes * times for (_, nbytes, _), times in reductions.items()) == pytest.approx(4 * 6_553_600, abs=8)
    per_pass = paper.micro_batches(layout) * LLAMA_13B.num_layers
    assert found["all-gather", 2 * 5120 * 5120, 16] == 8 * per_pass
    assert found["all-gather", 2 * 5120 * 13824, 16] == 6 * per_pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "fsdp", "limit"), [("v4:2x2x1", 4, 21e9), ("v5p:2x2x1", 4, 21e9), ("v6e:2x4", 8, 18e9)]
)
def test_13b_on_every_kind_of_tpu(absent, paper, target, fsdp, limit):
    step = compiled(paper, Layout(MeshConfig(fsdp=fsdp), "dots", 2), absent(target))
    assert step.peak <= limit


@pytest.mark.slow
def test_only_adapter_gradients_cross_tpu_slices(absent, paper):
    layout = Layout(MeshConfig(replica=2, fsdp=16), "dots", 1)
    step = compiled(paper, layout, absent("2xv5e:4x4"))
    between = [collective for collective in step.work.collectives if collective.group == (0, 16)]
    assert {collective.kind for collective in between} == {"all-reduce"}
    sent = sum(collective.nbytes * collective.times for collective in between)
    # Each of the 16 devices of a slice sends a sixteenth; small arrays (the loss, its count) are padded to a tile.
    assert sent == pytest.approx(4 * 6_553_600 / 16, rel=0.02)
    assert all(max(collective.group) < 16 for collective in step.work.collectives if collective not in between)
