"""The looks of answer options: a heading, markers, joints, and whether the answer is a marker or a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from flacuna_jax.flan_mini.templates import OptionLooks

_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x")


@dataclass(frozen=True)
class OptionStyle:
    """`marker` holds {} for the option and may hold one of {A} {a} {1} {i} for its place."""

    header: str
    marker: str
    joint: str
    answer_is_marker: bool

    def block(self, options: Sequence[str]) -> str:
        """The options as the prompt shows them."""
        short = sum(map(len, options)) <= 160 and not any("\n" in option for option in options)
        # Without a mark of its own an option must not run into the next one.
        joint = self.joint if short and (self.joint != " " or self.is_marked) else "\n"
        listed = joint.join(
            self._mark(index, len(options)).replace("{}", option, 1) for index, option in enumerate(options)
        )
        if not self.header:
            return listed
        return f"{self.header}{chr(10) if joint == chr(10) else ' '}{listed}"

    def answer(self, answer: str, options: Sequence[str]) -> str:
        """What the model is to answer: the option's marker, if this style answers with markers, else the text."""
        if not (self.answer_is_marker and self.is_marked and answer in options):
            return answer
        return self._mark(list(options).index(answer), len(options)).replace("{}", "").strip()

    @property
    def is_marked(self) -> bool:
        """Whether each option has a mark of its own."""
        return any(place in self.marker for place in ("{A}", "{a}", "{1}", "{i}"))

    def _mark(self, index: int, count: int) -> str:
        # Where letters or Roman numerals run out, all options are numbered.
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
