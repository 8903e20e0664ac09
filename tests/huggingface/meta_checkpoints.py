"""Meta's layout, made from transformers' models: rows of q and k in pairs, matrices split over files."""

import json
from pathlib import Path

from tests.torch_models import torch, transformers

NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
}


def meta_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name.removeprefix("model.")


def interleave(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `permute` in transformers' convert_llama_weights_to_hf.py."""
    rows, columns = weight.shape
    halves = weight.view(rows // head_dim, 2, head_dim // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns).clone()


def cut(name: str, tensor: torch.Tensor, ranks: int, embedding_axis: int) -> list[torch.Tensor]:
    if "norm" in name:
        return [tensor.clone() for _ in range(ranks)]
    axis = 1 if "wo" in name or "w2" in name else 0
    axis = embedding_axis if "tok_embeddings" in name else axis
    return [part.clone() for part in tensor.chunk(ranks, dim=axis)]


def write_meta(
    model: transformers.LlamaForCausalLM, path: Path, params: dict, *, ranks: int = 1, embedding_axis: int = 1
) -> None:
    """Writes `model` in Meta's layout, with `ranks` files and the given params.json."""
    path.mkdir(parents=True, exist_ok=True)
    config = model.config
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in model.state_dict().items():
        theirs = meta_name(name)
        if theirs.endswith(("wq.weight", "wk.weight")):
            tensor = interleave(tensor, config.head_dim)
        for shard, part in zip(shards, cut(theirs, tensor, ranks, embedding_axis), strict=True):
            shard[theirs] = part
    for rank, shard in enumerate(shards):
        torch.save({**shard, "rope.freqs": torch.arange(6.0)}, path / f"consolidated.{rank:02}.pth")
    sizes = {"dim": config.hidden_size, "n_heads": config.num_attention_heads, "n_layers": config.num_hidden_layers}
    (path / "params.json").write_text(json.dumps({**sizes, "vocab_size": -1, **params}))
