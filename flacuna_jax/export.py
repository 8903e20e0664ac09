"""`flacuna export RUN OUT --format adapter|merged`: writes a run as a PEFT adapter or a whole Hugging Face model."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from flacuna_jax.arguments import Parser, whole
from flacuna_jax.cli import run_verb
from flacuna_jax.config.files import load_config
from flacuna_jax.config.schema import LoraConfig, RunConfig
from flacuna_jax.convert import STORED_DTYPES
from flacuna_jax.data.conversation import Template, Turn, render_prompt, render_text
from flacuna_jax.data.tokenization import Tokenizer, tokenize_prompt
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import deliver
from flacuna_jax.huggingface.adapter import Adapter, read_adapter
from flacuna_jax.huggingface.adapter_writing import DTYPES
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.card import Facts
from flacuna_jax.huggingface.chat_template import open_template
from flacuna_jax.huggingface.directories import check_target
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.files.rounded import RoundedBase
from flacuna_jax.huggingface.files.tensors import TensorReader
from flacuna_jax.huggingface.golden import Golden, Prompt
from flacuna_jax.huggingface.load import fingerprint
from flacuna_jax.huggingface.merged import SHARD_BYTES
from flacuna_jax.huggingface.probe import probe_ids, stored_weights, streamed_logits
from flacuna_jax.huggingface.tokenizer import check_vocabulary, load_tokenizer
from flacuna_jax.huggingface.vllm_rules import vllm_options, vllm_violations
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.run.deliver import companions
from flacuna_jax.run.facts import run_facts
from flacuna_jax.run.model import network_sizes
from flacuna_jax.storage.checkpoint import list_checkpoints, restore_adapters
from flacuna_jax.storage.local_run import local_run


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = _parser().parse_args(argv)
    run, target = local_run(arguments.run), Path(arguments.out)
    check_target(target)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} has no config.yaml; give the output directory of a training run")
    settings = load_config(run / "config.yaml")
    if settings.lora is None:
        _export_full(arguments, run, target, settings)
        return None
    base = _base_directory(arguments, settings)
    config = network_sizes(settings.model, settings.data.max_length, base)
    reader = open_checkpoint(base, once=True)
    adapter, trained = _adapter(arguments, run, settings, settings.lora, config, reader)
    facts = run_facts(run, settings, arguments.results)
    name = arguments.base_name or settings.model.name or str(base)
    if arguments.format == "adapter":
        _export_adapter(arguments, target, dataclasses.replace(adapter, base_name=name), config, trained, facts)
    else:
        beside = dataclasses.replace(_companions(arguments, settings, config, facts), base_name=name)
        seen = _seen_by_training(settings, config, reader)
        if arguments.merge_base == "dequantised" and seen is None:
            raise UserError("--merge-base dequantised: the run's base was not quantised (model.quantization)")
        if seen is None or arguments.merge_base == "stored":
            _write_merged(arguments, target, reader, config, adapter, beside)
        else:
            print(f"merged into the base that training used, dequantised from {settings.model.quantization}")
            _write_merged(arguments, target, seen, config, adapter, beside)
        if seen is not None and arguments.merge_base == "stored":
            ids = probe_ids(config)
            logits = [streamed_logits(stored_weights(one, config), config, ids, adapter) for one in (reader, seen)]
            shift = float(np.abs(logits[0] - logits[1]).max())
            print(
                f"note: the run was trained on weights dequantised from {settings.model.quantization}; with the stored "
                f"weights, which were merged here, logits differ by up to {shift:.1e}"
            )
    return None


def _seen_by_training(settings: RunConfig, config: LlamaConfig, reader: TensorReader) -> TensorReader | None:
    """The dequantised base that a quantised run trained on; None if that is the stored base."""
    if settings.model.quantization is None:
        return None
    return RoundedBase(reader, config, settings.model.quantization, np.dtype(jnp.dtype(settings.model.dtype)))


def _base_directory(arguments: argparse.Namespace, settings: RunConfig) -> Path:
    base = Path(arguments.base or settings.model.path or "")
    if not base.is_dir() or settings.model.path is None:
        raise UserError(f"the run's base model {str(base)!r} does not exist here; give its directory with --base DIR")
    return base


def _adapter(
    arguments: argparse.Namespace,
    run: Path,
    settings: RunConfig,
    lora: LoraConfig,
    config: LlamaConfig,
    reader: TensorReader,
) -> tuple[Adapter, bool]:
    """The run's final adapter, or else that of a checkpoint, and whether it has been trained."""
    step = arguments.step
    if step is None and (run / "adapter").is_dir():
        adapter = read_adapter(run / "adapter", config)
        return adapter, adapter.is_trained
    params, meta = restore_adapters(arguments.run, step)
    recorded = meta.get("fingerprints", {}).get("base")
    if recorded is not None and recorded != fingerprint(reader, config):
        raise UserError(
            f"{reader.directory} is not the base that {arguments.run} was trained on; give that with --base DIR"
        )
    step = list_checkpoints(arguments.run)[-1] if step is None else step
    print(f"adapter of step {step}, from {arguments.run.rstrip('/')}/checkpoints")
    # The first update of a warm-up can have learning rate 0.
    arrays = {path: np.asarray(value, np.float32) for path, value in params.items()}
    return Adapter(ModelSpec(config, lora), arrays), step > 1


def _export_adapter(
    arguments: argparse.Namespace, target: Path, adapter: Adapter, config: LlamaConfig, trained: bool, facts: Facts
) -> None:
    dtype = arguments.dtype or "float32"
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: an adapter is stored as {' or '.join(DTYPES)}")
    for_vllm = "vllm" in arguments.check
    rules = vllm_violations if for_vllm else lambda _: ()
    _report(deliver.write_adapter(target, adapter, config, trained=trained, dtype=dtype, facts=facts, rules=rules))
    if for_vllm:
        print(f"vLLM can load it with {vllm_options(target)}")


