"""Tool calls in answers, in the form of the template."""

import itertools

import pytest

from flacuna_jax.data.conversation import template_from_jinja
from flacuna_jax.serving.tools import CallForm
from tests.vocabularies import LLAMA, llama_template

HERMES = """{% if tools %}tools: {{ tools | tojson }}
{% endif %}{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}{% generation %}\
{{ message['content'] }}{% for call in message['tool_calls'] or [] %}<tool_call>
{{ {'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson }}
</tool_call>{% endfor %}
{% endgeneration %}{% else %}{{ message['content'] }}
{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
BARE = HERMES.replace("<tool_call>\n", "").replace("\n</tool_call>", "").replace("'arguments':", "'parameters':")


def form(source: str) -> CallForm:
    found = CallForm.of(template_from_jinja({"default": source}, "test", LLAMA))
    assert found is not None
    return found


def test_marked_calls_are_found_after_text() -> None:
    hermes = form(HERMES)
    assert hermes == CallForm("<tool_call>", "</tool_call>", "name", "arguments")
    first, second = (f'<tool_call>\n{{"name": "f", "arguments": {{"x": {x}}}}}\n</tool_call>' for x in (1, 2))
    assert hermes.parse(f"Let me see.\n{first}\n{second}") == ("Let me see.", [("f", {"x": 1}), ("f", {"x": 2})])
    assert hermes.parse("no call") == ("no call", [])
    assert hermes.parse(first[:-20]) == (first[:-20], [])
    assert (hermes.certain("Let me <too"), hermes.certain("a < b"), hermes.certain(f"a {first}")) == (
        "Let me",
        "a < b",
        "a",
    )


def test_calls_without_marks_are_the_whole_answer() -> None:
    bare = form(BARE)
    assert (bare.opening, bare.arguments) == ("", "parameters")
    assert bare.parse('{"name": "f", "parameters": {"x": "}"}}') == ("", [("f", {"x": "}"})])
    assert bare.parse("The set {1, 2}") == ("The set {1, 2}", [])
    assert (bare.certain('{"na'), bare.certain("The")) == ("", "The")


def test_a_template_without_calls_has_no_form() -> None:
    assert CallForm.of(llama_template("vicuna_v1.1")) is None


@pytest.mark.parametrize("opening", ["", "<tool_call>"])
def test_text_that_is_certain_only_grows(opening: str) -> None:
    calls = CallForm(opening, "", "name", "arguments")
    text = f'Look: {opening}{{"name": "f", "arguments": {{}}}}'
    told = [calls.certain(text[:end]) for end in range(len(text) + 1)]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(told))
