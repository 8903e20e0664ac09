"""Makes the benchmarks run on machines with jax, flax and optax but without pydantic, which the config uses.

Importing this module makes `import pydantic` work if it is not installed, and does nothing otherwise. It only provides
construction, defaults and attributes. Nothing is validated, so it cannot be used for a run.
"""

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any


class _Model:
    def __init_subclass__(cls, **_: Any) -> None:
        pass

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __hash__(self) -> int:
        return hash((type(self), tuple(self.__dict__.items())))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def model_copy(self, update: dict[str, Any]) -> Any:
        return type(self)(**{**self.__dict__, **update})

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return {
            name: getattr(self, name) for kind in type(self).__mro__ for name in getattr(kind, "__annotations__", {})
        }


def _field(*_: Any, default: Any = None, **__: Any) -> Any:
    return default


def _leave(*_: Any, **__: Any) -> Callable[[Any], Any]:
    """Used as a decorator factory and in annotations."""
    return lambda function: function


class _Pydantic(types.ModuleType):
    """All other names that the config imports have no effect."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _leave


def _install() -> None:
    module: Any = _Pydantic("pydantic")
    module.BaseModel = _Model
    module.ValidationError = type("ValidationError", (ValueError,), {})
    module.ConfigDict = dict
    module.Field = _field
    sys.modules["pydantic"] = module


if importlib.util.find_spec("pydantic") is None:
    _install()
