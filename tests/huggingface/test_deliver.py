"""Whole models: bit-identical round trips, merges that transformers loads, and nothing left behind by a failed
check."""

import dataclasses
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import MeshConfig
from flacuna_jax.config.types import PROJECTIONS
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import deliver
from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.huggingface.alongside import LogitsAlongside
from flacuna_jax.huggingface.architecture import hugging_face_config, read_architecture
from flacuna_jax.huggingface.deliver import Companions, convert, write_merged, write_model
from flacuna_jax.huggingface.files import safetensors_file
from flacuna_jax.huggingface.files.native import MANIFEST
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.load import fingerprint, load_base, match_tensors
from flacuna_jax.huggingface.merged import merged_tensors, model_tensors, write_shards
from flacuna_jax.huggingface.probe import Side, probe_ids, stored_weights, streamed_logits
from flacuna_jax.huggingface.verify import VerificationError
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec, base_parameters
from flacuna_jax.model.sharding import make_mesh, parameter_shardings
from tests.huggingface.checkpoints import SMALL, TIED, Written, save
from tests.torch_models import torch, torch_llama, transformers
from tests.vocabularies import llama_template

JINJA = llama_template("vicuna_v1.1").jinja


@pytest.fixture(scope="module")
def companions(tiny_sentencepiece: Path) -> Companions:
    return Companions(tiny_sentencepiece, JINJA, {"bos_token_id": 1, "eos_token_id": 2})


def random_adapter(config: LlamaConfig, lora: LoraConfig) -> Adapter:
    rng = np.random.default_rng(0)
    spec = ModelSpec(config, lora)
    made = {path: 0.1 * rng.standard_normal(shape) for path, shape in spec.lora_shapes.items()}
    return Adapter(spec, {path: value.astype(np.float32) for path, value in made.items()})


def their_logits(path: Path, config: LlamaConfig) -> np.ndarray:
    model, info = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(torch.tensor(probe_ids(config))[None]).logits[0].numpy()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("through_native", [False, True], ids=["direct", "through the converted form"])
def test_round_trips_are_bit_identical(
    dtype: str, through_native: bool, architecture: LlamaConfig, companions: Companions, tmp_path: Path
) -> None:
    model = torch_llama(architecture).to(getattr(torch, dtype))
    save(model, tmp_path / "in", "bin sharded" if not architecture.tie_word_embeddings else "safetensors")
    reader = open_checkpoint(tmp_path / "in")
    original = fingerprint(reader, architecture)
    if through_native:
        convert(tmp_path / "native", reader, architecture, tokenizer_source=companions.tokenizer)
        reader = open_checkpoint(tmp_path / "native")
        assert fingerprint(reader, architecture) == original
    write_merged(tmp_path / "out", reader, architecture, None, companions, shard_bytes=60_000)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module", params=["plain", "grouped", "tied"])
def architecture(request: pytest.FixtureRequest) -> LlamaConfig:
    checkpoints = pytest.importorskip("tests.huggingface.checkpoints")
    return checkpoints.ARCHITECTURES[request.param]


def test_a_converted_checkpoint_loads_like_its_source(written: Written, companions: Companions, tmp_path: Path) -> None:
    config = written.config
    convert(tmp_path / "native", open_checkpoint(written.path), config, tokenizer_source=companions.tokenizer)
    assert read_architecture(tmp_path / "native") == config
    for mesh_config in (MeshConfig(), MeshConfig(fsdp=2, tensor=2)):
        shardings = parameter_shardings(base_parameters(config), make_mesh(mesh_config))
        ours = load_base(tmp_path / "native", config, shardings, "bfloat16")
        theirs = load_base(written.path, config, shardings, "bfloat16")
        assert all(np.array_equal(np.asarray(ours[path]), np.asarray(theirs[path])) for path in theirs)
    kept = (companions.tokenizer / "tokenizer.model").read_bytes()
    assert (tmp_path / "native" / "tokenizer.model").read_bytes() == kept
    assert (tmp_path / "native" / "config.json").read_bytes() == (written.path / "config.json").read_bytes()


