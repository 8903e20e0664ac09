"""Sharding of the network on a mesh: `RULES` maps the logical axes of parameters and activations to mesh axes.

The mesh has four axes, from the slowest network to the fastest. `replica` repeats the rest once per TPU slice or
host, `data` replicates the weights, `fsdp` splits them and gathers one layer at a time, `tensor` splits heads,
feed-forward and vocabulary. Rows of a batch are split over replica × data × fsdp.

`fsdp` splits a matrix along its first dimension, which varies slowest in memory, so that a gather concatenates whole
blocks. If it split the other dimension, XLA:GPU would first copy every stack of layers into a transposed layout for the
gathers, and keep the copies during the step (4.6 GB per device for 13B on four).
"""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flacuna_jax.config.run import MeshConfig
from flacuna_jax.errors import UserError
from flacuna_jax.kernels.axes import BATCH_AXES, TENSOR_AXIS
from flacuna_jax.model.variables import Axes, Parameter

MESH_AXES = (*BATCH_AXES, TENSOR_AXIS)

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
    "layers": None,
    "rank": None,
    None: None,
}
"""Logical axis → mesh axis, for activations and for weights in computation (for stored weights, see `stored_spec`)."""


def partition_spec(
    axes: Axes, shape: Sequence[int] | None = None, mesh: Mesh | AbstractMesh | None = None
) -> PartitionSpec:
    """Mesh axes for logical axes. With a shape and mesh, a dimension that its mesh axis does not divide is not
    split."""
    resolved = [RULES[axis] for axis in axes]
    if shape is not None and mesh is not None:
        resolved = [to if _divides(mesh, to, size) else None for to, size in zip(resolved, shape, strict=True)]
    return PartitionSpec(*resolved)


def _divides(mesh: Mesh | AbstractMesh, axis: str | tuple[str, ...] | None, size: int) -> bool:
    names = (axis,) if isinstance(axis, str) else (axis or ())
    return size % math.prod(mesh.shape[name] for name in names) == 0


def stored_spec(parameter: Parameter, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The sharding of a stored parameter: split over tensor and, for a matrix or a table of the base, also over fsdp.
    Adapters are replicated over fsdp: they are tiny, but a second set of gathers per layer would be slow."""
    spec = _matrix_spec if parameter.kind in ("matrix", "table") else partition_spec
    return spec(parameter.axes, parameter.shape, mesh)


def _matrix_spec(axes: Axes, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """fsdp splits the first dimension of the matrix that it divides together with the axis that already splits it."""
    spec = partition_spec(axes, shape, mesh)
    for dim in (len(axes) - 2, len(axes) - 1):
        both = (spec[dim], "fsdp") if isinstance(spec[dim], str) else ("fsdp",)
        if _divides(mesh, both, shape[dim]):
            return PartitionSpec(*spec[:dim], both, *spec[dim + 1 :])
    return spec


def parameter_shardings(parameters: Mapping[str, Parameter], mesh: Mesh | AbstractMesh) -> dict[str, NamedSharding]:
    """Shardings of parameters by path (`ModelSpec.base`, `held`, `adapters`)."""
    return {path: NamedSharding(mesh, stored_spec(parameter, mesh)) for path, parameter in parameters.items()}


def abstract_arrays(parameters: Mapping[str, Parameter], mesh: Mesh | AbstractMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of parameters."""
    shardings = parameter_shardings(parameters, mesh)
    return {path: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=shardings[path]) for path, p in parameters.items()}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of batch leaves [accumulation, batch, length]."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, None))


