"""The kernels with the real compilers, for absent hardware: resources, and no register spills.

Results and speed on hardware are tested elsewhere; these tests show that the hardware accepts every entry of the tile
tables. They skip if the compiler of a platform is not installed. One GPU and one TPU are in the quick set.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flacuna_jax.deviceless import lowering_for
from flacuna_jax.kernels.attention import SAVED_NAMES, attention
from flacuna_jax.kernels.packed_mask import PackedMask
from flacuna_jax.planning.targets import CompilerMissing, absent_devices, parse_target
from tests.kernels.remat import kernels_in_gradient

KERNELS = ("packed_attention_forward", "packed_attention_dq", "packed_attention_dkv")


def mesh_of(target: str, shape: tuple[int, int, int] = (1, 1, 1)) -> Mesh:
    try:
        devices = absent_devices(parse_target(target))
    except CompilerMissing as missing:
        pytest.skip(str(missing))
    return Mesh(np.array(devices).reshape(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def compiled_gradient(
    mesh: Mesh,
    heads: int = 40,
    kv_heads: int = 40,
    dim: int = 128,
    length: int = 1280,
    dtype: Any = jnp.bfloat16,
    window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Any:
    def shaped(shape: tuple[int, ...], dtype: Any, *axes: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    rows = ("data", "fsdp")
    q, k = (shaped((4, length, h, dim), dtype, rows, None, "tensor", None) for h in (heads, kv_heads))
    interval = shaped((4, length), jnp.int32, rows, None)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, mask: PackedMask) -> jax.Array:
        return jnp.sum(attention(q, k, v, mask, softcap=softcap).astype(jnp.float32) ** 2)

    with lowering_for(mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, PackedMask(interval, interval, window))
        return lowered.compile(compiler_options=options)


@dataclass(frozen=True)
class Resources:
    shared_memory: int
    registers: int
    spilled: int


def resources(dump: Path) -> dict[str, Resources]:
    """The resources of each kernel of a dumped compilation, from XLA's launch sequence and ptxas."""
    launches = next(dump.glob("*thunk_sequence.txt")).read_text()
    shared = {name: int(size) for name, size in re.findall(r"(packed_\w+) grid.*?shared_memory: (\d+)", launches)}
    found = {}
    for ptx in dump.glob("*.ptx"):
        text = ptx.read_text()
        name = re.search(r"\.entry (packed_\w+)", text)
        if name is None:
            continue
        architecture = re.search(r"\.target (\w+)", text)
        assert architecture is not None
        arguments = [ptxas(), "-v", "--gpu-name", architecture[1], str(ptx), "-o", str(dump / "kernel.cubin")]
        said = subprocess.run(arguments, capture_output=True, text=True, check=True).stderr
        spills = re.findall(r"(\d+) bytes spill", said)
        registers = re.search(r"Used (\d+) registers", said)
        assert registers is not None
        assert spills
        found[name[1]] = Resources(shared[name[1]], int(registers[1]), sum(map(int, spills)))
    return found


def ptxas() -> str:
    """The newest assembler: XLA writes PTX for the newest CUDA libraries, of which torch brings its own."""
    nvidia = pytest.importorskip("nvidia", reason="ptxas comes with nvidia-cuda-nvcc-cu12")
    programs = [program for place in nvidia.__path__ for program in Path(place).glob("*/bin/ptxas")]
    if not programs:
        pytest.skip("ptxas is not installed: pip install flacuna-jax[compilers]")
    return str(max(programs, key=_release))


def _release(program: Path) -> tuple[int, ...]:
    said = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    assert found is not None, said
    return tuple(map(int, found.groups()))


