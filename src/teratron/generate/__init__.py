"""Generation: key-value cache, samplers and searches, guides, and text as it comes."""

from __future__ import annotations

import sys
from types import ModuleType

from teratron.generate.answers import AnswerDecoder
from teratron.generate.api import generate, open_source
from teratron.generate.beam import BeamSearch
from teratron.generate.complete import Completion, Generator, Request, TextStream, complete
from teratron.generate.contrastive import ContrastiveSearch, ContrastiveStream
from teratron.generate.decoder import Decoder
from teratron.generate.engine import TokenStream
from teratron.generate.grammar import JsonSchema, Regex
from teratron.generate.guides import Choices
from teratron.generate.sampler import Sampling

__all__ = [
    "AnswerDecoder",
    "BeamSearch",
    "Choices",
    "Completion",
    "ContrastiveSearch",
    "ContrastiveStream",
    "Decoder",
    "Generator",
    "JsonSchema",
    "Regex",
    "Request",
    "Sampling",
    "TextStream",
    "TokenStream",
    "complete",
    "generate",
    "open_source",
]


class _Callable(ModuleType):
    """`teratron.generate` names this package as well as the function, so the package can be called like it."""

    __call__ = staticmethod(generate)


sys.modules[__name__].__class__ = _Callable
