"""Plans of training steps as rows of a result: what the compilers of absent chips say."""

from collections.abc import Iterable
from pathlib import Path

from benchmarks.rows import Row, add_row, read_rows
from examples.llama.plan import PlanConfig, asked, plan_report

GIB = 2**30


def find_row(rows: Iterable[Row], config: PlanConfig) -> Row | None:
    """The row that answers `config`; None if there is none.

    A row from before there was a flag has the flag's default.
    """
    question = asked(config).items()
    defaults = asked(PlanConfig())
    for row in rows:
        if question <= (defaults | row).items() and (
            not config.largest_batch or "largest_batch" in row
        ):
            return row
    return None


def row_of(rows: Iterable[Row], config: PlanConfig) -> Row:
    """The row that answers `config`.

    Raises:
      LookupError: If it was not planned yet.
    """
    row = find_row(rows, config)
    if row is None:
        raise LookupError(f"there is no row for {config}; run the benchmark")
    return row


def plan_missing(output: Path, command: str, configs: Iterable[PlanConfig]) -> None:
    """Compiles what has no row in `output` yet, and adds it."""
    for config in configs:
        if find_row(read_rows(output), config) is not None:
            continue
        report = plan_report(config)
        del report["loops"]
        row = asked(config) | report
        add_row(output, command, row)
        print(
            f"{config.load or config.model} {config.optimizer} {config.weights} {config.update} on "
            f"{config.device}, {config.batch} x {config.sequence}: "
            f"{row['peak_bytes'] / GIB:.2f} GiB",
            flush=True,
        )
