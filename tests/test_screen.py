"""What a run shows while it is going on."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress

import trompe.screen
from trompe.interfaces import EpochRecord
from trompe.screen import Bars, Plan, Screen, Silent, progress_bars


def tell(screen: Screen) -> None:
    screen.plan(Plan(0, 0, 3, ("a", "b [c]"), None))
    screen.stage("attack")
    screen.note("gradcam reads [layer]")
    screen.step(1, 2, 3, {"prediction": 0.5})
    screen.epoch(EpochRecord(1, {"prediction": 0.25}, {"score": 1.5}, 2.0))
    screen.stage("measuring")


def test_bars_keep_notes_and_epochs_as_lines_and_one_bar_at_a_time() -> None:
    shown = io.StringIO()
    with Progress(console=Console(file=shown, width=200)) as progress:
        tell(Bars(progress))
        assert [task.description for task in progress.tasks] == ["runs", "measuring"]
    assert "gradcam reads [layer]" in shown.getvalue()
    assert "epoch 1: prediction 0.2500  score 1.5000  (2 s)" in shown.getvalue()


def test_a_silent_screen_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    tell(Silent())
    assert capfd.readouterr() == ("", "")


def test_many_runs_are_one_bar_with_the_plans_remaining_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(trompe.screen, "console", Console(file=shown, width=200))
    with progress_bars() as bars:
        bars.plan(Plan(0, 0, 12, ("a", "b [c]"), None))
        bars.progress.refresh()
        bars.plan(Plan(3, 1, 12, ("d",), 3723.4))
    told = shown.getvalue()
    assert "3 of 12 done, 1 failed, running d" in told
    assert "1:02:03" in told
    assert len(bars.progress.tasks) == 1
