"""Generation: key-value cache, sampler, engine, and text as it comes."""

from __future__ import annotations

import sys
from types import ModuleType

from teratron.generate.complete import Completion, Request, TextStream, complete, encode, generate, open_source
from teratron.generate.contrastive import ContrastiveSearch, ContrastiveStream
from teratron.generate.engine import TokenStream
from teratron.generate.sampler import Sampling

__all__ = [
    "Completion",
    "ContrastiveSearch",
    "ContrastiveStream",
    "Request",
    "Sampling",
    "TextStream",
    "TokenStream",
    "complete",
    "encode",
    "generate",
    "open_source",
]


class _Callable(ModuleType):
    """`teratron.generate` names this package as well as the function, so the package can be called like it."""

    __call__ = staticmethod(generate)


sys.modules[__name__].__class__ = _Callable
