"""Templates: their text, their rules for joining segments, and their jinja against Hugging Face's own renderer."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flacuna_jax.data.conversation import (
    NAMES,
    Conversation,
    Segment,
    Template,
    Turn,
    render,
    render_prompt,
    render_text,
)
from flacuna_jax.data.segments import join_segments
from tests.data import fastchat
from tests.vocabularies import llama_template

V1_1 = llama_template("vicuna_v1.1")

SAID = [
    ("Hello!",),
    ("Hello!", "Hi!"),
    ("Hello!", "Hi!", "How are you?"),
    ("a\n", " b ", "  c", "d\n\n"),
    ("", "b"),
    ("a", "", "c", "d"),
    ("", "b", ""),
    ("it's {{ 1 }} {% if %} 'x' \"y\" \\n", "ok {# no #}"),
]


def turns(*texts: str) -> tuple[Turn, ...]:
    roles = ("user", "assistant")
    return tuple(Turn(roles[index % 2], text) for index, text in enumerate(texts))


@pytest.mark.parametrize("said", [said for said in SAID if len(said) % 2 == 0])
def test_v1_1_is_fastchats_text(said: tuple[str, ...]) -> None:
    expected = fastchat.prompt([(("USER", "ASSISTANT")[i % 2], text) for i, text in enumerate(said)])
    assert render_text(render(Conversation("x", "y", turns(*said)), V1_1)).removeprefix("<s>") == expected


def test_prompts_end_with_the_colon() -> None:
    text = render_text(render_prompt(turns("Hello!", "Hi!", "How are you?"), V1_1))
    assert text == f"<s>{V1_1.system} USER: Hello! ASSISTANT: Hi!</s>USER: How are you? ASSISTANT:"
    v0 = render_text(render_prompt(turns("Hello!"), llama_template("vicuna_v0"), system="Be brief."))
    assert v0 == "<s>Be brief.\n\n### Human: Hello!\n### Assistant:"


@pytest.mark.parametrize("said", [(), ("a", "b")])
def test_a_prompt_ends_with_a_question(said: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="last turn of a prompt must be of the user"):
        render_prompt(turns(*said), V1_1)


@pytest.fixture(scope="module")
def hugging_face(story_llama: Path) -> Callable[..., str]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(story_llama / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )

    def apply(template: Template, messages: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template.jinja,
            tokenize=False,
            add_generation_prompt=messages[-1]["role"] == "user",
        )

    return apply


@pytest.mark.parametrize("template", [llama_template(name) for name in NAMES], ids=NAMES)
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("said", SAID)
def test_jinja_gives_the_same_text(
    hugging_face: Callable[..., str], template: Template, system: str | None, said: tuple[str, ...]
) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": turn.role, "content": turn.text} for turn in turns(*said)]
    text = render_text(render(Conversation("x", "y", turns(*said), system), template))
    assert hugging_face(template, messages) == text


@pytest.mark.parametrize("template", [llama_template(name) for name in NAMES], ids=NAMES)
def test_jinja_rejects_turns_that_do_not_alternate(hugging_face: Callable[..., str], template: Template) -> None:
    with pytest.raises(Exception, match="alternate"):
        hugging_face(template, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def text(content: str, supervised: bool = False) -> Segment:
    return Segment(content, None, supervised, 0)


def test_adjacent_texts_with_the_same_loss_are_joined() -> None:
    parts = [text("a"), text("b"), text(" c"), text("d "), text(" e"), text(""), text("f", supervised=True)]
    assert [one.text for one in join_segments(parts, keep_spaces=True)] == ["ab", " cd  e", "f"]
    assert [one.text for one in join_segments(parts, keep_spaces=False)] == ["ab cd  e", "f"]
