"""Loads a model for inference: weights, adapter, tokenizer, mesh. Shared by the verbs that generate answers."""

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flacuna_jax.config.data import DataConfig
from flacuna_jax.config.files import load_config
from flacuna_jax.config.run import MeshConfig, RunConfig
from flacuna_jax.config.types import AUTO
from flacuna_jax.data.conversation import Template
from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.cache import directory_fingerprint
from flacuna_jax.generation.chat_model import ChatModel
from flacuna_jax.generation.engine import LlamaLanguageModel
from flacuna_jax.generation.settings import Placement
from flacuna_jax.hub import name_of
from flacuna_jax.huggingface.adapter import Adapter, read_adapter
from flacuna_jax.huggingface.answer_ends import answer_ends
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.chat_template import choose_template, describe_choice, open_template
from flacuna_jax.huggingface.files.place import hub_hint, local_checkpoint, require_directory
from flacuna_jax.huggingface.files.read import note_on_quantisation, open_checkpoint
from flacuna_jax.huggingface.files.tensors import TensorReader
from flacuna_jax.huggingface.load import load_base
from flacuna_jax.huggingface.tokenizer import check_vocabulary, has_tokenizer, load_tokenizer
from flacuna_jax.model.parameters import ModelSpec, quantize
from flacuna_jax.model.sharding import check_mesh, make_mesh, parameter_shardings
from flacuna_jax.planning.compute_dtype import choose_dtype
from flacuna_jax.run.model import with_rope_scaling
from flacuna_jax.say import say_on_stderr
from flacuna_jax.storage.local_run import local_run


@dataclasses.dataclass(frozen=True)
class ModelAddress:
    """A base model and an optional adapter on this machine. Written `DIR` or `DIR+ADAPTER`; both may be hf:NAME."""

    base: Path
    adapter: Path | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelAddress":
        base, plus, adapter = text.partition("+")
        if not base or (plus and not adapter):
            raise UserError(f"{text!r} is not a model; write DIR, or DIR+ADAPTER")
        return cls.of(base, adapter or None)

    @classmethod
    def of(cls, base: str, adapter: str | None) -> "ModelAddress":
        """Either may be a name on the Hub, or (part of) a run in a bucket: they are downloaded. Raises UserError."""
        return cls(local_checkpoint(local_run(base)), local_checkpoint(local_run(adapter)) if adapter else None)

    @property
    def name(self) -> str:
        base = name_of(self.base)
        if self.adapter is None:
            return base
        return f"{base}+{name_of(self.adapter)}"


BaseKey = tuple[Path, Path | None, ModelSpec]
"""The base, the adapter that changes it, and sizes."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model of which the base's weights are not read yet: its base, with the adapter's changes, and the adapter."""

    base: ModelSpec
    reader: TensorReader
    adapter: Adapter | None
    key: BaseKey


