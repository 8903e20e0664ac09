"""A model for inference from its directories: weights, adapter, tokenizer, mesh. Shared by the verbs that answer."""

import argparse
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from flacuna_jax.config import MeshConfig, RunConfig
from flacuna_jax.config_files import load_config
from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.cache import directory_fingerprint
from flacuna_jax.evaluation.flax_model import LlamaLanguageModel, Placement
from flacuna_jax.huggingface.adapter import read_adapter
from flacuna_jax.huggingface.architecture import read_architecture, read_json
from flacuna_jax.huggingface.load import load_base
from flacuna_jax.huggingface.place import require_directory
from flacuna_jax.huggingface.tokenizer import check_vocabulary, load_tokenizer
from flacuna_jax.model.parameters import ModelSpec, quantize
from flacuna_jax.model.sharding import check_mesh, make_mesh, parameter_shardings
from flacuna_jax.model_source import with_rope_scaling
from flacuna_jax.training.local_run import local_run

DEFAULT_TEMPLATE = "vicuna_v1.1"
"""Of what no run is known to have trained."""


@dataclasses.dataclass(frozen=True)
class ModelAddress:
    """A base, and the adapter on it if there is one. Written `DIR` or `DIR+ADAPTER`."""

    base: Path
    adapter: Path | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelAddress":
        base, plus, adapter = text.partition("+")
        if not base or (plus and not adapter):
            raise UserError(f"{text!r} names no model; write DIR, or DIR+ADAPTER")
        return cls.of(base, adapter or None)

    @classmethod
    def of(cls, base: str, adapter: str | None) -> "ModelAddress":
        """Either may be (of) a run in a bucket, which is copied. Raises UserError."""
        return cls(local_run(base), local_run(adapter) if adapter else None)

    @property
    def name(self) -> str:
        base = self.base.absolute().name  # "." has none
        if self.adapter is None:
            return base
        run = self.adapter.absolute()
        return f"{base}+{run.parent.name if run.name == 'adapter' else run.name}"


@dataclasses.dataclass
class ModelLoader:
    """Loads models one after another; a base that the next one shares stays on the devices.

    The adapter of a run whose base was quantised goes on the base as that run saw it, unless `stored_base` is set.
    """

    dtype: str = "bfloat16"
    mesh: MeshConfig | str = "auto"
    placement: Placement = dataclasses.field(default_factory=Placement)
    stored_base: bool = False
    _held: tuple[tuple[Path, ModelSpec], Mapping[str, jax.Array]] | None = None

    def load(self, address: ModelAddress, name: str | None = None) -> LlamaLanguageModel:
        """Raises UserError where a directory is missing or is no model, adapter or tokenizer of this architecture."""
        require_directory(address.base)
        adapter_directory = _adapter_directory(address.adapter)
        run = _run_of(adapter_directory)
        config = read_architecture(address.base)
        quantization, held_dtype = None, self.dtype
        if run is not None:
            config = with_rope_scaling(config, run.model, run.data.max_length)
            if run.model.quantization is not None and not self.stored_base:
                # From the numbers that the run quantised: other roundings before it would give other codes.
                quantization, held_dtype = run.model.quantization, run.model.dtype
        tokenizer = load_tokenizer(address.base)
        check_vocabulary(tokenizer, config.vocab_size, address.base)
        adapter = None if adapter_directory is None else read_adapter(adapter_directory, config)
        mesh = make_mesh(self.mesh)
        check_mesh(mesh, config.num_heads, config.num_kv_heads, config.intermediate_size)
        base = ModelSpec(config, None, self.dtype, held_dtype, quantization)
        spec = dataclasses.replace(base, lora=None if adapter is None else adapter.lora)
        if self._held is None or self._held[0] != (address.base, base):
            self._held = None  # frees the base before the next one is read
            shardings = parameter_shardings(base.base_shapes, mesh)
            keep = functools.partial(quantize, base, mesh)
            self._held = ((address.base, base), load_base(str(address.base), config, shardings, held_dtype, keep=keep))
        params = dict(self._held[1])
        if adapter is not None:
            shardings = parameter_shardings(spec.lora_shapes, mesh)
            params |= {key: jax.device_put(jnp.asarray(leaf), shardings[key]) for key, leaf in adapter.params.items()}
        directories = [address.base] if adapter_directory is None else [address.base, adapter_directory]
        # What a run's settings make of the base (positions, quantisation) stands in no file of these directories.
        fingerprint = directory_fingerprint(directories, f"flacuna {base!r}")
        return LlamaLanguageModel(
            spec, params, tokenizer, mesh, name or address.name, fingerprint, placement=self.placement
        )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What `addressed_model` reads."""
    parser.add_argument("--run", metavar="DIR", help="a training run: its base, its adapter and its template")
    parser.add_argument("--model", metavar="DIR", help="or a Hugging Face LLaMA directory, or a converted one")
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT adapter on that model, or the run that made one")


def addressed_model(arguments: argparse.Namespace) -> tuple[ModelAddress, str | None]:
    """Where the model is, and the template that its run trained it with; None where no run is named.

    Raises:
      UserError: the options name no model, or two, or a run that has not ended.
    """
    if (arguments.model is None) == (arguments.run is None) or (arguments.run and arguments.adapter):
        raise UserError("say which model: --model DIR, --model DIR --adapter DIR, or --run DIR")
    if arguments.run is None:
        return ModelAddress.of(arguments.model, arguments.adapter), None
    run = local_run(arguments.run)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} has no config.yaml; the output directory of a training run is expected")
    config = load_config(run / "config.yaml")
    if config.lora is None:
        return ModelAddress(_finished(run, "model")), config.data.template
    return ModelAddress(Path(str(config.model.path)), _finished(run, "adapter")), config.data.template


def _finished(run: Path, product: str) -> Path:
    if not (run / product).is_dir():
        raise UserError(
            f"{run} has no {product}/ yet; it is written when training ends (continue it, or `flacuna export`)"
        )
    return run / product


def add_base_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stored-base",
        action="store_true",
        help="put a run's adapter on the base as it is stored, also where the run quantised it (model.quantization)",
    )


def _run_of(adapter_directory: Path | None) -> RunConfig | None:
    """The settings that an adapter was trained with; None where it does not lie, under its name, in its run."""
    directory = None if adapter_directory is None else adapter_directory.absolute()
    if directory is None or directory.name != "adapter" or not (directory.parent / "config.yaml").is_file():
        return None
    return load_config(directory.parent / "config.yaml")


def eos_text(directory: Path) -> str:
    """How a model directory's tokenizer spells EOS."""
    path = directory / "tokenizer_config.json"
    spelled = read_json(path).get("eos_token") if path.is_file() else None
    if isinstance(spelled, dict):
        spelled = spelled.get("content")
    return spelled if isinstance(spelled, str) and spelled else "</s>"


def _adapter_directory(path: Path | None) -> Path | None:
    """An adapter's own directory, or that of a training run."""
    if path is None:
        return None
    if not path.is_dir():
        raise UserError(f"{path}: no such adapter directory")
    return path / "adapter" if (path / "adapter").is_dir() else path
