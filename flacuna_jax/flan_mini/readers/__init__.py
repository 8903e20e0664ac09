"""Readers of the sources in their published layouts. There is one reader per kind; all of them yield items."""

from collections.abc import Mapping
from types import MappingProxyType

from flacuna_jax.flan_mini.readers import (
    chain_of_thought,
    code,
    dialogues,
    flan_rows,
    natural_instructions,
    promptsource,
    task_rows,
)
from flacuna_jax.flan_mini.readers.common import Reader

READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "flan_rows": flan_rows.READER,
        "natural_instructions": natural_instructions.READER,
        "chain_of_thought": chain_of_thought.READER,
        "promptsource": promptsource.READER,
        "task_rows": task_rows.READER,
        "code_search_net": code.CODE_SEARCH_NET,
        "apps": code.APPS,
        "code_contests": code.CODE_CONTESTS,
        "alpaca": dialogues.ALPACA,
        "sharegpt": dialogues.SHAREGPT,
        "flan_mini": dialogues.FLAN_MINI,
    }
)
