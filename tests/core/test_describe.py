"""The table says what the optimizer keeps, for every leaf and in sum."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from apollo_optax import (
    ApolloDimensionNumbers,
    apollo,
    apollo_mini,
    describe,
    dimension_numbers_from_rules,
    infer_dimension_numbers,
)

LAYER = {"up": jnp.ones((8, 32)), "down": jnp.ones((32, 8)), "bias": jnp.ones((2, 16))}
PARAMS: Any = {"table": jnp.ones((50, 8)), "layers": [LAYER] * 12, "head": jnp.ones((8, 50))}
TOKENS = jax.ShapeDtypeStruct((2, 5), "int32")


def forward(params, tokens):
    x = params["table"][tokens]
    for layer in params["layers"]:
        hidden = (x @ layer["up"]).reshape(2, 5, 2, 16) + layer["bias"][None, None]
        x = x + jnp.tanh(hidden).reshape(2, 5, 32) @ layer["down"]
    return x @ params["head"]


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


OPTIMIZERS = {
    "adamw": optax.adamw(0.1),
    "bfloat16 moments": optax.adamw(0.1, mu_dtype="bfloat16"),
    "sgd": optax.sgd(0.1),
    "apollo": apollo(0.1, rank=4),
    "apollo_mini": apollo_mini(0.1),
    "muon": optax.contrib.muon(0.1),
    "a chain": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_sum_is_the_state_that_init_makes(name):
    tx = OPTIMIZERS[name]
    table = describe(PARAMS, tx)
    state = tx.init(PARAMS)
    assert table.state_bytes == nbytes(state)
    assert table.state_bytes == table.rest_bytes + sum(row.state_bytes for row in table)
    assert table.rest_bytes <= 40  # counts and keys
    assert table.over_adamw == pytest.approx(table.state_bytes / (8 * PARAMS_SIZE))


PARAMS_SIZE = sum(x.size for x in jax.tree.leaves(PARAMS))


def test_layers_are_folded_into_one_row():
    rows = {row.path: row for row in describe(PARAMS, apollo_mini(0.1))}
    assert set(rows) == {"table", "head", "layers/*/up", "layers/*/down", "layers/*/bias"}
    assert rows["layers/*/up"].copies == 12
    assert rows["layers/*/up"].shape == (8, 32)
    assert rows["layers/*/up"].state_numbers == 12 * (2 * 32 + 1)


def test_a_stacked_leaf_whose_layers_a_wrapper_takes_apart_has_their_state():
    inner = optax.scale_by_adam()

    def init(params):
        return inner.init({"layers": [{"w": w} for w in params["layers"]["w"]]})

    tx = optax.GradientTransformation(init, inner.update)
    (row,) = describe({"layers": {"w": jnp.ones((3, 8, 4))}}, tx)
    assert (row.path, row.state_numbers) == ("layers/w", 2 * 3 * 8 * 4)


def test_layers_that_differ_are_rows_of_their_own():
    params = {"layers": [{"w": jnp.ones((8, 8))}, {"w": jnp.ones((8, 4))}]}
    assert [row.path for row in describe(params, optax.sgd(0.1))] == ["layers/0/w", "layers/1/w"]


def test_the_model_says_kinds_axes_and_reasons():
    specs = infer_dimension_numbers(forward, PARAMS, TOKENS)
    tx = apollo_mini(0.1, weight_dimension_numbers=specs)
    table = describe(PARAMS, tx, forward, TOKENS)
    assert {row.path: (row.kind, row.axes, row.reason) for row in table} == {
        "table": ("vocabulary", "", "looked up"),
        "head": ("vocabulary", "", "output head"),
        "layers/*/up": ("matrix", "projected 0, channels 1", "product"),
        "layers/*/down": ("matrix", "projected 1, channels 0", "product"),
        "layers/*/bias": ("elementwise", "", "only entry by entry"),
    }
    assert table.remarks == []


def test_specifications_stand_for_the_optimizer_that_takes_them():
    specs = infer_dimension_numbers(forward, PARAMS, TOKENS)
    table = describe(PARAMS, specs, rank=2)
    tx = apollo(0.1, rank=2, weight_dimension_numbers=specs)
    assert list(table)[-2].state_bytes == list(describe(PARAMS, tx))[-2].state_bytes
    assert table.state_bytes == describe(PARAMS, tx).state_bytes
    assert {row.path: row.axes for row in table}["layers/*/up"] == "projected 0, channels 1"
    assert describe(PARAMS, specs).rows == describe(PARAMS, specs, rank=1).rows
    with pytest.raises(ValueError, match="rank must be an int >= 1 .*, got 0"):
        describe(PARAMS, specs, rank=0)


def test_full_size_state_is_remarked():
    table = describe(PARAMS, apollo_mini(0.1, weight_dimension_numbers=specs_of_up_only))
    (remark,) = table.remarks
    for path in ("table", "head", "layers/*/down", "layers/*/bias"):
        assert path in remark
    assert "layers/*/up" not in remark


def specs_of_up_only(params):
    rules = [("up", ApolloDimensionNumbers(0, 1)), ("", None)]
    return dimension_numbers_from_rules(rules)(params)


def test_a_rank_at_which_nothing_is_saved_is_remarked():
    params = {"w": jnp.ones((8, 16))}
    assert describe(params, apollo(0.1, rank=7)).remarks == []
    (remark,) = describe(params, apollo(0.1, rank=8)).remarks
    assert "the rank is not below their smaller side" in remark


def test_what_cannot_be_placed_is_remarked_with_its_reason():
    def summed(params, x):
        return x * params["w"].sum()

    table = describe({"w": jnp.ones((8, 16))}, optax.sgd(0.1), summed, jnp.ones(3))
    assert table.remarks == [
        "w (8, 16) could not be placed: it is only summed up (reduce_sum); 0 bytes."
    ]


def test_the_table_reads_in_a_terminal_and_in_a_notebook():
    specs = infer_dimension_numbers(forward, PARAMS, TOKENS)
    table = describe(PARAMS, specs)
    lines = str(table).splitlines()
    assert lines[0].split()[:4] == ["parameter", "shape", "kind", "axes"]
    (up,) = (line for line in lines if "layers/*/up x 12" in line)
    assert up.split()[-3:] == ["780", "3,120", "0.1270"]
    assert str(table) == repr(table)
    assert table._repr_html_().count("<tr>") == len(table) + 3
    assert "layers/*/up x 12" in table._repr_html_()


def test_shapes_do_and_leaves_that_are_no_arrays_are_left_out():
    params = {"w": jax.ShapeDtypeStruct((8, 16), "float32"), "activation": jnp.tanh}
    (row,) = describe(params, apollo_mini(0.1))
    assert (row.path, row.state_numbers) == ("w", 33)


def test_a_rank_beside_an_optimizer_is_refused():
    with pytest.raises(TypeError, match="rank=4 is only for specifications"):
        describe(PARAMS, optax.sgd(0.1), rank=4)


MATRIX = ApolloDimensionNumbers(0, 1)


def test_the_first_rule_wins():
    rules = dimension_numbers_from_rules([("layers/0/.*up", None), ("up|down", MATRIX), ("", None)])
    specs = rules(PARAMS)
    assert specs["layers"][0] == {"up": None, "down": MATRIX, "bias": None}
    assert specs["layers"][11] == {"up": MATRIX, "down": MATRIX, "bias": None}
    assert specs["table"] is None


def test_vectors_need_no_rule():
    rules = dimension_numbers_from_rules([("w", MATRIX)])
    assert rules({"w": jnp.ones((2, 3)), "w_bias": jnp.ones(3), "b": 1.0}) == {
        "w": MATRIX,
        "w_bias": None,
        "b": None,
    }


def test_rules_take_the_specifications_of_optax_and_are_what_apollo_takes():
    spec = optax.contrib.MuonDimensionNumbers(0, 1)
    tx = apollo_mini(
        0.1, weight_dimension_numbers=dimension_numbers_from_rules([("up|down", spec), ("", None)])
    )
    assert tx.init(PARAMS)[0].mu["layers"]["3"]["down"].shape == (1, 32)


def test_a_leaf_without_a_rule_is_an_error_that_names_it():
    with pytest.raises(
        ValueError, match=r"No rule for layers/0/bias \(2, 16\), .*table.*Add a rule"
    ):
        dimension_numbers_from_rules([("up|down|head", MATRIX)])({**PARAMS, "layers": [LAYER]})


def test_a_rule_that_does_not_fit_the_shape_is_an_error_that_names_the_leaf():
    rules = dimension_numbers_from_rules([("up", ApolloDimensionNumbers(0, 2)), ("", None)])
    with pytest.raises(ValueError, match=r"layers/0/up with shape \(8, 32\)"):
        rules(PARAMS)


@pytest.mark.parametrize("rule", ["w", ("w",), (1, MATRIX), ("w", (0, 1)), ("w", MATRIX, 2)])
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(TypeError, match="rules must be pairs"):
        dimension_numbers_from_rules([rule])


def test_an_expression_that_is_not_valid_is_refused():
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        dimension_numbers_from_rules([("(", MATRIX)])


def test_a_step_count_in_place_of_parameters_is_refused():
    with pytest.raises(TypeError, match="static_args"):
        dimension_numbers_from_rules([("", None)])(jnp.zeros((), int))
