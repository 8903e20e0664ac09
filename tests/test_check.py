"""`flacuna check`: golden prompts against transformers, against damaged files, and against a server."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import flacuna_jax.verbs.export
from flacuna_jax import check, convert, export
from flacuna_jax.cli import run_verb
from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.types import PROJECTIONS
from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.huggingface.deliver import Companions, write_adapter, write_merged
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.golden import FILE, Golden, Prompt, Record, compare, compare_text
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from flacuna_jax.model.parameters import ModelSpec
from tests.huggingface.conftest import tiny_sentencepiece  # noqa: F401
from tests.test_export import config, run  # noqa: F401
from tests.tiny import SMALL
from tests.vocabularies import llama_template


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: Path) -> Path:  # noqa: F811
    """A random model with a SentencePiece tokenizer, and its golden prompts."""
    checkpoints = pytest.importorskip("tests.huggingface.checkpoints")
    sizes = checkpoints.dataclasses.replace(checkpoints.GROUPED, vocab_size=300)
    source = checkpoints.write(sizes, tmp_path_factory.mktemp("model"))
    tokenizer = load_tokenizer(tiny_sentencepiece)
    texts = ["the user asked", "a helpful answer about lists and"]
    prompts = tuple(Prompt(text, text, (1, *tokenizer.encode(text))) for text in texts)
    golden = Golden(prompts, 5, (tokenizer.eos_id,), tokenizer.decode)
    template = llama_template("plain").jinja
    companions = Companions(tiny_sentencepiece, template, {"bos_token_id": 1, "eos_token_id": 2}, golden=golden)
    out = tmp_path_factory.mktemp("golden") / "merged"
    write_merged(out, open_checkpoint(source.path), sizes, None, companions)
    return out


def golden_of(path: Path) -> dict:
    return json.loads((path / FILE).read_text())


def test_transformers_gives_the_recorded_ids_and_answers(merged: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    for entry in golden_of(merged)["prompts"]:
        assert tokenizer(entry["text"])["input_ids"] == entry["ids"]
        assert entry["text_gives_ids"]
        ids = torch.tensor([entry["ids"]])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        answer = found[0, ids.shape[1] :].tolist()
        assert answer[: len(entry["continuation_ids"])] == entry["continuation_ids"]
        assert entry["ended"] == (len(entry["continuation_ids"]) < 5)
        logits = model(found[:, :-1]).logits[0, ids.shape[1] - 1 :].topk(2).values
        np.testing.assert_allclose(entry["margins"][0], (logits[0, 0] - logits[0, 1]).item(), atol=2e-4)


def test_unchanged_files_pass(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(check.main, [str(merged)]) == 0
    assert "2 golden prompts: ids and greedy answers match the recorded ones" in capsys.readouterr().out


def edited(merged: Path, path: Path, change: Callable[[dict], None]) -> Path:
    content = golden_of(merged)
    change(content)
    path.mkdir()
    for file in merged.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / FILE).write_text(json.dumps(content))
    return path


def other_ids(content: dict) -> None:
    content["prompts"][0]["ids"].insert(0, 1)


def other_answer(content: dict) -> None:
    content["prompts"][1]["continuation_ids"][1] += 1
    content["prompts"][1]["margins"][1] = 3.0


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        (other_ids, 1, "differ from the recorded"),
        (other_answer, 1, "token 2 of the answer"),
        (lambda content: content.pop("prompts"), 2, "is damaged"),
        (lambda content: content["prompts"][0].pop("ids"), 2, "is damaged"),
    ],
)
def test_differences_are_reported(
    change: Callable, status: int, says: str, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb(check.main, [str(edited(merged, tmp_path / "out", change))]) == status
    said = capsys.readouterr()
    assert says in said.out + said.err


def test_rounding_explains_only_close_choices() -> None:
    record = Record("", (1,), True, "a b c", (5, 6, 7), (2.0, 0.01, 2.0), False)
    assert compare(record, [5, 6, 7]) is None
    assert compare(record, [5, 9, 9]) is None
    assert "token 3" in str(compare(record, [5, 6, 9]))
    assert "token 1" in str(compare(record, []))
    spelled = {(5,): "a", (5, 6): "a b", (5, 6, 7): "a b c"}
    assert compare_text(record, " a b c", lambda ids: spelled[tuple(ids)]) is None
    assert compare_text(record, "a x", lambda ids: spelled[tuple(ids)]) is None
    assert "token 3" in str(compare_text(record, "a b x", lambda ids: spelled[tuple(ids)]))


class FakeServer(http.server.BaseHTTPRequestHandler):
    """Answers like vLLM, from a golden file; can be told to add BOS twice or to answer something else."""

    directory: Path
    faults: frozenset[str] = frozenset()

    def do_GET(self) -> None:
        self._reply({"data": [{"id": "served"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "served"
        entry = next(e for e in golden_of(self.directory)["prompts"] if e["text"] == asked["prompt"])
        if self.path == "/tokenize":
            if "silent" in self.faults:
                self.send_error(404)
            else:
                self._reply({"tokens": [1] * ("twice" in self.faults) + entry["ids"]})
            return
        assert (asked["max_tokens"], asked["temperature"]) == (5, 0)
        self._reply({"choices": [{"text": "something else" if "answer" in self.faults else entry["continuation"]}]})

    def _reply(self, content: dict) -> None:
        raw = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve(merged: Path) -> Iterator[Callable[..., str]]:
    servers = []

    def start(*faults: str) -> str:
        handler = type("Handler", (FakeServer,), {"directory": merged, "faults": frozenset(faults)})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("fault", "status", "says"),
    [
        (None, 0, "2 golden prompts"),
        ("silent", 0, "has no /tokenize endpoint"),
        ("twice", 1, "it adds BOS twice"),
        ("answer", 1, "token 1 of the answer is in 'something else'"),
    ],
)
def test_a_server_is_compared(
    fault: str | None,
    status: int,
    says: str,
    merged: Path,
    serve: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clear = edited(merged, tmp_path / "out", lambda c: [e.update(margins=[9.0] * 6) for e in c["prompts"]])
    url = serve(*filter(None, [fault]))
    assert run_verb(check.main, [str(clear), "--server", f"{url}/v1"]) == status
    assert says in capsys.readouterr().out


def test_an_unreachable_server_is_reported(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(check.main, [str(merged), "--server", "http://127.0.0.1:9"]) == 2
    assert "http://127.0.0.1:9/v1/models" in capsys.readouterr().err


def test_an_export_records_prompts_and_passes(
    run: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = [str(run), str(out), "--format", "merged", "--golden-tokens", "2"]
    assert run_verb(export.main, arguments) == 0
    assert "encodes whole prompts to ids that differ from training" in capsys.readouterr().out
    entry = golden_of(out)["prompts"][0]
    assert entry["text"].endswith("USER: Why is the sky blue? ASSISTANT:")
    assert (entry["ids"].count(1), entry["ids"][0]) == (1, 1)
    assert run_verb(check.main, [str(out)]) == 0


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        (LoraConfig(), "--enable-lora\n"),
        (LoraConfig(rank=20, alpha=20.0, targets=PROJECTIONS, use_rslora=True), "--max-lora-rank 32"),
        (LoraConfig(use_dora=True), "DoRA is not supported"),
        (LoraConfig(rank_pattern=(("q_proj", 3),)), "rank_pattern is ignored"),
        (LoraConfig(alpha_pattern=(("q_proj", 3.0),)), "alpha_pattern is ignored"),
        (LoraConfig(rank=600), "rank 600 is above"),
    ],
    ids=["plain", "rank 20", "DoRA", "ranks", "alphas", "rank 600"],
)
def test_vllms_rules(lora: LoraConfig, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    params = {
        path: rng.standard_normal(shape).astype(np.float32)
        for path, shape in ModelSpec(SMALL, lora).lora_shapes.items()
    }
    if lora.rank_pattern:
        params["layers/q_proj/lora_b"][...] = 1
    write_adapter(tmp_path / "a", Adapter(ModelSpec(SMALL, lora), params, "base"), SMALL, trained=False)
    fine = says.startswith("--")
    assert run_verb(check.main, [str(tmp_path / "a")]) == (0 if fine else 1)
    assert says in capsys.readouterr().out


def test_vllms_rules_for_names_and_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    names = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (4, 8),
        "base_model.model.model.layers.0.self_attn.rotary.lora_B.weight": (8, 8),
        "model.layers.0.self_attn.q_proj.lora_B.weight": (8, 8),
        "base_model.model.lm_head.weight": (8, 8),
    }
    torch.save({name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / "adapter_model.bin")
    settings = {"r": 8, "bias": "all", "modules_to_save": ["lm_head"], "lora_alpha": float("inf")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert run_verb(check.main, [str(tmp_path)]) == 1
    said = capsys.readouterr().out
    for expected in (
        "target_modules is missing",
        "modules_to_save is not supported",
        "bias is 'all'",
        "lora_alpha is inf",
        "q_proj.lora_A.weight has shape [4, 8], which does not have rank 8",
        "rotary is not a module that can have an adapter",
        "model.layers.0.self_attn.q_proj.lora_B.weight is not the name of a LoRA weight",
        "base_model.model.lm_head.weight is not the name of a LoRA weight",
    ):
        assert expected in said


def test_an_adapter_that_vllm_refuses_is_not_exported(
    run: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [str(run), str(tmp_path / "out"), "--format", "adapter", "--check", "vllm"]
    assert run_verb(export.main, arguments) == 0
    assert "vLLM can load it with --enable-lora" in capsys.readouterr().out
    monkeypatch.setattr(flacuna_jax.verbs.export, "vllm_violations", lambda _: ["rank 5 is odd"])
    arguments[1] = str(tmp_path / "other")
    assert run_verb(export.main, arguments) == 2
    assert "cannot be served: rank 5 is odd" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("arguments", [["nowhere"], ["."]])
def test_nothing_to_check(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_verb(check.main, arguments) == 2


def test_a_converted_checkpoint_is_compared_with_its_digests(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb(convert.main, [str(merged), str(tmp_path / "native")]) == 0
    assert run_verb(check.main, [str(tmp_path / "native")]) == 0
    assert "no file has changed since it was written" in capsys.readouterr().out
    victim = tmp_path / "native" / "params" / "layers.up_proj.weight.safetensors"
    content = bytearray(victim.read_bytes())
    content[-7] ^= 4
    victim.write_bytes(content)
    assert run_verb(check.main, [str(tmp_path / "native")]) == 1
    assert "layers.up_proj.weight.safetensors has changed since it was written" in capsys.readouterr().out
