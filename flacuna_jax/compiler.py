"""XLA's compiler options per platform, and the cache of compiled programs. The user can override all of them.

The train step passes the options to `jax.jit`, so that the trainer, the planner (which compiles for absent machines)
and the benchmarks use the same ones. An option that the installed jaxlib does not know is omitted with a warning
(`deviceless.known_options`); an option that XLA_FLAGS or LIBTPU_INIT_ARGS sets is left to the user.
docs/results/laboratory.md describes the effect of each option on the compiled step.

Every verb first calls `prepare_process`, which sets what JAX reads when it initializes its devices.
"""

import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from flacuna_jax.user_cache import user_cache

Options = dict[str, bool | int | float | str]

MEMORY_FRACTION = 0.95
"""Fraction of a GPU's memory for JAX's allocator. With JAX's default, 0.75, some runs that fit would fail. cuBLAS, NCCL
and the CUDA context use the rest."""

KEPT_FROM_SECONDS = 0.2
"""Programs that take longer to compile are cached. JAX's default is 1 second, but start-up compiles several small
programs that together take seconds."""

MAPPINGS, MAPPINGS_LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
"""The memory mappings of this process, one per line, and how many Linux allows: 65,530 unless set otherwise."""

ALWAYS: dict[str, Options] = {
    "cuda": {
        # 0 disables the pass. It merges products with a common operand, and for that it would concatenate frozen
        # weights with adapters in every layer.
        "xla_gpu_dot_merger_threshold_mb": 0,
        # The remat policy decides what is recomputed. XLA's own pass, which runs for programs above three quarters of
        # the memory, recomputes products with frozen weights and saves almost nothing.
        "xla_disable_hlo_passes": "rematerialization",
    },
}
SPLIT_WEIGHTS: dict[str, Options] = {
    "cuda": {
        # Overlaps gathers of weights and reductions with arithmetic.
        "xla_gpu_enable_latency_hiding_scheduler": True,
    },
}
"""Additional options for steps on a mesh that splits weights. TPUs overlap communication by default."""

QUICK: dict[str, tuple[Options, ...]] = {
    "tpu": ({"optimization_level": "O0"}, {"exec_time_optimization_effort": -1.0}),
}
"""Options for plans that minimize the compiler's optimization effort, under their names in different releases, newest
first (`deviceless.quick_options` takes the first known one). Most of the remaining time is the generation of machine
code, which they do not omit (docs/results/performance.md)."""


def compiler_options(platform: str, split_weights: bool, environment: Mapping[str, str] = os.environ) -> Options:
    """Options for the train step on a platform (`jax.Device.platform`), without those that the user sets."""
    flags = environment.get("XLA_FLAGS", "") + " " + environment.get("LIBTPU_INIT_ARGS", "")
    named_by_user = set(re.findall(r"--(\w+)", flags))
    platform = "cuda" if platform == "gpu" else platform
    options = ALWAYS.get(platform, {}) | (SPLIT_WEIGHTS.get(platform, {}) if split_weights else {})
    return {name: value for name, value in options.items() if name not in named_by_user}


def prepare_process(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the variables that JAX reads when it initializes its devices; call it before that. Does not overwrite
    variables that are already set.

    Programs that take longer than `KEPT_FROM_SECONDS` to compile are kept in the user's cache (`user_cache`), for the
    next start and for resumed runs. JAX_ENABLE_COMPILATION_CACHE=false disables this cache, and
    JAX_COMPILATION_CACHE_DIR moves it.
    """
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    settings = {
        "jax_compilation_cache_dir": str(user_cache(environment) / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": KEPT_FROM_SECONDS,
    }
    for name, value in settings.items():
        if name.upper() not in environment:
            environment[name.upper()] = str(value)
            if jax := sys.modules.get("jax"):  # an imported jax has already read its environment
                jax.config.update(name, value)


def release_programs() -> bool:
    """Releases all compiled programs if they take more than half of the memory mappings that a process may have, and
    returns whether it did. Programs that are needed again are read from the user's cache.

    On CPUs, a program takes several mappings per kernel, often hundreds. If there are no more, XLA aborts the process.
    An evaluation compiles programs for many sizes, so it calls this function between groups of problems.
    """
    import jax

    try:
        with MAPPINGS.open("rb") as lines:
            used = sum(1 for _ in lines)
        allowed = int(MAPPINGS_LIMIT.read_text())
    except (OSError, ValueError):  # not Linux, or hidden
        return False
    if used <= allowed // 2:
        return False
    jax.clear_caches()
    return True
