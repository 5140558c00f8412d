from benchmarks.load_memory import OUTPUT
from benchmarks.rows import read_rows


def test_loading_took_little_more_than_the_weights_and_one_parameter():
    ratios = {r["weights"]: r["peak_bytes"] / r["checkpoint_bytes"] for r in read_rows(OUTPUT)}
    assert ratios["bf16"] < 1.25
    assert ratios["int8"] < 1.25
    assert ratios["f32"] < 2.5
