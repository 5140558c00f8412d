"""LLaMA checkpoints: Hugging Face's format read and written, llama.cpp's GGUF read.

A checkpoint of Hugging Face's format is a folder with `config.json` and the tensors in
`model.safetensors`, or in several such files that `model.safetensors.index.json` lists. Hugging
Face stores one tensor for each layer and matrices as (out, in); ours are stacked over the layers
and (in, out).
"""

import functools
import json
import math
import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Array

from examples.llama import hub
from examples.llama.config import LlamaConfig, RopeScaling
from examples.llama.gguf_file import GgufFile, is_gguf
from examples.llama.model import Params, init_params
from examples.llama.safetensors_file import FLOATS, Tensor, write_safetensors
from examples.llama.train import unchanged

__all__ = [
    "StoredModel",
    "checkpoint_file",
    "describe_llama",
    "describe_shape",
    "load_llama",
    "save_llama",
]

_TENSOR_NAMES = {
    "embed.embedding": "model.embed_tokens.weight",
    "blocks.attention_norm.scale": "model.layers.{layer}.input_layernorm.weight",
    "blocks.attention.q_proj.kernel": "model.layers.{layer}.self_attn.q_proj.weight",
    "blocks.attention.k_proj.kernel": "model.layers.{layer}.self_attn.k_proj.weight",
    "blocks.attention.v_proj.kernel": "model.layers.{layer}.self_attn.v_proj.weight",
    "blocks.attention.o_proj.kernel": "model.layers.{layer}.self_attn.o_proj.weight",
    "blocks.mlp_norm.scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "blocks.mlp.gate_proj.kernel": "model.layers.{layer}.mlp.gate_proj.weight",
    "blocks.mlp.up_proj.kernel": "model.layers.{layer}.mlp.up_proj.weight",
    "blocks.mlp.down_proj.kernel": "model.layers.{layer}.mlp.down_proj.weight",
    "norm.scale": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
}

_ONLY_SUPPORTED: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
_CONTEXT = "max_position_embeddings"
_REQUIRED: Any = object()


class StoredModel(NamedTuple):
    """What a checkpoint holds, without its weights.

    Attributes:
        config: the model's shape.
        dtype: the dtype of the embedding, as a NumPy name; that of all tensors as a rule.
        longest_context: the most tokens it is made for, or None if the checkpoint does not say.
    """

    config: LlamaConfig
    dtype: str
    longest_context: int | None = None


def checkpoint_file(checkpoint: Path, name: str) -> bytes | None:
    """Returns a file of the tokenizer: of a folder, or what a GGUF file has in its place.

    Args:
        checkpoint: a folder of Hugging Face's format, a GGUF file, or `hf:NAME`.
        name: of the file, such as "tokenizer.json".

    Returns:
        The content; None if there is no such file.
    """
    folder = _local(checkpoint)
    if is_gguf(folder):
        file = GgufFile(folder)
        return file.tokenizer() if name == "tokenizer.json" else file.files().get(name)
    path = folder / name
    return path.read_bytes() if path.is_file() else None


def describe_llama(folder: str | os.PathLike[str]) -> StoredModel:
    """Checks a LLaMA checkpoint, a folder of Hugging Face's format or a GGUF file.

    No weights are read.

    Raises:
        ValueError: if the folder holds no such checkpoint, if its configuration needs what `Llama`
            does not have (the field is named), or if a tensor is missing or has another shape or
            a dtype that is not floating-point (the tensor is named).
    """
    config, stored = _open_checkpoint(folder)
    stored.files()  # what an export copies
    for path, expected in jax.tree.leaves_with_path(_expected_leaves(config)):
        leaf_name = _leaf_name(path)
        for layer in range(config.num_layers) if leaf_name.startswith("blocks.") else [0]:
            dtype = _check_tensor(stored, leaf_name, expected, layer)
            if leaf_name == "embed.embedding":
                embedding_dtype = dtype
    return StoredModel(config, embedding_dtype, stored.settings.get(_CONTEXT))


def describe_shape(checkpoint: str | os.PathLike[str]) -> tuple[LlamaConfig, str | None]:
    """Reads the shape of a model that LLaMA's blocks describe; its tensors need not be there.

    Args:
        checkpoint: a JSON file like `config.json`, a folder with one, a GGUF file, or `hf:NAME`.

    Returns:
        The shape, and what the model has that `Llama` has not, in words; None if it is a LLaMA.

    Raises:
        ValueError: if there is no configuration, or its sizes are not those of LLaMA's blocks.
    """
    path = _local(checkpoint, ("config.json",))
    if is_gguf(path):
        settings = GgufFile(path).settings
    else:
        settings = _read_json(path if path.suffix == ".json" else path / "config.json")
    others = {
        field: settings[field]
        for field, supported in _ONLY_SUPPORTED.items()
        if settings.get(field, supported) != supported
    }
    config = _config_from_settings(path, {**settings, **_ONLY_SUPPORTED})
    named = ", ".join(f"{field} {value!r}" for field, value in others.items())
    return config, named or None