def test_conversion_to_another_dtype_rounds_once(plain: Written, companions: Companions, tmp_path: Path) -> None:
    reader = open_checkpoint(plain.path)
    dtype = np.dtype(jnp.bfloat16)
    convert(tmp_path / "native", reader, SMALL, tokenizer_source=companions.tokenizer, dtype=dtype)
    found = open_checkpoint(tmp_path / "native").read("model.layers.1.mlp.up_proj.weight")
    expected = plain.model.model.layers[1].mlp.up_proj.weight.bfloat16().float().detach().numpy()
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(np.float32), expected)


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=3, alpha=5.0, targets=PROJECTIONS)], ids=["qv", "all"])
def test_merged_models_give_the_logits_of_peft(
    lora: LoraConfig, written: Written, companions: Companions, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    config = written.config
    adapter = random_adapter(config, lora)
    reader = open_checkpoint(written.path)
    report = write_merged(tmp_path / "merged", reader, config, adapter, companions, shard_bytes=50_000)
    deliver.write_adapter(tmp_path / "adapter", adapter, config, trained=True)
    model = peft.PeftModel.from_pretrained(torch_llama(config), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model(torch.tensor(probe_ids(config))[None]).logits[0].numpy()
    # float32 throughout, in another order; logits are O(1).
    np.testing.assert_allclose(their_logits(tmp_path / "merged", config), expected, atol=1e-4)
    assert report.logit_shift < 1e-4
    assert len(report.files) > 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_merged_weights_are_rounded_once(dtype: str, companions: Companions, tmp_path: Path) -> None:
    model = torch_llama(SMALL).to(getattr(torch, dtype))
    save(model, tmp_path / "base", "safetensors")
    adapter = random_adapter(SMALL, LoraConfig(rank=4, alpha=6.0))
    report = write_merged(tmp_path / "merged", open_checkpoint(tmp_path / "base"), SMALL, adapter, companions)
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    a, b = (torch.tensor(adapter.params[f"layers/v_proj/lora_{x}"][2]).double() for x in "ab")
    exact = model.model.layers[2].self_attn.v_proj.weight.double() + 1.5 * b @ a
    found = merged.model.layers[2].self_attn.v_proj.weight
    assert found.dtype == getattr(torch, dtype)
    # One rounding of the exact sum; float32 arithmetic may change the rounding of a value halfway between two numbers.
    assert (found == exact.to(found.dtype)).float().mean() > 0.995
    assert torch.equal(merged.model.layers[2].mlp.up_proj.weight, model.model.layers[2].mlp.up_proj.weight)
    assert report.logit_shift > 0


def test_merging_into_a_base_of_several_dtypes_keeps_each(companions: Companions, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = torch_llama(SMALL).bfloat16()
    for name, module in model.named_modules():
        if name.endswith(("norm", "embed_tokens")):
            module.float()
    save(model, tmp_path / "base", "safetensors")
    adapter = random_adapter(SMALL, LoraConfig(rank=4, alpha=6.0))
    report = write_merged(tmp_path / "merged", open_checkpoint(tmp_path / "base"), SMALL, adapter, companions)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    assert torch.equal(found["model.norm.weight"], model.model.norm.weight)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert report.logit_shift > 1e-3, "rounding to bfloat16, beyond the bound for float32"


def test_streamed_logits_equal_transformers(written: Written) -> None:
    weights = stored_weights(open_checkpoint(written.path), written.config)
    ours = streamed_logits(weights, written.config, probe_ids(written.config), None)
    np.testing.assert_allclose(ours, their_logits(written.path, written.config), atol=1e-4)


def test_the_files_other_than_weights(plain: Written, companions: Companions, tmp_path: Path) -> None:
    adapter = random_adapter(SMALL, LoraConfig())
    out = tmp_path / "merged"
    write_merged(out, open_checkpoint(plain.path), SMALL, adapter, companions, shard_bytes=30_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("model-*.safetensors"))
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == sum(2 * p.numel() for p in plain.model.parameters())
    assert (out / "tokenizer.model").read_bytes() == (companions.tokenizer / "tokenizer.model").read_bytes()
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == 2
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == JINJA
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi!"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("user's questions. USER: Hi! ASSISTANT:")


def test_an_existing_tokenizer_config_only_gains_the_template(
    plain: Written, story_llama: Path, tmp_path: Path
) -> None:
    companions = Companions(story_llama, JINJA, {})
    write_merged(tmp_path / "out", open_checkpoint(plain.path), SMALL, None, companions)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    original = json.loads((story_llama / "tokenizer_config.json").read_text())
    assert settings == {**original, "chat_template": JINJA}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (story_llama / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["plain", "tied"])
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=2, tensor=2)], ids=["one", "2×2"])
def test_trained_weights_load_in_transformers(
    config: LlamaConfig, mesh: MeshConfig, companions: Companions, tmp_path: Path
) -> None:
    model = torch_llama(config)
    save(model, tmp_path / "in", "safetensors")
    shardings = parameter_shardings(base_parameters(config), make_mesh(mesh))
    params = load_base(tmp_path / "in", config, shardings, "float32")
    report = write_model(tmp_path / "model", params, config, companions, dtype=np.dtype(np.float32))
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "model" / "config.json").read_text())["bos_token_id"] == 1
    assert report.logit_shift == 0
    write_model(tmp_path / "model", params, config, companions, dtype=np.dtype(jnp.bfloat16), replace=True)
    rounded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(rounded.state_dict()[name], t.bfloat16()) for name, t in model.state_dict().items())


