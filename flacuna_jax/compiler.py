"""What XLA is told, per platform, and where its programs are kept: one place, in which the user has the last word.

Options belong to a program: the train step hands them to `jax.jit`, so that the trainer, the planner (which compiles
for machines that are absent) and the benchmarks have the same. One that a later jaxlib no longer knows is left out with
a warning (`deviceless.known_options`), one that XLA_FLAGS (or LIBTPU_INIT_ARGS) names is left to the user.
docs/performance.md says what each does to the compiled step.

What has to be known before JAX meets a device is set by `prepare_process`, which every verb calls first.
"""

import os
import re
import sys
from collections.abc import Mapping, MutableMapping

from flacuna_jax.user_cache import user_cache

Options = dict[str, bool | int | float | str]

MEMORY_FRACTION = 0.95
"""Of a GPU's memory for JAX's allocator. JAX's own default, 0.75, would refuse runs that fit; cuBLAS, NCCL and the CUDA
context live in the rest."""

KEPT_FROM_SECONDS = 0.2
"""JAX's own default is 1. A start compiles a handful of programs that take less each and seconds together."""

ALWAYS: dict[str, Options] = {
    "cuda": {
        # Off: products that share an operand are merged by laying frozen weights beside adapters, in every layer.
        "xla_gpu_dot_merger_threshold_mb": 0,
        # What is computed again is the remat policy's choice. XLA's own, for programs above three quarters of the
        # memory, multiplies frozen weights again and saves next to nothing by that.
        "xla_disable_hlo_passes": "rematerialization",
    },
}
SPLIT_WEIGHTS: dict[str, Options] = {
    "cuda": {
        # Gathers of weights and reductions run beside arithmetic, instead of before it.
        "xla_gpu_enable_latency_hiding_scheduler": True,
    },
}
"""Beside those, for steps on a mesh that splits weights. TPUs overlap exchanges by default."""

QUICK: dict[str, tuple[Options, ...]] = {
    "tpu": ({"optimization_level": "O0"}, {"exec_time_optimization_effort": -1.0}),
}
"""For plans: the least effort for speed, under the names that it has had, the newest first (`deviceless.quick_options`
takes the first that is known). For TPUs the full search takes minutes."""


def compiler_options(platform: str, split_weights: bool, environment: Mapping[str, str] = os.environ) -> Options:
    """Options for the step on a platform (`jax.Device.platform`), without those that the user sets."""
    flags = environment.get("XLA_FLAGS", "") + " " + environment.get("LIBTPU_INIT_ARGS", "")
    named_by_user = set(re.findall(r"--(\w+)", flags))
    platform = "cuda" if platform == "gpu" else platform
    options = ALWAYS.get(platform, {}) | (SPLIT_WEIGHTS.get(platform, {}) if split_weights else {})
    return {name: value for name, value in options.items() if name not in named_by_user}


def prepare_process(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets what JAX reads when it first meets a device; call before that. What the environment says stays.

    Programs that took longer than `KEPT_FROM_SECONDS` to compile are kept in the user's cache (`user_cache`), for the
    next start and for resuming; JAX_ENABLE_COMPILATION_CACHE=false turns that off, JAX_COMPILATION_CACHE_DIR moves it.
    """
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    settings = {
        "jax_compilation_cache_dir": str(user_cache(environment) / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": KEPT_FROM_SECONDS,
    }
    for name, value in settings.items():
        if name.upper() not in environment:
            environment[name.upper()] = str(value)
            if jax := sys.modules.get("jax"):  # it has already read its environment
                jax.config.update(name, value)
