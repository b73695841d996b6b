"""Lines of `optim.groups`: what they say, and what is refused in one sentence that shows the line."""

from __future__ import annotations

import pytest

from teratron.config import Config, UserError
from teratron.config.groups import Group, parse_group


@pytest.mark.parametrize(
    ("line", "group"),
    [
        ("*.bias: lr=0.1 decay=0", Group("*.bias", 0.1, 0.0)),
        ("embedding.*:frozen", Group("embedding.*", frozen=True)),
        ("blocks.[01].*:  decay=1e-2", Group("blocks.[01].*", decay=0.01)),
    ],
)
def test_a_line_is_a_pattern_and_what_holds_for_it(line: str, group: Group) -> None:
    assert parse_group(line) == group
    assert Config().override({"optim.groups": [line]}).optim.groups == (line,)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("*.bias", "a colon"),
        (": lr=1", "a pattern"),
        ("*.bias:", "what holds"),
        ("*: decya=1", "decay"),
        ("*: lr=1 lr=2", "at most once"),
        ("*: lr=-1", "at least 0"),
        ("*: lr=fast", "NUMBER"),
        ("*: lr=inf", "NUMBER"),
        ("*: frozen=yes", "or frozen"),
        ("*: frozen lr=1", "nothing beside frozen"),
    ],
)
def test_other_lines_are_refused(line: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        Config().override({"optim.groups": ["*.weight: lr=1", line]})
    message = str(refused.value)
    assert message.startswith(f"optim.groups: {line!r}: expected ")
    assert said in message
    assert "\n" not in message


def test_patterns_match_whole_names() -> None:
    group = parse_group("*.bias: lr=0")
    assert group.matches("blocks.0.attention.q.bias")
    assert not group.matches("blocks.0.attention.q.biases")