@dataclasses.dataclass
class ModelLoader:
    """Loads models one after another; if the next one has the same base, the base stays on the devices.

    For an adapter that was trained on a quantised base, the base is quantised the same way, unless `stored_base` is
    set.
    """

    dtype: str = "bfloat16"
    mesh: MeshConfig | str = "auto"
    placement: Placement = dataclasses.field(default_factory=Placement)
    stored_base: bool = False
    _held: tuple[BaseKey, Mapping[str, jax.Array]] | None = None

    def load(self, address: ModelAddress, name: str | None = None) -> LlamaLanguageModel:
        """Raises UserError if a directory is missing or is not a model, adapter or tokenizer of this architecture."""
        opened = self.open(address)
        base, adapter, adapter_directory = opened.base, opened.adapter, find_adapter(address.adapter)
        config = base.config
        directory = tokenizer_directory(address)
        tokenizer = load_tokenizer(directory)
        check_vocabulary(tokenizer, config.vocab_size, directory)
        mesh = make_mesh(self.mesh)
        check_mesh(mesh, config.num_heads, config.num_kv_heads, config.intermediate_size)
        spec = base if adapter is None else dataclasses.replace(base, lora=adapter.lora, tokens=adapter.spec.tokens)
        params = dict(self.base_params(opened, mesh))
        if adapter is not None:
            shardings = parameter_shardings(spec.adapters, mesh)
            params |= {key: jax.device_put(jnp.asarray(leaf), shardings[key]) for key, leaf in adapter.params.items()}
        directories = [address.base] if adapter_directory is None else [address.base, adapter_directory]
        # The run's settings for the base (positions, quantisation) are not in the files of these directories.
        fingerprint = directory_fingerprint(directories, f"flacuna {base!r}")
        return LlamaLanguageModel(
            spec,
            params,
            tokenizer,
            mesh,
            name or address.name,
            fingerprint,
            placement=self.placement,
            ends=answer_ends(None, tokenizer, address.base),
        )

    def open(self, address: ModelAddress) -> Opened:
        """Reads sizes and adapter, but not the base's weights. Raises UserError as `load` does."""
        require_directory(address.base)
        adapter_directory = find_adapter(address.adapter)
        run = _run_of(adapter_directory)
        config = read_architecture(address.base)
        quantization, held_dtype = None, self.dtype
        if run is not None:
            config = with_rope_scaling(config, run.model, run.data.max_length)
            if run.model.quantization is not None and not self.stored_base:
                # Quantise the same numbers as the run; rounding them first would give other codes.
                quantization, held_dtype = run.model.quantization, run.model.dtype
        reader: TensorReader = open_checkpoint(address.base)
        adapter = None if adapter_directory is None else read_adapter(adapter_directory, config, reader)
        if adapter is not None:
            config, reader = adapter.spec.config, adapter.base(reader)
        base = ModelSpec(config, None, self.dtype, held_dtype, quantization)
        changed_by = None if adapter is None or adapter.changes is None else adapter_directory
        return Opened(base, reader, adapter, (address.base, changed_by, base))

    def base_params(self, opened: Opened, mesh: Mesh) -> Mapping[str, jax.Array]:
        """The parameters of a base on the devices."""
        if self._held is None or self._held[0] != opened.key:
            self._held = None  # frees the base before the next one is read
            base = opened.base
            shardings = parameter_shardings(base.base, mesh)
            keep = functools.partial(quantize, base, mesh)
            held = load_base(opened.reader, base.config, shardings, base.param_dtype, keep=keep)
            self._held = (opened.key, held)
        return self._held[1]


def load_model(
    model: str | os.PathLike[str] | None = None,
    *,
    adapter: str | os.PathLike[str] | None = None,
    run: str | os.PathLike[str] | None = None,
    template: str | None = None,
    raw: bool = False,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    batch_size: int = Placement.rows,
    say: Callable[[str], None] = lambda _: None,
) -> ChatModel:
    """Loads a model with its tokenizer and template.

    Args:
      model: directory of a Hugging Face checkpoint, or of one that `flacuna convert` wrote; a GGUF file; or
        hf:NAME[@REVISION].
      adapter: directory of a PEFT adapter for it, or of the run that trained one; or hf:NAME[@REVISION].
      run: output directory of a finished training run, instead of `model` and `adapter`.
      template: name of a template, a .jinja file, or "checkpoint". None: that of the run, else of the checkpoint, else
        vicuna_v1.1.
      raw: use no template.
      dtype: of the computation, and of the weights in memory.
      batch_size: prompts that are decoded together.
      say: receives lines about the template that is used.

    Raises:
      UserError: no model, or two; a directory that is missing or is no model; a template that does not exist.
    """
    address, trained = find_model(*(None if path is None else os.fspath(path) for path in (model, adapter, run)))
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype {dtype!r} is not one of bfloat16, float32")
    loader = ModelLoader(dtype, placement=Placement(rows=batch_size))
    used = None if raw else template_of(address, template, trained, say)
    return ChatModel(loader.load(address), used)


def dtype_of(arguments: argparse.Namespace, say: Callable[[str], None] = say_on_stderr) -> str:
    """The dtype of a verb that answers: that of its option, or the one that suits the devices, which is said."""
    if arguments.dtype is not None:
        return str(arguments.dtype)
    chosen = choose_dtype(jax.local_devices())
    say(f"dtype: {chosen}")
    return chosen.name


