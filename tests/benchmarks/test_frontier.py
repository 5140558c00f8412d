"""The frontier's search, its rules against the package's, and the text's figures."""

import math
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import state_sizes
from benchmarks.frontier import training
from benchmarks.frontier.pairs import OTHER_RULES, PAIRS, SWAN, Pair
from benchmarks.frontier.report import results_of
from benchmarks.frontier.rules import HIDDEN, VOCABULARY, Rule
from benchmarks.frontier.search import SEEDS, Sweep, best_trial, next_trials, rows_of, sweep_of
from benchmarks.frontier.training import LANES, Setting, Texts, Trial
from benchmarks.rows import RESULTS, read_rows

PAIR = Pair("1m", "whitened", "factored")
ROOT = Path(__file__).parents[2]
ROWS = read_rows(RESULTS / "frontier.json")


def test_a_sweep_ends_at_the_best_rates_with_worse_ones_on_all_sides_and_then_takes_seeds():
    best = Trial(0.016, 0.0075, 0.0011)

    def loss_of(trial: Trial) -> float:
        return sum(math.log(a / b) ** 2 for a, b in zip(trial[:3], best[:3], strict=True))

    losses: dict[Trial, float] = {}
    while trials := next_trials(PAIR, losses):
        assert len(trials) <= LANES
        assert not set(trials) & set(losses)
        losses |= {trial: loss_of(trial) for trial in trials}
    found = best_trial(losses)
    np.testing.assert_allclose(found[:3], best[:3], rtol=0.02)
    assert {t.seed for t in losses if t[:3] == found[:3]} == set(SEEDS)
    for axis, name in enumerate(Trial._fields[:3]):
        along = [t for t in losses if all(t[i] == found[i] for i in range(3) if i != axis)]
        rates = [getattr(t, name) for t in along]
        assert min(rates) < found[axis] < max(rates)


def test_the_sweep_of_a_wider_model_begins_at_the_rates_of_the_smallest():
    row = PAIR._asdict() | Trial(0.008, 0.24, 0.03)._asdict() | {"validation_loss": 1.0}
    wider = PAIR._replace(setting="4m")  # twice the width
    sweep = sweep_of([row], wider)
    assert sweep.start == Trial(0.004, 0.24, 0.03)
    assert sweep_of([row], PAIR) == Sweep()
    # Others were trained before: of a better one of them the neighbors would be missing too.
    losses = {Trial(0.004, 0.03, 0.01): 5.0, Trial(0.002, 0.12, 0.01): 6.0}
    trained = []
    while trials := next_trials(wider, losses, sweep):
        trained.append(trials[0])
        losses[trials[0]] = abs(math.log(trials[0].vocabulary_rate / 0.12))
    assert trained[0] == sweep.start
    assert best_trial(losses) == Trial(0.004, 0.12, 0.03)
    of_matrices_and_vocabulary = {trial[:2] for trial in losses}
    assert {(0.002, 0.12), (0.008, 0.12), (0.004, 0.06)} < of_matrices_and_vocabulary
    assert {(trial.norm_rate, trial.seed) for trial in trained} == {(0.03, 0)}
    assert (0.002, 0.12) not in {trial[:2] for trial in trained}


def test_of_other_rules_for_the_matrices_only_their_own_rate_is_swept():
    row = PAIR._asdict() | Trial(0.008, 0.24, 0.03)._asdict() | {"validation_loss": 1.0}
    other = Pair("1m", "neuron", "factored")
    sweep = sweep_of([row], other)
    losses: dict[Trial, float] = {}
    while trials := next_trials(other, losses, sweep):
        losses[trials[0]] = abs(math.log(trials[0].hidden_rate / 0.008))
    start = HIDDEN["neuron"].start
    assert losses.keys() == {Trial(start * factor, 0.24, 0.03) for factor in (0.5, 1, 2, 4)}


def test_every_pair_is_of_rules_that_exist_and_named_once():
    assert len(set(PAIRS)) == len(PAIRS)
    for pair in PAIRS:
        assert pair.setting in training.SETTINGS
        assert pair.hidden in HIDDEN
        assert pair.vocabulary in VOCABULARY


def test_a_diverged_trial_is_never_the_best():
    diverged = {**dict(zip(Pair._fields, PAIR, strict=True)), **Trial(1, 1, 1)._asdict()}
    trained = diverged | Trial(1, 2, 1)._asdict() | {"validation_loss": 9.0}
    losses = rows_of([diverged | {"validation_loss": None}, trained], PAIR)
    assert best_trial(losses) == Trial(1, 2, 1)


