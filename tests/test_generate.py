"""`flacuna generate` from the command line: models, runs, templates, and errors."""

import io
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import flacuna_jax.verbs.generate
from flacuna_jax import chat, generate
from flacuna_jax.cli import run_verb
from flacuna_jax.config.files import parse_config
from flacuna_jax.config.model import LoraConfig
from flacuna_jax.data.layouts import system_text
from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.deliver import write_adapter
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from flacuna_jax.model.parameters import ModelSpec
from tests.vocabularies import llama_template

LORA = LoraConfig(rank=2, alpha=4.0)
STORY = "Once upon a time, there was a"
# bfloat16 rounding can change near-ties; these tests compare texts, so they compute in float32.
PRECISE = ["--dtype", "float32", "--max-new-tokens", "12"]


@pytest.fixture
def run(story_llama: Path, tmp_path: Path) -> Path:
    """A finished run: its config and an adapter that changes the base's answers."""
    path = tmp_path / "run"
    path.mkdir()
    config = read_architecture(story_llama)
    tree = {
        "output_dir": str(path),
        "model": {"path": str(story_llama)},
        "lora": LORA.model_dump(mode="json"),
        "data": {"sources": [{"path": "data.json"}], "template": "vicuna_v0"},
    }
    (path / "config.yaml").write_text(parse_config(tree).to_yaml())
    rng = np.random.default_rng(0)
    params = {
        p: rng.standard_normal(s).astype(np.float32) * 0.2 for p, s in ModelSpec(config, LORA).lora_shapes.items()
    }
    write_adapter(path / "adapter", Adapter(ModelSpec(config, LORA), params, str(story_llama)), config, trained=True)
    return path


