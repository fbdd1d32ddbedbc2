"""The text of a compiled program (XLA's HLO) as computations of instructions, and how often each of them runs."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

# The name of an instruction, its shape, its operation; then come its operands in parentheses, and its attributes.
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_CALLED = re.compile(
    r"\b(condition|body|calls|to_apply|true_computation|false_computation|branch_computations|async_computation|"
    r"called_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
_KERNEL = re.compile(r'custom_call_target="(__cublas|__cudnn|tpu_custom_call)')
_COPIES = ("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "opt-barrier")
_CALLS = ("call", "fusion", "custom-call", "async-start")  # operations whose to_apply is executed, not a sum's

Shape = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Attributes:
        name, operation: in XLA's words, as in %add.3 and "add".
        shapes: dtype and sizes of the arrays of the result, those of a tuple in order.
        operands: names of instructions of the same computation.
        line: the text.
        is_root: whether its result is the computation's.
    """

    name: str
    operation: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    line: str
    is_root: bool

    def called(self) -> Iterator[tuple[str, str]]:
        """(attribute, computation) of every computation that the instruction executes."""
        for key, several, one in _CALLED.findall(self.line):
            if key != "to_apply" or self.operation in _CALLS:
                yield from ((key, word.strip().lstrip("%")) for word in (several or one).split(","))

    def integer(self, pattern: str) -> int | None:
        """The number that the pattern's group matches in the line; None without a match."""
        match = re.search(pattern, self.line)
        return int(match[1]) if match else None


Place = tuple[str, Instruction]  # a computation's name, and an instruction in it


