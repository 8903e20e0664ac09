"""Writes a run as a PEFT adapter, or as a whole model in Hugging Face's or llama.cpp's form."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from flacuna_jax.config.files import load_config
from flacuna_jax.config.model import LoraConfig, ModelConfig
from flacuna_jax.config.run import RunConfig
from flacuna_jax.errors import UserError
from flacuna_jax.hub import is_hub_name
from flacuna_jax.huggingface import deliver
from flacuna_jax.huggingface.adapter import Adapter, read_adapter
from flacuna_jax.huggingface.adapter_writing import DTYPES
from flacuna_jax.huggingface.answer_ends import answer_ends
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.card import Facts
from flacuna_jax.huggingface.chat_template import load_template, open_template
from flacuna_jax.huggingface.directories import check_target
from flacuna_jax.huggingface.files.place import local_checkpoint
from flacuna_jax.huggingface.files.read import note_on_quantisation, open_checkpoint
from flacuna_jax.huggingface.files.rounded import RoundedBase
from flacuna_jax.huggingface.files.tensors import TensorReader
from flacuna_jax.huggingface.forms import SHARD_BYTES, Format, GgufType, StoredDtype
from flacuna_jax.huggingface.gguf.deliver import write_gguf
from flacuna_jax.huggingface.golden import golden_prompts
from flacuna_jax.huggingface.load import fingerprint
from flacuna_jax.huggingface.probe import probe_ids, stored_weights, streamed_logits
from flacuna_jax.huggingface.tokenizer import check_vocabulary, load_tokenizer
from flacuna_jax.huggingface.upload import prepare_upload
from flacuna_jax.huggingface.vllm_rules import vllm_options, vllm_violations
from flacuna_jax.inference import ModelAddress, find_adapter, tokenizer_directory
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.run.deliver import adapter_spec, companions, tokenizer_writer
from flacuna_jax.run.facts import run_facts
from flacuna_jax.run.model import ModelSource, open_model
from flacuna_jax.say import Say
from flacuna_jax.storage.checkpoint import list_checkpoints, restore_adapters
from flacuna_jax.storage.local_run import local_run
from flacuna_jax.verbs.convert import STORED_DTYPES


@dataclasses.dataclass(frozen=True)
class Export:
    """What `export_run` writes."""

    run: str | None
    """Output directory of a training run, finished or not. None: `adapter` and `model` are given."""
    out: str
    """Directory to create."""
    format: Format
    """A PEFT adapter, or a whole model in Hugging Face's form or as a GGUF file; a run that trained every weight has no
    adapter."""
    dtype: StoredDtype | None = None
    """Of the weights in the files. None: float32 for an adapter, that of the base for a merged model."""
    base: str | None = None
    """Where the base model is now: a directory, or hf:NAME[@REVISION]. None: at the run's model.path."""
    base_name: str | None = None
    """Name of the base in adapter_config.json and the model card. None: the run's model.name, or the base's own."""
    step: int | None = None
    """Step of a checkpoint. None: the finished adapter, or else the newest checkpoint."""
    merge_base: Literal["dequantised", "stored"] | None = None
    """For a quantised base: merge into the weights that training used (as None does), or into the stored ones."""
    check: Sequence[Literal["vllm"]] = ()
    """Servers that must be able to load the adapter."""
    results: Path | None = None
    """Output directory of `flacuna evaluate`, for the model card. None: in the run's directory."""
    golden_tokens: int = 8
    """Length of the answers in golden_prompts.json; 0 leaves the file out."""
    shard_bytes: int = SHARD_BYTES
    """Size of the largest weight file of a merged model."""
    gguf_type: GgufType | None = None
    """Type of the matrices in a GGUF file. None: bf16 for a base in bfloat16, else f16."""
    adapter: str | None = None
    """Without a run: directory of any PEFT adapter to be merged into `model`; None writes the model itself."""
    model: str | None = None
    """Without a run: a checkpoint in Hugging Face's, Meta's or the native form, or a GGUF file. Both may be
    hf:NAME[@REVISION]."""
    push: str | None = None
    """Repository on the Hub to upload `out` to after its verification, NAME[@BRANCH]; created if it does not exist."""
    public: bool = False
    """Whether a repository that is created for `push` is public."""


