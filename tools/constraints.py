"""Print constraints.txt: the exact versions in this environment of everything that the [test] extra and the build need."""

from __future__ import annotations

import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEADER = """\
# The tested versions, exactly; both set-up commands install through this file.
# Renew: install what you want in .venv, run the tests, then `.venv/bin/python tools/constraints.py > constraints.txt`.
# CUDA builds of torch add nvidia-* and triton packages, whose versions torch itself fixes.
"""


def closure(roots: list[str]) -> dict[str, str]:
    """Name -> version of the roots (`name[extra]`) and of everything that they need on this platform, torch without `+cpu`."""
    pins: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [Requirement(root) for root in roots]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        for extra in ["", *wanted.extras]:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            found = distribution(name)
            pins[name] = found.version.split("+")[0]
            needs = [Requirement(line) for line in found.requires or []]
            todo += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
    return pins


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    pins = closure(["teratron[test]", *project["build-system"]["requires"]])
    del pins["teratron"]
    print(HEADER + "\n".join(f"{name}=={pins[name]}" for name in sorted(pins)))


if __name__ == "__main__":
    main()
