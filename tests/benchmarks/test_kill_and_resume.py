import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kill_and_resume
from examples.llama.metrics import read_metrics
from tests.examples.tiny_pretrain import squares

STEPS = 12


@pytest.mark.slow
def test_a_run_killed_at_start_in_a_step_and_in_a_save_ends_as_if_never_killed(
    tmp_path: Path,
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    corpus = tmp_path / "text.txt"
    corpus.write_text(squares())
    sizes = "--sequence 16 --batch 4 --micro-batches 1 --evaluation-batches 1 --sample-length 0"
    lengths = f"--steps {STEPS} --checkpoint-every 2 --evaluate-every 5 --log-every 1 --rank 4"
    options = ["--data", str(corpus), *sizes.split(), *lengths.split()]

    def trained(program: str, *more: str) -> int:
        command = [sys.executable, "-m", f"tests.examples.{program}", *more, *options]
        return subprocess.run(command, check=False).returncode

    assert trained("tiny_pretrain", "--output", str(whole)) == 0
    for moment in ("start", "step", "save"):
        resume = ["--resume"] if killed.is_dir() else []
        ended = trained("killed", moment, "--output", str(killed), *resume)
        assert ended == -signal.SIGKILL
    assert list((killed / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
    assert trained("tiny_pretrain", "--output", str(killed), "--resume") == 0
    assert kill_and_resume.differences(whole, killed, STEPS) == []

    # The comparison sees what it is for.
    lines = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[1:]))
    record = killed / "checkpoints" / str(STEPS) / "record" / "metadata"
    written = json.loads(record.read_text())
    record.write_text(json.dumps(written | {"batches": {"next_index": STEPS + 1}}))
    assert kill_and_resume.differences(whole, killed, STEPS) == ["record", "metrics"]
    shutil.rmtree(killed / "checkpoints" / str(STEPS) / "state")
    shutil.copytree(
        whole / "checkpoints" / str(STEPS - 2) / "state",
        killed / "checkpoints" / str(STEPS) / "state",
    )
    assert any("params" in name for name in kill_and_resume.differences(whole, killed, STEPS))
    assert len(read_metrics(whole)) == STEPS + 3
