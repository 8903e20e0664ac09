"""What a layer's forward pass leaves behind for its backward pass, by name: memory against arithmetic.

A frozen weight has no gradient, so its product leaves nothing behind but what an adapter beside it needs; what remains
is the policy's choice. In memory, most first:

- `none`: everything, except what is only moved (gathered, transposed or converted weights).
- `dots`: the results of projections and of attention. No weight is multiplied twice.
- `attention`: the results of attention. Projections are multiplied again, attention is not.
- `full`: only the layer's input. Everything is computed again.
- `offload`: as `dots`, but the results of projections wait in the host's memory. As fast as `dots` where the link to
  the host carries them in the time that a layer takes.
"""

from collections.abc import Callable
from typing import Any

from jax.ad_checkpoint import checkpoint_policies

from flacuna_jax.kernels.attention import SAVED_NAMES as ATTENTION
from flacuna_jax.model.lora import OUTPUT_NAME as PROJECTION


def _all_but_moves(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether a result is worth keeping: gathered, transposed or converted weights are not.

    Kept for every layer, gathered weights alone would be as large as a whole model on each device.
    """
    return primitive.name not in ("sharding_constraint", "custom_vjp_call", "transpose", "convert_element_type")


# Of projections the sums of base and adapter products are kept, not the products: nothing for the adapters' sake alone.
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
