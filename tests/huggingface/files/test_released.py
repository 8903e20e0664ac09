"""The layout of the released Flacuna: the state dict of a whole PEFT model, with an int8 base and its scales."""

from pathlib import Path

import numpy as np
import pytest

from flacuna_jax import convert
from flacuna_jax.cli import run_verb
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.adapter import read_adapter
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.load import match_tensors
from tests.huggingface.checkpoints import SMALL
from tests.torch_models import torch, torch_llama, transformers

peft = pytest.importorskip("peft")


def release(path: Path, rank: int = 8) -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    """Writes the layout; returns the PEFT model and its dequantised base weights."""
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(torch_llama(SMALL), lora)
    state, exact = {}, {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            state[name] = tensor = torch.randn_like(tensor) * 0.2
            model.state_dict()[name].copy_(tensor)
        elif "_proj" in name:
            plain = name.replace(".base_layer", "")
            scale = tensor.abs().amax(dim=1)
            state[plain] = torch.round(tensor / scale[:, None] * 127).to(torch.int8)
            state[plain.removesuffix(".weight") + ".SCB"] = scale
            exact[plain.removeprefix("base_model.model.")] = state[plain].float() * scale[:, None] / 127
        else:
            state[name] = tensor.float()
            exact[name.removeprefix("base_model.model.")] = tensor
    for layer in range(SMALL.num_layers):
        state[f"base_model.model.model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    path.mkdir()
    model.base_model.model.config.save_pretrained(path)
    torch.save(state, path / "pytorch_model.bin")
    return model, exact


def test_its_adapter_loads_in_peft_and_gives_its_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = release(tmp_path / "flacuna")
    assert run_verb(convert.main, [str(tmp_path / "flacuna"), str(tmp_path / "adapter")]) == 0
    assert "its 12 LoRA tensors as a PEFT adapter of rank 8, alpha 16" in capsys.readouterr().out
    again = peft.PeftModel.from_pretrained(torch_llama(SMALL), tmp_path / "adapter").eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)
    assert again.peft_config["default"].lora_dropout == 0.05
    assert read_adapter(tmp_path / "adapter", SMALL).base_name == "TheBloke/vicuna-13B-1.1-HF"


def test_its_base_can_be_dequantised(tmp_path: Path) -> None:
    _, exact = release(tmp_path / "flacuna")
    assert run_verb(convert.main, [str(tmp_path / "flacuna"), str(tmp_path / "base"), "--base"]) == 0
    reader = open_checkpoint(tmp_path / "base")
    match_tensors(reader, SMALL)
    for name, tensor in exact.items():
        # One unit of half precision: codes × scale / 127 is rounded once, from float32.
        np.testing.assert_allclose(reader.read(name).astype(np.float32), tensor.numpy(), rtol=2**-10, atol=1e-7)


def test_another_rank_needs_its_alpha(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release(tmp_path / "other", rank=4)
    assert run_verb(convert.main, [str(tmp_path / "other"), str(tmp_path / "out")]) == 2
    assert "has rank 4, but the released Flacuna has 8" in capsys.readouterr().err
    assert run_verb(convert.main, [str(tmp_path / "other"), str(tmp_path / "out"), "--alpha", "12"]) == 0
    assert read_adapter(tmp_path / "out", SMALL).lora.alpha == 12


def test_the_message_for_training_on_it_says_what_to_do(tmp_path: Path) -> None:
    release(tmp_path / "flacuna")
    with pytest.raises(UserError, match="`flacuna convert` extracts the adapter"):
        match_tensors(open_checkpoint(tmp_path / "flacuna"), SMALL)


@pytest.mark.parametrize("options", [["--delta", "x"], ["--base", "--delta", "x"]])
def test_options_that_do_not_apply_are_errors(options: list[str], tmp_path: Path) -> None:
    release(tmp_path / "flacuna")
    (tmp_path / "x").mkdir()
    options = [str(tmp_path / option) if option == "x" else option for option in options]
    assert run_verb(convert.main, [str(tmp_path / "flacuna"), str(tmp_path / "out"), *options]) == 2
    assert not (tmp_path / "out").exists()
