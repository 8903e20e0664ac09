"""Conversations with the small model: template, streaming, commands."""

import io
from pathlib import Path

import pytest

from flacuna_jax import chat
from flacuna_jax.cli import run_verb
from flacuna_jax.data.conversation import Turn
from flacuna_jax.data.tokenization import tokenize_prompt
from flacuna_jax.errors import UserError
from flacuna_jax.generation.chat_model import ChatModel
from flacuna_jax.generation.engine import LlamaLanguageModel
from flacuna_jax.generation.language_model import GenerationRequest
from flacuna_jax.inference import ModelAddress
from flacuna_jax.verbs.chat import Chat, Settings, new_tokens
from tests.evaluation.models import story_model
from tests.vocabularies import llama_template

TEMPLATE = llama_template("vicuna_v1.1")
ADDRESS = ModelAddress(Path("base"), Path("tuned"))


@pytest.fixture(scope="module")
def model(story_llama: Path) -> LlamaLanguageModel:
    return story_model(story_llama)


def _chat(model: LlamaLanguageModel, new: int = 20) -> Chat:
    answering = ChatModel(model, TEMPLATE)
    return Chat(ADDRESS, lambda address, again: answering, Settings(max_new_tokens=new), system="Tell stories.")


def _expected(model: LlamaLanguageModel, turns: list[Turn], new: int = 20) -> str:
    prompt = tokenize_prompt(turns, TEMPLATE, model.tokenizer, "Tell stories.")
    return model.generate([GenerationRequest(tuple(prompt), new)])[0].text


def test_turns_have_the_text_of_training_and_stream_to_the_same_text(model: LlamaLanguageModel) -> None:
    chat = _chat(model)
    pieces = list(chat.answer("One day, Lily saw a dog."))
    assert len(pieces) > 2
    question = Turn("user", "One day, Lily saw a dog.")
    assert "".join(pieces) == _expected(model, [question])
    second = "".join(chat.answer("And then?"))
    assert second == _expected(model, [question, Turn("assistant", "".join(pieces).strip()), Turn("user", "And then?")])


def test_side_by_side_keeps_the_tuned_answer(model: LlamaLanguageModel) -> None:
    chat = _chat(model)
    assert chat.command("/base") == "answers of base and tuned model"
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
    with pytest.raises(UserError, match="unknown command /rest"):
        chat.command("/rest")


def test_an_adapter_that_was_trained_further_is_read_again(model: LlamaLanguageModel) -> None:
    read: list[tuple[str, bool]] = []

    def load(address: ModelAddress, again: bool) -> ChatModel:
        read.append((address.name, again))
        return ChatModel(model, TEMPLATE)

    chat = Chat(ADDRESS, load, Settings(max_new_tokens=2))
    chat.command("/load other/lora")
    list(chat.answer("One day"))
    chat.command("/load other/lora")
    assert read == [("base+lora", True), ("base+lora", False), ("base+lora", True)]


def test_a_full_context_forgets_the_oldest_turns(model: LlamaLanguageModel) -> None:
    chat = _chat(model, new=30)
    chat.turns = [Turn("user", "word " * 300), Turn("assistant", "yes"), Turn("user", "b"), Turn("assistant", "c")]
    assert "forgot the oldest question" in "".join(chat.answer("One day " * 20))
    assert chat.turns[0].text == "b"
    turns = list(chat.turns)
    with pytest.raises(UserError, match="the question has"):
        list(chat.answer("word " * 500))
    assert chat.turns == turns, "a question that was not answered is dropped"


def test_a_conversation_through_a_pipe(
    story_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["One day, Lily saw a dog.", "/system Be brief.", "/load nowhere", "/what", "", "/reset", "/quit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert run_verb(chat.main, ["--model", str(story_llama), "--max-new-tokens", "8", "--dtype", "float32"]) == 0
    captured = capsys.readouterr()
    answer, system, reset = captured.out.strip().split("\n")
    turns = [Turn("user", "One day, Lily saw a dog.")]
    model = story_model(story_llama)
    prompt = tokenize_prompt(turns, TEMPLATE, model.tokenizer)
    assert answer == model.generate([GenerationRequest(tuple(prompt), 8)])[0].text.strip()
    assert (system, reset) == ("system text: Be brief.", "forgotten")
    assert [line.split(":")[0] for line in captured.err.splitlines()[2:]] == ["error", "error"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--max-new-tokens=0", "--max-new-tokens is 0"),
        ("--max-new-tokens=512", "model's context of 512"),
        ("--temperature=-1", "temperature is -1.0"),
        ("--template=vicunia", "'vicunia' is not one of"),
    ],
)
def test_mistakes_exit_before_the_first_question(
    option: str, message: str, story_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb(chat.main, ["--model", str(story_llama), option]) == 2
    assert message in capsys.readouterr().err


def test_new_tokens_leave_space_for_the_question(model: LlamaLanguageModel) -> None:
    assert new_tokens(None, ChatModel(model, TEMPLATE)) == 256
    assert new_tokens(511, ChatModel(model, TEMPLATE)) == 511
