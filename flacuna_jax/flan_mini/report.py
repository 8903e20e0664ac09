"""The report of a collection: the account of every source, lengths, packing, steps, leakage."""

from collections.abc import Mapping, Sequence

import numpy as np

from flacuna_jax.data.corpus_report import PackingFacts, length_parts, packing_facts, percent
from flacuna_jax.data.document import Cell, Document, Part, Table, Text
from flacuna_jax.flan_mini.account import SourceAccount, Statistics
from flacuna_jax.flan_mini.config import FlanMiniConfig
from flacuna_jax.flan_mini.leakage import BenchmarkLeakage, held_in
from flacuna_jax.flan_mini.records import FEW_SHOT, WITH_OPTIONS

SHOWN_TASKS = 30


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