def load_llama(
    folder: str | os.PathLike[str],
    *,
    convert: Callable[[Params], Params] = lambda params: params,
    shardings: Params | None = None,
) -> tuple[LlamaConfig, Params]:
    """Reads a LLaMA checkpoint, one parameter after another.

    The host's memory holds one converted parameter of all layers, and one tensor of the checkpoint.

    Args:
        folder: the checkpoint: a folder of Hugging Face's format, a GGUF file, or `hf:NAME`.
        convert: applied to one tensor at a time, in the nested dict of its names within a layer (or
            outside of the layers), such as a quantization; in the dtype in which it is stored.
        shardings: where each converted parameter goes; the default device if None.

    Returns:
        The model's shape, and its parameters as `init_params` lays them out.

    Raises:
        ValueError: as `describe_llama`.
    """
    config, stored = _open_checkpoint(folder)

    def load_leaf(path: jax.tree_util.KeyPath, expected: jax.ShapeDtypeStruct) -> Any:
        leaf_name = _leaf_name(path)
        whole_path = leaf_name.split(".")
        layered = whole_path[0] == "blocks"
        names = whole_path[layered:]
        whole = None
        for layer in range(config.num_layers) if layered else [0]:
            tensor = _read_tensor(stored, leaf_name, expected, layer)
            converted = jax.device_get(_at(convert(_nested(names, tensor)), names))
            if not layered:
                whole = converted
                break
            if whole is None:
                whole = jax.tree.map(
                    lambda part: np.empty((config.num_layers, *part.shape), part.dtype), converted
                )
            jax.tree.map(
                lambda part, of_layer, i=layer: np.copyto(part[i], of_layer), whole, converted
            )
        placed = jax.device_put(whole, None if shardings is None else _at(shardings, whole_path))
        return jax.block_until_ready(placed)

    return config, jax.tree.map_with_path(load_leaf, _expected_leaves(config))


