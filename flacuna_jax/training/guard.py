"""The watch over every update: a step whose loss or gradient is not finite, or leaps, changes nothing.

The decision is made inside the compiled step, from numbers that are part of the optimizer state. So no host waits for
it, a resumed run decides as an undisturbed one would, and neither a parameter nor a moment ever sees a NaN.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

MEMORY = 0.95
"""Weight of the past in the running means: about the last twenty accepted steps."""
SETTLING = 20
"""Accepted steps before a leap can be told from a start."""


class GuardState(NamedTuple):
    """Optimizer state inside the guard, and what the guard remembers; scalars, replicated."""

    inner: Any
    loss_mean: jax.Array
    """Exponential sum over accepted steps, float32; divided by 1 - MEMORY**accepted it is a mean."""
    norm_mean: jax.Array
    accepted: jax.Array
    """Updates made, int32."""
    skipped: jax.Array
    """Updates not made, int32."""
    in_a_row: jax.Array
    """Of those, the latest without an accepted one between, int32; 0 after a good step."""


def guarded(inner: optax.GradientTransformation, spike_factor: float | None) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer. A bad step leaves its state as it was and gives updates of zero.

    `update` takes the step's mean `loss` beside the gradients (without one, they alone are watched). Bad is what is not
    finite in loss or gradient norm, and with `spike_factor` also a loss or norm above that many times its running mean
    over accepted steps. The schedule counts accepted steps: a skipped batch is as though it were not in the data.
    """
    inner_update = optax.with_extra_args_support(inner).update

    def init(params: Any) -> GuardState:
        # An array each: the step donates them all.
        means = (jnp.zeros((), jnp.float32) for _ in range(2))
        counts = (jnp.zeros((), jnp.int32) for _ in range(3))
        return GuardState(inner.init(params), *means, *counts)

    def update(
        gradients: Any, state: GuardState, params: Any = None, *, loss: jax.Array | None = None, **extra: Any
    ) -> tuple[Any, GuardState]:
        loss = jnp.zeros((), jnp.float32) if loss is None else loss
        norm = optax.tree.norm(gradients).astype(jnp.float32)
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
        if spike_factor is not None:
            weight = 1 - jnp.float32(MEMORY) ** state.accepted
            leap = (loss * weight > spike_factor * state.loss_mean) | (norm * weight > spike_factor * state.norm_mean)
            bad |= leap & (state.accepted >= SETTLING)
        # The optimizer gets zeros instead of what is bad, so that no NaN arises even where it is then thrown away.
        harmless = jax.tree.map(lambda gradient: jnp.where(bad, 0, gradient), gradients)
        updates, inner_state = inner_update(harmless, state.inner, params, **extra)

        def unless_bad(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(bad, o, n), new, old)

        state = GuardState(
            unless_bad(inner_state, state.inner),
            unless_bad(MEMORY * state.loss_mean + (1 - MEMORY) * loss, state.loss_mean),
            unless_bad(MEMORY * state.norm_mean + (1 - MEMORY) * norm, state.norm_mean),
            state.accepted + ~bad,
            state.skipped + bad,
            jnp.where(bad, state.in_a_row + 1, 0),
        )
        return jax.tree.map(lambda u: jnp.where(bad, 0, u), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def skips(opt_state: Any) -> tuple[jax.Array, jax.Array]:
    """(all so far, in a row) of a guarded optimizer's state; zeros for one without a guard. int32 scalars."""
    if isinstance(opt_state, GuardState):
        return opt_state.skipped, opt_state.in_a_row
    none = jnp.zeros((), jnp.int32)
    return none, none
