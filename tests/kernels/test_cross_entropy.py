"""Chunked cross-entropy against the plain one that stores all logits."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.config.run import MeshConfig
from flacuna_jax.kernels.cross_entropy import chunk_size, token_losses, token_scores
from flacuna_jax.model.sharding import make_mesh

BATCH, LENGTH, WIDTH, VOCAB = 4, 21, 16, 52


def inputs(supervised: float, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH), dtype) * 2
    head = jax.random.normal(keys[1], (VOCAB, WIDTH), dtype)
    targets = jax.random.randint(keys[2], (BATCH, LENGTH), 0, VOCAB)
    mask = jax.random.uniform(keys[3], (BATCH, LENGTH)) < supervised
    weights = jax.random.normal(keys[4], (BATCH, LENGTH))
    return hidden, head, targets, mask, weights


def plain(hidden, head, targets, mask, softcap=None):
    logits = jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    log_probabilities = jax.nn.log_softmax(logits)
    return jnp.where(mask, -jnp.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0], 0.0)


@pytest.mark.parametrize("supervised", [0.0, 0.07, 0.5, 1.0])
@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_losses_and_gradients_are_exact(supervised, chunk):
    hidden, head, targets, mask, weights = inputs(supervised)

    def weighted(losses):
        return jnp.sum(weights * losses)

    actual = token_losses(hidden, head, targets, mask, chunk=chunk)
    np.testing.assert_allclose(actual, plain(hidden, head, targets, mask), atol=1e-5)
    ours = jax.grad(lambda h, w: weighted(token_losses(h, w, targets, mask, chunk=chunk)), (0, 1))(hidden, head)
    theirs = jax.grad(lambda h, w: weighted(plain(h, w, targets, mask)), (0, 1))(hidden, head)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    frozen_head = jax.grad(lambda h: weighted(token_losses(h, head, targets, mask, chunk=chunk)))(hidden)
    np.testing.assert_allclose(frozen_head, theirs[0], atol=2e-5)


def test_a_soft_cap_limits_the_logits():
    hidden, head, targets, mask, weights = inputs(0.5)

    def loss_of(losses, **options):
        return lambda h, w: jnp.sum(weights * losses(h, w, targets, mask, softcap=3.0, **options))

    expected = jax.value_and_grad(loss_of(plain), (0, 1))(hidden, head)
    ours = loss_of(token_losses, chunk=8)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2))):
        actual = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, head)
        frozen = jax.jit(jax.grad(ours))(hidden, head)
        scored, _ = token_scores(hidden, head, targets, mask, softcap=3.0, chunk=8)
    for a, b in zip(jax.tree.leaves((actual, frozen)), jax.tree.leaves((expected, expected[1][0])), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_allclose(scored, plain(hidden, head, targets, mask, 3.0), atol=1e-5)


@pytest.mark.parametrize("mesh_config", [None, MeshConfig(fsdp=2, tensor=2)])
def test_scores_show_which_targets_are_the_most_likely_tokens(mesh_config):
    hidden, head, targets, mask, _ = inputs(0.5)
    logits = jnp.einsum("btd,vd->btv", hidden, head)
    likeliest = jnp.argmax(logits, -1)
    targets = jnp.where(jnp.arange(LENGTH) % 3 == 0, likeliest, targets)
    with jax.set_mesh(make_mesh(mesh_config)) if mesh_config else contextlib.nullcontext():
        losses, hits = jax.jit(lambda *arrays: token_scores(*arrays, chunk=8))(hidden, head, targets, mask)
    np.testing.assert_allclose(losses, plain(hidden, head, targets, mask), atol=1e-5)
    np.testing.assert_array_equal(hits, mask & (targets == likeliest))
    assert 5 < hits.sum() < mask.sum()


@pytest.mark.parametrize("mesh_config", [MeshConfig(data=4), MeshConfig(fsdp=2, tensor=2), MeshConfig(tensor=4)])
def test_every_layout_gives_the_same(mesh_config):
    hidden, head, targets, mask, weights = inputs(0.3)

    def loss(h, w):
        return jnp.sum(weights * token_losses(h, w, targets, mask, chunk=8))

    expected = jax.value_and_grad(loss, (0, 1))(hidden, head)
    with jax.set_mesh(make_mesh(mesh_config)):
        actual = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, head)
        frozen = jax.jit(jax.grad(loss))(hidden, head)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(frozen, expected[1][0], atol=1e-5)


def test_a_vocabulary_that_tensor_does_not_divide_is_not_split():
    hidden, head, targets, mask, _ = inputs(0.3)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2))):
        odd = jax.jit(token_losses)(hidden, head[:51], jnp.minimum(targets, 50), mask)
    np.testing.assert_allclose(odd, plain(hidden, head[:51], jnp.minimum(targets, 50), mask), atol=1e-5)


@pytest.mark.parametrize("positions", [8, 100, 1280, 2560, 3000, 10240, 65536])
def test_the_last_chunk_wastes_little(positions):
    """At most a tenth of the positions, or 256; and no chunk is larger than the hardware needs."""
    chunk = chunk_size(positions)
    assert 0 < chunk <= min(1024, positions)
    assert chunk <= max(positions / 10, 256)


def test_bfloat16_stays_within_its_rounding():
    hidden, head, targets, mask, _ = inputs(0.5, jnp.bfloat16)
    actual = jax.grad(lambda h: jnp.sum(token_losses(h, head, targets, mask)))(hidden).astype(jnp.float32)
    exact = jax.grad(lambda h: jnp.sum(plain(h, head.astype(jnp.float32), targets, mask)))(hidden.astype(jnp.float32))
    # The logit gradient and the result are each rounded to 8 bits of mantissa: 2 · 2⁻⁸ of the norm.
    assert np.linalg.norm(actual - exact) < 8e-3 * np.linalg.norm(exact)


def test_some_columns_of_the_head_train():
    """Like an adapter next to a frozen matrix: only its part of the gradient is computed."""
    hidden, head, targets, mask, weights = inputs(0.5)
    frozen, adapter = head[:, :-3], head[:, -3:]

    def loss(hidden, adapter, **options):
        whole = jnp.concatenate([frozen, adapter], axis=1)
        return jnp.sum(token_losses(hidden, whole, targets, mask, chunk=8, **options) * weights)

    found = jax.jit(jax.grad(functools.partial(loss, trained_columns=3), (0, 1)))
    for ours, theirs in zip(found(hidden, adapter), jax.grad(loss, (0, 1))(hidden, adapter), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    whole = f"f32[{VOCAB},{WIDTH}]"
    compiled = found.lower(hidden, adapter).compile().as_text()
    made = [line for line in compiled.splitlines() if f"= {whole}" in line and " concatenate(" not in line]
    assert not [line for line in made if " dot(" in line or " pad(" in line], made


def test_neither_whole_logits_nor_head_gradient_exist_while_the_head_is_frozen():
    hidden, head, targets, mask, _ = inputs(0.5)
    text = str(jax.make_jaxpr(jax.grad(lambda h: jnp.sum(token_losses(h, head, targets, mask, chunk=8))))(hidden))
    assert f"f32[{BATCH * LENGTH},{VOCAB}]" not in text
    assert f"f32[{BATCH},{LENGTH},{VOCAB}]" not in text
    assert f"f32[{VOCAB},{WIDTH}] = dot_general" not in text


def test_extreme_logits_stay_finite():
    hidden, head, targets, mask, _ = inputs(1.0)
    losses = token_losses(hidden * 1e4, head, targets, mask)
    assert np.isfinite(losses).all()
