"""The model family by config: each member is written by transformers, then read, compared, decoded, converted, merged
and adapted.

float32 on both sides, sums in other orders: logits are O(1) and agree to 1e-4.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import MeshConfig
from flacuna_jax.config.types import PROJECTIONS
from flacuna_jax.generation import shared_prefix
from flacuna_jax.generation.decoder import Decoder, Draw, Network, Part
from flacuna_jax.generation.settings import GREEDY
from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.deliver import Companions, convert, write_adapter, write_merged
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.load import load_base
from flacuna_jax.huggingface.names import parse_adapter_name
from flacuna_jax.huggingface.probe import probe_ids, stored_weights, streamed_logits
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec, Params, count, tensors_in_order
from flacuna_jax.model.rope import ntk_theta, rope_frequencies
from flacuna_jax.model.sharding import make_mesh, parameter_shardings
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.step import StepConfig, loss_and_gradients
from tests.tiny import in_steps, packed_batch, to_device
from tests.torch_models import LLAMA3, YARN, torch, transformers
from tests.training.test_step_against_peft import run_ours, run_torch, torch_loss

peft = pytest.importorskip("peft")
load_file = pytest.importorskip("safetensors.numpy").load_file

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
FULL, SLIDING = "full_attention", "sliding_attention"
FAMILY = {
    "LLaMA 1": ("Llama", {"num_key_value_heads": 4}),
    "LLaMA 2, 70B": ("Llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    "LLaMA 3.1": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "Vicuna 1.5, 16k": ("Llama", {"num_key_value_heads": 4, "rope_parameters": LINEAR}),
    "LLaMA with YaRN and GELU": ("Llama", {"rope_parameters": YARN, "hidden_act": "gelu"}),
    "LLaMA with dynamic scaling": ("Llama", {"rope_parameters": DYNAMIC, "hidden_act": "gelu_pytorch_tanh"}),
    "LLaMA with biases": ("Llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "Mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 6, "head_dim": 16}),
    "Qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "Qwen2 with a window": (
        "Qwen2",
        {"num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "Ministral": (
        "Ministral",
        {"num_key_value_heads": 2, "sliding_window": 6, "head_dim": 16, "layer_types": [SLIDING, FULL]},
    ),
    "Qwen3 with a window": (
        "Qwen3",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 6, "layer_types": [SLIDING, FULL]},
    ),
    "Qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "OLMo 2": ("Olmo2", {"num_key_value_heads": 2}),
    "Granite": (
        "Granite",
        {
            "num_key_value_heads": 2,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "SmolLM3": ("SmolLM3", {"num_key_value_heads": 2, "no_rope_layers": [1, 0], "pad_token_id": 0}),
    "SmolLM3 with a window": (
        "SmolLM3",
        {
            "num_key_value_heads": 2,
            "no_rope_layers": [1, 0],
            "pad_token_id": 0,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "OLMo 3": (
        "Olmo3",
        {
            "num_key_value_heads": 2,
            "sliding_window": 6,
            "layer_types": [SLIDING, FULL],
            "rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 1e4}},
        },
    ),
    "Phi-3": (
        "Phi3",
        {
            "num_key_value_heads": 2,
            "sliding_window": 6,
            "original_max_position_embeddings": 64,
            "rope_parameters": LONGROPE,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "Phi-4-mini": (
        "Phi3",
        {
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 64,
            "rope_parameters": {**LONGROPE, "short_factor": [1.0, 1.5, 3.0], "long_factor": [2.0, 2.5, 3.0]},
            "partial_rotary_factor": 0.5,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "Gemma 2": (
        "Gemma2",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "Gemma 3": (
        "Gemma3",
        {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "sliding_window": 6,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 25,
            "rope_parameters": {
                FULL: {**LINEAR, "rope_theta": 1e6},
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}
NEWER = ("Qwen3", "OLMo 2", "Granite", "SmolLM3")
COMBINED = ("Ministral", "Qwen3 with a window", "SmolLM3 with a window", "OLMo 3", "Phi-4-mini")
"""Members that combine what others have: only in the slow suite."""
DOCUMENTS = [np.random.default_rng(i).integers(3, 97, size).tolist() for i, size in enumerate((17, 40, 9, 23, 31))]
ROWS = [[0, 1], [2, 3], [4]]


def always(*names: str) -> pytest.MarkDecorator:
    """Every member, but in the quick suite only these, which together cover what the test depends on."""
    members = [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY]
    return pytest.mark.parametrize("member", members, indirect=True)


@dataclasses.dataclass(frozen=True)
class Member:
    path: Path
    reference: "transformers.PreTrainedModel"
    config: LlamaConfig
    params: Params

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(self.config, None, "float32", "float32")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in COMBINED else []) for name in FAMILY],
)
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Member:
    kind, settings = FAMILY[request.param]
    torch.manual_seed(0)
    sizes = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    model = getattr(transformers, f"{kind}ForCausalLM")(sizes(**SIZES, **settings))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    path = tmp_path_factory.mktemp("member")
    model.eval().float().save_pretrained(path)
    config = read_architecture(path)
    return Member(path, model, config, load(path, config))


def load(path: Path, config: LlamaConfig) -> Params:
    mesh = make_mesh("auto", jax.devices()[:1])
    return load_base(str(path), config, parameter_shardings(ModelSpec(config).base, mesh), "float32")


@functools.cache
def compiled(spec: ModelSpec):
    @jax.jit
    def logits(params: Params, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        model = spec.merge(params)
        return model.logits(model(tokens, positions, make_packed_mask(segment_ids)))

    return logits


def packed_logits(spec: ModelSpec, params: Params) -> list[np.ndarray]:
    """Logits of each document in rows of several documents."""
    batch = packed_batch(DOCUMENTS, ROWS, 64)
    found = np.asarray(compiled(spec)(params, *(batch[key] for key in ("tokens", "positions", "segment_ids"))))
    return [
        found[row][batch["segment_ids"][row] == segment]
        for row, members in enumerate(ROWS)
        for segment in range(1, len(members) + 1)
    ]


def torch_logits(model: "torch.nn.Module") -> list[np.ndarray]:
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].numpy() for ids in DOCUMENTS]


def assert_equal_logits(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for actual, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)


def test_packed_logits_equal_transformers(member: Member) -> None:
    assert count(member.spec.base_shapes) == sum(p.numel() for p in member.reference.parameters())
    assert_equal_logits(packed_logits(member.spec, member.params), torch_logits(member.reference))


@always("LLaMA 3.1", "LLaMA with YaRN and GELU", "Mistral", "Qwen2 with a window", *NEWER, "Gemma 2")
@pytest.mark.parametrize("shared", [pytest.param(0, marks=pytest.mark.slow), 14])
def test_greedy_continuations_equal_transformers(member: Member, shared: int) -> None:
    """Prompts of mixed lengths in one batch, with or without a prefix that is computed once."""
    prompts = [DOCUMENTS[1][:shared] + DOCUMENTS[index] for index in (2, 0, 3)]
    for prompt, new in zip(prompts, continuations(member, prompts, shared, 24), strict=True):
        inputs = torch.tensor([prompt])
        output = member.reference.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        expected = output[0, len(prompt) :].tolist()
        ended = expected.index(2) if 2 in expected else len(expected)  # transformers stops at its own end of text
        assert new[:ended] == expected[:ended]


def continuations(member: Member, prompts: list[list[int]], shared: int, count: int) -> list[list[int]]:
    spec, params, prefix = member.spec, member.params, None
    if shared:
        head = np.zeros(16, np.int32)
        head[:shared] = prompts[0][:shared]
        prefix = shared_prefix.compute_prefix(spec, params, jnp.asarray(head), jnp.int32(shared))
    decoder = Decoder(Network(spec, params, make_mesh(MeshConfig())), len(prompts), 64, prefix)
    parts = {row: (Part(prompt[shared:]), Draw()) for row, prompt in enumerate(prompts)}
    first_r = decoder.begin(parts)
    more_bt = decoder.advance(count - 1, 64, [GREEDY]).token
    return np.concatenate([first_r[:, None], more_bt], axis=1).tolist()


def test_converted_and_back(member: Member, tmp_path: Path) -> None:
    convert(tmp_path / "native", open_checkpoint(member.path), member.config, tokenizer_source=member.path)
    assert read_architecture(tmp_path / "native") == member.config
    for name, value in load(tmp_path / "native", member.config).items():
        np.testing.assert_array_equal(value, member.params[name], err_msg=name)
    native = open_checkpoint(tmp_path / "native")
    write_merged(tmp_path / "back", native, member.config, None, Companions(tmp_path / "native", None, {}))
    before, after = (load_file(path / "model.safetensors") for path in (member.path, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_tensors_are_written_in_the_order_of_a_forward_pass(member: Member) -> None:
    """Otherwise values would wait in memory when a model is checked during writing (huggingface/alongside.py)."""
    stored, asked = stored_weights(open_checkpoint(member.path), member.config), []

    def weights(path: str, layer: int, rows: slice) -> np.ndarray:
        asked.append((path, layer))
        return stored(path, layer, rows)

    ids = probe_ids(member.config)
    theirs = member.reference(torch.tensor(ids[None])).logits[0].detach().numpy()
    np.testing.assert_allclose(streamed_logits(weights, member.config, ids, None), theirs, atol=1e-4, rtol=1e-4)
    assert list(dict.fromkeys(asked)) == [(path, layer or 0) for path, layer in tensors_in_order(member.config)]


@always("LLaMA 3.1", "LLaMA with biases", "Mistral", "Qwen2", *NEWER, "Gemma 2")
def test_adapters_and_merges_equal_those_of_peft(member: Member, tmp_path: Path) -> None:
    lora = LoraConfig(rank=3, alpha=6.0, targets="all-linear")
    rng = np.random.default_rng(1)
    shapes = ModelSpec(member.config, lora).lora_shapes
    params = {path: (0.1 * rng.standard_normal(shape)).astype(np.float32) for path, shape in shapes.items()}
    adapter = Adapter(ModelSpec(member.config, lora), params)
    spec = dataclasses.replace(member.spec, lora=lora)
    ours = packed_logits(spec, {**member.params, **params})

    write_adapter(tmp_path / "adapter", adapter, member.config, trained=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(member.path, attn_implementation="eager")
    assert_equal_logits(ours, torch_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()))

    reader = open_checkpoint(member.path)
    write_merged(tmp_path / "merged", reader, member.config, adapter, Companions(member.path, None, {}))
    assert read_architecture(tmp_path / "merged") == member.config
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert type(merged) is type(member.reference)
    assert_equal_logits(ours, torch_logits(merged.eval()))


@pytest.mark.parametrize(
    "rope",
    [
        LLAMA3,
        LINEAR,
        {**LLAMA3, "original_max_position_embeddings": 8192, "factor": 32.0},
        YARN,
        {**YARN, "beta_fast": 20.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.0},
        {**YARN, "attention_factor": 1.3, "original_max_position_embeddings": 4096, "truncate": False},
        DYNAMIC,
    ],
)
@pytest.mark.parametrize("head_dim", [12, 128])
def test_frequencies_equal_transformers(rope: dict, head_dim: int, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES, head_dim=head_dim, rope_parameters=rope)
    config.save_pretrained(tmp_path)
    expected, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    ours = read_architecture(tmp_path)
    assert ours.rope_scaling is not None
    assert ours.rope_scaling.attention_factor == pytest.approx(factor)
    np.testing.assert_allclose(ours.rope_frequencies, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("length", [256, 1000])
def test_ntk_is_dynamic_scaling_at_its_longest_input(length: int) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0}
    config = transformers.LlamaConfig(**SIZES, rope_parameters=rope)
    expected, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=length)
    ours = rope_frequencies(12, ntk_theta(1e4, 12, length / 128), None)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-5)


@always(*NEWER)
def test_training_equals_that_of_peft(member: Member) -> None:
    """Gradients of packed rows, and 12 steps of AdamW with clipping, against PEFT on the documents one by one."""
    # PEFT has one A for fused projections (tests/huggingface/test_fused.py).
    targets = ("o_proj", "down_proj") if member.config.fused_projections else PROJECTIONS
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.0, targets=targets)
    base = transformers.AutoModelForCausalLM.from_pretrained(member.path, attn_implementation="eager")
    settings = peft.LoraConfig(r=4, lora_alpha=8.0, target_modules=list(targets), task_type="CAUSAL_LM")
    reference = peft.get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in reference.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    spec = dataclasses.replace(member.spec, lora=lora)
    adapters = adapters_of(reference, spec)
    batch = to_device(in_steps(packed_batch(DOCUMENTS, [*ROWS, []], 64), 2))
    step = StepConfig(NetworkConfig(spec))

    loss, _, gradients = jax.jit(loss_and_gradients, static_argnums=0)(
        step, adapters, member.params, batch, jnp.int32(0)
    )
    expected = torch_loss(reference, DOCUMENTS)
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), abs=1e-4)
    for path, value in adapters_of(reference, spec, gradients=True).items():
        assert np.linalg.norm(gradients[path] - value) < 1e-4 * np.linalg.norm(value), path

    batches = [batch] * 12
    losses, _ = run_ours(spec, member.params, adapters, batches, 5e-3)
    reference.zero_grad()
    theirs = run_torch(reference, [DOCUMENTS] * 12, 5e-3)
    assert theirs[-1] < theirs[0] - 0.05
    np.testing.assert_allclose(losses, theirs, atol=2e-4)


def adapters_of(model: "peft.PeftModel", spec: ModelSpec, gradients: bool = False) -> Params:
    """PEFT's tensors, or their gradients, stacked in our layout."""
    params = {path: np.zeros(shape, np.float32) for path, shape in spec.lora_shapes.items()}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            path, layer = parse_adapter_name(name, spec.config)
            params[path][layer] = (parameter.grad if gradients else parameter.detach()).numpy()
    return {path: jnp.asarray(value) for path, value in params.items()}