@pytest.mark.parametrize("name", HIDDEN)
def test_updates_of_matrices_have_entries_of_size_about_one_and_point_uphill(name):
    params = {"q": jnp.zeros((2, 128, 128)), "up": jnp.zeros((2, 128, 344))}
    assert_directions(HIDDEN[name], params)


@pytest.mark.parametrize("name", VOCABULARY)
def test_updates_of_the_vocabulary_have_entries_of_size_about_one_and_point_uphill(name):
    params = {"embed": jnp.zeros((256, 128)), "lm_head": jnp.zeros((128, 256))}
    assert_directions(VOCABULARY[name], params)


def assert_directions(rule: Rule, params: dict[str, Any]) -> None:
    """Of a gradient that stays nearly the same, so that a momentum has its full size."""
    tx = rule.make(128, 0)
    state, update = tx.init(params), jax.jit(tx.update)
    drawn = {name: jax.random.normal(jax.random.key(1), p.shape) for name, p in params.items()}
    for step in range(30):
        key = jax.random.key(step)
        grads = {n: 1e-3 * (g + 0.1 * jax.random.normal(key, g.shape)) for n, g in drawn.items()}
        updates, state = update(grads, state, params)
    for name, u in updates.items():
        size = float(jnp.sqrt(jnp.mean(u**2)))
        assert 0.05 < size < 5, (name, size)  # a rank of an eighth or 1 has less, by its root
        assert jnp.sum(u * drawn[name]) > 0.2 * jnp.linalg.norm(u) * jnp.linalg.norm(drawn[name])


def test_the_factors_of_a_low_rank_momentum_find_a_gradient_of_low_rank_through_noise():
    rule = HIDDEN["low_rank_muon"].make(64, 0)
    left, right = (jax.random.normal(jax.random.key(n), (2, 48, 4)) for n in range(2))
    low = left @ jnp.swapaxes(right, -1, -2)
    state, update = rule.init({"w": low}), jax.jit(rule.update)
    for step in range(200):
        noise = 2 * jax.random.normal(jax.random.key(step), low.shape)
        _, state = update({"w": low + noise}, state)
    B, A = (factor["w"] for factor in state)
    assert jnp.linalg.norm(B @ A - low) < 0.2 * jnp.linalg.norm(low)


@pytest.mark.release
@pytest.mark.parametrize(("hidden", "vocabulary"), [("whitened", "factored"), ("muon", "adam")])
def test_models_side_by_side_are_trained_as_alone(hidden, vocabulary):
    tokens = np.random.default_rng(0).integers(0, 1024, 9000).astype(np.uint16)
    texts, setting = Texts(tokens, tokens), Setting("", width=32, layers=1, steps=3, sequences=2)
    trials = [Trial(0.004, 0.03, 0.01), Trial(0.04, 0.1, 0.02, 1), Trial(0.004, 0.03, 0.01, 1)]
    alone, together = (
        training.train(setting, hidden, vocabulary, trials, texts, lanes) for lanes in (1, 4)
    )
    np.testing.assert_allclose(np.array(together, float), np.array(alone, float), rtol=1e-5)
    assert len(set(alone)) == 3


def test_texts_are_written_for_another_machine_and_read_there(tmp_path):
    file = tmp_path / "tokens.npz"
    np.savez(file, train=np.arange(5), validation=np.arange(3))
    found = training.load_texts(Path(file))
    np.testing.assert_array_equal(found.train, np.arange(5))
    np.testing.assert_array_equal(found.validation, np.arange(3))


