"""A layout as text for a terminal: the degrees, which rank holds what, what that takes, and the pipeline's timeline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from teratron.config import ModelConfig
from teratron.plan.layout import Layout, Share
from teratron.plan.timeline import timeline_text

ROWS, LABEL = 16, 40
"""Pipeline ranks that are drawn, and columns for what they hold."""


def layout_text(layout: Layout, width: int = 100) -> str:
    """The whole picture; no line is longer than `width`, as long as that is 80 or more."""
    blocks = [
        [model_line(layout.config.model), degrees_line(layout.sizes)],
        list(_grid(layout, width)),
        list(_facts(layout, width)),
        _timeline(layout, width),
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def model_line(model: ModelConfig) -> str:
    """The model in a few words."""
    experts = f"{model.experts} experts, {model.experts_per_token} a token, " if model.experts else ""
    return (
        f"{model.layers} layers x {model.hidden:,}, {model.heads} heads, {experts}context {model.seq_length:,}, "
        f"vocabulary {model.vocab_size:,}"
    )


def degrees_line(sizes: Mapping[str, int]) -> str:
    """The ranks as a product of the degrees."""
    return f"{math.prod(sizes.values()):,} ranks = " + " x ".join(f"{axis} {degree}" for axis, degree in sizes.items())


def stage_text(layout: Layout, stage: int) -> str:
    """The units of a stage, such as `embedding, layers 0-5`."""
    units, last = layout.units[stage], max(units.stop for units in layout.units) - 1
    layers = [unit - 1 for unit in units if 0 < unit < last]
    words = ["embedding"] if 0 in units else []
    words += [f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"] if layers else []
    return ", ".join([*words, *(["head"] if last in units else [])])


def rank_text(layout: Layout, pipeline: int, width: int) -> str:
    """The stages of a pipeline rank, as many as fit, such as `embedding, layers 0-5, 48-53`."""
    words = [stage_text(layout, stage) for stage in layout.held[pipeline]]
    if all("layer" in word for word in words):
        words = [words[0].replace("layer ", "layers ") if len(words) > 1 else words[0], *(word.split(" ", 1)[1] for word in words[1:])]
    full = ", ".join(words)
    return full if len(full) <= width or len(words) < 3 else f"{words[0]}, ..., {words[-1]}"


def elided(count: int, room: int) -> list[int | None]:
    """The numbers below `count`, of which at most `room` are shown: the first ones, None for those left out, and the last."""
    return list(range(count)) if count <= room else [*range(max(1, room - 2)), None, count - 1]


def _grid(layout: Layout, width: int) -> Iterable[str]:
    """A row for each pipeline rank, a column for each tensor group, global rank numbers in it."""
    named = [axis for axis in layout.places[0] if layout.sizes[axis] > 1]
    rows = elided(len(layout.held), ROWS)
    labels = {rank: rank_text(layout, rank, LABEL) for rank in rows if rank is not None}
    number, label = max(len("pipeline"), len(str(len(layout.held)))), max(len("holds"), *map(len, labels.values()))
    cell = max(len(ranks_text(layout.ranks(len(layout.held) - 1, len(layout.places) - 1))), *(len(f"{axis} 000") for axis in named), 6)
    experts = layout.config.parallel.expert > 1
    cell = max(cell, *(len(experts_text(layout, place)) for place in range(len(layout.places)))) if experts else cell
    columns = elided(len(layout.places), (width - number - label - 4) // (cell + 2))

    def line(first: str, second: str, cells: Iterable[str]) -> str:
        return "  ".join([f"{first:<{number}}", f"{second:<{label}}", *(f"{text:<{cell}}" for text in cells)]).rstrip()

    for axis in named:
        yield line("", "", ("..." if column is None else f"{axis} {layout.places[column][axis]}" for column in columns))
    if experts:
        yield line("", "", ("..." if column is None else experts_text(layout, column) for column in columns))
    yield line("pipeline", "holds", ("" if column is None else "ranks" for column in columns))
    for rank in rows:
        if rank is None:
            yield line("...", "", ())
        else:
            cells = ("..." if column is None else ranks_text(layout.ranks(rank, column)) for column in columns)
            yield line(str(rank), labels[rank], cells)


def experts_text(layout: Layout, place: int) -> str:
    """The experts of a tensor group, such as `experts 0-3`, or with sequence `experts 0-1 | 2-3`; of many ranks the first and the last."""
    held = layout.experts(place)
    words = [f"{one[0]}-{one[-1]}" if len(one) > 1 else str(one[0]) for one in held]
    return f"experts {' | '.join(words if len(words) <= 4 else [words[0], '...', words[-1]])}"


def ranks_text(ranks: range) -> str:
    """A tensor group's ranks: each where there are few, else the first and the last."""
    return " ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]}-{ranks[-1]}"


