"""Adapters beside each other on one base."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("starlette")

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.data.conversation import Turn
from flacuna_jax.data.tokenization import tokenize_prompt
from flacuna_jax.errors import UserError
from flacuna_jax.serving.adapters import Served
from tests.serving.models import ADAPTERS, make_adapter, prepared

WORDS = "{% for message in messages %}so {{ message['content'] }} so{% endfor %}"


def prompt(model: Served) -> str:
    return model.tokenizer.decode(tokenize_prompt((Turn("user", "Hello"),), model.template, model.tokenizer))


def test_an_adapter_may_have_its_own_tokenizer_and_template(story_llama: Path, tmp_path: Path) -> None:
    own, plain = (make_adapter(tmp_path / name, story_llama, ADAPTERS["small"], seed=1) for name in ("own", "plain"))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(story_llama / name, own / name)
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": WORDS}))
    scheduler, _ = prepared(story_llama, {"plain": plain, "own": own}, "--rows", "1", "--context", "64")
    base, *adapters = scheduler.models.offered.values()
    assert [prompt(model).strip() for model in adapters] == [prompt(base).strip(), "so Hello so"]
    assert adapters[0].tokenizer is base.tokenizer


def test_adapters_that_cannot_share_a_batch_are_refused(story_llama: Path, tmp_path: Path) -> None:
    dora = make_adapter(tmp_path / "dora", story_llama, LoraConfig(rank=2, use_dora=True), seed=1)
    with pytest.raises(UserError, match=r"'dora' uses DoRA, so it cannot share a batch.*--format merged"):
        prepared(story_llama, {"dora": dora})