def addressed_model(arguments: argparse.Namespace) -> tuple[ModelAddress, DataConfig | None]:
    """`find_model` with the options of a verb."""
    return find_model(arguments.model, arguments.adapter, arguments.run)


def find_model(model: str | None, adapter: str | None, run: str | None) -> tuple[ModelAddress, DataConfig | None]:
    """The address of a model, and the data settings of the run that trained it; None if the run is not known.

    Raises:
      UserError: no model or two models are given, or a run that has not finished.
    """
    if (model is None) == (run is None) or (run and adapter):
        raise UserError("give the model: --model DIR, --model DIR --adapter DIR, or --run DIR")
    if run is None:
        address = ModelAddress.of(str(model), adapter)
        return address, trained_with(find_adapter(address.adapter))
    return _model_of_run(local_run(run))


def _model_of_run(run: Path) -> tuple[ModelAddress, DataConfig]:
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} has no config.yaml; give the output directory of a training run")
    config = load_config(run / "config.yaml")
    if config.lora is None:
        return ModelAddress(_finished(run, "model")), config.data
    return ModelAddress(local_checkpoint(str(config.model.path)), _finished(run, "adapter")), config.data


def _finished(run: Path, product: str) -> Path:
    if not (run / product).is_dir():
        raise UserError(
            f"{run} has no {product}/ yet; training writes it at its end (continue the run, or use `flacuna export`)"
        )
    return run / product


def _run_of(adapter_directory: Path | None) -> RunConfig | None:
    """The settings that an adapter was trained with; None if it is not in the adapter directory of its run."""
    directory = None if adapter_directory is None else adapter_directory.absolute()
    if directory is None or directory.name != "adapter" or not (directory.parent / "config.yaml").is_file():
        return None
    return load_config(directory.parent / "config.yaml")


def trained_with(adapter_directory: Path | None) -> DataConfig | None:
    """The data settings that an adapter was trained with; None if its run is not known."""
    run = _run_of(adapter_directory)
    return None if run is None else run.data


def tokenizer_directory(address: ModelAddress) -> Path:
    """The directory of a model's tokenizer: the adapter's if it has one, as PEFT's users save it with new tokens; else
    that of the adapter's run if it still exists, else the base's."""
    adapter = find_adapter(address.adapter)
    if adapter is not None and has_tokenizer(adapter):
        return adapter
    run = _run_of(adapter)
    if run is None or run.model.tokenizer is None:
        return address.base
    configured = local_checkpoint(run.model.tokenizer, weights=False)
    return configured if configured.is_dir() else address.base


def template_of(
    address: ModelAddress, name: str | None, trained: DataConfig | None, say: Callable[[str], None]
) -> Template:
    """The template for a model: the named one, or else that of its run, the checkpoint's own, or vicuna_v1.1.

    Args:
      address: The model.
      name: Name of a template, a .jinja file, auto or checkpoint; None if the user gave none.
      trained: Data settings of the run that trained the model.
      say: Called with a line that names the template, its warnings, and how quantised weights are read.

    Raises:
      UserError: The template does not exist.
    """
    directory = tokenizer_directory(address)
    tokenizer = load_tokenizer(directory)
    if name is None and trained is not None:
        template, asked = open_template(trained, directory, tokenizer), trained.template
    else:
        template, asked = choose_template(name or AUTO, directory, tokenizer), name or AUTO
    say(f"template: {describe_choice(asked, directory)}")
    quantised = note_on_quantisation(address.base)
    for note in (*template.notes, *([quantised] if quantised else [])):
        say(f"note: {note}")
    return template


def find_adapter(path: Path | None) -> Path | None:
    """The directory of an adapter, given itself or the training run that contains it."""
    if path is None:
        return None
    path = local_checkpoint(path)
    if not path.is_dir():
        raise UserError(f"{path}: this adapter directory does not exist{hub_hint(path)}")
    return path / "adapter" if (path / "adapter").is_dir() else path
