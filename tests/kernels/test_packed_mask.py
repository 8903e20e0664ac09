import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.kernels.packed_mask import PackedMask, TileRange, key_tiles, make_packed_mask, query_tiles
from tests.kernels.packings import random_segments


def visible(segments: np.ndarray, window: int | None) -> np.ndarray:
    """bool [B, T, T] directly from the definition: same document, not later, within the window."""
    length = segments.shape[1]
    result = np.zeros((*segments.shape, length), bool)
    for row, ids in enumerate(segments):
        for q in range(length):
            for k in range(q, -1, -1):
                if ids[k] != ids[q] or ids[q] == 0 or (window is not None and q - k >= window):
                    break
                result[row, q, k] = True
    return result


@pytest.mark.parametrize("window", [None, 1, 5, 1000])
def test_intervals_equal_the_visible_pairs(window: int | None) -> None:
    segments = random_segments(np.random.default_rng(0), 20, 37)
    mask = make_packed_mask(jnp.array(segments), window)
    position = np.arange(37)
    by_start = (mask.start_bt[:, :, None] <= position) & (position <= position[:, None])
    by_end = (position <= position[:, None]) & (position[:, None] < mask.end_bt[:, None, :])
    expected = visible(segments, window)
    np.testing.assert_array_equal(by_start, expected)
    np.testing.assert_array_equal(by_end, expected)


def test_an_id_that_returns_is_another_document() -> None:
    mask = make_packed_mask(jnp.array([[1, 1, 2, 1, 1]]))
    assert mask.start_bt.tolist() == [[0, 0, 2, 3, 3]]


def test_padding_sees_and_is_seen_by_nothing() -> None:
    mask = make_packed_mask(jnp.array([[3, 3, 0, 0]]))
    assert mask.start_bt.tolist() == [[0, 0, 4, 4]]
    assert mask.end_bt.tolist() == [[2, 2, 0, 0]]


def test_window_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="window is 0"):
        make_packed_mask(jnp.array([[1]]), window=0)


def tiled(x: np.ndarray, tile: int, fill: int) -> np.ndarray:
    """[B, T] to [B, tiles, tile], with the tail as in the kernels."""
    tail = -x.shape[1] % tile
    return np.pad(x, ((0, 0), (0, tail)), constant_values=fill).reshape(x.shape[0], -1, tile)


def check_ranges(ranges: TileRange, visible_bno: np.ndarray, alive_bno: np.ndarray, tile: int) -> tuple[int, int]:
    """Compares ranges [B, n] with visibility [B, n, own, other]; returns the tiles visited and the tiles needed."""
    first, full_first, full_stop, stop = (np.asarray(x)[..., None] for x in ranges)
    assert (first <= full_first).all() & (full_first <= full_stop).all() & (full_stop <= stop).all()
    tail = -visible_bno.shape[-1] % tile
    padded = np.pad(visible_bno, ((0, 0), (0, 0), (0, 0), (0, tail)))
    pairs = padded.reshape(*padded.shape[:-1], -1, tile)  # [B, n, own, other tile, other]
    index = np.arange(pairs.shape[-2])
    visited = (first <= index) & (index < stop)
    unmasked = (full_first <= index) & (index < full_stop)
    needed = pairs.any(axis=(2, 4))
    assert visited[needed].all(), "a needed tile is skipped"
    complete = (pairs.all(axis=4) | ~alive_bno[..., None]).all(axis=2)
    assert complete[unmasked].all(), "a tile that needs the mask is treated as full"
    return int(visited.sum()), int(needed.sum())


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("own", "other"), [(8, 8), (16, 8), (8, 16), (32, 4), (64, 64)])
@pytest.mark.parametrize("length", [64, 50])
def test_ranges_contain_all_needed_tiles_and_mask_all_partial_ones(
    length: int, own: int, other: int, window: int | None
) -> None:
    segments = random_segments(np.random.default_rng(length + own), 40, length)
    mask = make_packed_mask(jnp.array(segments), window)
    seen = visible(segments, window)
    rows = -length % own
    position = np.arange(length + rows).reshape(-1, own)

    by_query = np.pad(seen, ((0, 0), (0, rows), (0, 0))).reshape(40, -1, own, length)
    start = tiled(np.asarray(mask.start_bt), own, 2**30)
    check_ranges(key_tiles(jnp.array(start), jnp.array(position), other), by_query, start <= position, other)

    by_key = np.pad(seen.transpose(0, 2, 1), ((0, 0), (0, rows), (0, 0))).reshape(40, -1, own, length)
    end = tiled(np.asarray(mask.end_bt), own, 0)
    check_ranges(query_tiles(jnp.array(end), jnp.array(position), other), by_key, position < end, other)


def test_no_tile_of_other_documents_is_visited() -> None:
    segments = np.sort(random_segments(np.random.default_rng(1), 40, 64), axis=1)[:, ::-1]  # no holes between documents
    mask = make_packed_mask(jnp.array(segments))
    position = np.arange(64).reshape(-1, 8)
    by_query = visible(segments, None).reshape(40, 8, 8, 64)
    start = np.asarray(mask.start_bt).reshape(40, 8, 8)
    visited, needed = check_ranges(key_tiles(jnp.array(start), jnp.array(position), 4), by_query, start <= position, 4)
    assert visited == needed


def test_mask_is_a_pytree_with_a_static_window() -> None:
    mask = make_packed_mask(jnp.array([[1, 1, 2]]), window=2)
    leaves, structure = jax.tree.flatten(mask)
    assert len(leaves) == 2
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert isinstance(rebuilt, PackedMask)
    assert rebuilt.window == 2