def test_what_the_page_says_of_the_frontier_holds():
    found = {result.pair[1:]: result for result in results_of(ROWS)}
    adamw, muon = found["adam", "adam"], found["muon", "adam"]
    smallest = found["whitened", "factored"]
    assert smallest.over_adamw < 0.0025
    assert smallest.mean < adamw.mean
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"ends below AdamW at {smallest.over_adamw:.1%} of its state" in readme
    assert muon.mean == min(result.mean for result in found.values())
    assert f"Muon has the lowest loss, at {muon.over_adamw:.0%}" in readme
    with_momentum = found["whitened", "head_factored_momentum"]
    assert with_momentum.over_adamw < 0.03
    assert with_momentum.mean < muon.mean + 0.03
    both = rows_of(ROWS, Pair("1m", "whitened", "factored_momentum"))
    of_seeds = [both[best_trial(both)._replace(seed=seed)] for seed in SEEDS[:3]]
    assert statistics.fmean(of_seeds) == pytest.approx(2.376, abs=5e-4)
    assert statistics.stdev(of_seeds) == pytest.approx(0.003, abs=5e-4)
    (projected,) = rows_of(ROWS, Pair("1m", "apollo_quarter", "apollo")).values()
    assert projected == pytest.approx(2.662, abs=5e-4)
    with_adam = rows_of(ROWS, Pair("1m", "apollo_quarter", "adam"))
    assert projected - with_adam[best_trial(with_adam)] == pytest.approx(0.14, abs=0.005)
    for name, cost in {"apollo_quarter": 0.05, "apollo_mini": 0.045}.items():
        change = found[name, "factored"].mean - found[name, "adam"].mean
        assert change == pytest.approx(cost, abs=0.003)
    assert found["apollo_quarter", "adam"].mean - adamw.mean == pytest.approx(0.05, abs=0.005)
    assert found["apollo_mini", "adam"].mean - adamw.mean == pytest.approx(0.17, abs=0.005)
    seeds = {len(result.losses) for result in found.values() if result.pair not in OTHER_RULES}
    assert seeds == {len(SEEDS)}


def test_what_the_pages_say_of_twice_the_width_holds():
    losses = {
        pair: rows_of(ROWS, pair)
        for pair in (
            SWAN,
            Pair("1m", "adam", "adam"),
            SWAN._replace(setting="4m"),
            Pair("4m", "adam", "adam"),
        )
    }
    of_swan, of_adamw, of_swan_wide, of_adamw_wide = (
        each[best_trial(each)] for each in losses.values()
    )
    small, wider = of_swan - of_adamw, of_swan_wide - of_adamw_wide
    readme, page = (
        " ".join((ROOT / name).read_text(encoding="utf-8").split())
        for name in ("README.md", "docs/benchmarks.md")
    )
    assert f"At twice the width, SWAN is {-wider:.3f} below AdamW, with one seed." in readme
    assert f"factored vocabulary is {-wider:.3f} below AdamW, at" in page
    for pair in (SWAN._replace(setting="4m"), Pair("4m", "adam", "adam")):
        assert not next_trials(pair, losses[pair], sweep_of(ROWS, pair))  # its sweep is closed
    choosing = " ".join((ROOT / "docs/choosing.md").read_text(encoding="utf-8").split())
    assert f"At twice the width, SWAN ends {-wider:.3f} below AdamW" in choosing
    assert f"it was {-small:.3f} below" in page
    small_rates, wide_rates = (
        best_trial(losses[SWAN._replace(setting=setting)])[:2] for setting in ("1m", "4m")
    )
    (swan,) = (result for result in results_of(ROWS) if result.pair == SWAN)
    assert f"seeds have a standard deviation of {swan.deviation:.3f}" in page
    assert wide_rates == tuple(rate / 2 for rate in small_rates)
    (apollo,) = rows_of(ROWS, Pair("4m", "apollo_quarter", "adam"))
    of_apollo = rows_of(ROWS, Pair("1m", "apollo_quarter", "adam"))
    assert apollo.hidden_rate == best_trial(of_apollo).hidden_rate / 2


