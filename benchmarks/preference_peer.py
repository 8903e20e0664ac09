"""The peer's side of `preference.py`, TRL and PEFT: one epoch of DPO per line of input."""

import queue
import resource
import threading
import time
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from sides import serve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Turns(transformers.TrainerCallback):
    """Lets a trainer, which runs in a thread, begin an epoch when it is asked to."""

    def __init__(self) -> None:
        self.may_begin: queue.Queue[None] = queue.Queue()
        self.ended: queue.Queue[float | BaseException] = queue.Queue()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.may_begin.get()
        self._begun = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.ended.put(time.perf_counter() - self._begun)


class Peer:
    def open(
        self,
        model: str,
        pairs: list[dict[str, str]],
        dtype: str,
        length: int,
        batch: int,
        rounds: int,
        directory: str,
        micro_batch: int,
        checkpointing: bool,
    ) -> list[Any]:
        """Makes the trainer, and returns all documents: token ids, and the number without loss in front."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        # Texts: of messages, TRL would also train on what the template writes behind the end of an answer.
        records = [
            {
                **pair,
                "prompt": tokenizer.apply_chat_template(
                    [{"role": "user", "content": pair["prompt"]}], tokenize=False, add_generation_prompt=True
                ),
            }
            for pair in pairs
        ]
        settings = trl.DPOConfig(
            output_dir=f"{directory}/trl",
            report_to="none",
            use_cpu=DEVICE == "cpu",
            bf16=dtype == "bfloat16",
            gradient_checkpointing=checkpointing,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=batch // micro_batch,
            num_train_epochs=1 + rounds,
            learning_rate=1e-4,
            max_length=length,
            save_strategy="no",
            logging_strategy="epoch",
        )
        lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self._trainer = trl.DPOTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(
                model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
            ),
            args=settings,
            train_dataset=datasets.Dataset.from_list(records),
            processing_class=tokenizer,
            peft_config=lora,
        )
        self._turns = Turns()
        self._trainer.add_callback(self._turns)
        threading.Thread(target=self._train, daemon=True).start()
        documents = [
            [one["prompt_ids"] + one[answer], len(one["prompt_ids"])]
            for one in self._trainer.train_dataset
            for answer in ("chosen_ids", "rejected_ids")
        ]
        self._supervised = sum(len(ids) - prompt for ids, prompt in documents)
        return documents

    def _train(self) -> None:
        try:
            self._trainer.train()
        except BaseException as error:  # raised where the epoch is waited for
            self._turns.ended.put(error)

    def epoch(self) -> dict[str, float]:
        self._turns.may_begin.put(None)
        seconds = self._turns.ended.get()
        if isinstance(seconds, BaseException):
            raise seconds
        losses = [record["loss"] for record in self._trainer.state.log_history if "loss" in record]
        return {
            "seconds": seconds,
            "supervised": self._supervised,
            "loss": losses[-1] if losses else float("nan"),
            "process_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }


if __name__ == "__main__":
    serve(Peer())
