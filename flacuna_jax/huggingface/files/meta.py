"""Meta's original LLaMA files (params.json, consolidated.NN.pth) as a checkpoint under Hugging Face names.

They differ in three ways (github.com/meta-llama/llama). Matrices are split over model-parallel ranks, with one file per
rank: along rows in layers that split their output, along columns in layers that split their input. Rotary embedding
rotates adjacent pairs (0, 1), (2, 3), ..., while Hugging Face rotates (0, n/2), (1, n/2 + 1), ..., so the rows of q and
k are permuted within each head. And the sizes of the feed-forward network and of the vocabulary are not stored; they
follow from a rule and from the weights.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.files.json_file import read_json
from flacuna_jax.huggingface.files.tensors import ALL_ROWS, MappedFiles, StoredTensor
from flacuna_jax.huggingface.files.torch_file import read_torch_file

PARAMS_FILE = "params.json"

_HUGGING_FACE = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Meta's name of a module, in or outside of the layers → Hugging Face's name."""
_ONCE = ("tok_embeddings", "norm", "output")
_INTERLEAVED = ("attention.wq", "attention.wk")
_SPLIT_INPUTS = ("attention.wo", "feed_forward.w2")
_REPLICATED = ("attention_norm", "ffn_norm", "norm")
_IGNORED = "rope.freqs"


def is_meta(directory: Path) -> bool:
    """Whether a directory contains Meta's files."""
    return (directory / PARAMS_FILE).is_file() and bool(_files(directory))


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("consolidated.*.pth"))


