"""Flacuna in JAX: LoRA instruction tuning of LLaMA-family models (Ghosal et al., 2023, arXiv:2307.02053).

The names below are the Python API, which docs/reference/python.md shows. They are imported on first use, so that
`import flacuna_jax` and the command line do not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flacuna_jax.version import __version__

if TYPE_CHECKING:
    from flacuna_jax.config.files import load_config, parse_config
    from flacuna_jax.config.run import RunConfig
    from flacuna_jax.data.conversation import Conversation, Turn
    from flacuna_jax.data.tokenization import tokenize
    from flacuna_jax.errors import UserError
    from flacuna_jax.evaluation.benchmark import Options
    from flacuna_jax.evaluation.suite import evaluate_model
    from flacuna_jax.generation.chat_model import ChatModel
    from flacuna_jax.generation.settings import Decoding, Sampling
    from flacuna_jax.huggingface.chat_template import load_template
    from flacuna_jax.huggingface.tokenizer import load_tokenizer
    from flacuna_jax.inference import load_model
    from flacuna_jax.run.data import read_data
    from flacuna_jax.run.training_run import TrainingRun, open_run
    from flacuna_jax.training.loop import Request, StateHook, StepHook
    from flacuna_jax.training.objective import Objective
    from flacuna_jax.verbs.convert import Conversion, convert_model
    from flacuna_jax.verbs.export import Export, export_run
    from flacuna_jax.verbs.plan import plan_run

_MODULES = {
    "config.files": ("load_config", "parse_config"),
    "config.run": ("RunConfig",),
    "verbs.convert": ("Conversion", "convert_model"),
    "data.conversation": ("Conversation", "Turn"),
    "data.tokenization": ("tokenize",),
    "errors": ("UserError",),
    "evaluation.benchmark": ("Options",),
    "evaluation.suite": ("evaluate_model",),
    "verbs.export": ("Export", "export_run"),
    "generation.chat_model": ("ChatModel",),
    "generation.settings": ("Decoding", "Sampling"),
    "huggingface.chat_template": ("load_template",),
    "huggingface.tokenizer": ("load_tokenizer",),
    "inference": ("load_model",),
    "verbs.plan": ("plan_run",),
    "run.data": ("read_data",),
    "run.training_run": ("TrainingRun", "open_run"),
    "training.loop": ("Request", "StateHook", "StepHook"),
    "training.objective": ("Objective",),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ChatModel",
    "Conversation",
    "Conversion",
    "Decoding",
    "Export",
    "Objective",
    "Options",
    "Request",
    "RunConfig",
    "Sampling",
    "StateHook",
    "StepHook",
    "TrainingRun",
    "Turn",
    "UserError",
    "__version__",
    "convert_model",
    "evaluate_model",
    "export_run",
    "load_config",
    "load_model",
    "load_template",
    "load_tokenizer",
    "open_run",
    "parse_config",
    "plan_run",
    "read_data",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'flacuna_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"flacuna_jax.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
