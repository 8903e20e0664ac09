"""The counts that a data build prints for its records, and the policy for invalid records."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from flacuna_jax.errors import UserError

UNKNOWN_SHARE = 0.001
"""A data build warns if the fraction of unknown tokens among those with loss is above this value."""


@dataclass
class SourceReport:
    """Counts for one configured source. Lengths are in tokens.

    After a complete read, read = kept + the sum of `dropped`, where each unreadable record or torn file counts as one
    read. `changed` counts records that were kept in a changed form; `first_seen` has the place and the details of the
    first occurrence of each reason.
    """

    path: str
    read: int = 0
    kept: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    tokens_lost: int = 0
    """Tokens of over-long examples that were dropped or cut off."""
    first_seen: dict[str, str] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    """By name of a field, the number of records in which it was not empty and not used."""
    unknown_tokens: int = 0
    """Tokens with loss that are the tokenizer's unknown token."""
    unknown_characters: str = ""
    """The first characters of answers found that the tokenizer does not know."""
    ignored_files: tuple[str, ...] = ()
    """Files of a directory that are not data files by their extension."""
    notes: tuple[str, ...] = ()
    """Which files were read, if there was a choice."""

    def drop(self, reason: str, where: object, detail: str = "") -> None:
        self.dropped[reason] += 1
        self._remember(reason, where, detail)

    def change(self, reason: str, where: object) -> None:
        self.changed[reason] += 1
        self._remember(reason, where, "")

    def ignore(self, name: str) -> None:
        self.ignored[name] += 1

    def _remember(self, reason: str, where: object, detail: str) -> None:
        if reason not in self.first_seen:
            self.first_seen[reason] = f"{where}: {detail}" if detail else str(where)

    def lines(self) -> list[str]:
        """The report as text, one fact per line."""
        lines = [
            f"{self.path}: {self.read:,} records read, {self.kept:,} kept, "
            f"{self.tokens:,} tokens, {self.supervised_tokens:,} supervised"
        ]
        lines += [f"  {note}" for note in self.notes]
        for title, counts in (("dropped", self.dropped), ("changed", self.changed)):
            lines += [
                f"  {title} {count:,}: {reason} (first: {self.first_seen[reason]})"
                for reason, count in counts.most_common()
            ]
        lines += self._ignored_lines()
        if self.unknown_tokens:
            lines.append(self._unknown_line())
        if self.tokens_lost:
            lines.append(f"  {self.tokens_lost:,} tokens lost to the length limit")
        if self.ignored_files:
            shown = ", ".join(self.ignored_files[:5]) + (", ..." if len(self.ignored_files) > 5 else "")
            plural = "s" if len(self.ignored_files) != 1 else ""
            lines.append(f"  {len(self.ignored_files)} other file{plural} in the directory ignored: {shown}")
        return lines

    def _ignored_lines(self) -> list[str]:
        """Lines for ignored fields; fields that were ignored in the same number of records share a line."""
        by_count: dict[int, list[str]] = {}
        for name, count in self.ignored.most_common():
            by_count.setdefault(count, []).append(name)
        return [
            f"  field{'s' if len(names) > 1 else ''} {', '.join(sorted(names))} "
            f"ignored in {count:,} record{'s' if count != 1 else ''}"
            for count, names in by_count.items()
        ]

    def _unknown_line(self) -> str:
        share = self.unknown_tokens / max(self.supervised_tokens, 1)
        warning = "warning: " if share > UNKNOWN_SHARE else ""
        which = f"; it does not know {' '.join(self.unknown_characters)}" if self.unknown_characters else ""
        return (
            f"  {warning}{self.unknown_tokens:,} tokens with loss ({100 * share:.2g} %) are the tokenizer's unknown "
            f"token{which}"
        )


@dataclass(frozen=True)
class DataReport:
    sources: tuple[SourceReport, ...]

    @property
    def kept(self) -> int:
        return sum(source.kept for source in self.sources)

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources)

    @property
    def supervised_tokens(self) -> int:
        return sum(source.supervised_tokens for source in self.sources)

    def lines(self) -> list[str]:
        return [line for source in self.sources for line in source.lines()]


@dataclass(frozen=True)
class BadRecordPolicy:
    """What to do with an invalid record: stop with an error, or count it and continue."""

    report: SourceReport
    mode: Literal["error", "skip"]
    key: str = "data.on_bad_record"
    """Name of the setting that `mode` comes from, for messages."""

    def reject(self, reason: str, where: object, detail: str) -> None:
        """Counts the record under `reason`; raises UserError(`where`: `detail`) if bad records are errors."""
        if self.mode == "error":
            raise UserError(f"{where}: {detail} ({self.key}: skip would count it and continue)")
        self.report.drop(reason, where, detail)
