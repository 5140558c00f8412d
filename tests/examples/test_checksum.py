import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from examples.llama.checksum import _sum, _sum_in_parts, _sums, array_checksums

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.int32, jnp.uint32, jnp.bool_]


def example(dtype) -> jax.Array:
    bits = jax.random.bits(jax.random.key(0), (8, 6), jnp.uint8)
    return (bits % 2 if dtype == jnp.bool_ else bits % 100).astype(dtype)


def checksum(x: jax.Array) -> str:
    return array_checksums(x)[""]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_matters(dtype) -> None:
    x = example(dtype)
    changed = {
        checksum(x.at[i, j].set(~x[i, j] if dtype == jnp.bool_ else x[i, j] + 1))
        for i in range(8)
        for j in range(6)
    }
    assert len(changed | {checksum(x)}) == 49


def test_order_and_shape_matter() -> None:
    x = example(jnp.float32)
    same_elements = [x, x.T, x[::-1], x[:, ::-1], x.reshape(6, 8), x.reshape(48)]
    assert len({checksum(x) for x in same_elements}) == len(same_elements)


def test_it_is_the_same_however_the_array_is_divided() -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = example(jnp.bfloat16)
    for spec in (("a", "b"), ("b", None), (("a", "b"), None), (None, None)):
        divided = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        assert checksum(divided) == checksum(x)


def test_it_is_the_same_added_up_in_parts(monkeypatch) -> None:
    x = example(jnp.int8).reshape(8, 3, 2)
    monkeypatch.setattr("examples.llama.checksum._HASHES_AT_ONCE", 12)
    assert _sum_in_parts(x, 7) == _sum(x, 7)
    assert _sum_in_parts(x.at[7, 2, 1].add(1), 7) != _sum(x, 7)


def test_no_hash_of_every_element_is_kept() -> None:
    leaf = jax.ShapeDtypeStruct((64, 512, 512), jnp.int8)
    memory = _sums.lower({"x": leaf}, in_parts=True).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < leaf.size


def test_paths_name_arrays_and_empty_ones_have_none() -> None:
    found = array_checksums({"a": [jnp.ones(2), jnp.ones((0, 3))], "b": jnp.zeros([])})
    assert sorted(found) == ["a.0", "b"]
    assert all(len(value) == 16 for value in found.values())
    assert found["b"] == checksum(jnp.zeros([]))
