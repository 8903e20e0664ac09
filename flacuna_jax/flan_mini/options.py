"""Styles of answer options: a heading, markers, separators, and whether the answer is a marker or a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from flacuna_jax.flan_mini.templates import OptionLooks

_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x")


@dataclass(frozen=True)
class OptionStyle:
    """`marker` contains {} for the option and optionally one of {A} {a} {1} {i} for its index."""

    header: str
    marker: str
    joint: str
    answer_is_marker: bool

    def block(self, options: Sequence[str]) -> str:
        """The options in the format of the prompt."""
        short = sum(map(len, options)) <= 160 and not any("\n" in option for option in options)
        # Options without markers must be separated.
        joint = self.joint if short and (self.joint != " " or self.is_marked) else "\n"
        listed = joint.join(
            self._mark(index, len(options)).replace("{}", option, 1) for index, option in enumerate(options)
        )
        if not self.header:
            return listed
        return f"{self.header}{chr(10) if joint == chr(10) else ' '}{listed}"

    def answer(self, answer: str, options: Sequence[str]) -> str:
        """The model's answer: the option's marker if this style answers with markers, otherwise the text."""
        if not (self.answer_is_marker and self.is_marked and answer in options):
            return answer
        return self._mark(list(options).index(answer), len(options)).replace("{}", "").strip()

    @property
    def is_marked(self) -> bool:
        """Whether each option has a marker."""
        return any(place in self.marker for place in ("{A}", "{a}", "{1}", "{i}"))

    def _mark(self, index: int, count: int) -> str:
        # If there are too few letters or Roman numerals, all options are numbered.
        marker = self.marker
        if count > 26:
            marker = marker.replace("{A}", "{1}").replace("{a}", "{1}")
        if count > len(_ROMAN):
            marker = marker.replace("{i}", "{1}")
        places = {"{A}": chr(65 + index % 26), "{a}": chr(97 + index % 26), "{1}": str(index + 1)}
        if "{i}" in marker:
            places["{i}"] = _ROMAN[index]
        for place, text in places.items():
            marker = marker.replace(place, text)
        return marker


def draw_style(looks: OptionLooks, rng: Random) -> OptionStyle:
    return OptionStyle(
        rng.choice(looks.headers),
        rng.choice(looks.markers),
        rng.choice(looks.joints),
        rng.choice(looks.answers) == "marker",
    )
