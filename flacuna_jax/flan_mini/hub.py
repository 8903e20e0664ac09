"""Sources that name a dataset of the Hugging Face hub: hf:NAME[:CONFIG[:SPLIT]], fetched once into parquet."""

import os
from dataclasses import dataclass
from pathlib import Path

from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.config import MixtureSource

PREFIX = "hf:"


@dataclass(frozen=True)
class HubName:
    name: str
    config: str | None
    split: str

    @staticmethod
    def parse(text: str) -> "HubName":
        name, _, rest = text.removeprefix(PREFIX).partition(":")
        config, _, split = rest.partition(":")
        return HubName(name, config or None, split or "train")

    @property
    def file(self) -> str:
        parts = [self.name.replace("/", "--"), *([self.config] if self.config else []), self.split]
        return "-".join(parts) + ".parquet"


def resolve(source: MixtureSource, directory: Path) -> MixtureSource:
    """The source with a local path: a hub name becomes a parquet file below `directory`, fetched if it is not there.

    Raises UserError where the hub cannot be reached or does not have it.
    """
    if not source.path.startswith(PREFIX):
        return source
    hub_name = HubName.parse(source.path)
    path = directory / "downloads" / hub_name.file
    if not path.is_file():
        _download(hub_name, path, source)
    return source.model_copy(update={"path": str(path)})


def _download(hub_name: HubName, path: Path, source: MixtureSource) -> None:
    import datasets  # takes seconds to import, and only sources of the hub need it

    try:
        dataset = datasets.load_dataset(hub_name.name, hub_name.config, split=hub_name.split)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        dataset.to_parquet(str(partial))
        os.replace(partial, path)
    except Exception as error:
        # The hub's client raises its own, requests' and the file system's errors; all of them mean: not obtained.
        raise UserError(
            f"sources.{source.name}: {source.path} could not be fetched from the hub "
            f"({type(error).__name__}: {error}); "
            "a path to a local copy works without it"
        ) from error