def _facts(layout: Layout, width: int) -> Iterable[str]:
    for name, words in holdings(layout).items():
        lines = [""]
        for word in words:
            if lines[-1] and len(lines[-1]) + len(word) + 2 > width - 17:
                lines.append("")
            lines[-1] += (", " if lines[-1] else "") + word
        yield from (f"{name if first else '':<15}  {line}" for first, line in zip([True] + [False] * len(lines), lines, strict=False))


def holdings(layout: Layout) -> dict[str, list[str]]:
    """What each kind of rank holds, in words by its name."""
    config, sizes = layout.config, layout.sizes
    model, batch = config.model, config.largest_batch
    found = {"a tensor rank": tensor_words(layout)} if sizes["tensor"] > 1 else {}
    if sizes["context"] > 1:
        found["a context rank"] = [f"{-(-model.seq_length // sizes['context']):,} of {model.seq_length:,} tokens of each sequence"]
    if config.parallel.expert > 1:
        found["an expert rank"] = [f"{model.experts // config.parallel.expert:,} of {model.experts:,} experts of each layer that has any"]
    batches = f"{layout.micro_batches:,} micro-batch{'es' if layout.micro_batches > 1 else ''} of {layout.micro_batch}"
    found["a data rank"] = [f"{batch // layout.data_ranks:,} of {batch:,} sequences of a step, in {batches}"]
    owners = sizes["shard"] * sizes["context"]
    if config.parallel.shard != "none" and owners > 1:
        kept = {"optimizer": "optimizer state", "gradients": "optimizer state and gradients", "parameters": "all state"}
        found["a data rank"].append(f"{kept[config.parallel.shard]} in {owners} shares")
    found["parameters"] = [f"{between([share.parameters for share in layout.shares])} a rank"]
    found["state"] = [f"{state_text(layout.shares)} a rank: weights, gradients and {config.optim.name} in {config.train.precision}"]
    return found


def tensor_words(layout: Layout) -> list[str]:
    """What a tensor rank holds of each layer and of the vocabulary."""
    model, ranks = layout.config.model, layout.sizes["tensor"]
    pairs = max(1, model.key_value_heads // ranks)
    return [
        f"{model.heads // ranks} of {model.heads} heads",
        f"{pairs} of {model.key_value_heads} key/value heads",
        f"{model.ffn_width // ranks:,} of {model.ffn_width:,} feed-forward columns",
        f"{-(-model.vocab_size // ranks):,} of {model.vocab_size:,} vocabulary rows",
    ]


def between(values: Sequence[int]) -> str:
    """The least and the most."""
    low, high = min(values), max(values)
    return f"{high:,}" if low == high else f"{low:,} to {high:,}"


def state_text(shares: Sequence[Share]) -> str:
    """The least and the most bytes of state."""
    low, high = (size_text(size) for size in (min(s.state for s in shares), max(s.state for s in shares)))
    return high if low == high else f"{low} to {high}"


def size_text(count: float) -> str:
    """Bytes in the unit that suits."""
    unit = next((unit for unit in ("B", "KiB", "MiB", "GiB") if count < 1024 ** (1 + ["B", "KiB", "MiB", "GiB"].index(unit))), "TiB")
    scale = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    return f"{count / scale:,.1f} {unit}"


def captions(layout: Layout) -> list[str]:
    """What must be said below a timeline: the whole step's bubble, and how long things are taken to take."""
    pipeline, batch = layout.pipeline, layout.config.largest_batch
    if pipeline is None:
        return ["one pipeline rank: no bubble"]
    shown, count = pipeline.drawn.schedule.micro_batches, layout.micro_batches
    said = f"bubble of a step {100 * pipeline.bubble:.1f} % with {count:,} micro-batch{'es' if count > 1 else ''}"
    said += f", of which the picture has {shown}" if shown < count else ""
    again = " (a block is made again first)" if layout.config.train.recompute == "full" else ""
    lines = [
        said,
        f"peak activations of a step {round(pipeline.peak, 2):g} micro-batches",
        f"a layer's forward takes 1, its backward 2{again}; the output projection {layout.head_cost:.2g} layers; messages nothing",
    ]
    if count == 1 and batch > layout.data_ranks:
        lines.append(f"one micro-batch leaves the others waiting: --train.micro_batch 1 makes {batch // layout.data_ranks}")
    return lines


def _timeline(layout: Layout, width: int) -> list[str]:
    drawn = [timeline_text(layout.pipeline.drawn, width).rstrip("\n")] if layout.pipeline is not None else []
    return [*drawn, *captions(layout)]
