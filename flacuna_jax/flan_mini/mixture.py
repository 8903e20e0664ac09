"""Computes the number of records of each task: proportional with caps, in exact arithmetic, the same on every
machine."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

Stratum = tuple[str, str]
"""(task, type)."""


def allocate(total: int, weights: Sequence[float], capacities: Sequence[int]) -> list[int]:
    """Splits `total` in proportion to `weights`, none above its capacity; the excess is distributed to the others.

    Rounding is by largest remainder, ties to the earlier entry. The sum is min(total, sum of capacities with weight).
    The arithmetic is exact, so the result does not depend on the order of floating-point sums.
    """
    exact = [Fraction(weight) for weight in weights]
    counts = [0] * len(exact)
    open_ = [i for i, weight in enumerate(exact) if weight > 0 and capacities[i] > 0]
    remaining = min(total, sum(capacities[i] for i in open_))
    while open_:
        weight_sum = sum(exact[i] for i in open_)
        full = [i for i in open_ if remaining * exact[i] >= capacities[i] * weight_sum]
        if not full:
            break
        for i in full:
            counts[i] = capacities[i]
        remaining -= sum(capacities[i] for i in full)
        filled = set(full)
        open_ = [i for i in open_ if i not in filled]
    if open_:
        weight_sum = sum(exact[i] for i in open_)
        ideal = {i: remaining * exact[i] / weight_sum for i in open_}
        for i in open_:
            counts[i] = int(ideal[i])
        left = remaining - sum(counts[i] for i in open_)
        for i in sorted(open_, key=lambda i: (counts[i] - ideal[i], i))[:left]:
            counts[i] += 1
    return counts


def quotas(
    total: int,
    available: Mapping[Stratum, int],
    capacities: Mapping[Stratum, int],
    shares: Mapping[str, float] | None,
    rate_cap: int | None,
) -> dict[Stratum, int]:
    """The number of records of every (task, type).

    Types share the total by `shares` (without shares, in proportion to their items), and the tasks of a type share in
    proportion to their items, up to `rate_cap` (examples-proportional mixing with a maximum, Raffel et al., 2020,
    section 3.5.2). The missing part of a type with too few items goes to other types.

    Args:
      available: number of items of every stratum, which determine the proportions.
      capacities: maximum number of records of every stratum.
    """
    types = sorted({type_ for _, type_ in available})
    members = {type_: sorted(s for s in available if s[1] == type_) for type_ in types}
    rates = {s: min(count, rate_cap) if rate_cap else count for s, count in available.items()}
    if shares is None:
        weights = [float(sum(rates[s] for s in members[type_])) for type_ in types]
    else:
        weights = [float(shares.get(type_, 0.0)) for type_ in types]
    room = [sum(capacities[s] for s in members[type_] if rates[s]) for type_ in types]
    result: dict[Stratum, int] = {}
    for type_, count in zip(types, allocate(total, weights, room), strict=True):
        strata = members[type_]
        parts = allocate(count, [float(rates[s]) for s in strata], [capacities[s] for s in strata])
        result.update(zip(strata, parts, strict=True))
    return result
