"""Packed documents have the same values as separate ones, and no influence on each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.types import PROJECTIONS
from flacuna_jax.model.parameters import ModelSpec, Params
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.step import StepConfig, loss_and_gradients
from tests.tiny import SMALL, in_steps, packed_batch, random_params, to_device

LENGTH = 40
RNG = np.random.default_rng(3)
DOCUMENTS = [RNG.integers(1, SMALL.vocab_size, size).tolist() for size in (11, 17, 9)]
SPEC = ModelSpec(SMALL, LoraConfig(rank=3, dropout=0.0, targets=PROJECTIONS), "float32", "float32")


@pytest.fixture(scope="module")
def params() -> tuple[Params, Params]:
    return random_params(SPEC.base_shapes, scale=0.2), random_params(SPEC.lora_shapes, scale=0.1)


def losses(params, batch) -> np.ndarray:
    base, adapters = params
    config = NetworkConfig(SPEC)
    run = jax.jit(lambda p, b: config.with_params(p).token_losses(b))
    return np.asarray(run({**base, **adapters}, to_device(batch)))


def gradients(params, batch) -> Params:
    base, adapters = params
    run = jax.jit(loss_and_gradients, static_argnums=0)
    return run(StepConfig(NetworkConfig(SPEC)), adapters, base, to_device(in_steps(batch, 1)), jnp.int32(0))[2]


def test_losses_of_packed_documents_equal_those_of_separate_documents(params):
    packed = losses(params, packed_batch(DOCUMENTS, [[0, 1, 2]], LENGTH))[0]
    start = 0
    for index, ids in enumerate(DOCUMENTS):
        alone = losses(params, packed_batch(DOCUMENTS, [[index]], LENGTH))[0]
        # float32 sums over other keys' zeros may be associated differently: rounding only.
        np.testing.assert_allclose(packed[start : start + len(ids)], alone[: len(ids)], atol=2e-5, rtol=1e-5)
        start += len(ids)


def test_gradients_of_packed_documents_equal_those_of_separate_documents(params):
    together = gradients(params, packed_batch(DOCUMENTS, [[0, 1, 2]], LENGTH))
    apart = gradients(params, packed_batch(DOCUMENTS, [[0], [1], [2]], LENGTH))
    for name in together:
        scale = np.abs(np.asarray(apart[name])).max()
        np.testing.assert_allclose(together[name], apart[name], atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_changing_one_document_changes_no_bit_of_another(params, changed):
    other = [list(ids) for ids in DOCUMENTS]
    other[changed] = [(token + 13) % SMALL.vocab_size for token in other[changed]]
    before = losses(params, packed_batch(DOCUMENTS, [[0, 1, 2]], LENGTH))[0]
    after = losses(params, packed_batch(other, [[0, 1, 2]], LENGTH))[0]
    ends = np.cumsum([len(ids) for ids in DOCUMENTS])
    for index, (end, ids) in enumerate(zip(ends, DOCUMENTS, strict=True)):
        span = slice(end - len(ids), end)
        if index == changed:
            assert np.abs(before[span] - after[span]).max() > 1e-3
        else:
            np.testing.assert_array_equal(before[span], after[span])


@pytest.mark.parametrize("changed", [0, 2])
def test_the_gradient_of_a_document_does_not_depend_on_its_neighbours(params, changed):
    """With loss on document 1 only, other documents in its row do not change a bit of the gradient."""
    other = [list(ids) for ids in DOCUMENTS]
    other[changed] = [(token + 13) % SMALL.vocab_size for token in other[changed]]

    def only_document_1(documents):
        batch = packed_batch(documents, [[0, 1, 2]], LENGTH)
        return {**batch, "loss_mask": batch["loss_mask"] & (batch["segment_ids"] == 2)}

    before, after = gradients(params, only_document_1(DOCUMENTS)), gradients(params, only_document_1(other))
    for name in before:
        np.testing.assert_array_equal(np.asarray(before[name]), np.asarray(after[name]), err_msg=name)


def test_token_ids_of_padding_change_nothing(params):
    batch = packed_batch(DOCUMENTS, [[0, 1]], LENGTH)
    noisy = {**batch, "tokens": np.where(batch["segment_ids"] == 0, 7, batch["tokens"])}
    np.testing.assert_array_equal(losses(params, batch), losses(params, noisy))
    for name, value in gradients(params, batch).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(gradients(params, noisy)[name]))
