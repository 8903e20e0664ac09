"""Checkpoints in stacked, sharded arrays: exact, complete, and each device reads only its part."""

import copy
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from flacuna_jax.config.run import MeshConfig
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import load as load_module
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.load import fingerprint, load_base, match_tensors
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec, base_parameters
from flacuna_jax.model.sharding import make_mesh, parameter_shardings
from tests.huggingface.checkpoints import GROUPED, SMALL, Written, save, write
from tests.torch_models import from_torch, torch

MESHES = {"one": MeshConfig(), "fsdp": MeshConfig(fsdp=4), "fsdp × tensor": MeshConfig(fsdp=2, tensor=2)}


def load(path: Path, config: LlamaConfig, mesh: MeshConfig = MESHES["one"], dtype: str = "float32") -> dict:
    return load_base(path, config, parameter_shardings(base_parameters(config), make_mesh(mesh)), dtype)


@pytest.mark.parametrize("stacked_on_host", [0, load_module.STACKED_ON_HOST])
@pytest.mark.parametrize("mesh", MESHES)
def test_arrays_equal_those_of_transformers_and_have_the_right_shardings(
    mesh: str, stacked_on_host: int, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "STACKED_ON_HOST", stacked_on_host)
    params = load(written.path, written.config, MESHES[mesh])
    expected = from_torch(written.model, written.config)
    shardings = parameter_shardings(base_parameters(written.config), make_mesh(MESHES[mesh]))
    assert params.keys() == expected.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(expected[path]), err_msg=path)
        assert value.sharding.is_equivalent_to(shardings[path], value.ndim), path


@pytest.mark.parametrize("layout", ["safetensors sharded", "bin", "bin sharded", "bin old"])
def test_every_layout_gives_the_same_arrays(layout: str, plain: Written, tmp_path: Path) -> None:
    save(plain.model, tmp_path, layout)
    ours, theirs = load(tmp_path, SMALL, dtype="float16"), load(plain.path, SMALL, dtype="float16")
    for path in theirs:
        np.testing.assert_array_equal(np.asarray(ours[path]), np.asarray(theirs[path]), err_msg=path)
    assert fingerprint(open_checkpoint(tmp_path), SMALL) == fingerprint(open_checkpoint(plain.path), SMALL)


