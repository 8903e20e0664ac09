"""What became of every record: the counts that a data build prints, and the policy for records it cannot use."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from flacuna_jax.errors import UserError

UNKNOWN_SHARE = 0.001
"""Share of unknown tokens among those with loss above which a data build warns."""


@dataclass
class SourceReport:
    """Counts for one configured source. Lengths are in tokens.

    read = kept + the sum of `dropped` holds for complete reads, where each unreadable record or torn file counts as
    one read. `changed` counts records that were kept in another form; `first_seen` tells where each reason first
    occurred, and what was wrong there.
    """

    path: str
    read: int = 0
    kept: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    tokens_lost: int = 0
    """Tokens of over-long examples that were dropped or cut away."""
    first_seen: dict[str, str] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    """By name, in how many records a field held something that was not used."""
    unknown_tokens: int = 0
    """Tokens with loss that are the tokenizer's unknown token."""
    unknown_characters: str = ""
    """Characters of answers that the tokenizer does not know, the first ones that were found."""
    ignored_files: tuple[str, ...] = ()
    """Files of a directory whose ending is not one of a data file."""
    notes: tuple[str, ...] = ()
    """Which files were taken, where there was a choice."""

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
        """The report in words, a line per fact."""
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
        """The fields that were ignored in equally many records stand in one line."""
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
    """What to do with a record that cannot be understood: stop with its place, or count it and go on."""

    report: SourceReport
    mode: Literal["error", "skip"]
    key: str = "data.on_bad_record"
    """The setting that `mode` comes from, for messages."""

    def reject(self, reason: str, where: object, detail: str) -> None:
        """Counts the record under `reason`; raises UserError(`where`: `detail`) if bad records are errors."""
        if self.mode == "error":
            raise UserError(f"{where}: {detail} ({self.key}: skip would count it and go on)")
        self.report.drop(reason, where, detail)
