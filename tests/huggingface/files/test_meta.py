"""Meta's original files give, bit for bit, the model that they were split from."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flacuna_jax import convert
from flacuna_jax.cli import run_verb
from flacuna_jax.config.run import MeshConfig
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.deliver import Companions, write_merged
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.load import load_base
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import base_parameters
from flacuna_jax.model.sharding import make_mesh, parameter_shardings
from tests.huggingface.meta_checkpoints import write_meta
from tests.tiny import SMALL
from tests.torch_models import torch, torch_llama, transformers


@dataclasses.dataclass(frozen=True)
class Case:
    config: LlamaConfig
    params: dict
    ranks: int = 1
    embedding_axis: int = 1
    dtype: str = "float16"


ONE = dataclasses.replace(SMALL, vocab_size=300, intermediate_size=128)
TWO = dataclasses.replace(ONE, num_kv_heads=2, intermediate_size=176, rms_norm_eps=1e-5, max_position_embeddings=4096)
THREE = dataclasses.replace(TWO, rope_theta=500_000.0, max_position_embeddings=8192)
FACTOR = {"multiple_of": 16, "norm_eps": 1e-5, "n_kv_heads": 2, "ffn_dim_multiplier": 1.3}
CASES = {
    "LLaMA 1 in one file": Case(ONE, {"multiple_of": 16, "norm_eps": 1e-6}),
    "LLaMA 1 in four": Case(ONE, {"multiple_of": 16, "norm_eps": 1e-6}, ranks=4),
    "LLaMA 2, grouped": Case(TWO, FACTOR, ranks=2),
    "LLaMA 3": Case(THREE, {**FACTOR, "rope_theta": 500000.0}, ranks=2, embedding_axis=0, dtype="bfloat16"),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def model_of(case: Case) -> transformers.LlamaForCausalLM:
    return torch_llama(case.config).to(getattr(torch, case.dtype))


def write_case(case: Case, path: Path) -> transformers.LlamaForCausalLM:
    model = model_of(case)
    write_meta(model, path, case.params, ranks=case.ranks, embedding_axis=case.embedding_axis)
    return model


def test_tensors_are_bit_identical_and_sizes_follow(case: Case, tmp_path: Path) -> None:
    model = write_case(case, tmp_path)
    assert read_architecture(tmp_path) == case.config
    reader = open_checkpoint(tmp_path)
    state = model.state_dict()
    assert set(reader) == set(state)
    for name, tensor in state.items():
        expected = tensor.float().numpy()
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name).name == case.dtype
        np.testing.assert_array_equal(reader.read(name).astype(np.float32), expected, err_msg=name)
        np.testing.assert_array_equal(reader.read(name, slice(5, 37)).astype(np.float32), expected[5:37], err_msg=name)


def test_it_converts_loads_and_exports_as_a_transformers_model(
    case: Case, tiny_sentencepiece: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_case(case, tmp_path / "family" / "7B")
    shutil.copy(tiny_sentencepiece / "tokenizer.model", tmp_path / "family")
    assert run_verb(convert.main, [str(tmp_path / "family" / "7B"), str(tmp_path / "native")]) == 0
    assert (tmp_path / "native" / "tokenizer.model").is_file()
    assert read_architecture(tmp_path / "native") == case.config
    native = open_checkpoint(tmp_path / "native")
    token_ids = {"bos_token_id": 1, "eos_token_id": 2}
    companions = Companions(tmp_path / "native", None, token_ids)
    write_merged(tmp_path / "out", native, case.config, None, companions)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert again.config.eos_token_id == 2

    shardings = parameter_shardings(base_parameters(case.config), make_mesh(MeshConfig(fsdp=2, tensor=2)))
    direct = load_base(str(tmp_path / "family" / "7B"), case.config, shardings, "float32")
    converted = load_base(str(tmp_path / "native"), case.config, shardings, "float32")
    assert all(np.array_equal(np.asarray(direct[path]), np.asarray(converted[path])) for path in converted)


def edit(path: Path, **changes: object) -> None:
    params = json.loads((path / "params.json").read_text()) | changes
    (path / "params.json").write_text(json.dumps({key: value for key, value in params.items() if value is not None}))


def save_changed(path: Path, rank: int, change: Callable[[dict], None]) -> None:
    file = path / f"consolidated.{rank:02}.pth"
    state = torch.load(file)
    change(state)
    torch.save(state, file)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: (path / "consolidated.00.pth").unlink(), r"consolidated\.00\.pth is missing"),
        (lambda path: (path / "consolidated.01.pth").unlink(), "have 24 of the 48 columns of layers.0.attention.wo"),
        (lambda path: (path / "params.json").unlink(), r"Meta's files are params\.json and consolidated"),
        (lambda path: (path / "params.json").write_text("{"), "not valid JSON"),
        (lambda path: edit(path, n_layers=None), "n_layers is None"),
        (lambda path: edit(path, dim=50), "cannot be divided into 4 heads"),
        (lambda path: edit(path, norm_eps="small"), "norm_eps is 'small'"),
        (lambda path: edit(path, use_scaled_rope=True), "use_scaled_rope is set"),
        (lambda path: edit(path, n_layers=2), "not in the model"),
        (lambda path: edit(path, multiple_of=256), r"gate_proj\.weight has shape \[128, 48\]"),
        (lambda path: save_changed(path, 1, lambda s: s.pop("output.weight")), "do not have the same tensors: output"),
        (lambda path: save_changed(path, 1, lambda s: s["norm.weight"].add_(1)), "norm.weight differs between"),
        (lambda path: save_changed(path, 1, lambda s: s.update({"norm.weight": s["norm.weight"].float()})), "dtype"),
        (
            lambda path: [save_changed(path, rank, lambda s: s.update(x=torch.ones(2))) for rank in (0, 1)],
            "x does not belong to a LLaMA",
        ),
        (
            lambda path: save_changed(path, 1, lambda s: s.update({"layers.1.attention.wo.weight": torch.ones(9, 9)})),
            "dtype|do not fit",
        ),
        (
            lambda path: (path / "consolidated.01.pth").write_bytes((path / "consolidated.01.pth").read_bytes()[:-900]),
            r"consolidated\.01\.pth is torn",
        ),
    ],
)
def test_faults_are_named(damage: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    write_case(Case(ONE, {"multiple_of": 16, "norm_eps": 1e-6}, ranks=2), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=says):
        load_base(
            str(tmp_path),
            read_architecture(tmp_path) if (tmp_path / "params.json").is_file() else ONE,
            parameter_shardings(base_parameters(ONE), make_mesh(MeshConfig())),
            "float32",
        )
