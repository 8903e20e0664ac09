"""Tile sizes of the attention kernels, one table per architecture, with the reasons for them.

So far they are based on the reports of the real compilers for each kernel at [4, 1280, 40, head_dim]: shared memory in
bytes and registers (ptxas), no spills, within the limits of every card of the architecture. Smaller tiles visit less of
other documents, larger ones load less per product; only measurements show which is faster.
`benchmarks/tune_attention.py` writes its results on a device to `tiles_measured.json`, whose entries take precedence.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclass(frozen=True)
class GpuTile:
    """One kernel's tile: `queries` x `keys` scores at a time, `warps` x 32 threads, and `stages` of loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class GpuTiles:
    forward: GpuTile
    dq: GpuTile
    dkv: GpuTile
    dkv_ragged: GpuTile | None = None
    """Replaces `dkv` for rows that its tile does not divide, because their guards need registers."""

    def dkv_for(self, length: int) -> GpuTile:
        """The tile of dkv for rows of a length."""
        ragged = length % self.dkv.queries or length % self.dkv.keys
        return self.dkv_ragged if ragged and self.dkv_ragged else self.dkv


@dataclass(frozen=True)
class TpuTile:
    """One kernel's tile: `queries` x `keys` scores at a time, both multiples of 128."""

    queries: int
    keys: int


@dataclass(frozen=True)
class TpuTiles:
    forward: TpuTile
    dq: TpuTile
    dkv: TpuTile


# Ampere and Ada, bfloat16. Shared memory may be 101,376 bytes per block on sm_86 and sm_89, 166,912 on sm_80.
# head_dim 128 on sm_86 (sm_80 within 5 registers of it):
#   forward 128x64 w8 s2: 65,536, 244   s3: 98,304, 254   64x64 w4 s2: 57,344, 252 (128x128 w8, 128x64 w4 spill)
#   dq      64x64 w8 s2: 73,728, 164    128x32 w8 s2: 81,920, 196                  (128x64 w8 spills)
#   dkv     64x64 w8 s2: 74,240, 230    32x64 w8 s2: 53,504, 208                   (64x64 w4, 32x128 w8 spill)
# dkv of rows of 1000 on sm_86: 64x64 w8 s2: 74,240, 255, and from jax 0.12 on it spills; 32x64 w8 s2: 53,504, 208.
_AMPERE = GpuTiles(
    forward=GpuTile(128, 64, 8, 2),
    dq=GpuTile(64, 64, 8, 2),
    dkv=GpuTile(64, 64, 8, 2),
    dkv_ragged=GpuTile(32, 64, 8, 2),
)
# head_dim 64 on sm_80: 32,768, 168; 32,768, 252; 24,832, 183 (dkv 64x64 w8 spills 12 bytes there).
_AMPERE_64 = GpuTiles(forward=GpuTile(128, 64, 8, 2), dq=GpuTile(64, 64, 8, 2), dkv=GpuTile(32, 64, 8, 2))

# Hopper, bfloat16, head_dim up to 128: 232,448 bytes per block, products by wgmma. Bytes and registers at 128:
#   forward 128x64 w8 s3: 131,072, 183  s2: 98,304, 174  64x64 w4 s2: 81,920, 198  128x128 w8 s2: 163,840, 231
#   dq      64x64 w4 s2: 98,304, 227    128x64 w8 s2: 131,072, 194
#   dkv     32x64 w4 s2: 65,792, 255    64x64 w8 s2: 99,328, 247   32x128 w8 s2: 98,560, 230   (64x128 w8 spills)
# Forward: registers allow one block per multiprocessor, so the third stage is free. dq, dkv: two blocks, each of one
# warp group, run concurrently and hide each other's exponentials.
_HOPPER = GpuTiles(forward=GpuTile(128, 64, 8, 3), dq=GpuTile(64, 64, 4, 2), dkv=GpuTile(32, 64, 4, 2))

# head_dim above 128, bfloat16, everywhere. At 256 on sm_86: 69,632, 214; 65,536, 128; 81,920, 168.
_WIDE = GpuTiles(forward=GpuTile(64, 32, 8, 2), dq=GpuTile(32, 32, 8, 1), dkv=GpuTile(32, 32, 8, 1))