def _export_full(arguments: argparse.Namespace, run: Path, target: Path, settings: RunConfig) -> None:
    """Copies `model/`, which a run that trained every weight writes at its end, in another dtype if requested."""
    if arguments.format == "adapter":
        raise UserError(f"{run} trained every weight (lora: null); it has no adapter, export it with --format merged")
    if arguments.step is not None or not (run / "model").is_dir():
        raise UserError(
            f"{run} has no model/ yet; a run that trains all weights writes it at its end, so let the run finish"
        )
    reader = open_checkpoint(run / "model", once=True)
    config = read_architecture(run / "model")
    facts = run_facts(run, settings, arguments.results)
    beside = dataclasses.replace(
        _companions(arguments, settings, config, facts, of=run / "model"),
        base_name=settings.model.name or settings.model.path,
    )
    _write_merged(arguments, target, reader, config, None, beside)


def _write_merged(
    arguments: argparse.Namespace,
    target: Path,
    reader: TensorReader,
    config: LlamaConfig,
    adapter: Adapter | None,
    beside: deliver.Companions,
) -> None:
    if arguments.check:
        raise UserError(
            f"--check {arguments.check[0]} applies to adapters only; `flacuna check` compares a served model"
        )
    dtype = None if arguments.dtype is None else STORED_DTYPES[arguments.dtype]
    _report(
        deliver.write_merged(target, reader, config, adapter, beside, dtype=dtype, shard_bytes=arguments.shard_bytes)
    )


def _companions(
    arguments: argparse.Namespace,
    settings: RunConfig,
    config: LlamaConfig,
    facts: Facts,
    of: Path | None = None,
) -> deliver.Companions:
    """The files to write next to the weights of a run; `of` is the model directory that a run of all weights wrote."""
    if of is not None:  # it contains the tokenizer with the run's template
        model = settings.model.model_copy(update={"path": str(of), "tokenizer": str(of)})
        settings = settings.model_copy(update={"model": model})
    directory = Path(settings.model.tokenizer_path)
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, config.vocab_size, directory)
    template = open_template(settings.data, directory, tokenizer)
    made = companions(settings, template, tokenizer)
    golden = _golden(template, tokenizer, config, made.ends, arguments.golden_tokens)
    return dataclasses.replace(made, facts=facts, golden=golden)


QUESTIONS = ("Why is the sky blue?", "Name three colours.", "Write one sentence about rain.")
"""Questions of the golden prompts; short, because the exporting machine answers them with the written model."""


def _golden(
    template: Template, tokenizer: Tokenizer, config: LlamaConfig, ends: tuple[int, ...], count: int
) -> Golden | None:
    prompts = []
    for question in QUESTIONS if count else ():
        turns = (Turn("user", question),)
        ids = tokenize_prompt(turns, template, tokenizer)
        if len(ids) + count <= config.max_position_embeddings:
            text = render_text(render_prompt(turns, template))
            added = "".join(tokenizer.special.spellings[token] for token in tokenizer.prefix_ids)
            prompts.append(Prompt(question, text.removeprefix(added), tuple(ids)))
    if count and len(prompts) < len(QUESTIONS):
        print(
            f"note: {len(prompts)} of {len(QUESTIONS)} golden prompts; the others and {count} tokens exceed the context"
        )
    return Golden(tuple(prompts), count, ends, tokenizer.decode, _announce) if prompts else None


def _announce(seconds: float) -> None:
    if seconds > 60:
        print(f"answering golden prompts takes up to {seconds / 60:.0f} min; --golden-tokens 0 skips this")


def _report(written: deliver.Delivery) -> None:
    shift = "" if written.logit_shift is None else f"; rounding shifts logits by at most {written.logit_shift:.1e}"
    files = f"{len(written.files)} file{'s' if len(written.files) > 1 else ''}"
    print(f"{written.directory}: {written.size} of weights in {files}, read back and verified{shift}")
    for note in written.notes:
        print(f"note: {note}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("export", "Writes a run as a PEFT adapter or a merged Hugging Face model, and verifies it.")
    parser.add_argument("run", metavar="RUN", help="output directory of a training run")
    parser.add_argument("out", metavar="OUT", help="directory to create")
    parser.add_argument("--format", required=True, choices=("adapter", "merged"))
    parser.add_argument(
        "--dtype",
        choices=sorted(STORED_DTYPES),
        help="default: float32 for an adapter, the base's dtype for a merged model",
    )
    parser.add_argument(
        "--base-name", help="name of the base model in adapter_config.json; default: model.name, or its path"
    )
    parser.add_argument(
        "--merge-base",
        choices=("dequantised", "stored"),
        help="for a run with a quantised base: merge into the dequantised weights of training (default), or into "
        "those of the checkpoint, and report how much logits change",
    )
    parser.add_argument("--base", metavar="DIR", help="directory of the base model; default: the config's model.path")
    parser.add_argument(
        "--step",
        type=int,
        help="step of the checkpoint to export; default: the final adapter, or the newest checkpoint",
    )
    parser.add_argument(
        "--check", choices=("vllm",), action="append", default=[], help="fail if vLLM could not serve the adapter"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="output of `flacuna evaluate` for the model card; default: results in RUN",
    )
    parser.add_argument(
        "--golden-tokens",
        type=whole(0),
        default=8,
        metavar="N",
        help="tokens per answer in golden_prompts.json, each of which reads all weights once; 0 omits the file",
    )
    parser.add_argument(
        "--shard-bytes", type=whole(1), default=SHARD_BYTES, help="maximum size of a weight file of a merged model"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
