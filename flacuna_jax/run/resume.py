"""Compares a run with its checkpoint: which settings may change when a run is resumed."""

from collections.abc import Sequence
from typing import Any

from flacuna_jax.config.files import parse_config
from flacuna_jax.errors import UserError

# Identified by fingerprints, or without effect on the computed numbers.
_FREE = (
    "output_dir",
    "logging",
    "checkpoint",
    "distributed",
    "model.path",
    "model.name",
    "model.tokenizer",
    "lora.init_from",
    "training.objective.reference.adapter",
    # Evaluation, and the handling of bad steps, which never change the parameters.
    "evaluation",
    "training.on_bad_step",
    "training.spike_factor",
    "training.max_bad_steps",
)
# These change only the order of sums: results agree up to rounding.
_ROUNDING = (
    "mesh",
    "training.remat",
    "training.attention",
    "training.micro_batch_size",
    "libraries",
    "device",
    "compiler",
)
# Without a decaying schedule, the length of the run does not affect earlier steps.
_LENGTH = ("training.epochs", "training.max_steps", "total_steps")
# Derived from settings and data; if those may change, these may change too.
_DERIVED = ("rows_per_step", "total_steps")

BASE_CHECKSUM = "base_checksum"
"""Checksum of all frozen weights, known once a run has read them."""
_NOT_COMPARED = ("config", "fingerprints", "cursor", "counters", BASE_CHECKSUM)

# Names besides settings for `checkpoint.allow_changes`, with the keys that each covers.
WORDS = {
    "data": ("fingerprints.data", "held_out_fraction"),
    "tokenizer": ("fingerprints.tokenizer",),
    "base": ("fingerprints.base",),
    "code": ("fingerprints.code",),
    "reference": ("fingerprints.reference",),
}


def compare_meta(saved: dict[str, Any], current: dict[str, Any], allowed: Sequence[str] = ()) -> list[str]:
    """Changes that would alter the results of the resumed run, one line each; empty if the run may continue.

    Both arguments are checkpoint metas: `config` (the resolved config as JSON), `fingerprints` (data, tokenizer, base,
    ...) and plain numbers such as `rows_per_step` or `total_steps`. The comparison covers everything except `counters`,
    which change during the run, and `cursor`, which only older checkpoints have. `allowed`: settings, sections or
    `WORDS` that may differ.
    """
    return [_line(*change) for change in _refused(saved, current, allowed)]


def require_same_run(saved: dict[str, Any], current: dict[str, Any], run_dir: str, allowed: Sequence[str] = ()) -> None:
    """Raises `UserError` with every difference that `compare_meta` finds."""
    refused = _refused(saved, current, allowed)
    if refused:
        named = (_name_to_allow(key) for key, _, _ in refused if key not in _DERIVED)
        names = ", ".join(dict.fromkeys((*allowed, *named)))
        raise refusal(run_dir, [_line(*change) for change in refused], names)


def refusal(run_dir: str, changes: Sequence[str], names: str) -> UserError:
    """The error for changes that are refused unless `names` are allowed."""
    return UserError(
        "\n".join(
            (
                f"{run_dir} contains a run that cannot be continued with these settings:",
                *(f"  {change}" for change in changes),
                "restore them, choose another output_dir, or accept that the results may differ: "
                f"'--checkpoint.allow_changes=[{names}]'",
            )
        )
    )


def base_change(saved: dict[str, Any], current: dict[str, Any]) -> str | None:
    """A line if any byte of the frozen weights differs from the run of the checkpoint, otherwise None.

    Their fingerprint, which is compared before they are read, covers only samples of each tensor; this checksum covers
    all weights in memory. Quantised or randomly initialised weights may round differently on another mesh or device,
    so their difference is then ignored.
    """
    before, now = saved.get(BASE_CHECKSUM), current.get(BASE_CHECKSUM)
    computed = current["config"]["model"]["quantization"] is not None or current["fingerprints"]["base"] == "random"
    if before is None or before == now or (computed and rounding_changes(saved, current)):
        return None
    return _line(BASE_CHECKSUM, before, now)


def allowed_changes(saved: dict[str, Any], current: dict[str, Any], allowed: Sequence[str]) -> list[str]:
    """Differences that are accepted only because of `allowed`, for a notice."""
    refused = _refused(saved, current, allowed)
    return [_line(*change) for change in _refused(saved, current, ()) if change not in refused]


def _refused(saved: dict[str, Any], current: dict[str, Any], allowed: Sequence[str]) -> list[tuple[str, Any, Any]]:
    refused = [change for change in _changes(saved, current) if not _tolerated(change[0], saved)]
    prefixes = tuple(prefix for name in allowed for prefix in (name, *WORDS.get(name, ())))
    left = [change for change in refused if not _under(change[0], prefixes)]
    if len(left) < len(refused) and all(key in _DERIVED for key, _, _ in left):
        return []
    return left


def _name_to_allow(key: str) -> str:
    return next((word for word, keys in WORDS.items() if _under(key, keys)), key)


def rounding_changes(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Accepted changes after which results agree only up to rounding, not bit for bit; for a notice."""
    return [_line(*change) for change in _changes(saved, current) if _under(change[0], _ROUNDING)]


def _changes(saved: dict[str, Any], current: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    before, now = _flat(_comparable(saved)), _flat(_comparable(current))
    absent = object()
    changes = []
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key, absent), now.get(key, absent)
        if old != new:
            changes.append((key, "absent" if old is absent else old, "absent" if new is absent else new))
    return changes


def _comparable(meta: dict[str, Any]) -> dict[str, Any]:
    config = _complete(meta.get("config", {}))
    # Sources are identified by the fingerprint of the data; files may move, so paths are not compared.
    data = dict(config.get("data", {}))
    data["sources"] = [{k: v for k, v in source.items() if k != "path"} for source in data.get("sources", ())]
    rest = {key: value for key, value in meta.items() if key not in _NOT_COMPARED}
    rest["held_out_fraction"] = (config.get("evaluation") or {}).get("fraction")
    return {**config, "data": data, **rest, "fingerprints": meta.get("fingerprints", {})}


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the defaults of settings that the version that wrote it did not have: they mean what that version
    did. A config that this version cannot read is returned unchanged."""
    try:
        return parse_config(config).model_dump(mode="json")
    except UserError:
        return dict(config)


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        items = [(f"{key}.{name}" if key else str(name), item) for name, item in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        items = [(f"{key}.{index}", item) for index, item in enumerate(value)]
    else:
        return {key: list(value) if isinstance(value, tuple) else value}
    return {flat_key: leaf for name, item in items for flat_key, leaf in _flat(item, name).items()}


def _tolerated(key: str, saved: dict[str, Any]) -> bool:
    endless = saved.get("config", {}).get("training", {}).get("schedule") in ("constant", "inverse_sqrt")
    return _under(key, _FREE + _ROUNDING + (_LENGTH if endless else ()))


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _line(key: str, old: Any, new: Any) -> str:
    return f"{key}: {old} in the checkpoint, {new} now"
