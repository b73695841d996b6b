"""The report: self-contained, true to metrics.jsonl after crashes and resumes, safe with any text, small for long runs."""

from __future__ import annotations

import json
import math
import shlex
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from teratron.config import Config, UserError
from teratron.train import tensorboard
from teratron.train.history import read_history
from teratron.train.report import write_report
from teratron.train.report_curves import smooth
from teratron.train.report_page import compact, duration

START = {
    "event": "start",
    "step": 0,
    "time": 1_700_000_000.0,
    "parameters": 804_096,
    "vocab_size": 65,
    "device": "cpu: test, 2 threads",
    "precision": "bf16",
    "peak_flops": 2e11,
    "versions": {"torch": "2.13.0"},
    "train_tokens": 1000,
}
BIGRAM = {"event": "baseline", "name": "bigram", "loss": 2.5, "perplexity": 12.0}


def step(number: int, loss: float | None = 1.0, **more: Any) -> dict[str, Any]:
    event = {"event": "step", "step": number, "loss": loss, "grad_norm": 0.5, "lr": 1e-3, "tokens": 100 * number, "seconds": 0.1}
    return event | {"tokens_per_second": 1000.0, "mfu": 0.4, "time": START["time"] + number} | more  # type: ignore[operator]


def evaluation(number: int, loss: float) -> dict[str, Any]:
    return {"event": "eval", "step": number, "loss": loss, "perplexity": math.exp(loss)}


