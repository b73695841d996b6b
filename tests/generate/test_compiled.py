"""Places that are fixed, and steps that are compiled, give what the growing cache gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from teratron.checkpoint import LoadedModel
from teratron.config import UserError
from teratron.generate import BeamSearch, CompiledDecoder, Decoder, Draft, Request, Sampling, TokenStream, complete
from teratron.generate.cache import FixedCache, KVCache
from teratron.models import Model

PROMPTS = [[72, 105], [256], [84, 104, 101, 32, 99, 97, 116], [10, 20, 30]]
SHAPES = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {}),
    "window": ("llama", {"window": 5, "global_tokens": 2, "global_every": 2}),
    "alibi": ("llama", {"position": "alibi"}),
}


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_fixed_cache_equals_a_growing_one_also_after_tokens_taken_back(make_model: Callable[..., Model], name: str) -> None:
    style, keys = SHAPES[name]
    model = make_model(style, **keys)
    tokens = torch.randint(257, (3, 30), generator=torch.Generator().manual_seed(3))
    padding = torch.tensor([0, 2, 5])
    growing, fixed = KVCache(30), FixedCache(40, padding)

    def states(start: int, stop: int, cache: KVCache | FixedCache, shift: int = 0) -> torch.Tensor:
        places = torch.arange(start, stop) - padding[:, None]
        given = (tokens[:, start:stop] + shift) % 257
        return model({"tokens": given, "positions": places.clamp(min=0), "order": places}, cache=cache)["hidden"]

    for start, stop in ((0, 8), (8, 9), (9, 14), (14, 15)):
        if start:
            fixed.used = min(stop + 6, 30)
            states(start, fixed.used, fixed, shift=7)  # what is soon replaced, and what is left behind the newest token
            fixed.used = stop + 3
        real = (torch.arange(start, stop) >= padding[:, None])[..., None]
        found, expected = (states(start, stop, cache) * real for cache in (fixed, growing))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("name", SHAPES)
def test_compiled_steps_give_the_same_tokens(make_model: Callable[..., Model], name: str) -> None:
    style, keys = SHAPES[name]
    model = make_model(style, **keys)
    for how in (Sampling(temperature=0), Sampling(seed=7)):
        rows: list[list[list[int]]] = []
        for kind in (Decoder, CompiledDecoder):
            stream = TokenStream(kind(model, PROMPTS, 20), how, stop_ids=range(40, 60))
            rows.append([[] for _ in PROMPTS])
            for step in stream:
                for row, token in step:
                    rows[-1][row].append(token)
        assert rows[0] == rows[1]
        assert len({len(row) for row in rows[0]}) > 1, "rows should end at different steps"


def test_what_cannot_be_compiled_is_refused(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for rest in ({"sampling": BeamSearch(2)}, {"ahead": Draft(loaded)}):
        with pytest.raises(UserError, match="compiled steps have one token of each row: leave out"):
            Request(compiled=True, **rest)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="needs a C"):
        complete(loaded, ["Hi"], Request(compiled=True))
