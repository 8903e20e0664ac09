"""Remat policies by name: the results that a layer's forward pass saves for its backward pass.

They trade memory for arithmetic. A frozen weight has no gradient, so its product needs no saved input, except for an
adapter's. The policy decides about the rest; ordered by memory, most first:

- `none`: saves everything, except weights that are only gathered, transposed or converted.
- `dots`: saves the results of projections and of attention. No product with a weight is recomputed.
- `attention`: saves the results of attention. Projections are recomputed, attention is not.
- `full`: saves only the layer's input. Everything is recomputed.
- `offload`: like `dots`, but the results of projections are kept in host memory. As fast as `dots` if the link to the
  host transfers them in the time of a layer.
"""

from collections.abc import Callable
from typing import Any

from jax.ad_checkpoint import checkpoint_policies

from flacuna_jax.kernels.attention import SAVED_NAMES as ATTENTION
from flacuna_jax.model.lora import OUTPUT_NAME as PROJECTION


def _all_but_moves(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether to save a result: true unless it is a gathered, transposed or converted weight.

    Gathered weights of all layers would need the memory of a whole model on each device.
    """
    return primitive.name not in ("sharding_constraint", "custom_vjp_call", "transpose", "convert_element_type")


# For projections, the sums of base and adapter products are saved, so adapters need no additional memory.
REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "none": _all_but_moves,
    "dots": checkpoint_policies.save_only_these_names(PROJECTION, *ATTENTION),
    "attention": checkpoint_policies.save_only_these_names(*ATTENTION),
    "full": checkpoint_policies.nothing_saveable,
    "offload": checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(ATTENTION),
        names_which_can_be_offloaded=[PROJECTION],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