def make_run(folder: Path, events: list[dict[str, Any]], tail: str = "", **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(Config().override(config).to_toml(), "utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + tail, "utf-8")
    return folder


def page(run: Path) -> str:
    return write_report(run).read_text("utf-8")


class Balanced(HTMLParser):
    """Fails on a tag that closes what is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def text_of(html: str) -> str:
    """What a reader sees; checks on the way that every tag is closed."""
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    return " ".join(parser.text)


def full_run(folder: Path) -> Path:
    sample = {"event": "sample", "step": 300, "prompt": "def f(", "text": "def f(x):\n    return x < 1 & y"}
    events = [START, BIGRAM, *(step(i, 3 / i + 1) for i in range(1, 301)), evaluation(150, 1.5), evaluation(300, 1.6), sample]
    return make_run(folder, [*events, {"event": "end", "step": 300, "seconds": 30.0, "reason": "done", "time": START["time"] + 301}])


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    html = page(full_run(tmp_path / "run"))
    text_of(html)
    for outside in ("http", "src=", "<script", "<link", "@import", "url("):
        assert outside not in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert 'name="viewport"' in html


def test_the_summary_tells_the_run(tmp_path: Path) -> None:
    text = text_of(page(full_run(tmp_path / "my run")))
    expected = [
        "my run",
        "finished · step 300",
        "1.010",
        "1.500",
        "best, at step 150; last 1.600",
        "4.48",
        "804 k",
        "30.0 k",
        "30.0 passes",
    ]
    for part in [
        *expected,
        "2.7 times lower than a bigram model's 12.00",
        "1,000",
        "40.0 %",
        "200 GFLOP/s",
        "5 min 01 s",
        "cpu: test, 2 threads",
    ]:
        assert part in text


def test_of_steps_that_ran_twice_the_later_line_counts(tmp_path: Path) -> None:
    events = [
        START,
        *(step(i, 9.0) for i in range(1, 8)),
        evaluation(6, 0.5),
        {"event": "resume", "step": 4},
        *(step(i, 2.0) for i in (5, 6)),
    ]
    history = read_history(make_run(tmp_path / "run", events) / "metrics.jsonl")
    assert list(history.columns["step"]) == [1, 2, 3, 4, 5, 6]
    assert list(history.columns["loss"]) == [9, 9, 9, 9, 2, 2]
    assert history.of_kind("eval") == []


def test_a_resume_takes_back_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    events = [START, *(step(i) for i in range(1, 8)), {"event": "resume", "step": 4}]
    history = read_history(make_run(tmp_path / "run", events) / "metrics.jsonl")
    assert list(history.columns["step"]) == [1, 2, 3, 4]


def test_a_run_started_again_before_its_first_checkpoint_forgets_the_first_try(tmp_path: Path) -> None:
    events = [START, step(1, 9.0), step(2, 9.0), START, step(1, 2.0)]
    history = read_history(make_run(tmp_path / "run", events) / "metrics.jsonl")
    assert list(history.columns["loss"]) == [2.0]


def test_time_between_two_processes_is_not_training_time(tmp_path: Path) -> None:
    late = START["time"] + 90_000  # type: ignore[operator]
    events = [START, step(1), step(2), {"event": "resume", "step": 2, "time": late}, step(3, time=late + 1)]
    assert read_history(make_run(tmp_path / "run", events) / "metrics.jsonl").wall == pytest.approx(3.0)


@pytest.mark.parametrize("tail", ['{"event":"st', '{"event":"step","step":3,"loss":1.', "\x00\x00\n", "[1, 2]\n", "17\n"])
def test_a_half_written_line_is_left_out_and_told(tmp_path: Path, tail: str) -> None:
    run = make_run(tmp_path / "run", [START, step(1), step(2, 1.25)], tail)
    assert "1 unreadable line," in text_of(page(run))
    assert list(read_history(run / "metrics.jsonl").columns["loss"]) == [1.0, 1.25]


def test_numbers_that_are_none_are_gaps_and_told(tmp_path: Path) -> None:
    events = [START, step(1), step(2, None), step(3, grad_norm=None, mfu="much", tokens=None), evaluation(3, math.nan)]
    text = text_of(page(make_run(tmp_path / "run", events)))
    assert "At 1 of 3 steps the loss is not a finite number" in text
    assert "nan" not in text


def test_samples_are_escaped_and_keep_their_whitespace(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>\n\tif a < b:\n\n        x = '&amp;' \x07\ud800"
    html = page(make_run(tmp_path / "run", [step(1), {"event": "sample", "step": 1, "prompt": "<b>", "text": nasty}]))
    assert "<script" not in html
    shown = html.split("<pre>")[1].split("</pre>")[0]
    assert shown.startswith("<b>&lt;b&gt;</b>")
    assert unescape(shown.split("</b>", 1)[1]) == nasty.replace("\x07", "␇").replace("\ud800", "?")
    text_of(html)


def test_the_newest_samples_are_open_and_earlier_ones_folded(tmp_path: Path) -> None:
    samples = [{"event": "sample", "step": n, "prompt": "p", "text": f"written at {n}"} for n in range(1, 201)]
    before, folded = page(make_run(tmp_path / "run", [step(1), *samples])).split("<details>")[:2]
    assert "written at 200" in before
    assert "written at 199" not in before
    assert "of 199 earlier samples" in folded
    assert 20 <= folded.count("written at") <= 40


def test_config_shows_what_differs_and_everything(tmp_path: Path) -> None:
    html = page(make_run(tmp_path / "run", [step(1)], **{"optim.lr": 0.5, "data.text": ["a <b>.txt"]}))
    assert "2 keys differ from the defaults" in html
    assert html.count('<tr class="changed">') == 4
    assert f"All {len(list(Config().items()))} keys" in html
    assert "a &lt;b&gt;.txt" in html
    assert "Default: 0.0003." in html


def test_a_config_of_another_version_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [step(1)])
    (run / "config.toml").write_text("[model]\nflux = 3\n", "utf-8")
    assert "model.flux" in page(run)


def test_commands_survive_the_shell(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "it's a run", [step(1), {"event": "sample", "step": 1, "prompt": 'a "b" $c', "text": ""}], **{"train.steps": 1}
    )
    commands = [unescape(part.split("</code>")[0]) for part in page(run).split("<dd><code>")[1:]]
    assert [shlex.split(command) for command in commands] == [
        ["teratron", "generate", str(run), 'a "b" $c'],
        ["teratron", "train", str(run / "config.toml"), "--run", str(run), "--train.steps", "2"],
        ["tensorboard", "--logdir", str(run / "tensorboard")],
    ]


def test_an_interrupted_run_is_to_be_finished_first(tmp_path: Path) -> None:
    end = {"event": "end", "step": 3, "seconds": 1.0, "reason": "interrupted"}
    html = page(make_run(tmp_path / "run", [START, step(3), end], **{"train.steps": 50}))
    assert "interrupted · step 3 of 50" in text_of(html)
    assert "--train.steps 50<" in html


@pytest.mark.parametrize("events", [[], [START], [step(1)], [evaluation(0, 4.0)], [BIGRAM]])
def test_short_runs_make_a_page(tmp_path: Path, events: list[dict[str, Any]]) -> None:
    text = text_of(page(make_run(tmp_path / "run", events)))
    assert "To try next" in text
    assert ("No training steps are recorded yet" in text) == all(event["event"] not in ("step", "eval") for event in events)


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    events = [event for i in range(1, 20_001) for event in ([step(i, 2 + math.sin(i))] + [evaluation(i, 2 + 1 / i)] * (i % 10 == 0))]
    html = page(make_run(tmp_path / "run", [START, *events]))
    assert len(html) < 400_000
    assert "The last 200 of 2,001 events" in html


def test_a_failed_write_keeps_the_former_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", [step(1)])
    former = page(run)

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"report\.html.*No space left on device"):
        write_report(run)
    assert (run / "report.html").read_text("utf-8") == former
    assert sorted(path.name for path in run.iterdir()) == ["config.toml", "metrics.jsonl", "report.html"]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither config\.toml nor metrics\.jsonl"):
        write_report(tmp_path)


def test_a_broken_config_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [step(1)])
    (run / "config.toml").write_text("[model\n", "utf-8")
    with pytest.raises(UserError, match=r"config\.toml: not a readable TOML file"):
        write_report(run)


def test_smoothing_keeps_a_level_and_the_first_number_and_takes_out_noise() -> None:
    x = list(range(1000))
    assert smooth(x, [2.5] * 1000)[1] == pytest.approx([2.5] * 1000)
    noisy = [10.0, *((-1.0) ** i for i in range(999))]
    places, means, window = smooth(x, noisy)
    assert (places, window) == (x, 21)
    assert means[0] == 10.0
    assert max(map(abs, means[50:])) < 0.1
    assert len(smooth(list(range(30_000)), [1.0] * 30_000)[0]) == 1000


def test_smoothing_passes_over_gaps() -> None:
    means = smooth(list(range(500)), [math.nan if i == 250 else 1.0 for i in range(500)])[1]
    assert math.isnan(means[250])
    assert means[249] == means[251] == 1.0


def test_numbers_and_durations_are_readable() -> None:
    written = [compact(value) for value in (0, 999, 9_994, 12_345, 804_096, 1_000_000, 124_439_808, 1.5e9, 1.75e11, 1.008e12)]
    assert written == ["0", "999", "9,994", "12.3 k", "804 k", "1.00 M", "124 M", "1.50 B", "175 B", "1.01 T"]
    spans = [duration(value) for value in (0.0961, 41.23, 59.96, 192, 7500, 273_600)]
    assert spans == ["96 ms", "41.2 s", "1 min 00 s", "3 min 12 s", "2 h 05 min", "3 d 4 h"]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = tensorboard.TensorBoard(tmp_path)
    for event in [START, *(step(i, 9.0) for i in range(1, 7)), evaluation(2, 1.5), step(7, None)]:
        board.write(event)
    board.close()
    board = tensorboard.TensorBoard(tmp_path)
    for event in [{"event": "resume", "step": 3}, *(step(i, 2.0) for i in (4, 5))]:
        board.write(event)
    board.close()
    read = accumulator.EventAccumulator(str(tmp_path))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {
        *(f"train/{name}" for name in ("loss", "lr", "grad_norm", "tokens_per_second", "mfu")),
        *(f"eval/{name}" for name in ("loss", "perplexity")),
    }
    assert [(scalar.step, scalar.value) for scalar in read.Scalars("train/loss")] == [(1, 9), (2, 9), (3, 9), (4, 2), (5, 2)]
    assert [scalar.wall_time for scalar in read.Scalars("train/lr")][:2] == [START["time"] + 1, START["time"] + 2]  # type: ignore[operator]


def test_tensorboard_missing_is_said_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not tensorboard.available()
    with pytest.raises(UserError, match=r"pip install tensorboard.*--log\.tensorboard false"):
        tensorboard.TensorBoard(tmp_path)
