"""JAX's deprecations: users see no warnings, and the docs have a plan for each."""

import subprocess
import sys
import warnings
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs" / "how" / "architecture.md"

LOWER_THE_KERNELS = """
import jax, jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from flacuna_jax.kernels.attention import attention
from flacuna_jax.kernels.packed_mask import PackedMask

device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
q, interval = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.bfloat16), jax.ShapeDtypeStruct((1, 64), jnp.int32)
with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)):
    jax.jit(attention).trace(q, q, q, PackedMask(interval, interval)).lower(lowering_platforms=("cuda",))
"""


def test_users_see_no_deprecations():
    """With Python's default filters, in a process like that of a user."""
    done = subprocess.run([sys.executable, "-c", LOWER_THE_KERNELS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "eprecat" not in done.stderr + done.stdout


def test_every_announcement_about_the_kernels_has_a_plan():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(LOWER_THE_KERNELS, {})
    announced = {str(w.message).partition(". ")[0] for w in caught if issubclass(w.category, DeprecationWarning)}
    planned = " ".join(DOCS.read_text().split())
    assert [message for message in announced if message not in planned] == []