@dataclasses.dataclass(frozen=True)
class JoinedTensor:
    """A tensor in parts, one in each file.

    Attributes:
      parts: in the order of the ranks.
      axis: the axis along which the parts are concatenated.
      head_dim: for q and k, whose rows are permuted within each head; 0 for the others.
    """

    parts: tuple[StoredTensor, ...]
    axis: int
    head_dim: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def read(self, files: MappedFiles, rows: slice = ALL_ROWS) -> np.ndarray:
        """Some of the rows in Hugging Face's order; a copy, except for whole rows of a single part."""
        views = [files.view(part) for part in self.parts]
        if self.axis == 1:
            return np.concatenate([view[rows] for view in views], axis=1) if len(views) > 1 else views[0][rows]
        if len(views) == 1 and not self.head_dim:
            return views[0][rows]
        wanted = np.arange(*rows.indices(self.shape[0]))
        if self.head_dim:
            wanted = interleaved(wanted, self.head_dim)
        starts = np.cumsum([0, *(len(view) for view in views)])
        result = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        for view, start in zip(views, starts, strict=False):
            here = (start <= wanted) & (wanted < start + len(view))
            result[here] = view[wanted[here] - start]
        return result


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Indices in Meta's order (pairs) of rows in Hugging Face's order (two halves of a head)."""
    head, place = rows // head_dim, rows % head_dim
    half, pair = place // (head_dim // 2), place % (head_dim // 2)
    return head * head_dim + 2 * pair + half


def read_meta(directory: Path) -> dict[str, JoinedTensor]:
    """Opens Meta's files; weights are not touched.

    Raises:
      UserError: a file is missing, torn or not a dictionary of tensors, the files do not have the same tensors, or a
        tensor does not belong to a LLaMA.
    """
    head_dim = _settings(directory)["head_dim"]
    shards = _shards(directory)
    joined = {}
    for theirs in shards[0]:
        if theirs == _IGNORED:
            continue
        module = theirs.removesuffix(".weight")
        layer, inner = _layer(module)
        if inner not in _HUGGING_FACE or not theirs.endswith(".weight") or (layer is None) != (inner in _ONCE):
            raise UserError(f"{directory}: {theirs} does not belong to a LLaMA")
        place = "" if layer is None else f"model.layers.{layer}."
        ours = f"{place}{_HUGGING_FACE[inner]}.weight"
        parts = tuple(shard[theirs] for shard in shards)
        if inner in _REPLICATED:
            parts = _one_of_equal(directory, theirs, parts)
        permuted = head_dim if inner in _INTERLEAVED else 0
        joined[ours] = JoinedTensor(parts, _axis(directory, inner, parts), permuted)
        if inner == "attention.wo" and joined[ours].shape[1] != _settings(directory)["hidden_size"]:
            raise UserError(
                f"{directory}: the {len(shards)} consolidated files have {joined[ours].shape[1]} of the "
                f"{_settings(directory)['hidden_size']} columns of {theirs}; a file is missing, or {PARAMS_FILE} is of "
                f"another model"
            )
    return joined


def _layer(module: str) -> tuple[int | None, str]:
    head, _, rest = module.partition(".")
    number, _, inner = rest.partition(".")
    return (int(number), inner) if head == "layers" and number.isdecimal() else (None, module)


def _shards(directory: Path) -> list[dict[str, StoredTensor]]:
    files = _files(directory)
    expected = [directory / f"consolidated.{rank:02}.pth" for rank in range(len(files))]
    if files != expected:
        absent = next(path for path in expected if path not in files)
        raise UserError(f"{absent} is missing, but {files[-1].name} exists")
    shards = [read_torch_file(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        differing = sorted(shard.keys() ^ shards[0].keys())
        if differing:
            raise UserError(f"{file} and {files[0].name} do not have the same tensors: {names.some(differing)}")
        for name, tensor in shard.items():
            if (len(tensor.shape), tensor.dtype) != (len(shards[0][name].shape), shards[0][name].dtype):
                raise UserError(f"{file}: {name} does not have the dimensions and dtype that it has in {files[0].name}")
    return shards


def _axis(directory: Path, inner: str, parts: Sequence[StoredTensor]) -> int:
    """The axis along which the parts of a tensor are concatenated. LLaMA 1 and 2 split the embedding by columns, LLaMA
    3 by rows; the width of the parts distinguishes them."""
    axis = 1 if inner in _SPLIT_INPUTS else 0
    if inner == "tok_embeddings" and len(parts[0].shape) == 2:
        axis = 0 if parts[0].shape[1] == _settings(directory)["hidden_size"] else 1
    if any(len(part.shape) <= axis for part in parts):
        raise UserError(f"{directory}: {inner} has shape {list(parts[0].shape)}; it is not a matrix")
    others = {tuple(size for place, size in enumerate(part.shape) if place != axis) for part in parts}
    if len(others) > 1:
        raise UserError(f"{directory}: the parts of {inner} do not fit together: {[list(p.shape) for p in parts]}")
    return axis


def _one_of_equal(directory: Path, name: str, parts: tuple[StoredTensor, ...]) -> tuple[StoredTensor, ...]:
    """Returns one part of a norm; every rank has the whole norm."""
    files = MappedFiles()
    if any(not np.array_equal(files.view(part), files.view(parts[0])) for part in parts[1:]):
        raise UserError(f"{directory}: {name} differs between the files; they are not of one model")
    return parts[:1]


def meta_settings(directory: Path) -> dict[str, Any]:
    """Content of the config.json that is equivalent to Meta's files.

    They do not have the context length; it is set as in Hugging Face's conversion: 2048 for LLaMA 1 (norm_eps 1e-6),
    4096 for LLaMA 2, 8192 for LLaMA 3 (rope_theta 500,000), 16,384 for Code Llama (rope_theta 1,000,000).

    Raises:
      UserError: params.json lacks a size, or has a setting that is not implemented.
    """
    embedding = read_meta(directory).get(names.EMBEDDING)
    if embedding is None:
        raise UserError(f"{directory}: tok_embeddings.weight is missing from consolidated.00.pth")
    return _settings(directory) | {"vocab_size": embedding.shape[0]}


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / PARAMS_FILE
    params = read_json(path)
    if params.get("use_scaled_rope"):
        raise UserError(f"{path}: use_scaled_rope is set; scaled rotary embedding is not implemented")
    for key in ("moe", "quantization_args", "lora_args"):
        if params.get(key):
            raise UserError(f"{path}: {key} is set; only plain LLaMA checkpoints are supported")
    dim, layers, heads = (_whole(path, params, key) for key in ("dim", "n_layers", "n_heads"))
    if dim % heads or dim // heads % 2:
        raise UserError(f"{path}: dim {dim} cannot be divided into {heads} heads of even size")
    epsilon = _number(path, params, "norm_eps", 1e-5)
    theta = _number(path, params, "rope_theta", 10000.0)
    positions = {500_000.0: 8192, 1_000_000.0: 16384}.get(theta, 2048 if epsilon == 1e-6 else 4096)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": _feed_forward(path, params, dim),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if params.get("n_kv_heads") is None else _whole(path, params, "n_kv_heads"),
        "head_dim": dim // heads,
        "hidden_act": "silu",
        "rms_norm_eps": epsilon,
        "rope_theta": theta,
        "max_position_embeddings": positions,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def _feed_forward(path: Path, params: Mapping[str, Any], dim: int) -> int:
    """Size of the feed-forward network: two thirds of 4 · dim, times a factor since LLaMA 2, rounded up to a
    multiple."""
    multiple = _whole(path, params, "multiple_of")
    size = int(2 * (4 * dim) / 3)
    if params.get("ffn_dim_multiplier") is not None:
        size = int(_number(path, params, "ffn_dim_multiplier", 1.0) * size)
    return multiple * -(-size // multiple)


def _whole(path: Path, params: Mapping[str, Any], key: str) -> int:
    value = params.get(key)
    if type(value) is not int or value <= 0:
        raise UserError(f"{path}: {key} is {value!r}, not a positive whole number")
    return value


def _number(path: Path, params: Mapping[str, Any], key: str, default: float) -> float:
    value = params.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{path}: {key} is {value!r}, not a positive number")
    return float(value)
