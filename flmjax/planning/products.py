"""FLOPs of the matrix products of a compiled program.

A loop's body is counted as often as it runs, which the cost analysis of the compiler does not do.
"""

import functools
import math
import re

import numpy as np

from flmjax.planning.hlo import Instruction, Module


class MatrixProducts:
    """The matrix products of a program, 2 M N K FLOPs each; custom kernels are not counted.

    Example: a loop that runs 7 times over a product of (6, 10) and (10, 10) has 7 x 2 x 6 x 10 x 10 = 8,400 FLOPs.
    """

    def __init__(self, module: Module):
        self.module = module
        self.computation_flops = functools.cache(self._computation_flops)

    def flops(self) -> float:
        """FLOPs of all products that a device executes.

        Raises:
            ValueError: for a product whose contracted sizes cannot be read, and for a loop whose iterations cannot.
        """
        return self.computation_flops(self.module.entry)

    def _computation_flops(self, name: str) -> float:
        """FLOPs of one execution of a computation, with the computations that it calls; raises as `flops`."""
        instructions = self.module.computations[name].values()
        return sum(self.instruction_flops(name, instruction) for instruction in instructions)

    def instruction_flops(self, computation: str, instruction: Instruction) -> float:
        """FLOPs of one execution of an instruction, with the computations that it calls; raises as `flops`."""
        if _is_product(instruction):
            return 2.0 * _products(instruction, self.module.computations[computation])
        called = self.module.called(instruction)
        return float(sum(count * self.computation_flops(name) for name, count in called))


def _is_product(instruction: Instruction) -> bool:
    return instruction.operation in ("dot", "convolution") or 'custom_call_target="__cublas' in instruction.line


def _products(instruction: Instruction, computation: dict[str, Instruction]) -> int:
    """Scalar products of a matrix multiplication, M N K.

    Raises:
        ValueError: for contracted sizes that cannot be read.
    """
    line, result = instruction.line, instruction.shapes[0][1]
    factors = [computation[name].shapes[0][1] for name in instruction.operands[:2] if name in computation]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line)
    if labels and len(factors) == 2:
        return _convolved(line, labels.groups(), (*factors, result))
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
    contracted = contracted or re.search(r'lhs_contracting_dimensions":\[([^\]]*)\]', line)
    if contracted is None or len(factors) < 2:
        raise ValueError(f"no contracted sizes in {line.strip()[:200]}")
    return math.prod(result) * math.prod(factors[0][int(i)] for i in re.findall(r"\d+", contracted[1]))


def _convolved(line: str, labels: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> int:
    """Scalar products of a convolution, the form of matrix products in TPU programs.

    Along a spatial axis these are the pairs of an output and a place of the window that meet an input; padding and the
    holes of a dilated input have none. Example: a window of 32 over one input padded by 31 on both sides meets it once
    in each of the 32 outputs: 32 pairs, an axis of the right factor alone.
    """
    left, right, out = (dict(zip(names, sizes, strict=True)) for names, sizes in zip(labels, shapes, strict=True))
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", line) or [""])[0]))
    count = out["b"] * out["f"] * right["i"]
    for axis in filter(str.isdigit, labels[1]):
        place = int(axis)

        def setting(name: str, default: str, place: int = place) -> str:
            return window[name].split("x")[place] if name in window else default

        low = int(setting("pad", "0_0").split("_")[0])
        stride, dilation, hole = (int(setting(name, "1")) for name in ("stride", "rhs_dilate", "lhs_dilate"))
        places = np.arange(out[axis])[:, None] * stride - low + np.arange(right[axis]) * dilation
        count *= int(np.sum((places % hole == 0) & (places >= 0) & (places // hole < left[axis])))
    return count // (int(match[1]) if (match := re.search(r"batch_group_count=(\d+)", line)) else 1)
