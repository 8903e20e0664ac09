"""`flacuna export RUN OUT --format adapter|merged`: a training run as a PEFT adapter or a whole Hugging Face model."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flacuna_jax.cli import run_verb
from flacuna_jax.config import LoraConfig, RunConfig
from flacuna_jax.config_files import load_config
from flacuna_jax.convert import STORED_DTYPES
from flacuna_jax.data.conversation import TEMPLATES
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import deliver
from flacuna_jax.huggingface.adapter import Adapter, read_adapter
from flacuna_jax.huggingface.adapter_writing import DTYPES
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.directories import check_target
from flacuna_jax.huggingface.load import fingerprint
from flacuna_jax.huggingface.merged import SHARD_BYTES
from flacuna_jax.huggingface.read import open_checkpoint
from flacuna_jax.huggingface.tensors import TensorReader
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.training.checkpoint import list_checkpoints, restore_adapters


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = _parser().parse_args(argv)
    run, target = Path(arguments.run), Path(arguments.out)
    check_target(target)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} has no config.yaml; the output directory of a training run is expected")
    settings = load_config(run / "config.yaml")
    if settings.lora is None:
        _export_full(arguments, run, target, settings)
        return None
    base = _base_directory(arguments, settings)
    config = read_architecture(base)
    reader = open_checkpoint(base)
    adapter, trained = _adapter(run, arguments.step, settings, settings.lora, config, reader)
    if arguments.format == "adapter":
        _export_adapter(
            arguments, target, adapter, config, trained, arguments.base_name or settings.model.name or str(base)
        )
    else:
        dtype = None if arguments.dtype is None else STORED_DTYPES[arguments.dtype]
        _report(
            deliver.write_merged(
                target, reader, config, adapter, _companions(settings), dtype=dtype, shard_bytes=arguments.shard_bytes
            )
        )
    return None


def _base_directory(arguments: argparse.Namespace, settings: RunConfig) -> Path:
    base = Path(arguments.base or settings.model.path or "")
    if not base.is_dir() or settings.model.path is None:
        raise UserError(f"the run's base model {str(base)!r} is not here; say where it is with --base DIR")
    return base


def _adapter(
    run: Path,
    step: int | None,
    settings: RunConfig,
    lora: LoraConfig,
    config: LlamaConfig,
    reader: TensorReader,
) -> tuple[Adapter, bool]:
    """The run's adapter, and whether it has been trained: the final one, else that of a checkpoint."""
    if step is None and (run / "adapter").is_dir():
        adapter = read_adapter(run / "adapter", config)
        return adapter, any(np.any(value) for path, value in adapter.params.items() if path.endswith("lora_b"))
    params, meta = restore_adapters(run, step)
    recorded = meta.get("fingerprints", {}).get("base")
    if recorded is not None and recorded != fingerprint(reader, config):
        raise UserError(f"{reader.directory} is not the base that {run} was trained on; give that with --base DIR")
    step = list_checkpoints(run)[-1] if step is None else step
    print(f"adapter of step {step}, from {run / 'checkpoints'}")
    # The first update of a warm-up can have learning rate 0.
    return Adapter(lora, {path: np.asarray(value, np.float32) for path, value in params.items()}), step > 1


def _export_adapter(
    arguments: argparse.Namespace, target: Path, adapter: Adapter, config: LlamaConfig, trained: bool, base_name: str
) -> None:
    dtype = arguments.dtype or "float32"
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: an adapter is stored as {' or '.join(DTYPES)}")
    named = Adapter(adapter.lora, adapter.params, base_name)
    _report(deliver.write_adapter(target, named, config, trained=trained, dtype=dtype))


def _export_full(arguments: argparse.Namespace, run: Path, target: Path, settings: RunConfig) -> None:
    """A run that trained every weight ends in `model/`, which is copied, in another dtype if asked for."""
    if arguments.format == "adapter":
        raise UserError(f"{run} trained every weight (lora: null); it has no adapter, export it with --format merged")
    if arguments.step is not None or not (run / "model").is_dir():
        raise UserError(f"{run} has no model/ yet, which a run of all weights writes at its end; let it finish")
    dtype = None if arguments.dtype is None else STORED_DTYPES[arguments.dtype]
    reader = open_checkpoint(run / "model")
    config = read_architecture(run / "model")
    companions = deliver.Companions(run / "model", None, {})
    _report(
        deliver.write_merged(target, reader, config, None, companions, dtype=dtype, shard_bytes=arguments.shard_bytes)
    )


def _companions(settings: RunConfig) -> deliver.Companions:
    directory = Path(settings.model.tokenizer_path)
    tokenizer = load_tokenizer(directory)
    token_ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return deliver.Companions(directory, TEMPLATES[settings.data.template].jinja, token_ids)


def _report(written: deliver.Delivery) -> None:
    shift = "" if written.logit_shift is None else f"; rounding shifts logits by at most {written.logit_shift:.1e}"
    print(
        f"{written.directory}: {written.nbytes / 1e9:.3g} GB of weights in {len(written.files)} files, "
        f"read back and verified{shift}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flacuna export", description="Writes a run as a PEFT adapter or a merged Hugging Face model, verified."
    )
    parser.add_argument("run", metavar="RUN", help="output directory of a training run")
    parser.add_argument("out", metavar="OUT", help="directory to create")
    parser.add_argument("--format", required=True, choices=("adapter", "merged"))
    parser.add_argument("--dtype", choices=sorted(STORED_DTYPES), help="default: adapter float32, merged as the base")
    parser.add_argument(
        "--base-name", help="base model as adapter_config.json should name it; default: model.name, or its path"
    )
    parser.add_argument("--base", metavar="DIR", help="where the base model is now, if not at the config's model.path")
    parser.add_argument(
        "--step", type=int, help="a checkpoint's step; default: the finished adapter, or the newest one"
    )
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="largest weight file of a merged model")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
