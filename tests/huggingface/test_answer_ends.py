"""The end of an answer: the template's marker, EOS, generation_config.json; and how exports write it."""

import json
from pathlib import Path

import pytest

from flacuna_jax.data.conversation import Conversation, Turn
from flacuna_jax.data.tokenization import tokenize
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.answer_ends import answer_ends, checkpoint_ends
from flacuna_jax.huggingface.architecture import generation_config
from flacuna_jax.huggingface.chat_template import choose_template
from flacuna_jax.huggingface.merged import copy_tokenizer
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from tests.data.chat_templates import EOS, write_tokenizer


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "model", ["<|im_start|>", "<|im_end|>"])


def test_all_three_end_an_answer(chat_model: Path) -> None:
    """In Llama 3, SmolLM2 and Qwen, config.json, generation_config.json and the tokenizer have different tokens."""
    tokenizer = load_tokenizer(chat_model)
    (chat_model / "config.json").write_text(json.dumps({"eos_token_id": 335}))
    assert checkpoint_ends(chat_model) == (335,)
    (chat_model / "generation_config.json").write_text(json.dumps({"eos_token_id": [337, 335]}))
    template = choose_template("chatml", chat_model, tokenizer)
    im_end = tokenizer.special.tokens["<|im_end|>"].id
    assert answer_ends(template, tokenizer, chat_model) == (im_end, tokenizer.eos_id, 337, 335)
    assert answer_ends(None, tokenizer, None) == (tokenizer.eos_id,)
    written = generation_config({"eos_token_id": 335}, (im_end, 337))
    assert written["eos_token_id"] == [im_end, 337]
    (chat_model / "generation_config.json").write_text(json.dumps({"eos_token_id": "end"}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is 'end'"):
        checkpoint_ends(chat_model)


def test_the_end_marker_becomes_eos_unless_the_template_writes_eos(chat_model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(chat_model)
    turns = (Turn("user", "Hi"), Turn("assistant", "Yes"))
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    for name, eos in {"chatml": "<|im_end|>", "vicuna_v1.1": EOS}.items():
        template = choose_template(name, chat_model, tokenizer)
        out = tmp_path / name
        out.mkdir()
        copy_tokenizer(chat_model, out, template.jinja, tokenizer.special.spellings[template.ends[0]])
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        assert theirs.eos_token == eos
        ids = tokenize(Conversation("", "", turns), template, tokenizer).ids.tolist()
        assert theirs.apply_chat_template(messages, return_dict=False) == ids
        # The exported template is recognised as its original format.
        assert choose_template("auto", out, load_tokenizer(out)).name == name


def test_a_directory_without_changes_is_copied_unchanged(chat_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    copy_tokenizer(chat_model, out, None, EOS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (chat_model / name).read_bytes()
