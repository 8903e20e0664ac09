"""Matrices of files with the rows of several modules (Phi-3), as one tensor per module."""

from collections.abc import Mapping
from pathlib import Path

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.architecture import CONFIG_FILE, parse_architecture
from flacuna_jax.huggingface.families import MEMBERS
from flacuna_jax.huggingface.files.json_file import read_json
from flacuna_jax.huggingface.files.tensors import ReadableTensor, RowsOfTensor
from flacuna_jax.model.parameters import base_parameters


def split_fused(directory: Path, tensors: Mapping[str, ReadableTensor]) -> Mapping[str, ReadableTensor]:
    """The tensors under the names of the network's own modules; the same tensors if none of them is fused.

    Raises:
      UserError: a fused matrix does not have the rows of its modules.
    """
    file = directory / CONFIG_FILE
    raw = read_json(file) if file.is_file() else {}
    if not any(kind == raw.get("model_type") and m.network.get("fused_projections") for kind, m in MEMBERS.items()):
        return tensors
    config = parse_architecture(raw, str(file))
    split: dict[str, ReadableTensor] = {}
    for name, tensor in tensors.items():
        parts = names.stored_parts(config).get(name, ())
        if len(parts) < 2:
            split[name] = tensor
            continue
        if tensor.shape[:1] != (parts[-1].rows.stop,):
            raise UserError(
                f"{directory}: {name} has shape {list(tensor.shape)}, but config.json gives {parts[-1].rows.stop} rows"
            )
        for part in parts:
            split[base_parameters(config)[part.path].tensor(part.layer)] = RowsOfTensor(tensor, part.rows)
    return split
