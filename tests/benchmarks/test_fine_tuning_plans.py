import pytest

from apollo_optax.planning import parse_target
from benchmarks.fine_tuning_plans import CARDS, MODELS, smallest_card
from examples.llama.config import parameter_count
from examples.llama.huggingface import describe_shape


@pytest.mark.parametrize(
    ("name", "parameters"), [("LLaMA 3.2 1B", 1_235_814_400), ("LLaMA 3.1 8B", 8_030_261_248)]
)
def test_the_models_have_the_parameters_that_their_authors_say(name: str, parameters: int) -> None:
    config, others = describe_shape(MODELS[name])
    assert (parameter_count(config), others) == (parameters, None)


def test_a_step_goes_on_the_smallest_card_that_holds_its_peak() -> None:
    capacity = parse_target(CARDS[1]).capacity_bytes
    assert smallest_card(capacity) == "12 GB"
    assert smallest_card(capacity + 1) == "16 GB"
    assert smallest_card(2**40) == "none"