@pytest.mark.parametrize(
    ("stored", "wanted"), [("float16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_casts_round_once_as_torch_does(stored: str, wanted: str, plain: Written, tmp_path: Path) -> None:
    model = copy.deepcopy(plain.model).to(getattr(torch, stored))
    save(model, tmp_path, "safetensors")
    ours = load(tmp_path, SMALL, dtype=wanted)["layers/q_proj/weight"]
    theirs = model.model.layers[1].self_attn.q_proj.weight.to(getattr(torch, wanted)).float().detach().numpy()
    assert ours.dtype == wanted
    np.testing.assert_array_equal(np.asarray(ours[1]).astype(np.float32), theirs)


@pytest.mark.parametrize("mesh", MESHES)
def test_logits_from_disk_equal_transformers(mesh: str, written: Written) -> None:
    mesh = make_mesh(MESHES[mesh])
    params = load_base(
        written.path, written.config, parameter_shardings(base_parameters(written.config), mesh), "float32"
    )
    tokens = np.arange(2 * 9).reshape(2, 9) * 5 % written.config.vocab_size
    with jax.set_mesh(mesh):
        model = ModelSpec(written.config, None, "float32", "float32").merge(params)
        mask = make_packed_mask(jax.numpy.ones((2, 9), jax.numpy.int32))
        ours = model.logits(model(jax.numpy.asarray(tokens), jax.numpy.tile(jax.numpy.arange(9), (2, 1)), mask))
    theirs = written.model(torch.tensor(tokens)).logits.detach().numpy()
    # Both sides compute in float32 with different summation orders; logits are O(1).
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-4)


def test_absurd_layer_counts_are_an_error_at_once(plain: Written) -> None:
    many = dataclasses.replace(SMALL, num_layers=10**9)
    with pytest.raises(UserError, match=r"config\.json has 1000000000 layers, but there are \d+ tensors"):
        match_tensors(open_checkpoint(plain.path), many)


def test_a_trained_model_tied_under_the_heads_name(story_llama: Path) -> None:
    config = read_architecture(story_llama)
    params = load(story_llama, config)
    for name, index, value in json.loads((story_llama / "known_values.json").read_text())["values"]:
        path = "embed_tokens/weight" if name == "lm_head.weight" else name.replace("model.", "").replace(".", "/")
        if "layers/" in path:
            _, layer, *inner = path.split("/")
            array = params[f"layers/{'/'.join(inner[-2:])}"][int(layer)]
        else:
            array = params[path]
        # Values are stated with 8 digits.
        assert np.asarray(array).ravel()[index] == pytest.approx(value, abs=1e-6), name


def test_rotary_frequencies_of_old_checkpoints_are_ignored(plain: Written, tmp_path: Path) -> None:
    state = dict(plain.model.state_dict())
    for layer in range(SMALL.num_layers):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.arange(6).float()
    (tmp_path / "config.json").write_bytes((plain.path / "config.json").read_bytes())
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert load(tmp_path, SMALL).keys() == ModelSpec(SMALL).base_shapes.keys()


def rewrite(source: Written, path: Path, **changes: "torch.Tensor | None") -> None:
    state = {name: tensor.clone() for name, tensor in source.model.state_dict().items()} | changes
    (path / "config.json").write_bytes((source.path / "config.json").read_bytes())
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path / "pytorch_model.bin")


def test_missing_and_unexpected_tensors_are_both_listed(plain: Written, tmp_path: Path) -> None:
    rewrite(
        plain,
        tmp_path,
        **{
            "model.layers.1.mlp.up_proj.weight": None,
            "model.norm.weight": None,
            "model.layers.3.mlp.up_proj.weight": torch.zeros(2),
            "model.layers.0.self_attn.q_proj.bias": torch.zeros(2),
        },
    )
    with pytest.raises(UserError) as raised:
        load(tmp_path, SMALL)
    message = str(raised.value)
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "2 not in the model: model.layers.0.self_attn.q_proj.bias, model.layers.3.mlp" in message


def test_a_missing_head_hints_at_tied_embeddings(plain: Written, tmp_path: Path) -> None:
    rewrite(plain, tmp_path, **{"lm_head.weight": None})
    with pytest.raises(UserError, match="tie_word_embeddings: true"):
        load(tmp_path, SMALL)


def test_wrong_shapes_are_named_with_the_right_ones(plain: Written, tmp_path: Path) -> None:
    down = plain.model.model.layers[2].mlp.down_proj.weight.detach()
    rewrite(plain, tmp_path, **{"model.layers.2.mlp.down_proj.weight": down.t(), "lm_head.weight": torch.zeros(98, 48)})
    with pytest.raises(UserError) as raised:
        load(tmp_path, SMALL)
    assert "model.layers.2.mlp.down_proj.weight has shape [112, 48], but config.json gives [48, 112]" in str(
        raised.value
    )
    assert "lm_head.weight has shape [98, 48], but config.json gives [97, 48]" in str(raised.value)


def test_quantised_weights_are_an_error(plain: Written, tmp_path: Path) -> None:
    rewrite(plain, tmp_path, **{"model.norm.weight": torch.ones(48, dtype=torch.int8)})
    with pytest.raises(UserError, match=r"model\.norm\.weight has dtype int8"):
        load(tmp_path, SMALL)


def test_a_tied_model_with_a_different_head_is_an_error(tmp_path: Path) -> None:
    source = write(GROUPED, tmp_path / "untied")
    config = json.loads((source.path / "config.json").read_text())
    (source.path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(UserError, match="differ; set it to false"):
        load(source.path, read_architecture(source.path))
    embedding = source.model.model.embed_tokens.weight.detach()
    rewrite(source, tmp_path, **{"lm_head.weight": embedding.clone()})
    tied = read_architecture(tmp_path)
    np.testing.assert_array_equal(np.asarray(load(tmp_path, tied)["embed_tokens/weight"]), embedding.numpy())


def test_the_fingerprint_depends_on_weights_sizes_and_theta(plain: Written, tmp_path: Path) -> None:
    reader = open_checkpoint(plain.path)
    original = fingerprint(reader, SMALL)
    norm = plain.model.model.norm.weight.detach() + 1
    rewrite(plain, tmp_path, **{"model.norm.weight": norm})
    assert fingerprint(open_checkpoint(tmp_path), SMALL) != original
    assert fingerprint(reader, dataclasses.replace(SMALL, rope_theta=5e5)) != original