# float32 is for parity runs, not for speed: each product is three TF32 products, and registers are scarce. At
# head_dim 128 on sm_80: 49,152, 254; 40,960, 254; 49,152, 253 (dkv 32x16 w4 s1 spills there from jax 0.12 on).
_FLOAT32 = GpuTiles(forward=GpuTile(32, 32, 4, 1), dq=GpuTile(16, 16, 4, 1), dkv=GpuTile(16, 16, 4, 1))

_ARCHITECTURES = {
    "sm90": ("H100", "H200", "H800", "H20", "GH200"),
    "sm100": ("B100", "B200", "B300"),
}


def gpu_architecture(device_kind: str | None) -> str | None:
    """ "sm90" or "sm100" for data-center GPUs of Hopper and Blackwell, by name; None for every other device.

    The name is used because an absent target device has nothing else.
    """
    kind = device_kind or ""
    return next((name for name, kinds in _ARCHITECTURES.items() if any(part in kind for part in kinds)), None)


def gpu_holds(dim: int, dtype: DTypeLike) -> bool:
    """Whether any tile of this head_dim fits into a GPU's registers and shared memory."""
    return dim <= (256 if jnp.dtype(dtype).itemsize <= 2 else 128)


def gpu_tiles(device_kind: str | None, dim: int, dtype: DTypeLike) -> GpuTiles:
    """Tiles for a device (`jax.Device.device_kind`), head_dim and dtype; an unknown device gets tiles that fit all.

    Raises ValueError if no GPU can hold them.
    """
    if not gpu_holds(dim, dtype):
        raise ValueError(f"head_dim {dim} in {jnp.dtype(dtype).name} is too large for the GPU kernels; use backend xla")
    if measured := _measured(GpuTile, device_kind, dim, dtype):
        return GpuTiles(**measured)
    if jnp.dtype(dtype).itemsize > 2:
        return _FLOAT32
    if dim > 128:
        return _WIDE
    if gpu_architecture(device_kind) == "sm90":
        return _HOPPER
    return _AMPERE_64 if dim <= 64 else _AMPERE


# 256 x 256 float32 scores take 256 KiB of a core's vector memory, all blocks together about 2 MiB: far from its 16 MiB,
# and a row of 1280 has five tiles, few enough to amortise a grid step and enough to skip other documents.
_TPU = TpuTiles(forward=TpuTile(256, 256), dq=TpuTile(256, 256), dkv=TpuTile(256, 256))


def tpu_tiles(device_kind: str | None, dim: int, dtype: DTypeLike) -> TpuTiles:
    """Tiles for a TPU. Without measurements there is one entry, which v4, v5e, v5p and v6e compile for every head_dim
    up to 256."""
    if measured := _measured(TpuTile, device_kind, dim, dtype):
        return TpuTiles(**measured)
    return _TPU


MEASURED = Path(__file__).with_name("tiles_measured.json")
"""{device kind: {head_dim: {kernel: tile, "seconds": {backend: seconds}}}}, bfloat16.

An entry applies to head_dims up to its own and above half of it. "seconds" exists if more than one backend has kernels
for the device: forward and backward of each at the shape of the tuner.
"""

Tile = TypeVar("Tile", GpuTile, TpuTile)


def measured_seconds(device_kind: str | None, dim: int, dtype: DTypeLike) -> dict[str, float]:
    """Seconds of every backend that was compared on this device; empty if none was."""
    return _entry(device_kind, dim, dtype).get("seconds", {})


@cache
def _measured_table() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(MEASURED.read_text(encoding="utf-8"))


def _measured(tile: type[Tile], device_kind: str | None, dim: int, dtype: DTypeLike) -> dict[str, Tile] | None:
    entry = _entry(device_kind, dim, dtype)
    return {kernel: tile(**sizes) for kernel, sizes in entry.items() if kernel != "seconds"} or None


def _entry(device_kind: str | None, dim: int, dtype: DTypeLike) -> dict[str, Any]:
    if jnp.dtype(dtype).itemsize > 2:
        return {}
    entries = _measured_table().get(device_kind or "", {})
    return next((entry for of_dim, entry in entries.items() if int(of_dim) // 2 < dim <= int(of_dim)), {})
