"""Names of our settings in other trainers, for the error message when a config uses one of them."""

from collections.abc import Mapping
from types import MappingProxyType

_BATCH = "training.batch_size, the examples of an optimizer step; gradient accumulation is derived from it"

OURS: Mapping[str, str] = MappingProxyType(
    {
        # transformers and TRL
        "model_name_or_path": "model.path",
        "model_name": "model.path",
        "model_revision": "model.path (hf:NAME@REVISION)",
        "torch_dtype": "model.dtype",
        "bf16": "model.dtype",
        "fp16": "model.dtype",
        "load_in_4bit": "model.quantization (nf4)",
        "load_in_8bit": "model.quantization (int8)",
        "attn_implementation": "training.attention",
        "per_device_train_batch_size": "training.micro_batch_size, the rows per device in one pass",
        "gradient_accumulation_steps": _BATCH,
        "num_train_epochs": "training.epochs",
        "lr": "training.learning_rate",
        "lr_scheduler_type": "training.schedule",
        "optim": "training.optimizer",
        "adam_beta1": "training.betas",
        "adam_beta2": "training.betas",
        "gradient_checkpointing": "training.remat",
        "max_seq_length": "data.max_length",
        "dataset_name": "data.sources",
        "assistant_only_loss": "data.train_on (assistant)",
        "eval_steps": "evaluation.every_steps",
        "metric_for_best_model": "evaluation.metric",
        "load_best_model_at_end": "evaluation.deliver (best)",
        "early_stopping_patience": "evaluation.patience",
        "save_steps": "checkpoint.every_steps",
        "save_total_limit": "checkpoint.keep",
        "resume_from_checkpoint": "checkpoint.resume (auto by default)",
        "logging_steps": "logging.every_steps",
        "report_to": "logging.wandb and logging.tensorboard",
        "fsdp_config": "mesh",
        "deepspeed": "mesh",
        # preference tuning in TRL, axolotl and LLaMA-Factory
        "rl": "training.objective.name",
        "stage": "training.objective.name",
        "beta": "training.objective.beta",
        "rl_beta": "training.objective.beta",
        "dpo_beta": "training.objective.beta",
        "orpo_alpha": "training.objective.beta",
        "pref_beta": "training.objective.beta",
        "loss_type": "training.objective.loss",
        "pref_loss": "training.objective.name and training.objective.loss",
        "label_smoothing": "training.objective.label_smoothing",
        "dpo_label_smoothing": "training.objective.label_smoothing",
        "simpo_gamma": "training.objective.gamma",
        "cpo_alpha": "training.objective.sft_weight",
        "rpo_alpha": "training.objective.sft_weight",
        "pref_ftx": "training.objective.sft_weight",
        "desirable_weight": "training.objective.desirable_weight",
        "undesirable_weight": "training.objective.undesirable_weight",
        "kto_chosen_weight": "training.objective.desirable_weight",
        "kto_rejected_weight": "training.objective.undesirable_weight",
        "kto_desirable_weight": "training.objective.desirable_weight",
        "kto_undesirable_weight": "training.objective.undesirable_weight",
        "precompute_ref_log_probs": "training.objective.reference (cached)",
        "ref_model": "training.objective.reference",
        "ref_model_adapters": "training.objective.reference ({adapter: DIR})",
        "max_prompt_length": "data.max_length, of both answers with their prompts",
        "max_completion_length": "data.max_length, of both answers with their prompts",
        # PEFT
        "r": "lora.rank",
        "lora_r": "lora.rank",
        "lora_alpha": "lora.alpha",
        "lora_dropout": "lora.dropout",
        "target_modules": "lora.targets",
        # axolotl and LLaMA-Factory
        "base_model": "model.path",
        "revision_of_model": "model.path (hf:NAME@REVISION)",
        "adapter": "lora (null trains every weight)",
        "lora_target_modules": "lora.targets",
        "lora_target_linear": "lora.targets (all-linear)",
        "lora_target": "lora.targets",
        "lora_rank": "lora.rank",
        "lora_model_dir": "lora.init_from",
        "adapter_name_or_path": "lora.init_from",
        "loraplus_lr_ratio": "training.lora_plus_ratio",
        "peft_use_dora": "lora.use_dora",
        "peft_use_rslora": "lora.use_rslora",
        "datasets": "data.sources",
        "dataset": "data.sources",
        "sequence_len": "data.max_length",
        "cutoff_len": "data.max_length",
        "sample_packing": "data.packing",
        "chat_template": "data.template",
        "train_on_inputs": "data.train_on",
        "num_epochs": "training.epochs",
        "lr_scheduler": "training.schedule",
        "flash_attention": "training.attention",
        "val_set_size": "evaluation.fraction",
        "val_size": "evaluation.fraction",
        "wandb_project": "logging.wandb",
        # torchtune
        "checkpointer": "model.path",
        "max_seq_len": "data.max_length",
        "enable_activation_checkpointing": "training.remat",
        "max_steps_per_epoch": "training.max_steps",
        "clip_grad_norm": "training.max_grad_norm",
        "log_every_n_steps": "logging.every_steps",
        "lora_attn_modules": "lora.targets",
    }
)
"""Maps the last part of their dotted name to ours; text after our name is an explanation."""

OURS_BY_VALUE: Mapping[str, Mapping[object, str]] = MappingProxyType(
    {
        "train_on_inputs": {True: "data.train_on: all", False: "data.train_on: assistant, the default"},
        "assistant_only_loss": {True: "data.train_on: assistant, the default", False: "data.train_on: all"},
        "completion_only_loss": {True: "data.train_on: assistant, the default", False: "data.train_on: all"},
        "sample_packing": {True: "data.packing: best_fit, the default", False: "data.packing: none"},
        "packing": {True: "data.packing: best_fit, the default", False: "data.packing: none"},
        "load_in_4bit": {True: "model.quantization: nf4", False: "model.quantization: null, the default"},
        "load_in_8bit": {True: "model.quantization: int8", False: "model.quantization: null, the default"},
        "gradient_checkpointing": {True: "training.remat: full", False: "training.remat: none"},
        "bf16": {True: "model.dtype: bfloat16", False: "model.dtype: float32"},
        "fp16": {False: "model.dtype, auto by default"},
    }
)

OURS_IN_A_SOURCE: Mapping[str, str] = MappingProxyType(
    {
        "type": "format",
        "ds_type": "path (its extension gives the file type)",
        "formatting": "format",
        "chat_template": "data.template, for all sources",
        "name": "path: hf:NAME:CONFIG",
        "subset": "path: hf:NAME:CONFIG",
        "revision": "path: hf:NAME@REVISION",
        "dataset": "path",
        "file": "path",
        "file_name": "path",
        "data_files": "path, which may be a pattern such as data/*.jsonl",
        "train_on_split": "split",
        "samples": "max_examples",
        "num_samples": "max_examples",
        "limit": "max_examples",
        "probability": "weight, the passes over the source per epoch",
        "prob": "weight, the passes over the source per epoch",
    }
)


def ours(name: str, value: object, in_a_source: bool = False) -> str | None:
    """Our equivalent of another trainer's setting with that name and value; None for an unknown name."""
    name = name.lower()
    if in_a_source:
        return OURS_IN_A_SOURCE.get(name)
    if isinstance(value, bool) and (by_value := OURS_BY_VALUE.get(name, {}).get(value)):
        return by_value
    return OURS.get(name)