QUICK: tuple[str, dict[str, Any]] = ("a6000", {})
GEMMA2: dict[str, Any] = {"heads": 8, "kv_heads": 4, "dim": 256, "softcap": 50.0}
CASES = [
    ("a100-40gb", {}),
    ("a100-40gb", {"dim": 64}),
    ("a100-40gb", {"dim": 96}),
    ("a100-40gb", {"dim": 256}),
    ("a100-40gb", {"length": 1000}),
    ("a100-40gb", {"heads": 32, "kv_heads": 8}),
    ("a100-40gb", {"window": 256}),
    ("a100-40gb", {"dtype": jnp.float32}),
    ("a6000", {}),
    ("a6000", {"dim": 64}),
    ("a6000", {"dim": 96}),
    ("a6000", {"dim": 80}),
    ("a6000", {"dim": 256}),
    ("a6000", {"length": 1000}),
    ("a6000", {"heads": 32, "kv_heads": 8}),
    ("a6000", {"window": 256}),
    ("a6000", {"dtype": jnp.float32}),
    ("4090", {}),
    ("5090", {}),
    ("b200", {}),
    ("a100-40gb", GEMMA2),
    ("a6000", GEMMA2),
    ("h100", GEMMA2),
    ("h100", {}),
    ("h100", {"dim": 64}),
    ("h100", {"dim": 96}),
    ("h100", {"dim": 256}),
    ("h100", {"length": 1000}),
    ("h100", {"heads": 32, "kv_heads": 8}),
    ("h100", {"dtype": jnp.float32}),
]


@pytest.mark.parametrize(
    ("target", "case"),
    [pytest.param(*pair, marks=[] if pair == QUICK else pytest.mark.slow) for pair in CASES],
    ids=lambda value: str(value),
)
def test_gpu_kernels_fit_and_do_not_spill(target: str, case: dict[str, Any], tmp_path: Path) -> None:
    dumped = {"xla_dump_to": str(tmp_path), "xla_dump_emitter_re": "ptx"}
    compiled_gradient(mesh_of(target), **case, **dumped)
    gpu = parse_target(target).target.gpu
    assert gpu is not None
    found = resources(tmp_path)
    assert set(found) == set(KERNELS)
    for name, taken in found.items():
        print(f"{target} {case} {name}: {taken}")
        assert taken.spilled == 0, f"{name} spills {taken.spilled} bytes"
        assert taken.shared_memory <= gpu.shared_memory_per_block, name


def test_kernels_compile_for_a_tpu() -> None:
    compile_for_tpu("v5e", {})


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v4", "v5e", "v5p", "v6e"])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"dim": 64},
        {"dim": 96},
        {"dim": 256},
        {"length": 1000},
        {"heads": 32, "kv_heads": 8},
        {"window": 256},
        GEMMA2,
    ],
    ids=str,
)
def test_kernels_compile_for_every_tpu(target: str, case: dict[str, Any]) -> None:
    compile_for_tpu(target, case)


def compile_for_tpu(target: str, case: dict[str, Any]) -> None:
    text = compiled_gradient(mesh_of(target), **case).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == len(KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v4", "v6e"])
def test_tpu_kernels_compile_in_float32(target: str) -> None:
    compiled_gradient(mesh_of(target), dtype=jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "shape"), [("4xa6000", (1, 4, 1)), ("4xa6000", (1, 2, 2)), ("v5e:2x2", (1, 2, 2))])
def test_each_device_computes_its_own_part(target: str, shape: tuple[int, int, int]) -> None:
    text = compiled_gradient(mesh_of(target, shape)).as_text()
    assert not re.search(
        r" (all-gather|all-reduce|all-to-all|collective-permute)(-start)?\(", text.replace("f32[]", "")
    )


@pytest.mark.slow
def test_under_remat_the_forward_kernel_runs_once() -> None:
    mesh = mesh_of("a6000")

    def kernels(policy: Any) -> int:
        return kernels_in_gradient(mesh, lowering_for(mesh), 'custom_call_target="__gpu$xla.gpu.triton"', policy)

    assert kernels(jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)) == 3
    assert kernels(jax.checkpoint_policies.nothing_saveable) == 4
