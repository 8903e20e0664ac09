"""Sources that name a dataset of the Hugging Face hub: hf:NAME[:CONFIG[:SPLIT]], fetched once into parquet."""

from dataclasses import dataclass
from pathlib import Path

from flacuna_jax.config.schema import DataConfig, SourceConfig
from flacuna_jax.errors import UserError
from flacuna_jax.whole_files import replacing

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


def local_path(path: str, directory: Path, setting: str) -> str:
    """`path` itself, or for a hub name the parquet file below `directory`, fetched if it is not there.

    Args:
      setting: what a message calls the path, for example "data.sources.0".

    Raises:
      UserError: the hub cannot be reached or does not have it, or its client is not installed.
    """
    if not path.startswith(PREFIX):
        return path
    hub_name = HubName.parse(path)
    if not hub_name.name:
        raise UserError(f"{setting}: {path!r} names no dataset; write hf:NAME[:CONFIG[:SPLIT]]")
    file = directory / hub_name.file
    if not file.is_file():
        _download(hub_name, file, f"{setting}: {path}")
    return str(file)


def local_sources(config: DataConfig, directory: Path) -> DataConfig:
    """The config with every source on this machine; see `local_path`."""
    sources = tuple(
        source.model_copy(update={"path": local_path(_with_split(source), directory, f"data.sources.{index}")})
        for index, source in enumerate(config.sources)
    )
    return config.model_copy(update={"sources": sources})


def _with_split(source: SourceConfig) -> str:
    """The path of a source, with its split in it if it is a hub name."""
    if not source.path.startswith(PREFIX) or source.split is None:
        return source.path
    named = HubName.parse(source.path)
    if source.path.count(":") > 2 and named.split != source.split:
        raise UserError(f"{source.path}: the path names split {named.split}, and split: {source.split} another")
    return f"{PREFIX}{named.name}:{named.config or ''}:{source.split}"


def _download(hub_name: HubName, file: Path, what: str) -> None:
    try:
        import datasets  # optional, and it takes seconds to import
    except ImportError as error:
        raise UserError(
            f"{what} needs the hub's client: pip install 'flacuna-jax[hub]' ({error}); "
            "a path to a local copy works without it"
        ) from None
    try:
        dataset = datasets.load_dataset(hub_name.name, hub_name.config, split=hub_name.split)
        with replacing(file) as partial:
            dataset.to_parquet(str(partial))
    except Exception as error:
        # The hub's client raises its own, requests' and the file system's errors; all of them mean: not obtained.
        raise UserError(
            f"{what} could not be fetched from the hub ({type(error).__name__}: {error}); "
            "a path to a local copy works without it"
        ) from error