def export_run(export: Export, say: Say = lambda _: None) -> None:
    """Writes a training run in Hugging Face's form, reads the files back and verifies them; then uploads them if asked.

    Args:
      export: the run, the directory to create, and options.
      say: receives notes and a line about the result.

    Raises:
      UserError: the run, its base or `out` is not usable, the adapter cannot be served as `check` demands, or the Hub
        does not accept the upload; the token is checked first.
      VerificationError: the files do not hold what was to be written.
    """
    if export.format not in get_args(Format):
        raise UserError(f"format {export.format!r} is not one of {', '.join(get_args(Format))}")
    if export.public and export.push is None:
        raise UserError("--public needs --push NAME")
    if export.gguf_type is not None and export.format != "gguf":
        raise UserError("--gguf-type applies to --format gguf only")
    target = Path(export.out)
    check_target(target)
    upload = None if export.push is None else prepare_upload(export.push, public=export.public)
    _write(export, say, target)
    if upload is not None:
        say(f"pushed to {upload.send(target)}")


def _write(export: Export, say: Say, target: Path) -> None:
    if export.run is None:
        _write_model(export, say, target)
        return
    if export.adapter is not None or export.model is not None:
        raise UserError("--adapter and --model replace RUN; give either a run or a model")
    run = local_run(export.run)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} has no config.yaml; give the output directory of a training run")
    settings = load_config(run / "config.yaml")
    if settings.lora is None:
        _export_full(export, say, run, target, settings)
        return
    base = _base_directory(export, settings)
    source = open_model(settings, base, once=True)
    config, reader = source.config, source.reader
    assert reader is not None, "the base is in a directory"
    adapter, trained = _adapter(export, say, run, source, settings.lora)
    facts = run_facts(run, settings, export.results)
    model = settings.model if export.base is None else settings.model.model_copy(update={"path": export.base})
    name = export.base_name or model.base_name
    if export.format == "adapter":
        revision = model.base_revision if name == model.base_name else None
        adapter = dataclasses.replace(adapter, base_name=name, base_revision=revision)
        _export_adapter(export, say, target, adapter, trained, facts, _tokenizer_writer(settings))
    else:
        found = settings.model_copy(update={"model": model})
        beside = dataclasses.replace(_companions(export, say, found, config, facts), base_name=name)
        seen = _seen_by_training(settings, config, reader)
        if export.merge_base == "dequantised" and seen is None:
            raise UserError("--merge-base dequantised: the run's base was not quantised (model.quantization)")
        if seen is None or export.merge_base == "stored":
            _write_merged(export, say, target, reader, config, adapter, beside)
        else:
            say(f"merged into the base that training used, dequantised from {settings.model.quantization}")
            _write_merged(export, say, target, seen, config, adapter, beside)
        if seen is not None and export.merge_base == "stored":
            ids = probe_ids(config)
            bases = [stored_weights(adapter.with_rows(one), config) for one in (reader, seen)]
            logits = [streamed_logits(base, config, ids, adapter) for base in bases]
            shift = float(np.abs(logits[0] - logits[1]).max())
            say(
                f"note: the run was trained on weights dequantised from {settings.model.quantization}; with the stored "
                f"weights, which were merged here, logits differ by up to {shift:.1e}"
            )


