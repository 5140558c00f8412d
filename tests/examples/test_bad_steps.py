"""What `pretrain` does with steps that would spoil the weights."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console

from apollo_optax import apollo
from examples.llama import model, run, train
from examples.llama.bad_steps import CAUSES, cause_of, skip_bad_steps
from examples.llama.command_line import parse
from examples.llama.config import MODELS
from examples.llama.huggingface import save_llama
from examples.llama.layered import layered_training
from examples.llama.metrics import read_metrics
from examples.llama.optimizers import make_optimizer
from examples.llama.options import PretrainConfig
from examples.llama.pretrain import main, prepare
from tests.examples.tiny_pretrain import TINY, squares

GOOD = np.full((2, 3), 0.5, np.float32)


def toy_loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean(jnp.square(batch @ params["w"]), dtype=jnp.float32)


def toy_step(dtype: Any = jnp.float32, spike_limit: float = 3.0) -> tuple[Any, Any]:
    tx = skip_bad_steps(train.in_float32(apollo(0.01, 2)), spike_limit)
    weights = jax.random.normal(jax.random.key(0), (3, 4), dtype)
    return train.make_train_step(toy_loss, tx), train.init_state(tx, {"w": weights})


def copied(tree: Any) -> Any:
    """The step takes over the memory of what it is given."""
    return jax.tree.map(jnp.copy, tree)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("batch", "cause"),
    [
        (GOOD * np.nan, "not finite"),
        (GOOD * np.inf, "not finite"),
        (GOOD * 1e30, "not finite"),  # squares overflow in every dtype
        (GOOD * 200, "loss spike"),
        (GOOD * 0, "zero gradient"),
    ],
    ids=["nan", "inf", "overflow", "spike", "zero"],
)
def test_a_bad_step_changes_nothing_but_its_count(batch: Any, cause: str, dtype: Any) -> None:
    step, state = toy_step(dtype)
    state, outcome = step(state, GOOD)
    assert cause_of(outcome) == ""
    before = copied(state)
    state, outcome = step(state, batch)
    assert cause_of(outcome) == cause
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    counted = {"skipped": 1, "in_a_row": 1, "cause": CAUSES.index(cause)}
    jax.tree.map(
        np.testing.assert_array_equal, state.opt_state, before.opt_state._replace(**counted)
    )
    state, outcome = step(state, GOOD)
    assert (state.opt_state.skipped, state.opt_state.in_a_row) == (1, 0)
    assert np.any(state.params["w"] != before.params["w"])


def test_one_nan_in_a_large_gradient_is_seen() -> None:
    tx = skip_bad_steps(optax.sgd(0.1), 3.0)
    grads = jnp.ones((64, 64)).at[1, 2].set(jnp.nan)
    update, state = tx.update(grads, tx.init(grads), value=jnp.float32(1.0))
    assert (CAUSES[state.cause], state.skipped) == ("not finite", 1)
    np.testing.assert_array_equal(update, 0)


def test_without_a_limit_no_loss_is_a_spike() -> None:
    step, state = toy_step(spike_limit=0)
    state, _ = step(state, GOOD)
    _, outcome = step(state, GOOD * 200)
    assert cause_of(outcome) == ""


def test_a_guarded_step_is_the_step_where_nothing_is_bad() -> None:
    states = []
    for tx in (apollo(0.01, 2), skip_bad_steps(apollo(0.01, 2), 3.0)):
        step = train.make_train_step(toy_loss, tx)
        state = train.init_state(tx, {"w": jax.random.normal(jax.random.key(0), (3, 4))})
        for _ in range(3):
            state, _ = step(state, GOOD)
        states.append(state)
    plain, guarded = states
    jax.tree.map(np.testing.assert_array_equal, guarded.params, plain.params)
    jax.tree.map(np.testing.assert_array_equal, guarded.opt_state.inner_state, plain.opt_state)


@pytest.mark.parametrize(
    "weights", ["f32", *(pytest.param(w, marks=pytest.mark.slow) for w in ("bf16", "int8"))]
)
def test_a_layerwise_step_with_a_loss_that_is_not_finite_changes_nothing(weights: Any) -> None:
    training = layered_training(
        TINY, optax.adam(0.01), weights=weights, dtype=jnp.float32, spike_limit=3.0
    )
    params = jax.jit(lambda: model.init_params(TINY, 0, convert=training.keep))()
    state = training.init_state(params)
    tokens = np.arange(34, dtype=np.int32).reshape(2, 17)
    state, outcome = training.step(state, tokens)
    assert cause_of(outcome) == ""
    # The layers, norm and head, the embedding.
    assert outcome.moved == outcome.parts == TINY.num_layers + 2
    norm = state.params["rest"]["norm"]["scale"]
    bad = copied(state)
    bad.params["rest"]["norm"]["scale"] = norm.at[3].set(jnp.inf)
    before = copied(bad)
    after, outcome = training.step(bad, tokens)
    assert cause_of(outcome) == "not finite"
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(
        np.testing.assert_array_equal, after.opt_state.inner_state, before.opt_state.inner_state
    )


@pytest.fixture(scope="module")
def spoiled_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that returns NaN for every sequence with a "~" in it."""
    params = model.init_params(TINY, 0)
    embedding = params["embed"]["embedding"]
    params["embed"]["embedding"] = embedding.at[ord("~")].set(jnp.inf)
    folder = tmp_path_factory.mktemp("model") / "spoiled"
    save_llama(folder, TINY, params)
    return folder


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "nano", TINY)


