"""Deltas against an in-memory addition by torch, bit for bit."""

import copy
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from flacuna_jax import convert
from flacuna_jax.cli import run_verb
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.files.delta import DeltaReader
from flacuna_jax.huggingface.files.read import open_checkpoint
from tests.huggingface.checkpoints import SMALL, save
from tests.torch_models import torch, torch_llama, transformers

LLAMA = dataclasses.replace(SMALL, vocab_size=300)


def half_of_any_size(model: transformers.LlamaForCausalLM, seed: int) -> transformers.LlamaForCausalLM:
    """Weights over the whole range of half precision, including subnormals, where rounding differences would show."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).half()
    with torch.no_grad():
        for parameter in model.parameters():
            exponent = torch.randint(-26, 4, parameter.shape, generator=generator)
            parameter.copy_(torch.ldexp(torch.randn(parameter.shape, generator=generator), exponent).half())
    return model


def publish(model: transformers.LlamaForCausalLM, base: transformers.LlamaForCausalLM, path: Path, layout: str) -> None:
    """Computes a delta like FastChat's make_delta: target minus base in half precision, with zeros for new rows of the
    base."""
    delta = copy.deepcopy(model).half()
    original = base.half().state_dict()
    with torch.no_grad():
        for name, tensor in delta.state_dict().items():
            rows = len(original[name])
            tensor[:rows] -= original[name]
    save(delta, path, layout)


@pytest.mark.parametrize("extra_rows", [0, 1], ids=["v1.1", "v0"])
@pytest.mark.parametrize("layout", ["bin sharded", "safetensors"])
def test_sums_equal_those_of_torch(extra_rows: int, layout: str, tmp_path: Path) -> None:
    base = half_of_any_size(torch_llama(LLAMA), 0)
    target = half_of_any_size(torch_llama(dataclasses.replace(LLAMA, vocab_size=300 + extra_rows)), 1)
    save(base, tmp_path / "base", "bin")
    publish(target, base, tmp_path / "delta", layout)
    delta = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "delta").state_dict()
    reader = DeltaReader(open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "delta"))
    original = base.state_dict()
    assert set(reader) == set(delta)
    for name, difference in delta.items():
        padded = torch.zeros_like(difference)
        padded[: len(original[name])] = original[name]
        expected = padded + difference
        assert reader.shape(name) == tuple(expected.shape)
        np.testing.assert_array_equal(reader.read(name).view(np.uint16), expected.numpy().view(np.uint16), name)


def test_convert_adds_the_delta_and_copies_its_tokenizer(tiny_sentencepiece: Path, tmp_path: Path) -> None:
    base, target = torch_llama(LLAMA).half(), torch_llama(dataclasses.replace(LLAMA, vocab_size=301), seed=1).half()
    save(base, tmp_path / "base", "bin")
    publish(target, base, tmp_path / "delta", "bin sharded")
    shutil.copy(tiny_sentencepiece / "tokenizer.model", tmp_path / "delta")
    arguments = [str(tmp_path / "base"), str(tmp_path / "out"), "--delta", str(tmp_path / "delta")]
    assert run_verb(convert.main, arguments) == 0
    reader = open_checkpoint(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").is_file()
    assert reader.shape("lm_head.weight") == (301, 48)
    expected = target.model.layers[0].mlp.up_proj.weight.detach().numpy()
    found = reader.read("model.layers.0.mlp.up_proj.weight")
    # target - base + base rounds twice in half precision.
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=2e-3)


def test_a_delta_of_another_base(tmp_path: Path) -> None:
    save(torch_llama(LLAMA), tmp_path / "base", "bin")
    save(torch_llama(dataclasses.replace(LLAMA, num_layers=2)), tmp_path / "shallow", "bin")
    save(torch_llama(dataclasses.replace(LLAMA, intermediate_size=96)), tmp_path / "narrow", "bin")
    save(torch_llama(dataclasses.replace(LLAMA, vocab_size=299)), tmp_path / "small", "bin")
    base = open_checkpoint(tmp_path / "base")
    with pytest.raises(UserError, match=r"only one of them has model\.layers\.2"):
        DeltaReader(base, open_checkpoint(tmp_path / "shallow"))
    for other in ("narrow", "small"):
        with pytest.raises(UserError, match=r"in the delta, .* in the base"):
            DeltaReader(base, open_checkpoint(tmp_path / other))
