"""The matrix products and convolutions of a compiled program."""

import math
import re
from collections.abc import Iterator

import numpy as np

from apollo_optax.planning._hbm import shares_read
from apollo_optax.planning._hlo import (
    Computation,
    Instruction,
    Program,
    attribute_of,
    bits_of,
    elements_of,
    operands_of,
    sizes_of,
)


def products(
    instruction: Instruction, computation: Computation, program: Program
) -> Iterator[tuple[float, int]]:
    """Matrix products and convolutions, also in a fusion: operations, bits of an operand.

    A multiplication and an addition are two. Products with the padding of a convolution do not
    count, nor what a fusion does not need of a result. Bits are those of the smaller operand, ahead
    of a conversion that stands beside the product.
    """
    if instruction.opcode == "fusion":
        inside = program.computations[attribute_of(instruction, "calls") or ""]
        share = shares_read(inside)
        for part in inside.values():
            for operations, bits in products(part, inside, program):
                yield operations * share(part.name), bits
        return
    names = operands_of(instruction)
    if instruction.opcode == "convolution":
        depth = _convolution_depth(instruction, *(computation[name] for name in names))
    elif axes := re.search(
        r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)[\]}]', instruction.attributes
    ):  # of a dot, or of NVIDIA's library in the words of its call
        sizes = sizes_of(computation[names[0]].shape)
        depth = math.prod(sizes[int(axis)] for axis in re.findall(r"\d+", axes[1]))
    else:
        return
    bits = min(_narrowest_bits(name, computation) for name in names[:2])
    yield 2 * elements_of(instruction) * depth, bits


def _convolution_depth(convolution: Instruction, image: Instruction, kernel: Instruction) -> float:
    """Products that are added up for one element of the result, in the mean."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if not labels:
        raise ValueError(f"the convolution {convolution.name} has no dim_labels")
    of_image, of_kernel, of_result = (
        dict(zip(label, sizes_of(instruction.shape), strict=True))
        for label, instruction in zip(labels.groups(), (image, kernel, convolution), strict=True)
    )
    depth: float = of_kernel["i"]
    for axis, (stride, low, spread, reach) in enumerate(_windows(convolution)):
        label = str(axis)
        places = np.arange(of_result[label])[:, None] * stride - low
        places = places + np.arange(of_kernel[label]) * reach
        end = (of_image[label] - 1) * spread
        inside = (places >= 0) & (places <= end) & (places % spread == 0)
        depth *= int(inside.sum()) / of_result[label]
    return depth


def _windows(convolution: Instruction) -> list[tuple[int, int, int, int]]:
    """For each spatial axis stride, low padding, and dilations of image and kernel."""
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    if not window:
        return []
    told = dict(part.split("=") for part in window[1].split())
    axes = len(told["size"].split("x"))

    def numbers(name: str, default: int) -> list[int]:
        words = told[name].split("x") if name in told else [str(default)] * axes
        return [int(word.split("_")[0]) for word in words]

    columns = (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
    return list(zip(*(numbers(*column) for column in columns), strict=True))


def _narrowest_bits(name: str, computation: Computation) -> int:
    """Of a number in an array, or in what it is a conversion or another layout of."""
    instruction = computation[name]
    bits = _component_bits(instruction.shape)
    if instruction.opcode in ("convert", "bitcast", "copy", "transpose", "reshape", "broadcast"):
        return min(bits, _narrowest_bits(operands_of(instruction)[0], computation))
    return bits


def _component_bits(shape: str) -> int:
    """Of a number in the first array; a complex one has two."""
    dtype = re.search(r"(\w+)\[", shape)
    bits = bits_of(dtype[1]) if dtype else 0
    return bits // 2 if dtype and dtype[1].startswith("c") else bits
