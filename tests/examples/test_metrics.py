import json
from pathlib import Path

import pytest

from examples.llama.metrics import open_metrics, read_metrics


def test_lines_are_read_as_written(tmp_path: Path) -> None:
    with open_metrics(tmp_path) as write:
        write({"step": 1, "loss": 2.5})
        write({"step": 1, "validation_loss": 2.75})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 2.5},
        {"step": 1, "validation_loss": 2.75},
    ]


def test_going_on_after_a_step_leaves_neither_gaps_nor_duplicates(tmp_path: Path) -> None:
    with open_metrics(tmp_path) as write:
        for step in range(1, 6):
            write({"step": step, "loss": 0.0})
        write({"step": 3, "validation_loss": 0.0})
    with open_metrics(tmp_path, steps_done=3) as write:
        for step in range(4, 8):
            write({"step": step, "loss": 1.0})
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["loss"] for line in lines if "loss" in line] == [0.0] * 3 + [1.0] * 4
    assert sum("validation_loss" in line for line in lines) == 1


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path: Path) -> None:
    whole = json.dumps({"step": 1, "loss": 0.5}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 2, "lo')
    with open_metrics(tmp_path, steps_done=2) as write:
        write({"step": 2, "loss": 0.25})
    assert [line["loss"] for line in read_metrics(tmp_path)] == [0.5, 0.25]


def test_a_damaged_line_before_lines_to_keep_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 0.5}) for step in (1, 2, 3)]
    damaged = "\n".join([lines[0], lines[1][:7], lines[2]])
    (tmp_path / "metrics.jsonl").write_text(damaged)
    with (
        pytest.raises(OSError, match="is damaged .* remove the damaged line"),
        open_metrics(tmp_path, steps_done=3),
    ):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == damaged
    with open_metrics(tmp_path, steps_done=1):
        pass
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_a_line_that_lacks_its_end_alone_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}))
    with open_metrics(tmp_path, steps_done=1) as write:
        write({"step": 2, "loss": 0.25})
    assert [line["loss"] for line in read_metrics(tmp_path)] == [0.5, 0.25]


def test_a_new_run_begins_with_no_lines(tmp_path: Path) -> None:
    with open_metrics(tmp_path) as write:
        write({"step": 1, "loss": 0.0})
    with open_metrics(tmp_path):
        pass
    assert read_metrics(tmp_path) == []


def test_tensorboard_gets_every_value_by_its_name(tmp_path: Path) -> None:
    with open_metrics(tmp_path, tensorboard=True) as write:
        write({"step": 1, "loss": 0.5, "learning_rate": 0.25})
    (events,) = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    assert b"loss" in written
    assert b"learning_rate" in written
    assert b"step" not in written


def test_missing_metrics_are_no_lines_and_damaged_ones_an_error(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    for damaged in (b'{"st\n', b"\xff\xfe\n"):
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + damaged)
        with pytest.raises(OSError, match=r"metrics.jsonl is damaged .*; remove the damaged line"):
            read_metrics(tmp_path)
