"""Guards every update: a step whose loss or gradient is not finite, or is a spike, changes nothing.

The decision is made inside the compiled step, from numbers in the optimizer state. Therefore no host waits for it, a
resumed run decides like an uninterrupted one, and NaNs never reach parameters or moments.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

MEMORY = 0.95
"""Decay of the running means, which cover about the last twenty accepted steps."""
SETTLING = 20
"""Accepted steps before the running means are used to detect spikes."""


class GuardState(NamedTuple):
    """State of the inner optimizer, and the guard's own state: replicated scalars."""

    inner: Any
    loss_mean: jax.Array
    """Exponential sum over accepted steps, float32; divided by 1 - MEMORY**accepted it is a mean."""
    norm_mean: jax.Array
    accepted: jax.Array
    """Number of accepted updates, int32."""
    skipped: jax.Array
    """Number of skipped updates, int32."""
    in_a_row: jax.Array
    """Number of consecutive skipped updates up to now, int32; 0 after a good step."""


def guarded(inner: optax.GradientTransformation, spike_factor: float | None) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer. A bad step leaves the optimizer's state unchanged and returns updates of zero.

    `update` takes the step's mean `loss` in addition to the gradients; without it, only the gradients are checked. A
    step is bad if its loss or gradient norm is not finite, or, with `spike_factor`, if either exceeds `spike_factor`
    times its running mean over accepted steps. The schedule counts accepted steps, so a skipped batch has the same
    effect as a batch that is missing from the data.
    """
    inner_update = optax.with_extra_args_support(inner).update

    def init(params: Any) -> GuardState:
        # Separate arrays, because the step donates each of them.
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
        # The optimizer gets zeros instead of bad gradients, so that no NaN occurs even in discarded results.
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
    """(total, consecutive) skipped updates of a guarded optimizer's state, int32 scalars; zeros without a guard."""
    if isinstance(opt_state, GuardState):
        return opt_state.skipped, opt_state.in_a_row
    none = jnp.zeros((), jnp.int32)
    return none, none