def save_llama(
    folder: str | os.PathLike[str],
    config: LlamaConfig,
    params: Any,
    *,
    floats: Callable[[Any], Params] = unchanged,
    like: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a checkpoint that `load_llama` and transformers' `LlamaForCausalLM` read.

    The folder is made if needed; a checkpoint in it is overwritten. Beside `params`, memory holds
    one tensor of the checkpoint.

    Args:
        folder: where to.
        config: the model's shape.
        params: the parameters, as `init_params` lays them out once `floats` is applied.
        floats: makes what is written from `params`, such as dequantized weights, also of one layer.
            What `params` has of the layers is stacked below "blocks". Of the result only the part
            that is written next is computed.
        like: the checkpoint that the model was loaded from. Everything but the weights is then as
            it is there: the dtype of each tensor, all of `config.json`, and the files of tokenizer,
            chat template, generation and licence, `hub.OTHER_FILES`; but the `tokenizer.json` of a
            GGUF file is left out. If None, tensors keep the dtypes of `params`, and `config.json`
            names no ids of begin and end.

    Raises:
        ValueError: if `params` are not those of a model of shape `config`, or `like` is no
            checkpoint of such a model.
    """
    shapes = jax.eval_shape(floats, params)
    _check_leaves(config, shapes)
    stored = None if like is None else _open_checkpoint(like)[1]
    tensors: dict[str, Tensor] = {}
    for path, leaf in jax.tree.leaves_with_path(shapes):
        leaf_name = _leaf_name(path)
        template = _TENSOR_NAMES[leaf_name]
        read = functools.partial(_tensor, floats, leaf_name, params)
        for layer in range(config.num_layers) if "{layer}" in template else [None]:
            dtype = leaf.dtype if stored is None else _check_tensor(stored, leaf_name, leaf, layer)
            shape = jax.eval_shape(read, layer).shape
            tensors[template.format(layer=layer)] = Tensor(
                shape, jnp.dtype(dtype), functools.partial(read, layer)
            )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors)
    if stored is None:
        settings = _settings_from_config(config, shapes["embed"]["embedding"].dtype.name)
    else:
        settings = stored.settings
        for name, content in stored.files().items():
            (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _leaf_name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


@functools.partial(jax.jit, static_argnames=("floats", "leaf_name"))
def _tensor(floats: Callable[[Any], Params], leaf_name: str, params: Any, layer: Any) -> Array:
    """Computes one tensor of a checkpoint, of a layer unless that is None, and no other part."""

    def of_layer(path: jax.tree_util.KeyPath, leaf: Array) -> Array:
        in_blocks = any(getattr(part, "key", None) == "blocks" for part in path)
        return leaf[layer][None] if in_blocks else leaf

    if layer is not None:
        params = jax.tree.map_with_path(of_layer, params)
    leaf = _at(floats(params), leaf_name.split("."))
    return _transposed(leaf_name, leaf if layer is None else leaf[0])


def _transposed(leaf_name: str, array: Any) -> Any:
    return array.T if leaf_name.endswith(".kernel") else array


def _expected_leaves(config: LlamaConfig) -> Params:
    return jax.eval_shape(functools.partial(init_params, config), 0)


def _check_leaves(config: LlamaConfig, params: Params) -> None:
    expected, given = (
        {_leaf_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (_expected_leaves(config), params)
    )
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise ValueError(
                f"the parameter {name} has the shape {given.get(name)}; a model of {config} "
                f"has {expected.get(name)}."
            )


def _read_json(path: Path) -> dict[str, Any]:
    if path.parent.is_file():
        raise ValueError(
            f"{path.parent} is a file; give its folder, {path.parent.parent}, or a .gguf file."
        )
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a LLaMA checkpoint is a folder that has it.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; it should be an object.")
    return content


def _config_from_settings(checkpoint: Path, settings: dict[str, Any]) -> LlamaConfig:
    try:
        return _checked_config(settings)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


def _checked_config(settings: dict[str, Any]) -> LlamaConfig:
    for field, supported in _ONLY_SUPPORTED.items():
        given = settings.get(field, supported)
        if given != supported:
            raise ValueError(
                f"{field} in config.json is {given!r}; supported is {supported!r} alone."
            )
    theta, scaling = _rope_from_settings(settings)
    config = LlamaConfig(
        vocab_size=_number(settings, "vocab_size"),
        hidden_size=_number(settings, "hidden_size"),
        intermediate_size=_number(settings, "intermediate_size"),
        num_layers=_number(settings, "num_hidden_layers"),
        num_heads=_number(settings, "num_attention_heads"),
        num_kv_heads=_number(settings, "num_key_value_heads", default=None) or 0,
        rope_theta=theta,
        rms_norm_eps=_number(settings, "rms_norm_eps", float, default=1e-6),
        rope_scaling=scaling,
        tied=_is_tied(settings),
    )
    if settings.get("head_dim") not in (None, config.head_dim):
        raise ValueError(
            f"head_dim in config.json is {settings['head_dim']}; supported is hidden_size / "
            f"num_attention_heads, here {config.head_dim}."
        )
    _number(settings, _CONTEXT, default=None)
    return config


def _number(
    settings: dict[str, Any], field: str, kind: type = int, *, default: Any = _REQUIRED
) -> Any:
    """Returns a positive number; null is allowed if `default` is None."""
    value = settings.get(field, default)
    if value is _REQUIRED:
        raise ValueError(f"config.json has no {field}; this kind of checkpoint needs it.")
    if value is None and default is None:
        return None
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not (is_number and 0 < value < math.inf):
        raise ValueError(
            f"{field} in config.json is {value!r}; it should be a positive {kind.__name__}."
        )
    return value


def _is_tied(settings: dict[str, Any]) -> bool:
    value = settings.get("tie_word_embeddings", False)
    if not isinstance(value, bool):
        raise ValueError(
            f"tie_word_embeddings in config.json is {value!r}; it should be true or false."
        )
    return value


def _rope_from_settings(settings: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    # transformers 5 moved rope_theta and rope_scaling into rope_parameters.
    field = "rope_parameters" if settings.get("rope_parameters") else "rope_scaling"
    rope = settings.get(field) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{field} in config.json is {rope!r}; it should be an object or null.")
    theta = _number(
        rope if "rope_theta" in rope else settings, "rope_theta", float, default=10_000.0
    )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type != "llama3":
        raise ValueError(
            f"{field} in config.json is of type {rope_type!r}; supported are 'default' and "
            "'llama3'."
        )
    return theta, RopeScaling(
        factor=_number(rope, "factor", float),
        low_freq_factor=_number(rope, "low_freq_factor", float),
        high_freq_factor=_number(rope, "high_freq_factor", float),
        original_context=_number(rope, "original_max_position_embeddings"),
    )


def _settings_from_config(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        **_ONLY_SUPPORTED,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    scaling = config.rope_scaling
    if scaling is not None:
        settings[_CONTEXT] = int(scaling.factor * scaling.original_context)
        settings["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return settings


class _Folder:
    """A folder of Hugging Face's format. `GgufFile` has the same methods.

    Attributes:
      settings: The content of `config.json`.
    """

    def __init__(self, path: Path):
        self.settings = _read_json(path / "config.json")
        self._path, self._file_of = path, _tensor_files(path)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Returns a tensor's shape, and its dtype as safetensors names it."""
        with _open(self._file_of[name]) as tensors:
            try:
                header = tensors.get_slice(name)
            except safetensors.SafetensorError as error:
                raise ValueError(
                    f"{self._file_of[name]} has no tensor {name}, but the checkpoint's index lists "
                    "it there."
                ) from error
        return tuple(header.get_shape()), header.get_dtype()

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor."""
        with _open(self._file_of[name]) as tensors:
            return tensors.get_tensor(name)

    def files(self) -> dict[str, bytes]:
        """Returns the contents of the files that a checkpoint has beside its weights."""
        return {
            path.name: path.read_bytes()
            for pattern in hub.OTHER_FILES
            for path in self._path.glob(pattern)
            if path.is_file() and not path.name.endswith(".index.json")
        }


def _local(
    checkpoint: str | os.PathLike[str], files: tuple[str, ...] = hub.CHECKPOINT_FILES
) -> Path:
    """Where a checkpoint lies, once it is brought from the hub if it is to be."""
    if str(checkpoint).startswith(hub.PREFIX):
        return hub.download_checkpoint(str(checkpoint), files)
    return Path(checkpoint)


def _open_checkpoint(
    checkpoint: str | os.PathLike[str],
) -> tuple[LlamaConfig, "_Folder | GgufFile"]:
    path = _local(checkpoint)
    stored = GgufFile(path) if is_gguf(path) else _Folder(path)
    return _config_from_settings(path, stored.settings), stored


def _check_tensor(
    stored: "_Folder | GgufFile", leaf_name: str, expected: jax.ShapeDtypeStruct, layer: int | None
) -> str:
    """Returns the dtype of a tensor that has the shape it should have."""
    name = _TENSOR_NAMES[leaf_name].format(layer=layer)
    if name not in stored:
        raise ValueError(f"the checkpoint has no tensor {name}; its config.json implies it.")
    shape = expected.shape[leaf_name.startswith("blocks.") :]
    shape = shape[::-1] if leaf_name.endswith(".kernel") else shape
    given, dtype = stored.header(name)
    if given != shape:
        raise ValueError(f"the tensor {name} has the shape {given}; config.json implies {shape}.")
    if dtype not in FLOATS:
        raise ValueError(
            f"the tensor {name} is {dtype}; supported are {', '.join(FLOATS)}, "
            "without quantization."
        )
    return FLOATS[dtype]


def _read_tensor(
    stored: "_Folder | GgufFile", leaf_name: str, expected: jax.ShapeDtypeStruct, layer: int
) -> np.ndarray:
    """Returns a tensor as `init_params` lays it out."""
    _check_tensor(stored, leaf_name, expected, layer)
    return _transposed(leaf_name, stored.read(_TENSOR_NAMES[leaf_name].format(layer=layer)))


def _nested(names: Sequence[str], leaf: Any) -> Any:
    """Returns the nested dict that has nothing but this leaf, below these names."""
    return functools.reduce(lambda inner, name: {name: inner}, reversed(names), leaf)


def _at(tree: Any, names: Sequence[str]) -> Any:
    return functools.reduce(operator.getitem, names, tree)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Returns the file of every tensor by the tensor's name; one file goes before an index."""
    single = folder / "model.safetensors"
    if single.is_file():
        with _open(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = _read_json(index).get("weight_map")
        if not isinstance(files, dict):
            raise ValueError(
                f"{index} has no weight_map, an object that names the file of each tensor."
            )
        for file in files.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{index} lists {file!r}; expected names of files beside it.")
        return {name: folder / file for name, file in files.items()}
    raise ValueError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json; other formats "
        "are converted by loading and saving with transformers."
    )


def _open(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file} does not exist, but the checkpoint's index lists it.")
    try:
        return safetensors.safe_open(file, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}.") from error
