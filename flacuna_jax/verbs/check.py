"""Compares an exported directory, or a server of it, with its recorded results."""

import argparse
import json
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flacuna_jax.cli import EXIT_FAILURE, EXIT_OK
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.adapter import CONFIG_FILE
from flacuna_jax.huggingface.answer_ends import checkpoint_ends
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.files.native import is_native, read_manifest
from flacuna_jax.huggingface.files.pieces import file_digest
from flacuna_jax.huggingface.files.place import hub_hint, local_checkpoint
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.golden import FILE, Record, compare, compare_text, read_golden
from flacuna_jax.huggingface.other_encoder import encoder_of
from flacuna_jax.huggingface.probe import stored_weights, streamed_greedy
from flacuna_jax.huggingface.tokenizer import check_vocabulary, load_tokenizer
from flacuna_jax.huggingface.vllm_rules import vllm_options, vllm_violations

_SECONDS = 120


def run(arguments: argparse.Namespace) -> int:
    directory, given = local_checkpoint(arguments.directory), arguments.directory
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise UserError(f"{given} {what}; give the output of `flacuna export` or `flacuna convert`{hub_hint(given)}")
    if (directory / CONFIG_FILE).is_file():
        return _check_adapter(directory)
    if is_native(directory):
        return _check_converted(directory)
    if not (directory / FILE).is_file():
        raise UserError(f"{given} has no {FILE}; `flacuna export` writes it beside merged models and GGUF files")
    records, count = read_golden(directory)
    if arguments.server is None:
        faults = list(_check_files(directory, records, count))
    else:
        faults = list(_check_server(Server(arguments.server, arguments.served_name), directory, records, count))
    for fault in faults:
        print(f"differs: {fault}")
    if not faults:
        print(f"{len(records)} golden prompts: ids and greedy answers match the recorded ones")
    return EXIT_FAILURE if faults else EXIT_OK


def _check_adapter(directory: Path) -> int:
    violations = vllm_violations(directory)
    for violation in violations:
        print(f"vLLM: {violation}")
    if not violations:
        print(f"vLLM can load {directory} with {vllm_options(directory)}")
    return EXIT_FAILURE if violations else EXIT_OK


def _check_converted(directory: Path) -> int:
    open_checkpoint(directory)
    parameters = read_manifest(directory)["parameters"].values()
    damaged = [entry["file"] for entry in parameters if file_digest(directory / entry["file"]) != entry["digest"]]
    for file in damaged:
        print(f"differs: {file} has changed since it was written; convert the model again")
    if not damaged:
        print(f"{len(parameters)} parameters: no file has changed since it was written")
    return EXIT_FAILURE if damaged else EXIT_OK


def _check_files(directory: Path, records: Sequence[Record], count: int) -> Iterator[str]:
    config = read_architecture(directory)
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, config.vocab_size, directory)
    encoder = encoder_of(directory)
    ends = {tokenizer.eos_id, *checkpoint_ends(directory)}
    for record in records:
        if encoder is not None and record.text_gives_ids and encoder.text(record.text) != list(record.ids):
            yield f"{record.text[-60:]!r}: ids of {encoder.name} differ from the recorded ones"
        chat = None if encoder is None else encoder.chat
        if encoder and chat and record.message_gives_ids and chat(record.message) != list(record.ids):
            yield f"{record.message!r}: ids of {encoder.name} with the chat template differ from the recorded"
    weights = stored_weights(open_checkpoint(directory), config)
    chosen, _ = streamed_greedy(weights, config, [record.ids for record in records], count)
    for record, ids in zip(records, chosen.tolist(), strict=True):
        length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        if fault := compare(record, ids[:length]):
            yield f"{record.text[-60:]!r}: {fault}"


class Server:
    """An OpenAI-compatible completion server."""

    def __init__(self, url: str, name: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self.name = name or self._ask("/v1/models")["data"][0]["id"]

    def complete(self, prompt: str | list[int], count: int) -> str:
        request = {"model": self.name, "prompt": prompt, "max_tokens": count, "temperature": 0}
        return self._ask("/v1/completions", request)["choices"][0]["text"]

    def tokens(self, text: str) -> list[int] | None:
        """The server's token ids of a text; None if it has no /tokenize endpoint (vLLM and llama.cpp have)."""
        request = {"model": self.name, "prompt": text, "add_special_tokens": True, "content": text, "add_special": True}
        try:
            return self._ask("/tokenize", request)["tokens"]
        except UserError:
            return None

    def _ask(self, path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
                return json.load(reply)
        except (OSError, ValueError) as error:
            raise UserError(f"--server {self._url}{path}: {error}") from None


def _check_server(server: Server, directory: Path, records: Sequence[Record], count: int) -> Iterator[str]:
    tokenizer = load_tokenizer(directory)
    told = True
    for record in records:
        ids = server.tokens(record.text) if record.text_gives_ids else list(record.ids)
        told &= ids is not None
        if ids is not None and ids != list(record.ids):
            twice = " (it adds BOS twice)" if ids[1:] == list(record.ids) else ""
            yield f"{record.text[-60:]!r}: the server's ids differ from those of training{twice}"
        prompt = record.text if record.text_gives_ids else list(record.ids)
        if fault := compare_text(record, server.complete(prompt, count), tokenizer.decode):
            yield f"{record.text[-60:]!r}: {fault}"
    if not told:
        print("note: the server has no /tokenize endpoint; only answers were compared")
