"""Words an item: chooses its template, the style of its options and, in a few-shot group, exemplars of the same task.

All choices use a random stream of the item itself, so an item always gets the same wording. A `Draft` can drop
exemplars to fit a length, but never a part of the item itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from flacuna_jax.flan_mini.items import PAIR, READY, Fields, Item, chooser
from flacuna_jax.flan_mini.options import OptionStyle, draw_style
from flacuna_jax.flan_mini.templates import Family, Frame, Shapes, Wording

OPTION_SHARE = 0.5
"""Fraction of the items with options that show them, as in the FLAN Collection's template types."""

Pool = Sequence[tuple[int, Item]]
"""(key, item) of a task, in the order in which they were drawn."""


@dataclass(frozen=True)
class Draft:
    """A worded item. `prompt(chosen)` is the user's text with the chosen exemplars."""

    head: str
    exemplars: tuple[str, ...]
    query: str
    separator: str
    target: str
    with_options: bool = False

    def prompt(self, chosen: Sequence[int]) -> str:
        parts = [self.head] if self.head else []
        return self.separator.join([*parts, *(self.exemplars[i] for i in chosen), self.query])

    @property
    def everything(self) -> str:
        return self.prompt(range(len(self.exemplars)))


@dataclass(frozen=True)
class Writer:
    """Converts items to drafts.

    share: fraction of the items that get exemplars, if there are any.
    """

    families: Mapping[str, Family]
    shapes: Shapes
    seed: int
    share: float
    max_exemplars: int

    def draft(self, key: int, item: Item, pool: Pool) -> Draft:
        if item.family == READY:
            return Draft("", (), item.fields["inputs"], "", item.fields["targets"])
        rng = chooser(self.seed, "wording", key)
        family = self.families[item.family]
        wording = rng.choice([w for w in family.wordings if w.fits(item.fields)] or [family.core])
        shown = rng.random() < OPTION_SHARE and bool(item.fields.get("options"))
        style = draw_style(self.shapes.options, rng) if shown else None
        if rng.random() < self.share:
            own = item.fields.get("exemplars")
            if own:
                return self._with_own_exemplars(item, family, own, rng)
            others = [other for k, other in pool if k != key and _alike(item, other)]
            if others:
                count = rng.randint(1, min(self.max_exemplars, len(others)))
                return self._group(item, family, wording, style, rng.sample(others, count), rng)
        prompt, target = _word(item.fields, wording, style)
        return Draft("", (), prompt, "", target, shown)

    def _group(
        self,
        item: Item,
        family: Family,
        wording: Wording,
        style: OptionStyle | None,
        others: Sequence[Item],
        rng: Random,
    ) -> Draft:
        mode = rng.choices(list(self.shapes.modes), list(self.shapes.modes.values()))[0]
        if mode == "framed" or family.head is not None or item.family == PAIR:
            frame = rng.choice(self.shapes.frames)
            head = family.head.fill(item.fields) if family.head else ""
            texts = tuple(_framed(other.fields, family, frame, style) for other in others)
            prompt, target = _frame_query(item.fields, family, frame, style)
            return Draft(head, texts, prompt, frame.separator, target, style is not None)
        separator = rng.choice(self.shapes.separators)
        texts = tuple(
            _joined(*_word(other.fields, _for_exemplar(other, family, wording, mode, rng), style)) for other in others
        )
        prompt, target = _word(item.fields, wording, style)
        return Draft("", texts, prompt, separator, target, style is not None)

    def _with_own_exemplars(self, item: Item, family: Family, own: Sequence[Sequence[str]], rng: Random) -> Draft:
        """A Natural Instructions group: two of the task's positive examples, or one with its explanation."""
        frame = rng.choice(self.shapes.frames)
        explained = [example for example in own if example[2]]
        if explained and rng.random() < 0.5:
            text, answer, why = rng.choice(explained)
            exemplars = [f"{frame.question}{text}{frame.answer}{answer}{rng.choice(self.shapes.explained)}{why}"]
        else:
            chosen = rng.sample(list(own), min(2, len(own)))
            exemplars = [f"{frame.question}{text}{frame.answer}{answer}" for text, answer, _ in chosen]
        prompt, target = _frame_query(item.fields, family, frame, None)
        head = family.head.fill(item.fields) if family.head else ""
        return Draft(head, tuple(exemplars), prompt, frame.separator, target)


def _alike(item: Item, other: Item) -> bool:
    """Whether an item of the same task can be an exemplar: asked in the same form, in the same language."""
    same_language = item.fields.get("language") == other.fields.get("language")
    # Another solution of the same problem would reveal the question or the answer.
    differs = all(item.fields.get(name) != other.fields[name] for name in ("problem", "inputs") if name in other.fields)
    return item.family == other.family and same_language and differs


def _for_exemplar(other: Item, family: Family, wording: Wording, mode: str, rng: Random) -> Wording:
    usable = [w for w in family.wordings if w.fits(other.fields)]
    if mode == "same" and wording in usable:
        return wording
    return rng.choice(usable or [family.core])


def _word(fields: Fields, wording: Wording, style: OptionStyle | None) -> tuple[str, str]:
    options = fields.get("options") or []
    block = style.block(options) if style and options else ""
    if style and options:
        fields = {**fields, "answer": style.answer(fields["answer"], options)}
    return wording.prompt.fill(fields, block), wording.target.fill(fields)


def _framed(fields: Fields, family: Family, frame: Frame, style: OptionStyle | None) -> str:
    question, target = _core(fields, family, style)
    return f"{frame.question}{question}{frame.answer}{target}"


def _frame_query(fields: Fields, family: Family, frame: Frame, style: OptionStyle | None) -> tuple[str, str]:
    question, target = _core(fields, family, style)
    return f"{frame.question}{question}{frame.answer}".rstrip(), target


def _core(fields: Fields, family: Family, style: OptionStyle | None) -> tuple[str, str]:
    question, target = _word(fields, family.core, style)
    options = fields.get("options") or []
    return (f"{question}\n{style.block(options)}" if style and options else question), target


def _joined(prompt: str, target: str) -> str:
    return f"{prompt}{' ' if prompt.endswith(':') else chr(10)}{target}"