def row_shards(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Number of parts into which a mesh, by default the ambient one, splits the rows of a batch; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation to its sharding on the ambient mesh (`jax.set_mesh`); does nothing without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def gather_weight(weight: jax.Array, *axes: str | None) -> jax.Array:
    """Gathers a stored matrix for computation along fsdp; it stays split over tensor.

    The gather is explicit, so that the compiler cannot choose to move activations instead. The gradient is
    reduce-scattered to the stored sharding and is never whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return weight
    return _relay(weight, partition_spec(axes, weight.shape, mesh), _matrix_spec(axes, weight.shape, mesh))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _relay(x: jax.Array, forward: PartitionSpec, backward: PartitionSpec) -> jax.Array:
    """x with one sharding, and its gradient with another."""
    return jax.lax.with_sharding_constraint(x, forward)


def _relay_forward(x: jax.Array, forward: PartitionSpec, backward: PartitionSpec) -> tuple[jax.Array, None]:
    return _relay(x, forward, backward), None


def _relay_backward(forward: PartitionSpec, backward: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, backward),)


_relay.defvjp(_relay_forward, _relay_backward)


def make_mesh(config: MeshConfig | str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the (replica, data, fsdp, tensor) mesh; `auto` splits the weights over every device of a slice.

    Axes are arranged so that replicas are whole slices, or whole hosts if there are no slices; within them, the torus
    of a TPU is taken into account.

    Raises:
      UserError: the config needs more devices than there are, does not use all devices of several hosts, or lets fsdp
        or tensor cross the slow network between TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    if not isinstance(config, MeshConfig):
        config = split_everywhere(devices)
    wanted = config.devices
    if wanted > len(devices):
        asked = " × ".join(f"{axis} {getattr(config, axis)}" for axis in MESH_AXES)
        raise UserError(
            f"mesh: {asked} needs {wanted} devices, but there are {len(devices)}; lower an axis or set mesh: auto"
        )
    if wanted < len(devices) and jax.process_count() > 1:
        raise UserError(f"mesh: uses {wanted} of {len(devices)} devices; several hosts must use all")
    return Mesh(_device_grid(config, devices[:wanted]), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def split_everywhere(devices: Sequence[jax.Device]) -> MeshConfig:
    """The mesh that splits weights as far as possible: over all devices, or over all of a TPU slice."""
    slices = tpu_slices(devices)
    return MeshConfig(replica=slices, fsdp=len(devices) // slices)


def _device_grid(config: MeshConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    slices = tpu_slices(devices)
    copies = config.replica * config.data
    if copies % slices:
        raise UserError(
            f"mesh: replica {config.replica} × data {config.data} is not a multiple of the {slices} TPU slices; "
            f"set replica: {slices}, so that fsdp and tensor stay within a slice"
        )
    shape = (copies // slices, config.fsdp, config.tensor)
    in_order = sorted(devices, key=lambda device: (_slice_index(device), device.process_index, device.id))
    blocks = np.array_split(np.array(in_order), slices)
    # An axis may end within a side of a TPU's torus: 32 × 16 on 8 × 8 × 8.
    grids = [create_device_mesh(shape, block.tolist(), allow_split_physical_axes=True) for block in blocks]
    return np.stack(grids).reshape([getattr(config, axis) for axis in MESH_AXES])


def tpu_slices(devices: Sequence[jax.Device]) -> int:
    """Number of TPU slices; GPUs and CPUs count as one slice, with the hosts one after another."""
    return len({_slice_index(device) for device in devices})


def _slice_index(device: jax.Device) -> int:
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def idle_devices(used: int, present: int) -> list[str]:
    """A warning if a mesh does not use all devices."""
    return [f"mesh uses {used} of {present} devices; mesh: auto uses all"] if used < present else []


def check_mesh(mesh: Mesh, num_heads: int, num_kv_heads: int, intermediate_size: int) -> None:
    """`check_tensor_parallelism` for a mesh."""
    check_tensor_parallelism(mesh.shape["tensor"], num_heads, num_kv_heads, intermediate_size)


def check_tensor_parallelism(tensor: int, num_heads: int, num_kv_heads: int, intermediate_size: int) -> None:
    """Raises `UserError` if tensor parallelism would split a head, or split the feed-forward network unevenly."""
    for what, size in (
        ("attention heads", num_heads),
        ("key/value heads", num_kv_heads),
        ("feed-forward units", intermediate_size),
    ):
        if size % tensor:
            raise UserError(f"mesh.tensor: {tensor} does not divide the model's {size} {what}")
