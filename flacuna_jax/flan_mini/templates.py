"""Template families, read from YAML: pools of prompts for one kind of item, and the formats of few-shot groups.

Templates are data: placeholders in braces are replaced, and everything else in a template or a value is literal.
"""

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.items import Fields

OPTIONS = "options"
_OURS = ("general.yaml", "reasoning.yaml", "code.yaml")
_PLACEHOLDER = re.compile(r"\{([a-z_0-9]+)\}")


@dataclass(frozen=True)
class Pattern:
    """Text with placeholders: `parts` alternates literal text and placeholder names, beginning with text."""

    parts: tuple[str, ...]

    @property
    def placeholders(self) -> frozenset[str]:
        return frozenset(self.parts[1::2])

    def fill(self, fields: Fields, options: str = "") -> str:
        """The text for an item. Without options, the line for them is removed."""
        texts: list[str] = []
        for index, part in enumerate(self.parts):
            if index % 2 == 0:
                texts.append(part)
            elif part != OPTIONS:
                texts.append(fields[part])
            elif options:
                texts.append(options)
            elif texts[-1].endswith("\n"):
                texts[-1] = texts[-1][:-1]
        return "".join(texts).strip()


def pattern(text: str) -> Pattern:
    return Pattern(tuple(_PLACEHOLDER.split(text)))


@dataclass(frozen=True)
class Wording:
    prompt: Pattern
    target: Pattern

    def fits(self, fields: Fields) -> bool:
        """Whether an item has a value for every placeholder."""
        needed = (self.prompt.placeholders | self.target.placeholders) - {OPTIONS}
        return all(fields.get(name) for name in needed)


@dataclass(frozen=True)
class Family:
    """`core` words an item within a few-shot group; the optional `head` precedes the exemplars."""

    name: str
    core: Wording
    head: Pattern | None
    wordings: tuple[Wording, ...]

    def needs(self) -> frozenset[str]:
        """Placeholders that an item needs for all templates."""
        used = {*self.core.prompt.placeholders, *self.core.target.placeholders}
        for wording in self.wordings:
            used |= wording.prompt.placeholders | wording.target.placeholders
        return frozenset(used - {OPTIONS})


@dataclass(frozen=True)
class Frame:
    question: str
    answer: str
    separator: str


@dataclass(frozen=True)
class OptionLooks:
    headers: tuple[str, ...]
    markers: tuple[str, ...]
    joints: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Shapes:
    """The formats of exemplars and options."""

    modes: Mapping[str, int]
    separators: tuple[str, ...]
    frames: tuple[Frame, ...]
    explained: tuple[str, ...]
    options: OptionLooks


@functools.cache
def load_shapes() -> Shapes:
    tree = yaml.safe_load(_package_text("few_shot.yaml"))
    options = OptionLooks(**{name: tuple(values) for name, values in tree["options"].items()})
    frames = tuple(Frame(*frame) for frame in tree["frames"])
    return Shapes(tree["modes"], tuple(tree["separators"]), frames, tuple(tree["explained"]), options)


@functools.cache
def load_families(directory: str | None = None) -> Mapping[str, Family]:
    """The built-in families, and those of the YAML files in `directory`, which replace built-in ones of the same name.

    Raises UserError for a file that does not have the layout of the built-in files.
    """
    families: dict[str, Family] = {}
    for name in _OURS:
        families |= _families(yaml.safe_load(_package_text(name)), name)
    if directory is not None:
        files = sorted(Path(directory).glob("*.yaml"))
        if not files:
            raise UserError(f"{directory}: there is no .yaml file of template families (family_templates)")
        for path in files:
            try:
                families |= _families(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise UserError(f"{path}: cannot be read as template families: {error}") from None
    return families


def family(families: Mapping[str, Family], name: str, where: str) -> Family:
    """The family `name`; if it does not exist, raises UserError with the nearest name."""
    if name not in families:
        near = difflib.get_close_matches(name, families, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; available are {', '.join(sorted(families))}"
        raise UserError(f"{where}: there is no template family {name!r}{hint}")
    return families[name]


def _package_text(name: str) -> str:
    return (resources.files("flacuna_jax.flan_mini") / "templates" / name).read_text(encoding="utf-8")


def _families(tree: Any, origin: str) -> dict[str, Family]:
    if not isinstance(tree, dict):
        raise UserError(f"{origin}: the file must map families to their templates")
    return {str(name): _family(str(name), entry, origin) for name, entry in tree.items()}


def _family(name: str, entry: Any, origin: str) -> Family:
    pairs: Any = entry.get("templates") if isinstance(entry, dict) else None
    is_pairs = (
        isinstance(pairs, list)
        and pairs
        and all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
        )
    )
    if not is_pairs or not isinstance(entry.get("core"), str):
        raise UserError(f"{origin}: family {name!r} needs `core` (text) and `templates` (a list of [prompt, target])")
    wordings = tuple(Wording(pattern(prompt), pattern(target)) for prompt, target in pairs)
    core_target = entry.get("core_target", pairs[0][1])
    head = entry.get("head")
    core = Wording(pattern(entry["core"]), pattern(core_target))
    return Family(name, core, pattern(head) if head else None, wordings)
