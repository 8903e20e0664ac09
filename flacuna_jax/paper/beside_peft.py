"""`python -m flacuna_jax.paper.beside_peft --config C --steps N --output F`: the first steps of a LoRA run, and PEFT's.

Both sides get the same initial adapter, batches and schedule, without dropout, in float32. PEFT's side sees every
document alone, without packing and padding, and uses torch's AdamW and gradient clipping. Needs torch, transformers and
peft. The file has one loss per step and side.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from flacuna_jax.arguments import Parser, whole
from flacuna_jax.cli import run_verb
from flacuna_jax.config.files import load_config
from flacuna_jax.config.run import RunConfig
from flacuna_jax.data.pipeline import BatchStream, StepSource
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.huggingface.adapter_writing import write_adapter_files
from flacuna_jax.model.sharding import batch_sharding
from flacuna_jax.run.setup import Setup, open_parts, set_up
from flacuna_jax.run.start import fresh_state
from flacuna_jax.say import say_on_stderr
from flacuna_jax.training.step import make_step
from flacuna_jax.whole_files import write_atomically


@dataclasses.dataclass(frozen=True)
class Document:
    """One packed document: its tokens, and the positions whose next token has loss."""

    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]
    has_loss: NDArray[np.bool_]


def main(argv: Sequence[str] | None = None) -> int | None:
    parser = Parser("paper.beside_peft", __doc__)
    parser.add_argument("--config", required=True, metavar="YAML", help="a training config with lora")
    parser.add_argument("--steps", type=whole(1), required=True)
    parser.add_argument("--output", required=True, metavar="JSON")
    arguments, overrides = parser.parse_with_overrides(argv)
    config = load_config(arguments.config, [*overrides, "--lora.dropout=0.0", "--model.dtype=float32"])
    if config.lora is None:
        raise UserError(f"{arguments.config}: lora is null; the comparison is of adapters")
    setup = set_up(open_parts(config), say_on_stderr)
    if arguments.steps > setup.plan.total_steps:
        raise UserError(f"--steps {arguments.steps}: the run has {setup.plan.total_steps} steps")
    source = StepSource(setup.store, setup.plan, 0, 1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        ours = our_losses(setup, source, arguments.steps, Path(directory))
        middle = time.monotonic()
        theirs = peft_losses(config, setup, source, arguments.steps, Path(directory))
    seconds = {"ours": middle - began, "peft": time.monotonic() - middle}
    found = {"ours": ours, "peft": theirs, "seconds": seconds, "versions": _versions()}
    write_atomically(Path(arguments.output), json.dumps(found, indent=1))
    return None


def our_losses(setup: Setup, source: StepSource, steps: int, adapter_directory: Path) -> list[float]:
    """Trains `steps` steps; writes the initial adapter, in PEFT's form, before the first one."""
    state, base = fresh_state(setup)
    initial = {name: np.asarray(value, np.float32) for name, value in state.trainable.items()}
    write_adapter_files(adapter_directory, Adapter(setup.spec, initial, setup.config.model.base_name, None))
    step = make_step(setup.step_config, setup.layout.optimizer, setup.mesh, setup.layout.shardings)
    trainable, optimizer, losses = state.trainable, state.opt_state, []
    stream = BatchStream(source, start_step=0, threads=1, ahead=1)
    for index in range(steps):
        batch = jax.device_put(next(stream), batch_sharding(setup.mesh))
        trainable, optimizer, metrics = step(trainable, optimizer, base, batch, np.int32(index))
        losses.append(float(metrics.loss))
        print(f"ours {index + 1}: {losses[-1]:.6f}", file=sys.stderr)
    stream.close()
    return losses


def peft_losses(
    config: RunConfig, setup: Setup, source: StepSource, steps: int, adapter_directory: Path
) -> list[float]:
    """Trains PEFT's model from the same adapter on the same documents."""
    import peft
    import torch

    model: Any = peft.PeftModel.from_pretrained(_torch_base(config), str(adapter_directory), is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    beta1, beta2 = config.training.betas or (0.9, 0.999)
    optimizer = torch.optim.AdamW(trained, betas=(beta1, beta2), eps=1e-8, weight_decay=config.training.weight_decay)
    losses = []
    for index in range(steps):
        documents = list(documents_of(source[index]))
        count = sum(int(document.has_loss.sum()) for document in documents)
        optimizer.zero_grad()
        total = 0.0
        for document in documents:
            logits = model(input_ids=torch.tensor(document.tokens[None].astype(np.int64))).logits[0]
            targets = torch.tensor(document.targets.astype(np.int64))
            kept = torch.tensor(document.has_loss)
            loss = torch.nn.functional.cross_entropy(logits[kept], targets[kept], reduction="sum") / count
            loss.backward()
            total += float(loss.detach())
        if config.training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, config.training.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = float(setup.schedule(index))
        optimizer.step()
        losses.append(total)
        print(f"peft {index + 1}: {total:.6f}", file=sys.stderr)
    return losses


def documents_of(batch: Any) -> Iterator[Document]:
    """The documents of a batch of packed rows. Segment ids number the documents of a row from 1; 0 is padding."""
    length = batch["tokens"].shape[-1]
    rows = {name: batch[name].reshape(-1, length) for name in ("tokens", "targets", "segment_ids", "loss_mask")}
    for tokens, targets, segments, mask in zip(*rows.values(), strict=True):
        for segment in range(1, int(segments.max()) + 1):
            inside = segments == segment
            if mask[inside].any():
                yield Document(tokens[inside], targets[inside], mask[inside])


def _torch_base(config: RunConfig) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    assert config.model.path is not None
    path = Path(config.model.path)
    if path.is_file():
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def _versions() -> dict[str, str]:
    import peft
    import torch
    import transformers

    return {module.__name__: str(module.__version__) for module in (jax, torch, transformers, peft)}


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
