"""Exports a model as a GGUF file with a Modelfile, and verifies it before the directory gets its final name."""

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.huggingface.answer_ends import checkpoint_ends
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.chat_template import read_chat_template
from flacuna_jax.huggingface.deliver import Companions, Delivery, describe, write_companions
from flacuna_jax.huggingface.directories import whole_directory
from flacuna_jax.huggingface.files.read import CheckpointReader, open_checkpoint
from flacuna_jax.huggingface.files.tensors import BFLOAT16, TensorReader, cast
from flacuna_jax.huggingface.forms import GgufType
from flacuna_jax.huggingface.gguf.architectures import architecture_of
from flacuna_jax.huggingface.gguf.modelfile import Around, jinja_renderer, modelfile, texts_around
from flacuna_jax.huggingface.gguf.settings import metadata_of
from flacuna_jax.huggingface.gguf.tensors import read_tensors
from flacuna_jax.huggingface.gguf.tokenizer_metadata import tokenizer_metadata
from flacuna_jax.huggingface.gguf.unpack import unpack
from flacuna_jax.huggingface.gguf.write import FLOAT, WrittenTensor, write_file, written_tensors
from flacuna_jax.huggingface.merged import main_dtype, merged_tensors
from flacuna_jax.huggingface.probe import Side, StreamedModel, probe_ids, stored_weights
from flacuna_jax.huggingface.tokenizer import PROBES, AnyTokenizer, load_tokenizer
from flacuna_jax.huggingface.verify import VerificationError, verify_digest, verify_merge
from flacuna_jax.model.llama import LlamaConfig

FILE, MODELFILE = "model.gguf", "Modelfile"
_ROUNDED: Mapping[str, np.dtype] = {"f16": np.dtype(np.float16), "bf16": BFLOAT16}


def write_gguf(
    target: str | Path,
    reader: TensorReader,
    config: LlamaConfig,
    adapter: Adapter | None,
    companions: Companions,
    *,
    kind: GgufType | None = None,
) -> Delivery:
    """Writes and verifies base + adapter as a GGUF file.

    The file is read back like any other checkpoint: its settings must be those of the model, and its logits those of
    the base with its adapter, up to rounding.

    Args:
      target: new directory.
      reader: the base that the adapter is added to (`Adapter.base`).
      config: its architecture.
      adapter: the adapter to merge; None for the base itself.
      companions: tokenizer, chat template, model card.
      kind: type of the matrices. None: bf16 if most of the base is bfloat16, else f16.

    Raises:
      UserError: the target already exists, or GGUF cannot express the model or its tokenizer.
      VerificationError: the written file differs from the intended content; nothing is left behind.
    """
    architecture, started = architecture_of(config), time.monotonic()
    if kind is None:
        kind = "bf16" if main_dtype(merged_tensors(reader, config, None)) == BFLOAT16 else "f16"
    if adapter is not None:
        reader = adapter.with_rows(reader)
    pending = merged_tensors(reader, config, adapter, FLOAT)
    tensors = written_tensors(pending, architecture, config, kind)
    with whole_directory(target) as partial, tempfile.TemporaryDirectory() as temporary:
        meant, opened = Path(temporary) / "meant", Path(temporary) / "opened"
        meant.mkdir()
        write_companions(meant, config, FLOAT, reader.directory, companions)
        of_tokenizer = tokenizer_metadata(meant, config.vocab_size, origin=companions.tokenizer)
        described = metadata_of(config, architecture) | of_tokenizer
        name = Path(companions.base_name or reader.directory).name
        general = {"general.type": "model", "general.name": name}
        digest = write_file(partial / FILE, architecture.name, {**general, **described}, tensors, kind)
        verify_digest(partial / FILE, digest)
        unpack(partial / FILE, opened)
        notes = _verify(opened, config, tensors, kind, meant)
        shift = _logit_shift(opened, config, Side(stored_weights(reader, config), adapter), kind)
        lora = None if adapter is None else adapter.lora
        notes += describe(partial, opened, config, companions, lora, shift, time.monotonic() - started, FILE)
        notes += _write_modelfile(partial, meant, companions)
    return Delivery(Path(target), (FILE,), sum(tensor.nbytes for tensor in tensors), shift, tuple(notes))