def test_non_finite_weights_are_named_and_leave_nothing(companions: Companions, tmp_path: Path) -> None:
    model = torch_llama(SMALL).half()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[3, 5] = float("inf")
    save(model, tmp_path / "in", "safetensors")
    reader = open_checkpoint(tmp_path / "in")
    for write in (
        lambda: write_merged(tmp_path / "out", reader, SMALL, None, companions),
        lambda: convert(tmp_path / "out", reader, SMALL, tokenizer_source=companions.tokenizer),
    ):
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight contains infinities"):
            write()
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_failed_check_leaves_nothing_that_looks_finished(
    plain: Written, companions: Companions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = deliver.write_shards

    def flip_a_bit(directory: Path, *arguments: object) -> Iterator[tuple[str, str]]:
        for file, digest in original(directory, *arguments):
            content = bytearray((directory / file).read_bytes())
            content[-3] ^= 1
            (directory / file).write_bytes(content)
            yield file, digest

    monkeypatch.setattr(deliver, "write_shards", flip_a_bit)
    with pytest.raises(VerificationError, match=r"model\.safetensors: its bytes differ from the written"):
        write_merged(tmp_path / "out", open_checkpoint(plain.path), SMALL, None, companions)
    assert not list(tmp_path.iterdir())


def test_a_header_that_swaps_two_tensors_leaves_nothing(
    plain: Written, companions: Companions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes went through the network, and names, shapes and dtypes are the intended ones."""
    original = safetensors_file.make_header
    q_proj, o_proj = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qo")
    other = {q_proj: o_proj, o_proj: q_proj}

    def swapped(tensors: Sequence[tuple[str, tuple[int, ...], np.dtype]]) -> bytes:
        return original([(other.get(name, name), shape, dtype) for name, shape, dtype in tensors])

    monkeypatch.setattr(safetensors_file, "make_header", swapped)
    with pytest.raises(VerificationError, match="the values of other tensors"):
        write_merged(tmp_path / "out", open_checkpoint(plain.path), SMALL, None, companions)
    assert not list(tmp_path.iterdir())


def test_logits_do_not_depend_on_how_values_arrive(plain: Written) -> None:
    """Values come in blocks of uneven sizes, mixed within a layer, and with the head first, as files are sorted."""
    reader = open_checkpoint(plain.path)
    weights = stored_weights(reader, SMALL)
    rng = np.random.default_rng(0)
    blocks = []
    for tensor in merged_tensors(reader, SMALL, None):
        cuts = sorted({0, tensor.shape[0], *rng.integers(0, tensor.shape[0], 3).tolist()})
        rows = [slice(*pair) for pair in itertools.pairwise(cuts)]
        blocks += [(tensor, rows[i]) for i in rng.permutation(len(rows))]
    with LogitsAlongside(SMALL, Side(weights)) as alongside:
        for tensor, rows in blocks:
            alongside.see(tensor.name, rows, tensor.make(rows))
        meant, found = alongside.both(weights)
    np.testing.assert_array_equal(meant, found)
    # float32 with another summation order: one of the two computes both sides in one product.
    np.testing.assert_allclose(found, streamed_logits(weights, SMALL, probe_ids(SMALL), None), atol=1e-5)


def test_missing_values_are_an_error(plain: Written) -> None:
    reader = open_checkpoint(plain.path)
    weights = stored_weights(reader, SMALL)
    with LogitsAlongside(SMALL, Side(weights)) as alongside:
        for tensor in merged_tensors(reader, SMALL, None):
            if tensor.name != "model.layers.1.mlp.up_proj.weight":
                alongside.see(tensor.name, slice(0, tensor.shape[0]), tensor.make(slice(0, tensor.shape[0])))
        with pytest.raises(ValueError, match="layer 1"):
            alongside.both(weights)


@pytest.mark.parametrize("fault", ["scale", "transposed layers", "forgotten"])
def test_a_wrong_merge_is_detected_by_its_logits(
    fault: str, plain: Written, companions: Companions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = random_adapter(SMALL, LoraConfig(targets=PROJECTIONS))
    wrong = {
        "scale": dataclasses.replace(adapter, spec=ModelSpec(SMALL, adapter.lora.model_copy(update={"alpha": 32.0}))),
        "transposed layers": dataclasses.replace(adapter, params={p: v[::-1] for p, v in adapter.params.items()}),
        "forgotten": None,
    }[fault]
    original = deliver.merged_tensors
    monkeypatch.setattr(deliver, "merged_tensors", lambda r, c, _, d: original(r, c, wrong, d))
    with pytest.raises(VerificationError, match="merging shifted logits"):
        write_merged(tmp_path / "out", open_checkpoint(plain.path), SMALL, adapter, companions)
    assert not list(tmp_path.iterdir())


def damage_shape(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["parameters"]["norm/weight"]["shape"] = [49]
    (path / MANIFEST).write_text(json.dumps(manifest))


def rename_parameter(path: Path) -> None:
    text = (path / MANIFEST).read_text().replace('"norm/weight"', '"nurm/weight"')
    (path / MANIFEST).write_text(text)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: (path / MANIFEST).write_text("{"), "not valid JSON"),
        (
            lambda path: (path / MANIFEST).write_text('{"format": "other"}'),
            "expected 'flacuna_jax checkpoint' version 2",
        ),
        (damage_shape, "does not match flacuna.json"),
        (rename_parameter, "which does not exist in a LLaMA"),
        (lambda path: (path / "params" / "norm.weight.safetensors").unlink(), "cannot be read"),
        (lambda path: (path / "params" / "norm.weight.safetensors").write_bytes(b"12345678"), "torn"),
        (lambda path: (path / MANIFEST).unlink(), "contains no checkpoint"),
    ],
    ids=["torn manifest", "other format", "shape", "unknown", "lost file", "torn file", "unfinished"],
)
def test_a_damaged_converted_checkpoint_is_an_error(
    damage: object, says: str, plain: Written, companions: Companions, tmp_path: Path
) -> None:
    convert(tmp_path / "native", open_checkpoint(plain.path), SMALL, tokenizer_source=companions.tokenizer)
    match_tensors(open_checkpoint(tmp_path / "native"), SMALL)
    damage(tmp_path / "native")
    with pytest.raises(UserError) as raised:
        open_checkpoint(tmp_path / "native")
    assert says in str(raised.value)


def anonymous_memory() -> int:
    """Bytes of this process that are not pages of files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def peak_of(work: Callable[[], object]) -> int:
    before, peak, done = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return peak[0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
def test_memory_is_that_of_one_layer(tmp_path: Path, tiny_sentencepiece: Path) -> None:
    """160 MB in 24 layers; the largest stacked parameter has 35 MB, one layer of it 1.4 MB."""
    sizes = {"num_layers": 24, "hidden_size": 512, "intermediate_size": 1408, "head_dim": 64}
    config = dataclasses.replace(SMALL, num_heads=8, num_kv_heads=8, **sizes)
    noise = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float16)
    params = {path: np.resize(noise * 0.02, shape) for path, shape in ModelSpec(config).base_shapes.items()}
    source = tmp_path / "source"
    source.mkdir()
    tensors = model_tensors(params, config, np.dtype(np.float16))
    total = sum(tensor.nbytes for tensor in tensors)
    list(write_shards(source, tensors, 50_000_000))
    (source / "config.json").write_text(json.dumps(hugging_face_config(config, np.dtype(np.float16))))
    del params, tensors
    adapter = random_adapter(config, LoraConfig())
    companions = Companions(tiny_sentencepiece, None, {})

    def run(name: str) -> None:
        reader = open_checkpoint(source)
        convert(tmp_path / f"native {name}", reader, config, tokenizer_source=tiny_sentencepiece)
        write_merged(tmp_path / f"merged {name}", reader, config, adapter, companions)

    run("warm-up, which compiles")
    # One layer in float32, its pieces in half precision and the overhead of the allocator.
    assert peak_of(lambda: run("measured")) < 50_000_000 < total / 3
