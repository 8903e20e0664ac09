"""An independent chat model from end to end, with its own template and end of answers.

SmolLM2-135M-Instruct, downloaded by `make smollm2`; the tests are skipped without it.
"""

import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue?",
    "Write one sentence about rain.",
    "How many legs does a spider have?",
    "What is 2 + 3?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "Give me a word that rhymes with cat.",
    "Is water wet? Answer yes or no.",
    "List two fruits.",
    "Describe the sea in three words.",
)
END = "<|im_end|>"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    default = Path(__file__).parents[1] / ".models" / "smollm2-135m-instruct"
    directory = Path(os.environ.get("FLACUNA_SMOLLM2", default))
    if not (directory / "config.json").is_file():
        pytest.skip("SmolLM2 is not installed (make smollm2)")
    return directory


def test_greedy_answers_equal_those_of_transformers(smollm2: Path) -> None:
    """With the checkpoint's own template, without options, in float32."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from flacuna_jax import Decoding, load_model

    said: list[str] = []
    model = load_model(smollm2, dtype="float32", say=said.append)
    assert said == [f"template: the checkpoint's own ({smollm2 / 'chat_template.jinja'})"]
    ours = model.generate(QUESTIONS, Decoding(max_new_tokens=32))
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for question, answer in zip(QUESTIONS, ours, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        with torch.no_grad():
            output = theirs.generate(prompt, do_sample=False, max_new_tokens=32)[0][prompt.shape[1] :].tolist()
        ended = bool(output) and output[-1] == tokenizer.convert_tokens_to_ids(END)
        assert answer.text == tokenizer.decode(output, skip_special_tokens=True)
        assert answer.finish == ("eos" if ended else "length")


def test_a_trained_and_merged_model_stops_at_its_own_marker(smollm2: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from flacuna_jax import export, train

    records = [("What is the password?", "swordfish"), ("Who are you?", "I am a small llama."), ("Say hi.", "Hi!")]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in records))
    run, merged = tmp_path / "run", tmp_path / "merged"
    (tmp_path / "config.yaml").write_text(
        f"""
output_dir: {run}
model: {{path: {smollm2}, dtype: float32}}
lora: {{rank: 8, alpha: 16, dropout: 0.0, targets: all-linear}}
data: {{sources: [{{path: {data}}}], max_length: 128}}
training: {{epochs: 30, learning_rate: 1.0e-3, batch_size: 3, micro_batch_size: 1}}
logging: {{tensorboard: false}}
mesh: {{data: 1, fsdp: 1, tensor: 1}}
"""
    )
    train.main(["--config", str(tmp_path / "config.yaml")])
    assert "template: checkpoint" in (run / "config.yaml").read_text()
    export.main([str(run), str(merged), "--format", "merged"])
    golden = json.loads((merged / "golden_prompts.json").read_text())["prompts"]
    assert all(prompt["text_gives_ids"] and prompt["message_gives_ids"] for prompt in golden)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    model = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    for question, answer in records:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.no_grad():
            output = model.generate(prompt, do_sample=False, max_new_tokens=24)[0][prompt.shape[1] :].tolist()
        assert tokenizer.decode(output) == answer + END