def _write_model(export: Export, say: Say, target: Path) -> None:
    """Writes a model that need not be of one of our runs, with an adapter merged into it if one is given."""
    if export.model is None:
        raise UserError("give a run to export, or --model DIR to write any model, with --adapter DIR merged into it")
    if export.format == "adapter":
        raise UserError("--format adapter needs a run; --format merged merges an --adapter into --model")
    if (option := next((name for name in _OF_A_RUN if getattr(export, name) is not None), None)) is not None:
        raise UserError(f"--{option.replace('_', '-')} is an option for a run, not for --adapter and --model")
    base = local_checkpoint(export.model)
    adapter_directory = None if export.adapter is None else find_adapter(local_run(export.adapter))
    config = read_architecture(base)
    reader: TensorReader = open_checkpoint(base, once=True)
    adapter = None if adapter_directory is None else read_adapter(adapter_directory, config, reader)
    if adapter is not None:
        config, reader = adapter.spec.config, adapter.base(reader)
    merged = export.adapter if export.adapter is None or is_hub_name(export.adapter) else str(adapter_directory)
    directory = tokenizer_directory(ModelAddress(reader.directory, adapter_directory))
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, config.vocab_size, directory)
    template = load_template(directory, tokenizer=tokenizer)
    ends = answer_ends(template, tokenizer, reader.directory)
    beside = deliver.Companions(
        directory,
        None,
        {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id},
        ends,
        stop_strings=template.stop_strings,
        base_name=export.base_name or (adapter and adapter.base_name) or ModelConfig(path=export.model).base_name,
        facts=Facts({} if merged is None else {"adapter": merged}),
        golden=golden_prompts(template, tokenizer, config, ends, export.golden_tokens, say),
    )
    _write_merged(export, say, target, reader, config, adapter, beside)


_OF_A_RUN = ("base", "step", "merge_base", "results")


def _seen_by_training(settings: RunConfig, config: LlamaConfig, reader: TensorReader) -> TensorReader | None:
    """The dequantised base that a quantised run trained on; None if that is the stored base."""
    if settings.model.quantization is None:
        return None
    return RoundedBase(reader, config, settings.model.quantization, np.dtype(jnp.dtype(settings.model.dtype)))


def _base_directory(export: Export, settings: RunConfig) -> Path:
    base = local_checkpoint(export.base or settings.model.path or "")
    if not base.is_dir() or settings.model.path is None:
        raise UserError(f"the run's base model {str(base)!r} does not exist here; give its directory with --base DIR")
    return base


def _adapter(
    export: Export,
    say: Say,
    run: Path,
    source: ModelSource,
    lora: LoraConfig,
) -> tuple[Adapter, bool]:
    """The run's final adapter, or else that of a checkpoint, and whether it has been trained."""
    step, config, reader = export.step, source.config, source.reader
    if step is None and (run / "adapter").is_dir():
        adapter = read_adapter(run / "adapter", config)
        return adapter, adapter.is_trained
    assert export.run is not None
    assert reader is not None
    params, meta = restore_adapters(export.run, step)
    recorded = meta.get("fingerprints", {}).get("base")
    if recorded is not None and recorded != fingerprint(reader, config):
        raise UserError(
            f"{reader.directory} is not the base that {export.run} was trained on; give that with --base DIR"
        )
    step = list_checkpoints(export.run)[-1] if step is None else step
    say(f"adapter of step {step}, from {export.run.rstrip('/')}/checkpoints")
    # The first update of a warm-up can have learning rate 0.
    arrays = {path: np.asarray(value, np.float32) for path, value in params.items()}
    return Adapter(adapter_spec(source, lora), arrays), step > 1


def _tokenizer_writer(settings: RunConfig) -> Callable[[Path], None]:
    tokenizer = load_tokenizer(settings.model.tokenizer_path, settings.data.new_tokens)
    template = open_template(settings.data, settings.model.tokenizer_path, tokenizer)
    return tokenizer_writer(settings, template, tokenizer)


