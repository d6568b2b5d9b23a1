"""TerseLM: prompt compression with a small LM that is aligned to the target LLM.

Public names are imported on first use, so that ``import terselm`` stays quick.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.abc import MetaPathFinder

    from terselm.compress.compressor import PromptCompressor
    from terselm.compress.messages import ChatResult
    from terselm.compress.prompt import Prompt
    from terselm.compress.result import CompressionResult, TokenDecision
    from terselm.compress.settings import CompressionSettings
    from terselm.errors import TerseLMError

__version__ = "0.1.0"

__all__ = [
    "ChatResult",
    "CompressionResult",
    "CompressionSettings",
    "Prompt",
    "PromptCompressor",
    "TerseLMError",
    "TokenDecision",
    "__version__",
]

_HOME = {
    "ChatResult": "terselm.compress.messages",
    "CompressionResult": "terselm.compress.result",
    "CompressionSettings": "terselm.compress.settings",
    "Prompt": "terselm.compress.prompt",
    "PromptCompressor": "terselm.compress.compressor",
    "TerseLMError": "terselm.errors",
    "TokenDecision": "terselm.compress.result",
}


# Asked after all other finders: paths of earlier versions.
sys.meta_path.append(
    cast(
        "MetaPathFinder",
        SimpleNamespace(
            find_spec=lambda name, path=None, target=None: (
                import_module("terselm.moved").OldPath.spec(name)
                if name.startswith("terselm.") and name != "terselm.moved"  # which an installation may lack
                else None
            )
        ),
    )
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'terselm' has no attribute {name!r}")