class Module:
    """A compiled program.

    Attributes:
        computations: instructions by name, of each computation by name, in the order of the schedule.
        entry: name of the computation that the program starts with.
        num_partitions: devices of the program.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self._counted = functools.cache(self._counts)
        partitions = re.search(r"num_partitions=(\d+)", text)
        self.num_partitions = int(partitions[1]) if partitions else 1
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
                current = self.computations[match[2]] = {}
                self.entry = match[2] if match[1] else self.entry
            elif line.rstrip() == "}":  # "}}," ends a kernel's attributes, not a computation
                current = None
            elif current is not None and (match := _INSTRUCTION.match(line)):
                operands = re.findall(r"%([\w.\-]+)", _before_parenthesis(match[5]))
                shapes = tuple(_shapes(match[3]))
                current[match[2]] = Instruction(match[2], match[4], shapes, tuple(operands), line, bool(match[1]))
        self._callers: dict[str, list[Place]] = collections.defaultdict(list)
        for computation, instructions in self.computations.items():
            for instruction in instructions.values():
                for _, name in instruction.called():
                    self._callers[name].append((computation, instruction))

    def called(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """(Computation, number of executions) for each computation that one execution of an instruction executes.

        Raises:
            ValueError: for a loop whose number of iterations cannot be read, if there is something to count in it.
        """
        for key, name in instruction.called():
            if key != "condition" and name in self.computations and self._counted(name):
                yield name, self.trips(instruction) if key == "body" else 1

    def executions(self) -> dict[str, int]:
        """Number of executions of every computation that has, or calls, a matrix product or a collective.

        Raises:
            ValueError: as `called`.
        """
        times: dict[str, int] = {}

        def visit(name: str, count: int) -> None:
            times[name] = times.get(name, 0) + count
            for instruction in self.computations[name].values():
                for other, inner in self.called(instruction):
                    visit(other, count * inner)

        visit(self.entry, 1)
        return times

    def _counts(self, name: str) -> bool:
        """Whether a computation has, or calls, something to count: a matrix product, a kernel or a collective."""
        return any(
            instruction.operation in ("dot", "convolution", "send")
            or _KERNEL.search(instruction.line)
            or instruction.operation.removesuffix("-start") in KINDS
            or any(other in self.computations and self._counted(other) for _, other in instruction.called())
            for instruction in self.computations[name].values()
        )

    # ---- loops -------------------------------------------------------------------------------------------------------

    def trips(self, loop: Instruction) -> int:
        """Iterations of a `while`: from its line, or from its counter's start, step and limit.

        The lines of TPU programs, and of loops that a GPU's compiler changed late, do not have the number. Example:
        collective matrix products of a TPU count to 16 in steps of 2, which are 8 iterations.

        Raises:
            ValueError: naming the loop, when they cannot be read.
        """
        if (known := loop.integer(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)')) is not None:
            return known
        called = dict(loop.called())
        trips = self._counted_trips(called.get("condition", ""), called.get("body", ""))
        if trips is None:
            raise ValueError(f"the number of iterations of loop %{loop.name} cannot be read from the compiled program")
        return trips

    def _counted_trips(self, condition: str, body: str) -> int | None:
        """Iterations of a loop `for (i = start; i < limit; i += step)`; None for a loop of another form."""
        test = self._result(condition)
        if test is None or test[1].operation != "compare":
            return None
        direction = re.search(r"direction=(\w+)", test[1].line)
        sign = direction[1] if direction else ""
        left, right = (self._source(test[0], name) for name in test[1].operands)
        if self._integer(left) is not None:  # limit > i
            left, right, sign = right, left, {"GT": "LT", "GE": "LE", "NE": "NE"}.get(sign, "")
        counter, limit = self._state_index(left), self._integer(right)
        if counter is None or limit is None or sign not in ("LT", "LE", "NE"):
            return None
        start, step = self._integer(self._initial(body, counter)), self._step(body, counter)
        if start is None or step is None or step <= 0:
            return None
        return max(0, -(-(limit - start + (sign == "LE")) // step))

    def _step(self, body: str, index: int) -> int | None:
        """What an iteration adds to element `index` of a loop's state."""
        add = self._element(self._result(body), index)
        if add is None or add[1].operation != "add":
            return None
        terms = [self._source(add[0], name) for name in add[1].operands]
        for counter, step in (terms, terms[::-1]):
            if self._state_index(counter) == index:
                return self._integer(step)
        return None

    def _integer(self, place: Place | None) -> int | None:
        """The integer that an instruction always has; None if it has none, or it cannot be told."""
        if place is None:
            return None
        if place[1].operation == "constant":
            return place[1].integer(r"constant\((-?\d+)\)")
        index = self._state_index(place)
        if index is None or not self._is_constant(place[0], index):
            return None
        return self._integer(self._initial(place[0], index))

    def _is_constant(self, computation: str, index: int) -> bool:
        """Whether the loop of a body or condition changes element `index` of its state in no iteration."""
        caller = self.caller(computation)
        if caller is None or caller[1].operation != "while":
            return False
        return self._state_index(self._element(self._result(dict(caller[1].called())["body"]), index)) == index

    def _initial(self, computation: str, index: int) -> Place | None:
        """Element `index` of a loop's state before the first iteration, of the loop of a body or condition."""
        caller = self.caller(computation)
        return None if caller is None else self._element(self._source(caller[0], caller[1].operands[0]), index)

    def _source(self, computation: str, name: str) -> Place | None:
        """The instruction whose value `name` has, through copies, fusions, calls and tuples."""
        instruction = self.computations[computation].get(name)
        if instruction is None:
            return None
        if instruction.operation in _COPIES:
            return self._source(computation, instruction.operands[0])
        if instruction.operation in ("fusion", "call"):
            return self._result(next((name for _, name in instruction.called()), "")) or (computation, instruction)
        if instruction.operation == "get-tuple-element":
            index = instruction.integer(r"index=(\d+)")
            source = self._source(computation, instruction.operands[0])
            element = None if index is None else self._element(source, index)
            return element or (computation, instruction)
        if instruction.operation == "parameter" and (caller := self.caller(computation)):
            number = instruction.integer(r"parameter\((\d+)\)")
            if caller[1].operation in _CALLS and number is not None:
                return self._source(caller[0], caller[1].operands[number])
        return computation, instruction

    def _element(self, source: Place | None, index: int) -> Place | None:
        """Element `index` of a tuple; of a loop's result, if no iteration changes it, that before the loop."""
        if source is None:
            return None
        computation, instruction = source
        if instruction.operation == "tuple":
            return self._source(computation, instruction.operands[index])
        if instruction.operation == "while":
            body = dict(instruction.called())["body"]
            return self._initial(body, index) if self._is_constant(body, index) else None
        return None

    def _result(self, computation: str) -> Place | None:
        """The source of a computation's result."""
        instructions = self.computations.get(computation, {}).values()
        root = next((instruction for instruction in instructions if instruction.is_root), None)
        return None if root is None else self._source(computation, root.name)

    def _state_index(self, place: Place | None) -> int | None:
        """Index of the element of its loop's state that an instruction reads; None for other instructions."""
        if place is None or place[1].operation != "get-tuple-element":
            return None
        state = self._source(place[0], place[1].operands[0])
        is_state = state is not None and state[1].operation == "parameter"
        return place[1].integer(r"index=(\d+)") if is_state else None

    def caller(self, computation: str) -> Place | None:
        """The one instruction that executes a computation; None if there are several."""
        callers = self._callers[computation]
        return callers[0] if len(callers) == 1 else None


# ---- text ------------------------------------------------------------------------------------------------------------


def _before_parenthesis(text: str) -> str:
    """The text up to the parenthesis that closes an opened one."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.start()]
    return text


def _shapes(text: str) -> list[Shape]:
    shapes = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)
    return [(dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in shapes if dtype in BYTES]


def num_bytes(shape: Shape) -> int:
    """Bytes of an array."""
    return BYTES[shape[0]] * math.prod(shape[1])
