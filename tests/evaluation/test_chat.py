"""Conversations with the small model: wording, streaming, commands."""

from pathlib import Path

import pytest

from flacuna_jax.chat import Chat, Settings
from flacuna_jax.data.conversation import TEMPLATES, Turn
from flacuna_jax.data.tokenization import tokenize_prompt
from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.flax_model import LlamaLanguageModel
from flacuna_jax.evaluation.language_model import GenerationRequest
from flacuna_jax.inference import ModelAddress
from tests.evaluation.models import story_model

TEMPLATE = TEMPLATES["vicuna_v1.1"]
ADDRESS = ModelAddress(Path("base"), Path("tuned"))


@pytest.fixture(scope="module")
def model(story_llama: Path) -> LlamaLanguageModel:
    return story_model(story_llama)


def _chat(model: LlamaLanguageModel, new: int = 20) -> Chat:
    return Chat(ADDRESS, lambda address: model, Settings(TEMPLATE, max_new_tokens=new), system="Tell stories.")


def _expected(model: LlamaLanguageModel, turns: list[Turn], new: int = 20) -> str:
    prompt = tokenize_prompt(turns, TEMPLATE, model.tokenizer, "Tell stories.")
    return model.generate([GenerationRequest(tuple(prompt), new)])[0].text


def test_turns_are_worded_as_in_training_and_stream_to_the_same_text(model: LlamaLanguageModel) -> None:
    chat = _chat(model)
    pieces = list(chat.answer("One day, Lily saw a dog."))
    assert len(pieces) > 2
    question = Turn("user", "One day, Lily saw a dog.")
    assert "".join(pieces) == _expected(model, [question])
    second = "".join(chat.answer("And then?"))
    assert second == _expected(model, [question, Turn("assistant", "".join(pieces).strip()), Turn("user", "And then?")])


def test_side_by_side_keeps_the_tuned_answer(model: LlamaLanguageModel) -> None:
    chat = _chat(model)
    assert chat.command("/base") == "base and tuned side by side"
    said = "".join(chat.answer("Tom had a cat."))
    assert said.startswith("[base]  ")
    assert "\n[tuned] " in said
    assert [turn.role for turn in chat.turns] == ["user", "assistant"]


def test_commands(model: LlamaLanguageModel) -> None:
    chat = _chat(model)
    assert "Output:" in chat.command("/task Write a story")
    list(chat.answer("About rain"))
    assert chat.turns[0].text == "Write a story.\n\nAbout rain\nOutput:"
    assert chat.command("/task") == "plain questions"
    assert chat.command("/reset") == "forgotten"
    assert chat.turns == []
    assert chat.command("/load other/adapter") == "answering: base+other"
    assert chat.command("/load") == "answering: base"
    chat.command("/system Be brief.")
    assert chat.system == "Be brief."
    with pytest.raises(UserError, match="no command /rest"):
        chat.command("/rest")


def test_a_full_context_forgets_the_oldest_turns(model: LlamaLanguageModel) -> None:
    chat = _chat(model, new=30)
    chat.turns = [Turn("user", "word " * 300), Turn("assistant", "yes"), Turn("user", "b"), Turn("assistant", "c")]
    assert "forgotten" in "".join(chat.answer("One day " * 20))
    assert chat.turns[0].text == "b"
    with pytest.raises(UserError, match="the question has"):
        list(_chat(model).answer("word " * 500))
