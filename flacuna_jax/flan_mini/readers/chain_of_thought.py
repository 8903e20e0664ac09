r"""FLAN's chain-of-thought sets: TSV files without header, with question, answer, rationale; "\n" stands for a newline.

Every row gives a direct item (question → rationale and answer) and three inverse ones (FLAN's input inversion): the
question from answer and rationale, the rationale from question and answer, question and answer from the rationale.
"""

from functools import partial
from pathlib import Path

from flacuna_jax.data.files import DataFiles, Place
from flacuna_jax.data.formats import BadRecord
from flacuna_jax.data.report import BadRecordPolicy
from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.config import MixtureSource
from flacuna_jax.flan_mini.items import Item
from flacuna_jax.flan_mini.readers.common import Items, Reader, attempt, filled

_STREAMS = {"aqua": "stream_aqua", "qed": "stream_qed"}
"""Two sets whose tasks have another prefix than cot_ in FLAN-mini."""
_INVERSE = ("cot_to_question", "cot_to_rationale", "cot_to_both")


def _find(source: MixtureSource) -> DataFiles:
    root = Path(source.path)
    if root.is_file():
        return DataFiles((root,), ())
    files = tuple(sorted(root.rglob("*.tsv")))
    if not files:
        raise UserError(f"{root}: there is no .tsv file with question, answer and rationale")
    training = tuple(file for file in files if "train" in file.stem.split("_"))
    return DataFiles(training or files, tuple(f.name for f in files if training and f not in training))


def _read(_: MixtureSource, path: Path, policy: BadRecordPolicy) -> Items:
    name = path.name.split(".")[0].removesuffix("_train")
    task = _STREAMS.get(name, f"cot_{name}")
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                policy.report.read += 1
                place = Place(path, policy.report.read, line)
                for item in attempt(policy, place, partial(_row, task, raw)):
                    yield place, item
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _row(task: str, raw: bytes) -> list[Item]:
    fields = _fields(raw)
    return [Item(task, "cot", fields, "direct"), *(Item(f"{task}_ii", f, fields, "inverse") for f in _INVERSE)]


def _fields(raw: bytes) -> dict[str, str]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f"not UTF-8: {error.reason}") from None
    columns = text.rstrip("\r\n").split("\t")
    if len(columns) != 3:
        raise BadRecord(
            "wrong number of columns", f"{len(columns)} columns; there must be question, answer and rationale"
        )
    question, answer, rationale = (column.replace("\\n", "\n") for column in columns)
    return {
        "question": filled(question, "question"),
        "answer": filled(answer, "answer"),
        "rationale": filled(rationale, "rationale"),
    }


READER = Reader(_find, _read)
