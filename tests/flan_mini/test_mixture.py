import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flacuna_jax.flan_mini.items import Item, hash64, ranks
from flacuna_jax.flan_mini.mixture import allocate, quotas

counts = st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 500)), min_size=1, max_size=30)


@given(st.integers(0, 5000), counts)
def test_allocation_is_exact_and_within_capacity(total: int, entries: list[tuple[float, int]]) -> None:
    weights, capacities = [w for w, _ in entries], [c for _, c in entries]
    result = allocate(total, weights, capacities)
    assert sum(result) == min(total, sum(c for w, c in entries if w > 0))
    assert all(0 <= n <= c for n, c in zip(result, capacities, strict=True))
    assert all(n == 0 for n, w in zip(result, weights, strict=True) if w == 0)


@given(st.integers(1, 1000), st.lists(st.integers(1, 100), min_size=1, max_size=20))
def test_without_caps_allocation_is_proportional_to_one(total: int, weights: list[int]) -> None:
    result = allocate(total, [float(w) for w in weights], [total] * len(weights))
    for count, weight in zip(result, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1


def test_the_excess_of_a_full_task_goes_to_the_others() -> None:
    assert allocate(100, [1.0, 1.0, 2.0], [5, 1000, 1000]) == [5, 32, 63]


def test_rate_cap_limits_the_weight_of_a_task_not_its_records() -> None:
    available = {("big", ""): 1_000_000, ("small", ""): 1_000}
    result = quotas(3_000, available, available, None, 5_000)
    assert result == {("big", ""): 2_500, ("small", ""): 500}
    assert quotas(10_000, available, available, None, 5_000)[("big", "")] == 9_000


def test_types_share_before_tasks_do() -> None:
    available = {("a", "zs_opt"): 900, ("b", "zs_opt"): 100, ("a", "fs_opt"): 50}
    result = quotas(100, available, available, {"zs_opt": 1.0, "fs_opt": 1.0}, None)
    assert result == {("a", "fs_opt"): 50, ("a", "zs_opt"): 45, ("b", "zs_opt"): 5}
    result = quotas(400, available, available, {"zs_opt": 1.0, "fs_opt": 1.0, "zs_noopt": 2.0}, None)
    assert sum(result.values()) == 400  # types that are missing, or cannot give their share, leave it to the others


def test_order_is_a_bijection_that_depends_on_the_seed() -> None:
    keys = np.arange(100_000, dtype=np.uint64)
    assert len(np.unique(ranks(keys, 1))) == len(keys)
    assert not np.array_equal(np.argsort(ranks(keys, 1)), np.argsort(ranks(keys, 2)))
    # Neighbouring keys are not neighbours in the order.
    assert abs(np.corrcoef(keys.astype(float), np.argsort(np.argsort(ranks(keys, 1))))[0, 1]) < 0.02


@given(st.lists(st.text(), max_size=4), st.lists(st.text(), max_size=4))
def test_hashes_distinguish_sequences(one: list[str], other: list[str]) -> None:
    assert (hash64(*one) == hash64(*other)) == (one == other)


def test_an_item_is_identified_by_its_content() -> None:
    item = Item("t", "f", {"a": "1", "b": ["2"]})
    assert item.key() == Item("t", "f", {"b": ["2"], "a": "1"}, same_as=("x",), size=3).key()
    assert item.key() != Item("t", "f", {"a": "1", "b": "2"}).key()
    assert item.key() != Item("t", "f", item.fields, "direct").key()


@pytest.mark.parametrize("seed", [0, 42])
def test_the_order_never_changes(seed: int) -> None:
    """Collections must be the same as with older versions, so these numbers must not change."""
    expected = {0: [9080446654069053331, 8733647672263106449], 42: [11028477970262551856, 665191590178982809]}
    assert ranks(np.array([1, 2], np.uint64), seed).tolist() == expected[seed]
