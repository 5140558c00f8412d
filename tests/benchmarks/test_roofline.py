"""No committed measurement beats a bound."""

from benchmarks.roofline import OUTPUT, PUBLISHED, tokens_per_second_at_most
from benchmarks.rows import Row, read_rows


def rows_of(kind: str) -> list[Row]:
    return [row for row in read_rows(OUTPUT) if kind in row]


def test_no_program_ran_faster_on_this_machine_than_its_bound() -> None:
    rows = rows_of("program")
    assert len(rows) == 10
    assert not [row for row in rows if row["fastest_seconds"] < row["step_seconds_at_least"]]


def test_no_measured_update_is_faster_than_its_bound() -> None:
    rows = rows_of("timed_update")
    assert {row["target"] for row in rows} == {"a100-80gb", "h200"}
    assert not [row for row in rows if row["step_seconds"] < row["step_seconds_at_least"]]


def test_no_published_training_is_faster_than_the_bound_of_its_products() -> None:
    for name, model, chip, tokens_per_second, _ in PUBLISHED:
        assert tokens_per_second < tokens_per_second_at_most(model, chip), name


def test_operations_are_never_above_the_compilers_own_count() -> None:
    shares = [row["operations"] / row["compiler_operations"] for row in rows_of("count")]
    assert len(shares) == 5
    # What is missing is elementwise.
    assert all(0.95 < share <= 1 for share in shares)
