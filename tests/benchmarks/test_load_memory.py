from benchmarks.load_memory import OUTPUT
from benchmarks.rows import read_rows
from examples.llama.config import MODELS


def test_loading_took_little_more_than_the_weights_and_one_parameter():
    ratios = {r["weights"]: r["loading_bytes"] / r["checkpoint_bytes"] for r in read_rows(OUTPUT)}
    assert ratios["bf16"] < 1.25
    assert ratios["int8"] < 1.25
    assert ratios["f32"] < 2.5


def test_exporting_took_a_few_tensors():
    largest = 4 * MODELS["350m"].vocab_size * MODELS["350m"].hidden_size  # in float32
    for row in read_rows(OUTPUT):
        assert row["exporting_bytes"] < 4 * largest