def test_what_the_pages_say_of_four_times_the_steps_holds():
    def above(rules: tuple[str, str], setting: str) -> float:
        of_rules, of_adamw = (
            rows_of(ROWS, Pair(setting, *names)) for names in (rules, ("adam", "adam"))
        )
        return of_rules[best_trial(of_rules)] - of_adamw[best_trial(of_adamw)]

    swan, apollo = ("whitened", "factored"), ("apollo_quarter", "adam")
    of_swan, of_apollo = (above(rules, "1m_long") for rules in (swan, apollo))
    readme, page, choosing = (
        " ".join((ROOT / name).read_text(encoding="utf-8").split())
        for name in ("README.md", "docs/benchmarks.md", "docs/choosing.md")
    )
    told = f"SWAN is {of_swan:.3f} above AdamW, and APOLLO is {of_apollo:.3f} above, with one seed"
    assert told in readme
    assert f"SWAN ends {of_swan:.3f} above AdamW, and APOLLO {of_apollo:.3f} above" in choosing
    assert (
        f"is {-above(swan, '1m'):.3f} below AdamW after 500 steps, and {of_swan:.3f} above after "
        f"2,000. APOLLO is then {of_swan - of_apollo:.3f} below SWAN."
    ) in page
    assert (
        f"is {above(apollo, '1m'):.3f} above after 500 steps, and {of_apollo:.3f} above after"
    ) in page
    swan_batch, apollo_batch = (above(rules, "1m_batch") for rules in (swan, apollo))
    batch = "With four times the batch, SWAN"
    assert f"{batch} is {swan_batch:.3f} above, and APOLLO {apollo_batch:.3f}" in readme
    assert f"{batch} ends {swan_batch:.3f} above AdamW, and APOLLO {apollo_batch:.3f}" in choosing
    assert f"as in four times the steps: it ends {swan_batch:.3f} above AdamW" in page
    assert f"APOLLO falls back further, and ends {apollo_batch:.3f} above AdamW" in page
    of_momentum = above(("whitened", "head_factored_momentum"), "1m_long")
    assert (
        f"wins back {of_swan - of_momentum:.3f} of the {of_swan:.3f}. SWAN is then "
        f"{of_apollo - of_momentum:.3f} below APOLLO"
    ) in page
    assert f"With a momentum for the head, SWAN ends {of_momentum:.3f} above." in choosing
    losses = rows_of(ROWS, Pair("1m_long", *swan))
    best = best_trial(rows_of(ROWS, SWAN))
    half = best._replace(hidden_rate=best.hidden_rate / 2, vocabulary_rate=best.vocabulary_rate / 2)
    twice = best._replace(hidden_rate=2 * best.hidden_rate)
    assert f"which ends {losses[best] - losses[twice]:.3f} lower" in page
    assert f"which ends {losses[half] - losses[best]:.3f} higher" in page


def test_what_the_page_says_of_other_rules_holds():
    page = " ".join((ROOT / "docs/benchmarks.md").read_text(encoding="utf-8").split())
    of_swan = rows_of(ROWS, SWAN)[best_trial(rows_of(ROWS, SWAN))]
    above, state = {}, {}
    of_adamw = training.state_bytes(training.SETTINGS["1m"], "adam", "adam")
    for pair in OTHER_RULES:
        if losses := rows_of(ROWS, pair):
            above[pair.hidden] = losses[best_trial(losses)] - of_swan
            size = training.state_bytes(training.SETTINGS["1m"], *pair[1:])
            state[pair.hidden] = size / of_adamw
    assert f"Muon ends at least {-above['muon']:.3f} below SWAN with the same vocabulary" in page
    assert f"Its momentum takes {state['muon']:.0%} of AdamW's state" in page
    assert f"the loss is {above['orthogonalized']:.3f} above SWAN's" in page
    apollo = "apollo_orthogonalized"
    assert f"keep {state[apollo]:.0%} of AdamW's state, and end {above[apollo]:.3f} above" in page
    for name in ("whitened_basis", "one_bit_muon", "low_rank_muon"):
        assert f"keeps {state[name]:.1%}, and ends {above[name]:.3f} above SWAN" in page
    assert f"One run ends {-above['swan']:.3f} below SWAN" in page
    assert f"One run ends {above['neuron']:.3f} above SWAN" in page


def test_what_the_page_says_of_other_rates_of_swans_vocabulary_holds():
    of_tokens = rows_of(ROWS, SWAN)
    best = best_trial(of_tokens)
    halved = best._replace(vocabulary_rate=best.vocabulary_rate / 2)
    lost = {30: of_tokens[halved] - of_tokens[best]}
    of_bytes = {
        (row["learning_rate"], row["vocabulary_learning_rate"]): row["validation_loss"]
        for row in read_rows(RESULTS / "nano_learning_rates.json")
        if row["name"] == "swan"
    }
    lost[15] = of_bytes[0.004, 0.06] - of_bytes[0.004, 0.004]
    choosing = (ROOT / "docs/choosing.md").read_text(encoding="utf-8")
    assert f"| 60x | 30x lost {lost[30]:.3f} |" in choosing
    assert f"| 1x | 15x lost {lost[15]:.2f} |" in choosing


@pytest.mark.filterwarnings("ignore:rank=:UserWarning")
def test_state_of_real_models_is_what_describe_says():
    rows = read_rows(state_sizes.OUTPUT)
    for row in rows:
        del row["machine"]
    assert rows == state_sizes.measure()
