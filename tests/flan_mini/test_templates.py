from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.few_shot import Writer
from flacuna_jax.flan_mini.items import Item
from flacuna_jax.flan_mini.options import OptionStyle, draw_style
from flacuna_jax.flan_mini.templates import load_families, load_shapes, pattern

FAMILIES = load_families()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_template_shows_the_question_and_asks_for_the_answer(name: str) -> None:
    family = FAMILIES[name]
    fields = {placeholder: f"<{placeholder}>" for placeholder in family.needs()}
    prompts = [wording.prompt.fill(fields) for wording in family.wordings]
    assert len(set(prompts)) == len(prompts)
    for wording, prompt in zip(family.wordings, prompts, strict=True):
        assert wording.target.placeholders
        assert not wording.target.placeholders & wording.prompt.placeholders - {"answer"} or name.startswith("cot"), (
            prompt
        )
        assert prompt == prompt.strip()
        # The prompt does not contain the answer, unless the family reveals it by design.
        for placeholder in wording.target.placeholders:
            assert f"<{placeholder}>" not in prompt, prompt


@given(st.dictionaries(st.sampled_from(["a", "b"]), st.text(), min_size=2))
def test_values_are_text_and_never_templates(values: dict[str, str]) -> None:
    filled = pattern("x {a} y {b} z").fill(values)
    assert filled == f"x {values['a']} y {values['b']} z"


def test_braces_in_values_and_templates_are_kept() -> None:
    assert pattern("f{x} {code}").fill({"x": "{code}", "code": "{x}"}) == "f{code} {x}"
    assert pattern("{ not } {Not} {code}").fill({"code": "1"}) == "{ not } {Not} 1"


def test_without_options_their_line_is_removed() -> None:
    assert pattern("a\n{options}\nAnswer:").fill({}) == "a\nAnswer:"
    assert pattern("a\n{options}\nAnswer:").fill({}, "- x") == "a\n- x\nAnswer:"


@given(st.integers(0, 10_000), st.lists(st.text("abcde ", min_size=1), min_size=2, max_size=40, unique=True), st.data())
def test_every_option_style_can_be_answered(seed: int, options: list[str], data: st.DataObject) -> None:
    style = draw_style(load_shapes().options, Random(seed))
    block = style.block(options)
    answers = [style.answer(option, options) for option in options]
    assert len(set(answers)) == len(options)  # no two options have the same answer
    for option, answer in zip(options, answers, strict=True):
        assert option in block
        assert answer in block


def test_marker_styles() -> None:
    style = OptionStyle("Options:", "({A}) {}", " ", True)
    assert style.block(["yes", "no"]) == "Options: (A) yes (B) no"
    assert style.answer("no", ["yes", "no"]) == "(B)"
    assert OptionStyle("", "- {}", "\n", True).answer("no", ["yes", "no"]) == "no"  # bullets are not answers
    assert OptionStyle("", "({i}) {}", "\n", True).answer("x11", [f"x{i}" for i in range(12)]) == "(12)"


def test_an_answer_with_braces_is_text() -> None:
    style = OptionStyle("", "{A}. {}", "\n", False)
    assert style.block(["{A}", "{}"]) == "A. {A}\nB. {}"


def writer(share: float, most: int = 5) -> Writer:
    return Writer(FAMILIES, load_shapes(), 42, share, most)


def nli(i: int) -> Item:
    fields = {"premise": f"p{i}.", "hypothesis": f"h{i}.", "answer": "yes" if i % 2 else "no", "options": ["yes", "no"]}
    return Item("t", "nli", fields)


def test_a_group_never_has_its_own_query_as_exemplar() -> None:
    pool = [(i, nli(i)) for i in range(6)]
    for key, item in pool:
        draft = writer(1.0).draft(key, item, pool)
        assert 1 <= len(draft.exemplars) <= 5
        assert not any(item.fields["premise"] in exemplar for exemplar in draft.exemplars)
        assert item.fields["premise"] in draft.query
        assert draft.prompt(()) == draft.query


def test_the_wording_of_an_item_does_not_depend_on_other_items() -> None:
    pool = [(i, nli(i)) for i in range(20)]
    drafts = [writer(0.5).draft(key, item, pool) for key, item in pool]
    assert [writer(0.5).draft(key, item, pool) for key, item in reversed(pool)] == drafts[::-1]
    assert {bool(draft.exemplars) for draft in drafts} == {True, False}
    assert {draft.with_options for draft in drafts} == {True, False}


def test_exemplars_do_not_show_another_answer_to_the_same_problem() -> None:
    items = [
        (
            i,
            Item(
                "apps", "program_synthesis", {"problem": "p", "solution": f"s{i}", "language": "Python", "starter": ""}
            ),
        )
        for i in range(5)
    ]
    assert not writer(1.0).draft(0, items[0][1], items).exemplars


def test_natural_instructions_use_their_own_examples() -> None:
    own = [["in1", "out1", "why1"], ["in2", "out2", ""], ["in3", "out3", "why3"]]
    counts = set()
    for key in range(60):
        item = Item(
            "task001", "task_definition", {"definition": "Do.", "input": f"i{key}", "answer": "a", "exemplars": own}
        )
        draft = writer(1.0).draft(key, item, [])
        counts.add((len(draft.exemplars), any("why" in e for e in draft.exemplars)))
        assert draft.head == "Do."
        assert draft.everything.count("Do.") == 1
    assert counts == {(2, False), (1, True)}


def test_custom_families_extend_and_replace_ours(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "nli:\n  core: '{premise}'\n  templates: [['{premise}?', '{answer}']]\nnew:\n  core: x\n  templates: [[x, y]]\n"
    )
    families = load_families(str(tmp_path))
    assert len(families["nli"].wordings) == 1
    assert "new" in families
    (tmp_path / "bad.yaml").write_text("nli:\n  templates: 3\n")
    load_families.cache_clear()
    with pytest.raises(UserError, match=r"bad\.yaml: family 'nli' needs"):
        load_families(str(tmp_path))
