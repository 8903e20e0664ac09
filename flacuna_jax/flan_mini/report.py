"""The reports of a data build: the account of every source, lengths, packing, steps, leakage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.data.packing import PackingMethod, pack
from flacuna_jax.data.report import DataReport
from flacuna_jax.data.store import TokenStore
from flacuna_jax.flan_mini.account import SourceAccount, Statistics
from flacuna_jax.flan_mini.config import FlanMiniConfig
from flacuna_jax.flan_mini.document import Bars, Cell, Document, Table, Text
from flacuna_jax.flan_mini.leakage import BenchmarkLeakage, held_in
from flacuna_jax.flan_mini.records import FEW_SHOT, WITH_OPTIONS

BINS = 20
SHOWN_TASKS = 30

Part = Table | Bars | Text


@dataclass(frozen=True)
class PackingFacts:
    """Rows of a packed epoch. `lower_bound` is a lower bound for the rows of any packing."""

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
        # Two examples of more than half a row cannot share a row.
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
        """Optimizer steps of an epoch with `batch_size` examples per step, counted as in training."""
        if not self.rows:
            return 0
        return -(-self.rows // -(-batch_size * self.rows // self.examples))


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def mixture_document(
    config: FlanMiniConfig,
    accounts: Sequence[SourceAccount],
    statistics: Statistics,
    leakage: Sequence[BenchmarkLeakage],
) -> Document:
    """The report of a collection build."""
    packing = PackingFacts.of(
        statistics.length, int(statistics.supervised.sum()), config.max_length, "best_fit", config.seed
    )
    few_shot = int((statistics.traits & FEW_SHOT > 0).sum())
    facts = [
        *packing_facts(packing, config.batch_size),
        ("few-shot records", percent(few_shot, len(statistics))),
        ("with options shown", percent(int((statistics.traits & WITH_OPTIONS > 0).sum()), len(statistics))),
        ("records that repeat another's text", f"{statistics.repeated:,}"),
        ("seed", str(config.seed)),
    ]
    parts: list[Part] = [
        _mixture_table(accounts, statistics),
        _losses(accounts),
        *length_parts(statistics.length, packing),
        _tasks_table(accounts),
        *leakage_parts(leakage, [statistics.tasks[i] for i in np.unique(statistics.task)], config),
    ]
    return Document("FLAN-mini collection", facts, parts)


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


def _mixture_table(accounts: Sequence[SourceAccount], statistics: Statistics) -> Table:
    items = sum(account.distinct for account in accounts)
    rows: list[list[Cell]] = []
    for index, account in enumerate(accounts):
        mine = statistics.source == index
        lost = sum(account.unusable.values())
        tokens, supervised = int(statistics.length[mine].sum()), int(statistics.supervised[mine].sum())
        rows.append(
            [
                account.name,
                account.read,
                lost,
                account.items,
                account.duplicates,
                account.distinct,
                account.records,
                account.wanted,
                tokens,
                supervised,
                percent(account.distinct, items),
                percent(account.records, len(statistics)),
                percent(tokens, int(statistics.length.sum())),
                len(account.per_task),
            ]
        )
    header = ["source", "read", "unusable", "items", "duplicates", "distinct", "records", "wanted", "tokens"]
    header += ["supervised", "share before", "share after", "share of tokens", "tasks"]
    note = "Share before: of the distinct items there are. Share after: of the records in the mixture."
    return Table("Sources", header, rows, note)


def _losses(accounts: Sequence[SourceAccount]) -> Table:
    rows: list[list[Cell]] = []
    for account in accounts:
        for title, counts in (
            ("unusable record", account.unusable),
            ("item set aside", account.set_aside),
            ("did not fit", account.lost),
            ("changed", account.changed),
        ):
            for reason, count in sorted(counts.items(), key=lambda pair: -pair[1]):
                rows.append([account.name, title, reason, count, account.first_seen.get(reason, "")])
        if account.untried + account.spare:
            rows.append(
                [account.name, "not needed", "not drawn, or drawn in reserve", account.untried + account.spare, ""]
            )
        if account.ignored_files:
            shown = ", ".join(account.ignored_files[:3]) + (", …" if len(account.ignored_files) > 3 else "")
            rows.append([account.name, "file ignored", shown, len(account.ignored_files), ""])
    note = "Every item read is in the mixture or in one of these lines."
    return Table("Where the rest went", ["source", "what", "reason", "count", "first seen"], rows, note)


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


def _tasks_table(accounts: Sequence[SourceAccount]) -> Table:
    found = [(account.name, task, count) for account in accounts for task, count in account.per_task.items()]
    found.sort(key=lambda entry: (-entry[2], entry[1]))
    available = {account.name: account.available_per_task for account in accounts}
    rows: list[list[Cell]] = [
        [task, source, count, available[source].get(task, 0)] for source, task, count in found[:SHOWN_TASKS]
    ]
    note = f"The largest {min(SHOWN_TASKS, len(found))} of {len(found):,}."
    return Table("Tasks", ["task", "source", "records", "distinct items"], rows, note)


def leakage_parts(
    leakage: Sequence[BenchmarkLeakage], tasks: Sequence[str], config: FlanMiniConfig | None = None
) -> list[Part]:
    parts: list[Part] = []
    held = held_in(tasks)
    lines = [f"{name}: {_some(members)}" for name, members in held.items()]
    parts.append(Text("Held-in benchmarks, by task name", lines or ["none of the known benchmarks"]))
    if leakage:
        size = f"{config.leakage.ngram}-grams" if config and config.leakage else "n-grams"
        header = ["benchmark", "items", "too short", "any overlap", "≥ 50 % covered", "≥ 80 % covered"]
        header += ["mean in prompts", "mean in answers", "held-in by name", "tasks that overlap most"]
        rows = [_leakage_row(one, held) for one in leakage]
        note = f"Overlap of the evaluation items' {size} of words with the training records."
        parts.append(Table("Leakage", header, rows, note))
        worst = [[one.name, percent(part, 1), text] for one in leakage for part, text in one.worst[:3]]
        if worst:
            parts.append(Table("Evaluation items covered most", ["benchmark", "coverage", "item"], worst))
    return parts


def _leakage_row(one: BenchmarkLeakage, held: Mapping[str, Sequence[str]]) -> list[Cell]:
    means = (percent(float(part.mean()), 1) if len(part) else "-" for part in (one.prompt, one.answer))
    is_held = any(name.lower() == one.name.lower() for name in held)
    tasks = ", ".join(f"{task} ({count:,})" for task, count in one.tasks[:3])
    judged = one.items - one.too_short
    shares = (f"{n:,} ({percent(n, judged)})" for n in (one.touched(), one.covered(0.5), one.covered(0.8)))
    return [one.name, one.items, one.too_short, *shares, *means, "yes" if is_held else "no", tasks]


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def run_document(
    store: TokenStore,
    report: DataReport,
    weights: Sequence[float],
    epoch: NDArray[np.int64],
    packing: PackingFacts,
    batch: Sequence[tuple[str, str]],
    leakage: Sequence[BenchmarkLeakage],
) -> Document:
    """The report of a training config's data: exactly the examples of the run's first epoch.

    epoch: the examples of the first epoch, indices into the store. batch: facts about rows per step and steps, from
      the run's plan.
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
        *leakage_parts(leakage, store.tasks),
    ]
    return Document("Training data, first epoch", facts, parts)
