"""LLaMA checkpoints in llama.cpp's format, GGUF: one file with weights, settings and tokenizer.

The file is shown as the folder of Hugging Face's format that it was made from. Quantized weights
are read as float32. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

__all__ = ["GgufFile", "is_gguf"]

_TENSOR_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_TENSOR_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_SETTINGS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}
# LLaMA 3.1's way to stretch the rotary wavelengths comes as one number for each wavelength.
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens


def is_gguf(path: Path) -> bool:
    """Whether a file is named as one of GGUF."""
    return path.suffix.lower() == ".gguf"


class GgufFile:
    """A GGUF file, as the folder of Hugging Face's format that it stands for.

    Args:
      path: The file. Weights are read when they are asked for, one tensor at a time.

    Attributes:
      settings: What `config.json` would have.

    Raises:
      ValueError: If the file is damaged, or holds another architecture than LLaMA's.
      ImportError: If the package `gguf` is not installed.
    """

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError as error:
            raise ImportError(f"{path}: .gguf needs the package gguf: pip install gguf") from error
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{path} is damaged or no GGUF file: {error}") from error
        self.path, self._gguf = path, gguf
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise ValueError(
                f"{path} holds the architecture {architecture!r}; supported is 'llama' alone"
            )
        self.settings = self._settings()

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor that has this name in Hugging Face's format."""
        return _gguf_name(name) in self._tensors

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Returns a tensor's shape, and the dtype in which it is read, as safetensors names it."""
        tensor = self._tensors[_gguf_name(name)]
        kinds = self._gguf.GGMLQuantizationType
        dtype = {kinds.F16: "F16", kinds.F64: "F64"}.get(tensor.tensor_type, "F32")
        return tuple(int(size) for size in reversed(tensor.shape)), dtype

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as Hugging Face's format has it; quantized ones as float32."""
        tensor = self._tensors[_gguf_name(name)]
        kinds = self._gguf.GGMLQuantizationType
        if tensor.tensor_type in (kinds.F16, kinds.F64):
            array = np.asarray(tensor.data)
        else:
            try:
                array = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                raise ValueError(
                    f"{self.path}: the tensor {tensor.name} is {tensor.tensor_type.name}, which "
                    "the package gguf does not read; quantize the model in another way"
                ) from error
        array = array.reshape(tuple(reversed(tensor.shape)))
        heads = {
            "q_proj": self.settings["num_attention_heads"],
            "k_proj": self.settings["num_key_value_heads"],
        }
        for projection, count in heads.items():
            if projection in name:
                # llama.cpp turns neighbouring channels, (2 i, 2 i + 1); here it is (i, i + half).
                halves = array.reshape(count, -1, 2, array.shape[-1])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        return array

    def files(self) -> dict[str, bytes]:
        """Returns what a folder has beside weights and tokenizer, by the names of the files."""
        tokens = self._strings("tokenizer.ggml.tokens")
        special = {}
        for name in ("bos", "eos", "unk"):
            number = self._field(f"tokenizer.ggml.{name}_token_id", None)
            if number is None:
                continue
            if number not in range(len(tokens)):
                raise ValueError(
                    f"{self.path}: tokenizer.ggml.{name}_token_id is {number}; the tokens are 0 to "
                    f"{len(tokens) - 1}"
                )
            special[f"{name}_token"] = tokens[number]
        template = self._field("tokenizer.chat_template", None)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
        if template is not None:
            settings["chat_template"] = template
        return {"tokenizer_config.json": json.dumps(settings, indent=2).encode()}

    def tokenizer(self) -> bytes:
        """Returns the content of `tokenizer.json`.

        Raises:
          ValueError: If the tokenizer is of a kind that is not supported.
        """
        tokens = self._strings("tokenizer.ggml.tokens")
        return self._tokenizer(tokens).to_str(pretty=True).encode()

    def _field(self, name: str, *default: Any) -> Any:
        field = self._fields.get(name)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise ValueError(f"{self.path} has no {name}; a LLaMA model's GGUF file needs it")

    def _strings(self, name: str) -> list[str]:
        value = self._field(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{self.path}: {name} is {value!r:.40}; it should list strings")
        return value

    def _settings(self) -> dict[str, Any]:
        heads = self._field("llama.attention.head_count")
        defaults = {"attention.head_count_kv": heads, "rope.freq_base": 10_000.0}
        settings: dict[str, Any] = {
            name: self._field(f"llama.{key}", *([defaults[key]] if key in defaults else []))
            for name, key in _SETTINGS.items()
        }
        for name, value in settings.items():
            if isinstance(value, list):
                raise ValueError(
                    f"{self.path}: {name} differs between layers; supported is one for all"
                )
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(
                    f"{self.path}: llama.{_SETTINGS[name]} is {value!r}; it should be positive"
                )
        # Stored as float32, such as 0.00001 as 0.000009999999747.
        settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.7g}")
        settings["rope_theta"] = float(f"{settings['rope_theta']:.7g}")
        width = self._field("llama.attention.key_length", None)
        settings["head_dim"] = width or settings["hidden_size"] // heads
        embedding = _TENSOR_NAMES["model.embed_tokens.weight"]
        if embedding not in self._tensors:
            raise ValueError(f"{self.path} has no tensor {embedding}; a LLaMA model has it")
        settings["vocab_size"] = int(self._tensors[embedding].shape[1])
        settings["tie_word_embeddings"] = "output.weight" not in self._tensors
        for name in ("bos", "eos"):
            settings[f"{name}_token_id"] = self._field(f"tokenizer.ggml.{name}_token_id", None)
        settings |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        settings |= {"hidden_act": "silu", "torch_dtype": "float32"}
        scaling = self._field("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise ValueError(
                f"{self.path}: the rotary scaling is {scaling!r}; supported are none and LLaMA 3's"
            )
        if bias := next((name for name in self._tensors if name.endswith(".bias")), None):
            raise ValueError(f"{self.path} has a bias, {bias}; supported are models without biases")
        if _ROPE_FACTORS in self._tensors:
            settings["rope_scaling"] = self._llama3_rope(settings)
        return settings

    def _llama3_rope(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        factors = np.asarray(self._tensors[_ROPE_FACTORS].data, np.float32)
        factor = float(factors.max())
        scaling = {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}
        half = settings["head_dim"] // 2
        turns = (
            _LLAMA3_ROPE["original_max_position_embeddings"]
            * settings["rope_theta"] ** (-np.arange(half) / half)
            / (2 * np.pi)
        )
        low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        if factors.shape != kept.shape or not np.allclose(
            factors, 1 / (kept + (1 - kept) / factor), rtol=1e-3
        ):
            raise ValueError(
                f"{self.path}: {_ROPE_FACTORS} are not those of LLaMA 3, which alone are supported"
            )
        return scaling

    def _tokenizer(self, tokens: list[str]) -> tokenizers.Tokenizer:
        kind = self._field("tokenizer.ggml.model")
        words = self._field("tokenizer.ggml.pre", "gpt-2")
        supported = ("gpt-2", "smollm", "llama-bpe")
        if kind != "gpt2" or words not in supported:
            raise ValueError(
                f"{self.path}: the tokenizer is {kind!r}, words as {words!r}; read are 'gpt2' "
                f"with words as {', '.join(supported)}. Give --tokenizer the model's tokenizer.json"
            )
        stored = self._strings("tokenizer.ggml.merges")
        merges: list[Any] = [tuple(merge.split(" ")) for merge in stored]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        for merge in merges:
            if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
                raise ValueError(
                    f"{self.path}: tokenizer.ggml.merges has {' '.join(merge)!r}; a merge is "
                    "two tokens with a space between them, which joined are a token too"
                )
        kinds = self._field("tokenizer.ggml.token_type", [1] * len(tokens))
        if len(kinds) != len(tokens):
            raise ValueError(
                f"{self.path}: tokenizer.ggml.token_type has {len(kinds)} types for {len(tokens)} "
                "tokens; each token has one"
            )
        is_llama3 = words == "llama-bpe"
        tokenizer = tokenizers.Tokenizer(
            models.BPE(vocab=vocabulary, merges=merges, ignore_merges=is_llama3)
        )
        before: list[Any] = []
        if is_llama3:
            before = [pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_WORDS), "isolated")]
        elif words == "smollm":
            before = [pre_tokenizers.Digits(individual_digits=True)]
        bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not is_llama3)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, bytewise])
        tokenizer.decoder = decoders.ByteLevel()
        for kind, add in (
            (_CONTROL, tokenizer.add_special_tokens),
            (_USER_DEFINED, tokenizer.add_tokens),
        ):
            add([token for token, its in zip(tokens, kinds, strict=True) if its == kind])
        return tokenizer


def _gguf_name(name: str) -> str:
    if name in _TENSOR_NAMES:
        return _TENSOR_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER_TENSOR_NAMES[rest]}"