def _verify(
    opened: Path, config: LlamaConfig, tensors: Sequence[WrittenTensor], kind: GgufType, meant: Path
) -> list[str]:
    """Compares settings, tensors and tokenizer of the file with those that were meant; returns notes."""
    found, architecture = read_architecture(opened), architecture_of(config)
    written = dataclasses.replace(config, family=found.family)
    if architecture.whole_every is None:
        written = dataclasses.replace(written, sliding_window=None, windowed_layers=None)
    if _in_float32(found) != _in_float32(written):
        raise VerificationError(f"{opened}: the metadata read back give {found}")
    reader = CheckpointReader(opened, read_tensors(opened, found))
    wanted = {tensor.source.name: tensor.source.shape for tensor in tensors if tensor.source.name in reader}
    if {name: reader.shape(name) for name in reader} != wanted:
        raise VerificationError(f"{opened}: the tensors read back are not those that were written")
    _verify_values(reader, tensors)
    notes = []
    if other := [tensor for tensor in tensors if len(tensor.source.shape) > 1 and tensor.kind != kind.upper()]:
        notes.append(f"{len(other)} matrices are {other[0].kind}, because their rows are not whole blocks of {kind}")
    if config.sliding_window is not None and not architecture.whole_every:
        notes.append(f"llama.cpp does not apply the window of {config.sliding_window} tokens; keep inputs below it")
    if lost := set(checkpoint_ends(meant)) - set(checkpoint_ends(opened)):
        notes.append(f"GGUF files can name three tokens that end an answer; {sorted(lost)} are only in {MODELFILE}")
    ours, theirs = load_tokenizer(meant), load_tokenizer(opened)
    if differing := _first_difference(ours, theirs):
        notes.append(f"the tokenizer of the file encodes {differing!r} to other ids than that of the model")
    return notes


def _in_float32(config: LlamaConfig) -> Mapping[str, Any]:
    """The sizes, with numbers rounded as in the metadata."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(entry) for key, entry in value.items()}
        if isinstance(value, tuple):
            return tuple(map(rounded, value))
        return float(np.float32(value)) if isinstance(value, float) else value

    return rounded(dataclasses.asdict(config))


def _first_difference(ours: AnyTokenizer, theirs: AnyTokenizer) -> str | None:
    return next((text for text in PROBES if ours.encode(text) != theirs.encode(text)), None)


def _verify_values(reader: TensorReader, tensors: Sequence[WrittenTensor]) -> None:
    """Compares the values of the file with those that were meant."""
    for tensor in tensors:
        if tensor.source.name not in reader:  # divisors of rotary frequencies, which are in the settings
            continue
        for rows in tensor.blocks():
            meant, found = tensor.source.make(rows), cast(reader.read(tensor.source.name, rows), FLOAT)
            if not np.all(np.abs(meant - found) <= tensor.largest_error(meant)):
                raise VerificationError(f"{tensor.name} read back differs by more than rounding to {tensor.kind}")


def _logit_shift(opened: Path, config: LlamaConfig, meant: Side, kind: GgufType) -> float:
    """The largest shift of a logit.

    The steps of q8_0 depend on the largest of 32 values, so that single logits shift more than in half precision; their
    root mean square may shift by a quarter of their standard deviation (a ninth in SmolLM2), where a wrong merge shifts
    them by their own size.
    """
    ids = probe_ids(config)
    sides = [meant, Side(stored_weights(open_checkpoint(opened), config))]
    intended, found = StreamedModel(sides, config, batch=1, slots=len(ids)).extend(ids[None])
    if kind != "q8_0":
        return verify_merge(opened, intended, found, [_ROUNDED[kind]])
    shift, bound = float(np.sqrt(np.mean((intended - found) ** 2))), 0.25 * float(np.std(intended))
    if not shift <= bound:
        raise VerificationError(f"{opened}: logits shifted by {shift:.2e} (root mean square), more than {bound:.2e}")
    return float(np.abs(intended - found).max())


def _write_modelfile(partial: Path, meant: Path, companions: Companions) -> list[str]:
    tokenizer, found = load_tokenizer(meant), read_chat_template(meant)
    special = tokenizer.special
    around: Around | None = None
    notes = []
    if found is not None:
        variables = {
            **special.variables,
            "eos_token": special.eos,
            **({"bos_token": special.bos} if special.bos else {}),
        }
        bos = special.bos if tokenizer.prefix_ids else None
        around = texts_around(jinja_renderer(found.sources["default"], variables, bos))
        if around is None:
            notes.append(
                f"{MODELFILE} has no TEMPLATE, because a Go template cannot do what the chat template does; "
                "check what Ollama uses instead, with `flacuna check --server`"
            )
    ends = companions.ends or (tokenizer.eos_id,)
    stops = [special.spellings[end] for end in ends if end in special.spellings]
    content = modelfile(FILE, around, list(dict.fromkeys([*stops, *companions.stop_strings])))
    (partial / MODELFILE).write_text(content, encoding="utf-8")
    return notes
