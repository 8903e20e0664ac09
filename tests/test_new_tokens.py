"""Tokens that a run adds: tokenizer, tables, training, files, answers; as by a user, and compared with transformers."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from flacuna_jax.cli import main as flacuna
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.changed_base import grown, with_more_rows
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.merged import copy_tokenizer
from flacuna_jax.huggingface.tokenizer import load_tokenizer, tokenizer_fingerprint
from tests.small_run import write_run

pytestmark = pytest.mark.usefixtures("compiled_once")

NEW = (("<think>", False), ("reverse it", False), ("<|im_start|>", True), ("<|im_end|>", True))
SETTINGS = [
    "--data.add_tokens=[<think>, reverse it]",
    "--data.add_special_tokens=['<|im_start|>', '<|im_end|>']",
    "--data.template=chatml",
]
SHORT = "--training={max_steps: 2, schedule: constant, learning_rate: 0.01, batch_size: 8, remat: none}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, compiled_once: None) -> Path:
    """The input of a run, with a checkpoint in run/model."""
    directory = tmp_path_factory.mktemp("base")
    assert flacuna(["train", "--config", str(write_run(directory, lora=None)), "--training.max_steps=1"]) == 0
    return directory


@pytest.fixture(scope="module")
def train(base: Path) -> Callable[..., int]:
    config = yaml.safe_load((base / "config.yaml").read_text())
    config["model"] = {"path": str(base / "run" / "model"), "dtype": "float32"}
    config["lora"] = {"rank": 2, "targets": ["q_proj", "v_proj"]}
    (base / "tuned.yaml").write_text(yaml.safe_dump(config))

    def run(output: Path, *settings: str) -> int:
        return flacuna(["train", "--config", str(base / "tuned.yaml"), f"--output_dir={output}", SHORT, *settings])

    return run


@pytest.fixture(scope="module")
def tuned(base: Path, train: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that added tokens."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    assert train(run, *SETTINGS) == 0
    return run


def test_the_files_of_an_adapter_with_new_tokens(base: Path, tuned: Path) -> None:
    settings = json.loads((tuned / "adapter" / "adapter_config.json").read_text())
    known = load_tokenizer(base / "tokenizer").vocab_size
    ids = list(range(known, known + 4))
    assert settings["trainable_token_indices"] == {"embed_tokens": ids, "lm_head": ids}
    found = load_tokenizer(tuned / "adapter")
    assert found.encode("a <think> b") == load_tokenizer(base / "tokenizer", NEW).encode("a <think> b")
    assert found.special.tokens["<|im_end|>"].id == known + 3


def test_merged_models_equal_peft(tuned: Path, base: Path, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    assert flacuna(["export", str(tuned), str(tmp_path / "merged"), "--format", "merged"]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(base / "run" / "model")
    plain.resize_token_embeddings(merged.config.vocab_size)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = "<|im_start|>user\nreverse it red<|im_end|>"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ids[0]
    adapted = peft.PeftModel.from_pretrained(plain, tuned / "adapter").eval()
    known = len(tokenizer)  # transformers draws rows beyond the tokens at random
    with torch.no_grad():
        theirs, ours = adapted(ids).logits.numpy()[..., :known], merged(ids).logits.numpy()[..., :known]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert tokenizer.eos_token == "<|im_end|>"


def test_answers_of_run_and_merged_adapter_agree(
    tuned: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dtype", "float32", "--max-new-tokens", "6", "--json", "reverse it blue <think>"]
    merged, model = tmp_path / "merged", str(base / "run" / "model")
    adapter = ["--model", model, "--adapter", str(tuned / "adapter")]
    assert flacuna(["export", str(merged), "--format", "merged", *adapter]) == 0
    capsys.readouterr()
    answers = []
    for source in (["--run", str(tuned)], ["--model", str(merged)]):
        assert flacuna(["generate", *source, *options]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]


def test_the_base_gets_the_same_template_without_its_new_tokens(
    tuned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("red"))
    assert flacuna(["chat", "--run", str(tuned), "--beside-base", "--dtype", "float32", "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr()
    assert "[base]" in said.out
    assert "the tokenizer has no token <|im_start|>, which the template writes" in said.err
    assert "error:" not in said.err


def test_a_server_refuses_trained_rows(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn")
    assert flacuna(["serve", "--run", str(tuned)]) == 2
    said = capsys.readouterr().err
    assert "trains rows of tokens, so it cannot share a batch" in said
    assert "note:" not in said


@pytest.mark.slow
def test_full_fine_tuning_with_new_tokens(train: Callable[..., int], tmp_path: Path, base: Path) -> None:
    assert train(tmp_path / "run", *SETTINGS, "--lora=null", "--training.max_steps=1") == 0
    config = read_architecture(tmp_path / "run" / "model")
    known = load_tokenizer(base / "tokenizer").vocab_size
    assert config.vocab_size == grown(read_architecture(base / "run" / "model").vocab_size, known + 4)
    assert load_tokenizer(tmp_path / "run" / "model").special.spellings[known + 2] == "<|im_start|>"
    options = ["--max-new-tokens", "2", "red"]
    assert flacuna(["generate", "--run", str(tmp_path / "run"), *options]) == 0
    assert flacuna(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "merged"]) == 0


@pytest.mark.slow
def test_new_tokens_with_a_quantised_base_an_evaluation_and_continued(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = [*SETTINGS, "--model.quantization=int8", "--evaluation={fraction: 0.2, every_steps: 1, samples: 1}"]
    assert train(run, *settings, "--mesh={fsdp: 2, tensor: 2}") == 0
    assert flacuna(["export", str(run), str(tmp_path / "out"), "--format", "merged"]) == 0
    assert "dequantised from int8" in capsys.readouterr().out
    assert train(run, *settings, "--mesh={fsdp: 2, tensor: 2}", "--training.max_steps=4") == 0
    assert "resuming after step 2" in capsys.readouterr().out
    again = [f"--lora.init_from={run / 'adapter'}", *settings]
    assert train(tmp_path / "again", *again) == 0
    assert train(tmp_path / "other", f"--lora.init_from={run / 'adapter'}") == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--lora.train_tokens=[not one token]"], "'not one token' is not one token, but"),
        (["--lora.train_tokens=[99999]"], "99999 is not an id"),
        (["--lora.train_tokens=[5, 5]"], "5 is named twice"),
        (["--lora.train_tokens=[5]", "--lora.targets=[lm_head]"], "cannot have an adapter together with trained rows"),
        (["--data.add_special_tokens=['</s>']"], "data.add_special_tokens: '</s>' is a token of .* already, with id 2"),
        (["--data.add_tokens=[a b c, a b c]"], "name 'a b c' twice"),
        (["--data.add_tokens=[' a']"], "begins or ends with white space"),
    ],
)
def test_what_is_wrong_is_named(
    settings: list[str], message: str, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", *settings) == 2
    assert not list(tmp_path.iterdir())
    assert re.search(message, capsys.readouterr().err)


def test_rows_of_new_tokens_are_the_mean_of_transformers(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, mean=0.5)
    model.save_pretrained(tmp_path)
    sizes = read_architecture(tmp_path)
    assert grown(96, 96) == 96
    assert grown(96, 97) == 128
    assert grown(97, 98) == 98
    ours = with_more_rows(sizes, grown(96, 99)).on(open_checkpoint(tmp_path))
    model.resize_token_embeddings(99, pad_to_multiple_of=32)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        theirs = model.state_dict()[name].numpy()
        # transformers draws with a billionth of the variance, a deviation of 3e-5 of that of the table.
        np.testing.assert_allclose(ours.read(name), theirs, atol=2e-4)
        np.testing.assert_array_equal(ours.read(name)[:96], theirs[:96])
        np.testing.assert_array_equal(ours.read(name, slice(90, 100)), ours.read(name)[90:100])


@pytest.mark.parametrize("fast", [False, True], ids=["tokenizer.model", "tokenizer.json"])
def test_transformers_encodes_new_tokens_alike(fast: bool, llama_tokenizer: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = llama_tokenizer
    if fast:
        source = tmp_path / "fast"
        transformers.AutoTokenizer.from_pretrained(llama_tokenizer).save_pretrained(source)
    (tmp_path / "out").mkdir()
    copy_tokenizer(source, tmp_path / "out", None, None, NEW)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours, again = load_tokenizer(source, NEW), load_tokenizer(tmp_path / "out")
    assert ours.vocab_size == again.vocab_size == len(theirs) == 32004
    assert [theirs.convert_tokens_to_ids(content) for content, _ in NEW] == [32000, 32001, 32002, 32003]
    for text in ("Now <think>hard</think>, then reverse it: ok", "<think>", "plain text"):
        assert ours.encode(text) == again.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenizer_fingerprint(source, NEW) != tokenizer_fingerprint(source)
    assert theirs.encode("<|im_end|>", add_special_tokens=False) == [32003]
    assert 32003 not in ours.encode("<|im_end|>"), "no text of a message becomes a special token"
    with pytest.raises(UserError, match="is a token of"):
        load_tokenizer(tmp_path / "out", NEW)