def _export_adapter(
    export: Export,
    say: Say,
    target: Path,
    adapter: Adapter,
    trained: bool,
    facts: Facts,
    tokenizer: Callable[[Path], None],
) -> None:
    dtype = export.dtype or "float32"
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: an adapter is stored as {' or '.join(DTYPES)}")
    for_vllm = "vllm" in export.check
    rules = vllm_violations if for_vllm else lambda _: ()
    delivery = deliver.write_adapter(
        target,
        adapter,
        adapter.spec.config,
        trained=trained,
        dtype=dtype,
        facts=facts,
        tokenizer=tokenizer,
        rules=rules,
    )
    _report(delivery, say)
    if for_vllm:
        say(f"vLLM can load it with {vllm_options(target)}")


def _export_full(export: Export, say: Say, run: Path, target: Path, settings: RunConfig) -> None:
    """Copies `model/`, which a run that trained every weight writes at its end, in another dtype if requested."""
    if export.format == "adapter":
        raise UserError(
            f"{run} trained every weight (lora: null); it has no adapter, export it with --format merged or gguf"
        )
    if export.step is not None or not (run / "model").is_dir():
        raise UserError(
            f"{run} has no model/ yet; a run that trains all weights writes it at its end, so let the run finish"
        )
    reader = open_checkpoint(run / "model", once=True)
    config = read_architecture(run / "model")
    facts = run_facts(run, settings, export.results)
    beside = dataclasses.replace(
        _companions(export, say, settings, config, facts, of=run / "model"),
        base_name=settings.model.base_name,
    )
    _write_merged(export, say, target, reader, config, None, beside)


def _write_merged(
    export: Export,
    say: Say,
    target: Path,
    reader: TensorReader,
    config: LlamaConfig,
    adapter: Adapter | None,
    beside: deliver.Companions,
) -> None:
    if export.check:
        raise UserError(f"--check {export.check[0]} applies to adapters only; `flacuna check` compares a served model")
    if note := note_on_quantisation(reader.directory):
        say(f"note: {note}")
    if export.format == "gguf":
        if export.dtype is not None:
            raise UserError(
                f"--dtype {export.dtype}: the type of the matrices in a GGUF file is given with --gguf-type"
            )
        _report(write_gguf(target, reader, config, adapter, beside, kind=export.gguf_type), say)
        return
    dtype = None if export.dtype is None else STORED_DTYPES[export.dtype]
    size = export.shard_bytes
    _report(deliver.write_merged(target, reader, config, adapter, beside, dtype=dtype, shard_bytes=size), say)


def _companions(
    export: Export,
    say: Say,
    settings: RunConfig,
    config: LlamaConfig,
    facts: Facts,
    of: Path | None = None,
) -> deliver.Companions:
    """The files to write next to the weights of a run; `of` is the model directory that a run of all weights wrote."""
    if of is not None:  # it contains the tokenizer with the run's template
        model = settings.model.model_copy(update={"path": str(of), "tokenizer": str(of)})
        data = settings.data.model_copy(update={"add_tokens": (), "add_special_tokens": ()})
        settings = settings.model_copy(update={"model": model, "data": data})
    directory = settings.model.tokenizer_path
    tokenizer = load_tokenizer(directory, settings.data.new_tokens)
    check_vocabulary(tokenizer, config.vocab_size, directory)
    template = open_template(settings.data, directory, tokenizer)
    made = companions(settings, template, tokenizer)
    golden = golden_prompts(template, tokenizer, config, made.ends, export.golden_tokens, say)
    return dataclasses.replace(made, facts=facts, golden=golden)


def _report(written: deliver.Delivery, say: Say) -> None:
    shift = "" if written.logit_shift is None else f"; rounding shifts logits by at most {written.logit_shift:.1e}"
    files = f"{len(written.files)} file{'s' if len(written.files) > 1 else ''}"
    say(f"{written.directory}: {written.size} of weights in {files}, read back and verified{shift}")
    for note in written.notes:
        say(f"note: {note}")
