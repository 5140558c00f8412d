from pathlib import Path

import pytest

from benchmarks.long_run import PARTS, long_run


@pytest.mark.release
def test_every_part_of_the_steps_is_measured(tmp_path: Path) -> None:
    row = long_run(tmp_path, "bf16", 2000)
    assert len(row["validation_loss"]) == len(row["step_milliseconds"]) == PARTS
    assert row["validation_loss"][-1] < row["validation_loss"][0]
    assert all(milliseconds > 0 for milliseconds in row["step_milliseconds"])
    # A part may be over before it is looked at.
    assert max(row["resident_megabytes"]) > 100
