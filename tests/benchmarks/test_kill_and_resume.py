import json
import random
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import kill_and_resume
from examples.llama.metrics import read_metrics
from tests.examples.tiny_pretrain import squares


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    corpus = tmp_path_factory.mktemp("corpus") / "text.txt"
    corpus.write_text(squares())
    sizes = "--sequence 16 --batch 4 --micro-batches 1 --evaluation-batches 1 --sample-length 0"
    lengths = "--steps 40 --checkpoint-every 2 --evaluate-every 10 --log-every 1 --rank 4"
    program = [sys.executable, "-m", "tests.examples.tiny_pretrain", "--data", str(corpus)]
    return [*program, *sizes.split(), *lengths.split()]


@pytest.mark.slow
def test_a_run_killed_at_start_in_a_step_and_in_a_save_ends_as_if_never_killed(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # quick to compile
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert kill_and_resume.kill_and_resume(command, whole, 0, random.Random(0)) == []
    kills = kill_and_resume.kill_and_resume(command, killed, 3, random.Random(0))
    assert [kill.when for kill in kills] == ["start", "step", "save"]
    assert kill_and_resume.differences(whole, killed, 40) == []

    # The comparison sees what it is for.
    lines = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[1:]))
    record = killed / "checkpoints" / "40" / "record" / "metadata"
    written = json.loads(record.read_text())
    record.write_text(json.dumps(written | {"batches": {"next_index": 41}}))
    assert kill_and_resume.differences(whole, killed, 40) == ["record", "metrics"]
    shutil.rmtree(killed / "checkpoints" / "40" / "state")
    shutil.copytree(whole / "checkpoints" / "38" / "state", killed / "checkpoints" / "40" / "state")
    assert any("params" in name for name in kill_and_resume.differences(whole, killed, 40))
    assert len(read_metrics(whole)) == 44