def _say(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert run_verb(generate.main, list(arguments)) == 0
    return capsys.readouterr().out.splitlines()


def test_answers_equal_those_of_transformers(
    story_llama: Path, capsys: pytest.CaptureFixture[str], torch: ModuleType, transformers: ModuleType
) -> None:
    """From text to text, with and without the template."""
    tokenizer = load_tokenizer(story_llama)
    reference = transformers.LlamaForCausalLM.from_pretrained(story_llama, dtype=torch.float32)

    def expected(text: str) -> str:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
        mask = torch.ones_like(ids)
        new = reference.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        return tokenizer.decode(new[0, ids.shape[1] :].tolist())

    model = ["--model", str(story_llama), *PRECISE]
    assert _say(capsys, *model, "--raw", STORY) == [expected(STORY)]
    prompt = f"{system_text('vicuna_v1.1')} USER: {STORY} ASSISTANT:"
    assert "\n".join(_say(capsys, *model, STORY)) == expected(prompt)


def test_a_run_provides_base_adapter_and_template(
    run: Path, story_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spelled_out = ["--model", str(story_llama), "--adapter", str(run), "--template", "vicuna_v0"]
    tuned = _say(capsys, "--run", str(run), *PRECISE, STORY)
    assert tuned == _say(capsys, *spelled_out, *PRECISE, STORY)
    assert tuned != _say(capsys, "--model", str(story_llama), "--template", "vicuna_v0", *PRECISE, STORY)
    assert tuned != _say(capsys, "--run", str(run), "--template", "vicuna_v1.1", *PRECISE, STORY)


def test_an_adapter_outside_of_its_run(
    run: Path, story_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unrelated config.yaml in its parent directory is ignored."""
    (run / "adapter").rename(tmp_path / "mine")
    (tmp_path / "config.yaml").write_text("services: [web]")
    assert _say(capsys, "--model", str(story_llama), "--adapter", str(tmp_path / "mine"), *PRECISE, STORY)


def test_chat_accepts_a_run_like_generate(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = _say(capsys, "--run", str(run), *PRECISE, STORY)
    monkeypatch.setattr("sys.stdin", io.StringIO(STORY))
    assert run_verb(chat.main, ["--run", str(run), *PRECISE]) == 0
    assert capsys.readouterr().out.splitlines() == answer


def test_prompts_from_a_file_and_answers_as_json(
    story_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["Lily saw a", STORY]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    options = ["--model", str(story_llama), "--raw", "--json", *PRECISE]
    records = [json.loads(line) for line in _say(capsys, *options, "--file", str(tmp_path / "prompts.txt"))]
    assert [record["prompt"] for record in records] == prompts
    assert records == [json.loads(line) for line in _say(capsys, *options, *prompts)]
    assert all(record["tokens"] == 12 and record["finish"] == "length" for record in records)
    for stdin in (["--file", "-"], []):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(prompts)))
        assert records == [json.loads(line) for line in _say(capsys, *options, *stdin)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    assert records == [json.loads(line) for line in _say(capsys, *options, "--file", str(tmp_path / "prompts.jsonl"))]


def test_a_task_uses_the_prompt_of_the_paper(story_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(story_llama), *PRECISE]
    worded = _say(capsys, *options, "Write a story.\n\nAbout Lily\nOutput:")
    assert _say(capsys, *options, "--task", "Write a story", "About Lily") == worded
    assert _say(capsys, *options, "About Lily") != worded


def test_a_template_file_system_text_and_stops(
    story_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.jinja").write_text(llama_template("vicuna_v1.1").jinja)
    system = system_text("vicuna_v1.1")

    def say(*arguments: str) -> str:
        return "\n".join(_say(capsys, "--model", str(story_llama), *PRECISE, *arguments))

    answer = say(STORY)
    assert say("--system", system, STORY) == answer
    assert say("--raw", f"{system} USER: {STORY} ASSISTANT:") == answer
    assert say("--template", str(tmp_path / "mine.jinja"), STORY) == answer  # the file contains the system text
    assert say("--system", "Be brief.", STORY) != answer
    stop = answer[4:7]
    assert say("--stop", stop, STORY) == answer[: answer.index(stop)]


def test_equal_prompts_get_different_samples(story_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(story_llama), "--raw", *PRECISE, "--temperature", "1"]
    assert len(set(_say(capsys, *options, STORY, STORY, STORY))) > 1


def test_sampling_is_a_function_of_the_seed(story_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(story_llama), "--raw", *PRECISE, "--temperature", "1", "--top-k", "50", "--top-p", "0.95"]
    first, again, other = (_say(capsys, *options, "--seed", seed, STORY) for seed in ("1", "1", "2"))
    assert first == again != other


def test_the_number_of_answers_printed_together_does_not_change_them(
    story_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model", str(story_llama), "--raw", *PRECISE, "--temperature", "1", "--batch-size", "2", *[STORY] * 5]
    together = _say(capsys, *options)
    monkeypatch.setattr(flacuna_jax.verbs.generate, "PRINTED_TOGETHER", 1)
    assert _say(capsys, *options) == together


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "MODEL"], "standard input cannot be read"),
        (["--model", "MODEL", "--file", "x.txt", "hello"], "give prompts"),
        (["--model", "MODEL", "--file", "absent.txt"], "prompt file absent.txt cannot be read"),
        (["hello"], "give the model"),
        (["--model", "MODEL", "--run", "RUN", "hello"], "give the model"),
        (["--run", "absent", "hello"], "absent has no config.yaml"),
        (["--model", "absent", "hello"], "absent"),
        (["--model", "MODEL", "--template", "vicunia", "hello"], "'vicunia' is not one of"),
        (["--model", "MODEL", "--template", "none.jinja", "hello"], "none.jinja: the template cannot be read"),
        (["--model", "MODEL", "--temperature", "-1", "hello"], "temperature is -1.0"),
        (["--model", "MODEL", "--temperature", "nan", "hello"], "temperature is nan"),
        (["--model", "MODEL", "--temperature", "1e-300", "hello"], "temperature is 1e-300; use 0 for greedy"),
        (["--model", "MODEL", "--stop", "", "hello"], "--stop is empty"),
        (["--model", "MODEL", "caf\udce9"], "is not UTF-8 text"),
        (["--model", "MODEL", "--max-new-tokens", "0", "hello"], "--max-new-tokens"),
        (["--model", "MODEL", "--max-new-tokens", "600", "hello"], "exceeds the model's context of 512"),
    ],
)
def test_mistakes_get_one_message(
    arguments: list[str], message: str, story_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(story_llama) if argument == "MODEL" else argument for argument in arguments]
    assert run_verb(generate.main, arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_prompt_files_with_a_byte_order_mark_or_without_a_final_newline(
    story_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + STORY.encode() + b"\r\n")
    options = ["--model", str(story_llama), "--raw", "--json", *PRECISE]
    assert json.loads(_say(capsys, *options, "--file", str(tmp_path / "marked.txt"))[0])["prompt"] == STORY
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    assert run_verb(generate.main, [*options, "--file", str(tmp_path / "deep.jsonl")]) == 2
    assert "deep.jsonl, line 1: a line must be an object" in capsys.readouterr().err


def test_an_unfinished_run_is_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "adapter").rename(run / "elsewhere")
    assert run_verb(generate.main, ["--run", str(run), "hello"]) == 2
    assert "has no adapter/ yet" in capsys.readouterr().err
