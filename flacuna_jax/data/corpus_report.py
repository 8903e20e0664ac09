"""The report of a training config's data: sources, losses by reason, lengths, packing."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.data.document import Bars, Cell, Document, Part, Table
from flacuna_jax.data.packing import PackingMethod, pack
from flacuna_jax.data.report import DataReport
from flacuna_jax.data.store import TokenStore

BINS = 20


@dataclass(frozen=True)
class PackingFacts:
    """Rows of a packed epoch. `lower_bound` is a number of rows that no packing can do without."""

    examples: int
    tokens: int
    supervised: int
    max_length: int
    rows: int
    lower_bound: int
    examples_per_row: NDArray[np.int64]

    @staticmethod
    def of(
        lengths: NDArray[np.integer], supervised: int, max_length: int, method: PackingMethod, seed: int
    ) -> "PackingFacts":
        plan = pack(lengths, max_length, method, seed, 0)
        tokens = int(lengths.sum())
        # Examples of more than half a row cannot share one with each other.
        bound = max(-(-tokens // max_length), int((lengths > max_length / 2).sum()))
        per_row = np.diff(plan.row_offsets)
        return PackingFacts(len(lengths), tokens, supervised, max_length, plan.rows, bound, per_row)

    @property
    def fill(self) -> float:
        return self.tokens / max(1, self.rows * self.max_length)

    @property
    def best_fill(self) -> float:
        return self.tokens / max(1, self.lower_bound * self.max_length)

    def steps(self, batch_size: int) -> int:
        """Optimizer steps of an epoch at this many examples per step, as training counts them."""
        if not self.rows:
            return 0
        return -(-self.rows // -(-batch_size * self.rows // self.examples))


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def packing_facts(packing: PackingFacts, batch_size: int) -> list[tuple[str, str]]:
    return [
        ("records", f"{packing.examples:,}"),
        ("tokens", f"{packing.tokens:,}"),
        ("supervised tokens", f"{packing.supervised:,} ({percent(packing.supervised, packing.tokens)})"),
        (f"rows of {packing.max_length} tokens", f"{packing.rows:,}"),
        ("fill of packed rows", f"{100 * packing.fill:.2f} % (at best {100 * packing.best_fill:.2f} %)"),
        ("examples per row", f"{packing.examples / max(1, packing.rows):.2f}"),
        (f"optimizer steps per epoch at {batch_size}", f"{packing.steps(batch_size):,}"),
    ]


def length_parts(lengths: NDArray[np.integer], packing: PackingFacts) -> list[Part]:
    edges = np.linspace(0, packing.max_length, BINS + 1).astype(np.int64)
    counts, _ = np.histogram(lengths - 1, edges)
    labels = [f"{low + 1}–{high}" for low, high in pairwise(edges.tolist())]
    low, middle, high = np.percentile(lengths, [10, 50, 90]) if len(lengths) else (0, 0, 0)
    note = f"A tenth is no longer than {low:.0f}, half than {middle:.0f}, nine tenths than {high:.0f}."
    most = int(packing.examples_per_row.max(initial=1))
    width = -(-most // BINS)
    starts = list(range(1, most + 1, width))
    rows = [int(((packing.examples_per_row >= s) & (packing.examples_per_row < s + width)).sum()) for s in starts]
    row_labels = [str(s) if width == 1 else f"{s}–{s + width - 1}" for s in starts]
    return [
        Bars("Lengths of records, in tokens", labels, counts.tolist(), note),
        Bars("Examples per packed row", row_labels, rows),
    ]


def run_document(
    store: TokenStore,
    report: DataReport,
    weights: Sequence[float],
    epoch: NDArray[np.int64],
    packing: PackingFacts,
    batch: Sequence[tuple[str, str]],
    more: Sequence[Part] = (),
) -> Document:
    """The report of a training config's data: exactly what its run sees in the first epoch.

    epoch: the examples of the first epoch, indices into the store. batch: facts about rows per step and steps, from
      the run's plan. more: parts to add at the end.
    """
    facts = [*packing_facts(packing, 1)[:-1], *batch]
    kept = sum(source.kept for source in report.sources)
    weighted = [source.kept * weight for source, weight in zip(report.sources, weights, strict=True)]
    rows: list[list[Cell]] = []
    losses: list[list[Cell]] = []
    for source, weight, amount in zip(report.sources, weights, weighted, strict=True):
        dropped = sum(source.dropped.values())
        row: list[Cell] = [source.path, source.read, source.kept, dropped, source.tokens]
        row += [source.supervised_tokens, source.tokens_lost, float(weight)]
        rows.append([*row, percent(source.kept, kept), percent(amount, sum(weighted))])
        for what, counts in (("dropped", source.dropped), ("changed", source.changed)):
            losses += [
                [source.path, what, reason, count, source.first_seen.get(reason, "")]
                for reason, count in counts.items()
            ]
        losses += [[source.path, "field ignored", name, count, ""] for name, count in source.ignored.most_common()]
        if source.unknown_tokens:
            unknown = source.unknown_characters or "tokens with loss"
            losses.append([source.path, "unknown tokens", unknown, source.unknown_tokens, ""])
    header = ["source", "read", "kept", "dropped", "tokens", "supervised", "tokens lost", "weight"]
    parts: list[Part] = [
        Table(
            "Sources", [*header, "share before", "share after"], rows, "Shares of examples, before and after weights."
        ),
        Table("Dropped, changed and ignored", ["source", "what", "reason", "count", "first seen"], losses),
        *length_parts(store.lengths[epoch], packing),
        *more,
    ]
    return Document("Training data, first epoch", facts, parts)
