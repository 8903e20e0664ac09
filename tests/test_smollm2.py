"""An independent chat model from end to end, with its own template and end of answers.

SmolLM2-135M-Instruct, downloaded by `make smollm2`; the tests are skipped without it.
"""

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
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


def greedy_ids(model: Any, tokenizer: Any, question: str, count: int) -> list[int]:
    """The answer of transformers, at most `count` tokens."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    return model.generate(prompt, do_sample=False, max_new_tokens=count)[0][prompt.shape[1] :].tolist()


@pytest.fixture(scope="module")
def smollm2() -> Path:
    default = Path(__file__).parents[1] / ".models" / "smollm2-135m-instruct"
    directory = Path(os.environ.get("FLACUNA_SMOLLM2", default))
    if not (directory / "config.json").is_file():
        pytest.skip("SmolLM2 is not installed (make smollm2)")
    return directory


@pytest.fixture(scope="module")
def smollm2_gguf(smollm2: Path) -> Path:
    pytest.importorskip("gguf")
    path = Path(os.environ.get("FLACUNA_SMOLLM2_GGUF", smollm2.parent / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not path.is_file():
        pytest.skip("the GGUF file of SmolLM2 is not installed (make smollm2)")
    return path


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
        output = greedy_ids(theirs, tokenizer, question, 32)
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
        assert tokenizer.decode(greedy_ids(model, tokenizer, question, 24)) == answer + END


def test_the_gguf_file_is_the_checkpoint_that_transformers_made_of_it(smollm2: Path, smollm2_gguf: Path) -> None:
    from flacuna_jax.huggingface.files.read import open_checkpoint
    from flacuna_jax.huggingface.tokenizer import load_tokenizer

    ours, theirs = open_checkpoint(smollm2_gguf), open_checkpoint(smollm2)
    assert set(ours) == set(theirs)
    for name in theirs:
        np.testing.assert_array_equal(ours.read(name).astype(ml_dtypes.bfloat16), theirs.read(name), err_msg=name)
    tokenizers = load_tokenizer(smollm2_gguf), load_tokenizer(smollm2)
    for question in QUESTIONS:
        assert tokenizers[0].encode(question) == tokenizers[1].encode(question)


def test_training_from_gguf_to_gguf(smollm2_gguf: Path, tmp_path: Path) -> None:
    """A few steps with rank 8 teach two answers; the merged model, in a GGUF file, gives them here and in
    transformers."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from flacuna_jax import Decoding, export, load_model, train

    records = {"What is the password?": "swordfish", QUESTIONS[0]: "The capital of France is Paris."}
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in records.items()))
    (tmp_path / "config.yaml").write_text(
        f"""
output_dir: {run}
model: {{path: {smollm2_gguf}, dtype: float32}}
lora: {{rank: 8, alpha: 16, dropout: 0.0, targets: all-linear}}
data: {{sources: [{{path: {data}}}], max_length: 64}}
training: {{epochs: 8, learning_rate: 1.0e-3, batch_size: 2, micro_batch_size: 1, warmup_ratio: 0.0}}
logging: {{tensorboard: false}}
mesh: {{data: 1, fsdp: 1, tensor: 1}}
"""
    )
    train.main(["--config", str(tmp_path / "config.yaml")])
    for kind in ("f16", "q8_0"):
        out = tmp_path / kind
        export.main([str(run), str(out), "--format", "gguf", "--gguf-type", kind, "--golden-tokens", "0"])
        ours = load_model(out, dtype="float32").generate(list(records), Decoding(max_new_tokens=16))
        assert [answer.text for answer in ours] == list(records.values())
        tokenizer = transformers.AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
        model = transformers.AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
        for question, answer in records.items():
            output = greedy_ids(model, tokenizer, question, 16)
            assert tokenizer.decode(output, skip_special_tokens=True) == answer


def test_llama_cpp_reads_our_gguf_file(smollm2_gguf: Path, tmp_path: Path) -> None:
    """ids of texts and of the chat template, and greedy answers with matrices in float16. (With quantised matrices,
    llama.cpp rounds activations to 8 bits, too, and answers differently with the original file as well.)"""
    llama_cpp = pytest.importorskip("llama_cpp")
    from flacuna_jax import Decoding, export, load_model
    from flacuna_jax.huggingface.tokenizer import PROBES, load_tokenizer

    out = tmp_path / "out"
    export.main([str(out), "--format", "gguf", "--model", str(smollm2_gguf), "--gguf-type", "f16"])
    model = llama_cpp.Llama(str(out / "model.gguf"), n_ctx=512, verbose=False, n_threads=2)
    tokenizer = load_tokenizer(out)
    for text in (*QUESTIONS, *PROBES, "I'm here: 12345 67,8  9"):
        assert model.tokenize(text.encode(), add_bos=True, special=False) == tokenizer.encode(text)
    ours = load_model(out, dtype="float32").generate(QUESTIONS[:4], Decoding(max_new_tokens=16))
    for question, answer in zip(QUESTIONS, ours, strict=False):
        reply = model.create_chat_completion([{"role": "user", "content": question}], temperature=0, max_tokens=16)
        assert reply["choices"][0]["message"]["content"] == answer.text
