"""Counts read from compiled programs, against known counts."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flacuna_jax.config.run import MeshConfig
from flacuna_jax.model.sharding import make_mesh
from flacuna_jax.planning.hlo import Program, replica_group
from flacuna_jax.planning.roofline import LATENCY, NETWORK_SHARE, exchange_time
from flacuna_jax.planning.targets import parse_target

LAYERS, ROWS, WIDTH = 5, 64, 128


def compiled_scan(mesh, weight_spec):
    def step(x, weights):
        def layer(x, w):
            return jax.nn.relu(x @ jax.lax.with_sharding_constraint(w, PartitionSpec())), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    x = jax.ShapeDtypeStruct((ROWS, WIDTH), "float32", sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), "float32", sharding=NamedSharding(mesh, weight_spec))
    with jax.set_mesh(mesh):
        return Program(jax.jit(step).lower(x, weights).compile().as_text())


@pytest.fixture(scope="module")
def program():
    return compiled_scan(make_mesh(MeshConfig(fsdp=4)), PartitionSpec(None, "fsdp"))


def test_products_in_loops_are_multiplied_by_the_trip_count(program):
    assert program.matrix_flops == LAYERS * 2 * (ROWS // 4) * WIDTH * WIDTH


def test_collectives_have_kind_bytes_partners_and_count(program):
    gather, reduction = sorted(program.collectives, key=lambda collective: collective.kind)
    assert (gather.kind, gather.nbytes, gather.times) == ("all-gather", WIDTH * WIDTH * 4, LAYERS)
    assert gather.group == (0, 1, 2, 3)
    assert gather.received == WIDTH * WIDTH * 4 * 3 / 4
    assert (reduction.kind, reduction.nbytes, reduction.times) == ("all-reduce", 4, 1)
    assert reduction.received == 2 * 4 * 3 / 4


def test_traffic_counts_only_slices_of_stacks(program):
    weights = LAYERS * WIDTH * WIDTH * 4
    # Shards read, gathered weights written and read, about 8 kB of activations: not the whole stack in every layer.
    assert weights < program.memory_traffic < 6 * weights


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4,'axis_2'=1] {'axis_1'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, x", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=1,'b'=8,'c'=1,'d'=16], device_ids=([16,8]T(1,0)) {'b'}, x", tuple(range(8))),
        ("replica_groups=mesh['a'=8,'b'=16], device_ids=([16,8]T(1,0)) {'b'}, x", tuple(range(0, 128, 8))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}, x", (3, 1)),
        ("source_target_pairs={{3,1},{1,3}}, x", (1, 3)),
    ],
)
def test_partners_in_every_form(text, group):
    assert replica_group(text) == group


def test_the_gpu_and_tpu_forms():
    text = """HloModule m
%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]{1,0}) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%p), index=1
  %ag = (bf16[2,16]{1,0}, bf16[8,16]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[1,4]<=[4], backend_config={"is_sync":false}
  %agd = bf16[8,16]{1,0} all-gather-done(%ag)
  %rs = ((bf16[8,16]{1,0}), bf16[2,16]{1,0}) reduce-scatter-start(%x), channel_id=2, replica_groups=[1,4]<=[4], backend_config={"is_sync":true}
  %gemm = (bf16[8,8]{1,0}, s8[64]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm"
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%x, %x)
}
ENTRY %main (a: bf16[8,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %w = (s32[], bf16[8,16]{1,0}) while(%a), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %one = bf16[8,16]{1,0} all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="1"}
  %two = bf16[8,16]{1,0} all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="1"}
  ROOT %r = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} copy(%a)
}
"""  # noqa: E501
    program = Program(text)
    found = [(c.kind, c.nbytes, c.times, c.overlapped) for c in program.collectives]
    assert found == [
        ("all-gather", 256, 3, True),
        ("reduce-scatter", 256, 3, False),
        ("all-gather", 256, 1, True),  # in two fusions with one channel: one collective
    ]
    assert program.matrix_flops == 3 * 2 * 8 * 8 * 16
    copy = next(use for use in program.uses if use.instruction.opcode == "copy")
    assert program._traffic(copy) == 256, "on-chip memory is not traffic"


@pytest.mark.parametrize("shape", ["f32[5]{0}", "((f32[5]{0}), f32[5]{0})"], ids=["to jax 0.11", "from jax 0.12"])
def test_an_asynchronous_reduction_counts_once(shape):
    text = f"""HloModule jit_step

ENTRY %main (a: f32[5]) -> f32[5] {{
  %a = f32[5]{{0}} parameter(0)
  %start = {shape} all-reduce-start(%a), channel_id=1, replica_groups=[1,4]<=[4], backend_config={{"is_sync":false}}
  ROOT %done = f32[5]{{0}} all-reduce-done(%start)
}}
"""
    (reduction,) = Program(text).collectives
    assert (reduction.kind, reduction.nbytes, reduction.times, reduction.overlapped) == ("all-reduce", 20, 1, True)


def test_a_loop_counts_up_to_the_constant_in_its_condition():
    """TPU programs have no counts, and a compiler may give a loop another name."""
    text = """HloModule jit_step

%body (b: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %b = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%b), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%i, %y)
}

%condition (c: (s32[], f32[8,8])) -> pred[] {
  %c = (s32[], f32[8,8]{1,0}) parameter(0)
  %bound = s32[]{:T(128)} constant(40)
  %j = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %bound), direction=LT
}

ENTRY %main (a: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %a = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[8,8]{1,0}) while(%a), condition=%condition, body=%body, metadata={op_name="kernel/pallas_call"}
}
"""  # noqa: E501
    assert Program(text, lambda op_name: 3.0).matrix_flops == 40 * 2 * 8 * 8 * 8
    traced = text.replace("constant(40)", "parameter(1)")
    assert Program(traced, lambda op_name: 3.0).matrix_flops == 3 * 2 * 8 * 8 * 8


def test_collectives_between_tpu_slices_count_the_sent_bytes():
    """A piece of a two-slice program: an all-reduce within each slice, then each of 16 devices sends a sixteenth."""
    attributes = (
        '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",'
        '_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"'
    )
    text = f"""HloModule jit_step

ENTRY %main (share: f32[5,8,128]) -> f32[5,8,128] {{
  %share = f32[5,8,128]{{2,1,0}} parameter(0)
  %first = token[] after-all()
  %sent = (f32[5,8,128]{{2,1,0}}, u32[], token[]) send(%share, %first), frontend_attributes={{{attributes}}}
  ROOT %copy = f32[5,8,128]{{2,1,0}} copy(%share)
}}
"""
    (between,) = Program(text).collectives
    assert (between.kind, between.nbytes, between.group) == ("all-reduce", 5 * 8 * 128 * 4, (0, 16))
    link, seconds = exchange_time(between, parse_target("2xv5e:4x4"))
    assert link == "network"
    assert seconds == pytest.approx(between.nbytes / (NETWORK_SHARE * 3.125e9), abs=1.1 * LATENCY)
