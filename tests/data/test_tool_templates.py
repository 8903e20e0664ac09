"""Calls and results of tools in the chat templates of other models."""

from typing import Any

import pytest

from flacuna_jax.data.conversation import Conversation, TemplateRefusal, Turn, render, template_from_jinja
from tests.data.chat_templates import SHIPPED, ZEPHYR_LIKE, marks_of, trl_templates
from tests.data.rendered import CALL, TOOL, Loaded, in_flacuna, in_transformers, said, supervised_text

pytestmark = pytest.mark.usefixtures("fixed_date")
ALL = {**trl_templates(), **SHIPPED}
if len(ALL) == len(SHIPPED):
    pytest.skip("trl, whose templates are compared, is not installed", allow_module_level=True)


_RESULT = {"name": "weather", "tool_call_id": "abcdefghi"}


def _weather(result: str, answer: str, said: str = "", call: dict[str, Any] = CALL) -> tuple[Turn, ...]:
    """A question, a call of a tool, its result and an answer."""
    asked = Turn("user", "Weather?"), Turn("assistant", said, extra={"tool_calls": [call]})
    return (*asked, Turn("tool", result, extra=_RESULT), Turn("assistant", answer))


@pytest.mark.parametrize("name", ["llama3_1", "gptoss", "qwen3", "mistral_v0.3"])
def test_results_of_tools_may_be_written_as_json_text(name: str, loaded: Loaded) -> None:
    """Llama 3.1 and GPT-OSS escape a result that is already JSON, which counts as supported."""
    ours, theirs = loaded(*marks_of(ALL[name]))
    template = template_from_jinja({"default": ALL[name]}, name, ours.special)
    turns = _weather('{"sky": "\\"clear\\"", "degrees": 21}', "It is clear.")
    conversation = Conversation("", "", turns, None, (TOOL,))
    assert in_flacuna(ours, template, conversation)[0] == in_transformers(theirs, ALL[name], conversation)[0]
    supervised = supervised_text(template, turns, (TOOL,))
    assert "Paris" in supervised
    assert "It is clear." in supervised
    assert "degrees" not in supervised


def test_a_template_that_needs_arguments_as_text_gets_text(loaded: Loaded) -> None:
    ours, theirs = loaded(*marks_of(ALL["deepseekv3"]))
    template = template_from_jinja({"default": ALL["deepseekv3"]}, "deepseekv3", ours.special)

    def turns(arguments: Any) -> tuple[Turn, ...]:
        call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
        return _weather("sunny", "It is sunny.", call=call)

    ids, _ = in_flacuna(ours, template, Conversation("", "", turns({"city": "Paris"})))
    assert ids == in_transformers(theirs, ALL["deepseekv3"], Conversation("", "", turns('{"city": "Paris"}')))[0]


def test_a_call_counts_as_omitted_if_only_its_name_is_in_the_text(loaded: Loaded) -> None:
    """A template that ignores tool_calls, and a question that contains the name of the function."""
    ours, _ = loaded("<|im_start|>", "<|im_end|>")
    template = template_from_jinja({"default": ZEPHYR_LIKE}, "no tools", ours.special)
    turns = (Turn("user", "Call weather please"), Turn("assistant", "", extra={"tool_calls": [CALL]}))
    with pytest.raises(TemplateRefusal, match=r"not support tool_calls \(turn 2\)"):
        render(Conversation("", "", turns), template)
    with pytest.raises(TemplateRefusal, match="not support tools"):
        render(Conversation("", "", said("Call weather please", "No"), None, (TOOL,)), template)
    reasoning = (Turn("user", "Yes or no?"), Turn("assistant", "Yes", extra={"reasoning_content": "Yes"}))
    with pytest.raises(TemplateRefusal, match="not support reasoning"):
        render(Conversation("", "", reasoning), template)


@pytest.mark.parametrize("name", ["gemma4", "gemma4_v5", "diffusion_gemma"])
def test_no_result_of_a_tool_carries_loss(name: str, loaded: Loaded) -> None:
    """Gemma 4 writes the results between the calls and the text of a single message."""
    ours, _ = loaded(*marks_of(ALL[name]))
    template = template_from_jinja({"default": ALL[name]}, name, ours.special)
    turns = _weather("sunny", "It is fine.", said="I look.")
    with pytest.raises(TemplateRefusal, match=r"turn 3 inside the answer of turn 2|no marker after an answer"):
        render(Conversation("", "", turns, None, (TOOL,)), template)
    silent = _weather("sunny", "It is fine.")
    assert "sunny" not in supervised_text(template, silent, (TOOL,))
