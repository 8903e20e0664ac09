"""Sources from the Hugging Face Hub: hf:NAME[:CONFIG[:SPLIT]], downloaded once and stored as Parquet."""

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
    """`path` itself, or for a Hub name its Parquet file below `directory`, which is downloaded if it is missing.

    Args:
      setting: name of the path's setting for messages, for example "data.sources.0".

    Raises:
      UserError: the Hub cannot be reached or does not have the dataset, or its client is not installed.
    """
    if not path.startswith(PREFIX):
        return path
    hub_name = HubName.parse(path)
    if not hub_name.name:
        raise UserError(f"{setting}: {path!r} is not a dataset name; write hf:NAME[:CONFIG[:SPLIT]]")
    file = directory / hub_name.file
    if not file.is_file():
        _download(hub_name, file, f"{setting}: {path}")
    return str(file)


def local_sources(config: DataConfig, directory: Path) -> DataConfig:
    """The config with local paths for all sources; see `local_path`."""
    sources = tuple(
        source.model_copy(update={"path": local_path(_with_split(source), directory, f"data.sources.{index}")})
        for index, source in enumerate(config.sources)
    )
    return config.model_copy(update={"sources": sources})


def _with_split(source: SourceConfig) -> str:
    """The path of a source; a Hub name includes the split."""
    if not source.path.startswith(PREFIX) or source.split is None:
        return source.path
    named = HubName.parse(source.path)
    if source.path.count(":") > 2 and named.split != source.split:
        raise UserError(f"{source.path}: the path has split {named.split}, but split: {source.split} is another")
    return f"{PREFIX}{named.name}:{named.config or ''}:{source.split}"


def _download(hub_name: HubName, file: Path, what: str) -> None:
    try:
        import datasets  # optional, and it takes seconds to import
    except ImportError as error:
        raise UserError(
            f"{what} needs the Hub client: pip install 'flacuna-jax[hub]' ({error}); "
            "a path to a local copy works without it"
        ) from None
    try:
        dataset = datasets.load_dataset(hub_name.name, hub_name.config, split=hub_name.split)
        with replacing(file) as partial:
            dataset.to_parquet(str(partial))
    except Exception as error:
        # The Hub client raises its own, requests' and the file system's errors; all of them mean that it failed.
        raise UserError(
            f"{what} could not be downloaded from the Hub ({type(error).__name__}: {error}); "
            "a path to a local copy works without it"
        ) from error