def command(folder: Path, text: str, *more: str) -> list[str]:
    corpus = folder / "text.txt"
    corpus.write_text(text)
    return [
        *("--data", str(corpus), "--output", str(folder / "run"), "--tokenizer", "bytes"),
        *("--sequence", "16", "--batch", "4", "--micro-batches", "2", "--log-every", "1"),
        *("--evaluation-batches", "1", "--sample-length", "0", "--steps", "12", *more),
    ]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "run") if "loss" in line]


@pytest.mark.parametrize("update", ["standard", pytest.param("layerwise", marks=pytest.mark.slow)])
def test_steps_that_are_not_finite_are_skipped_counted_and_reported(
    update: str, spoiled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = squares(0, 20) + "~~~\n" + squares(20, 200)
    flags = ["--load", str(spoiled_model), "--update", update, "--micro-batches", "1"]
    flags += ["--learning-rate", "0.02"]
    # More than once through the text.
    arguments = command(tmp_path, text, *flags, "--batch", "8", "--steps", "60")
    assert main(arguments) == 0
    skipped = [line for line in lines(tmp_path) if "skipped" in line]
    assert 1 <= len(skipped) <= 4
    assert all(line["loss"] is None and line["skipped"] == "not finite" for line in skipped)
    output = capsys.readouterr().out
    assert f"step {skipped[0]['step']}/60  skipped, not finite; 1 skipped so far" in output
    assert f'"skipped_steps": {len(skipped)}' in (tmp_path / "run" / "result.json").read_text()
    # The schedule waits for a step that is skipped.
    rates = {line["step"]: line["learning_rate"] for line in lines(tmp_path)}
    first = skipped[0]["step"]
    assert rates[first + 1] == rates[first]
    assert lines(tmp_path)[-1]["loss"] < lines(tmp_path)[0]["loss"] - 0.5


def test_a_run_whose_every_step_was_skipped_ends_with_an_error(
    spoiled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--load", str(spoiled_model), "--steps", "2"]
    assert main(command(tmp_path, "~" * 4000, *more)) == 1
    error = capsys.readouterr().err
    assert "error: every step of apollo was skipped" in error
    assert error.count("\n") == 1
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.slow
def test_too_many_skipped_steps_end_the_run_with_its_last_checkpoint_as_it_was(
    spoiled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--most-skipped", "4", "--checkpoint-every", "2"]
    good = command(tmp_path, squares(0, 200), "--load", str(spoiled_model), *more)
    # The last step of all before which to stop: a run on the same text, but for the weights.
    assert main([*good, "--spike-limit", "0"]) == 0
    assert not any("skipped" in line for line in lines(tmp_path))
    bad = command(tmp_path / "run", "~" * 4000, "--load", str(spoiled_model), *more)
    capsys.readouterr()
    assert main(bad) == 1
    error = capsys.readouterr().err
    # The device is a step ahead of what the host has seen.
    assert "5 steps in a row were skipped, until step 5" in error
    assert "(not finite); no checkpoint was saved before" in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "run" / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_run_can_go_on_after_skipped_steps_with_another_learning_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nothing is within a ten-thousandth of a nat of the mean for long.
    more = ["--spike-limit", "1e-4", "--most-skipped", "1", "--checkpoint-every", "1"]
    arguments = command(tmp_path, squares(0, 200), *more, "--learning-rate", "0.3")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "(loss spike); the last checkpoint is that of step" in error
    saved = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    resuming = [*arguments, "--resume", "--spike-limit", "3"]
    assert main(resuming) == 2
    assert "spike_limit is 0.0001 there and 3.0 here" in capsys.readouterr().err
    assert main([*resuming, "--learning-rate", "0.01", "--allow-changes"]) == 0
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 13))
    assert all("skipped" not in line for line in lines(tmp_path) if line["step"] <= saved)


@pytest.mark.slow
def test_another_model_is_refused_and_another_seed_has_its_projections_if_changes_are_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(tmp_path, squares(0, 200), "--steps", "2")
    assert main(arguments) == 0
    keys = {}
    for seed in ("0", "1"):
        given = [*arguments, "--resume", "--allow-changes", "--seed", seed]
        plan = prepare(parse(PretrainConfig, "pretrain", given, ()))
        state, batches, _ = run._start(plan.runs[0], plan.text, rich.console.Console())
        batches.close()
        found = optax.tree_utils.tree_get_all_with_path(state.opt_state, "key")
        keys[seed] = [tuple(map(int, key)) for _, key in found]
    fresh = optax.tree_utils.tree_get_all_with_path(
        make_optimizer(plan.runs[0].settings.optimizer).init({}), "key"
    )
    assert keys["1"] == [tuple(map(int, key)) for _, key in fresh]
    assert keys["0"] != keys["1"]
    capsys.readouterr()
    assert main([*arguments, "--resume", "--allow-changes", "--rank", "3"]) == 2
    assert "optimizer.rank is" in capsys.readouterr().err
