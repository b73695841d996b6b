"""Generation: key-value caches, samplers and searches, guesses ahead, guides, and text as it comes."""

from __future__ import annotations

import sys
from types import ModuleType

from teratron.generate.answers import AnswerDecoder
from teratron.generate.api import generate, open_source
from teratron.generate.beam import BeamSearch
from teratron.generate.compiled import CompiledDecoder
from teratron.generate.complete import Completion, Generator, Request, TextStream, complete
from teratron.generate.contrastive import ContrastiveSearch, ContrastiveStream
from teratron.generate.decoder import Decoder
from teratron.generate.engine import TokenStream
from teratron.generate.grammar import JsonSchema, Regex
from teratron.generate.guides import Choices
from teratron.generate.sampler import Sampling
from teratron.generate.speculate import Draft, LookUp, ModelGuesser, SpeculativeStream, TextGuesser

__all__ = [
    "AnswerDecoder",
    "BeamSearch",
    "Choices",
    "CompiledDecoder",
    "Completion",
    "ContrastiveSearch",
    "ContrastiveStream",
    "Decoder",
    "Draft",
    "Generator",
    "JsonSchema",
    "LookUp",
    "ModelGuesser",
    "Regex",
    "Request",
    "Sampling",
    "SpeculativeStream",
    "TextGuesser",
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
