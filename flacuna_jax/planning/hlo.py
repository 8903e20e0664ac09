"""Reads an optimised XLA program: how often each instruction runs, and its products, memory traffic and communication.

XLA's own cost analysis counts the body of a loop once, and does not exist for absent GPUs. Therefore this walks the
text of the program: computations, called from loops with trip counts, down to the instructions of fusions.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_ARRAY_WITH_LAYOUT = re.compile(r"\b([a-z][a-z0-9]*\[[\d,]*\])(\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Instructions that only rename or rearrange handles; nothing is read or written for them.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "optimization-barrier", "iota", "copy-done", "async-done", "async-update"),
}


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @cached_property
    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """(dtype, dimensions) of every array in the result."""
        return _arrays(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(dtype, dims) for dtype, dims in self.arrays)

    @property
    def stored_bytes(self) -> int:
        """Bytes in device memory; a TPU program keeps some arrays in on-chip memory, S(1)."""
        arrays = _ARRAY_WITH_LAYOUT.findall(self.shape)
        return sum(_nbytes(*_arrays(array)[0]) for array, layout in arrays if "S(" not in layout)

    @property
    def elements(self) -> int:
        return math.prod(self.arrays[0][1]) if self.arrays else 0

    def is_number(self, number: int) -> bool:
        """Whether this is parameter `number` of its computation."""
        return self.opcode == "parameter" and self.attributes.startswith(f"({number})")

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    def called(self, name: str) -> str | None:
        return self.attribute(rf"\b{name}=%?([\w.\-]+)")

    @property
    def op_name(self) -> str:
        """Its origin in the traced function, for example jit(step)/while/body/dot_general."""
        return self.attribute(r'op_name="([^"]*)"') or ""


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return list(self.instructions.values())[-1]

    def users(self, name: str) -> list[Instruction]:
        return [instruction for instruction in self.instructions.values() if name in instruction.operands]


@dataclass(frozen=True)
class Use:
    """An instruction, its computation, and how often it runs."""

    instruction: Instruction
    computation: Computation
    times: float
    fused: bool


@dataclass(frozen=True)
class Collective:
    """One kind of collective operation, per device and run of the program."""

    kind: str
    nbytes: int
    """Bytes of the whole array: the result of a gather, the operand of a reduction."""
    group: tuple[int, ...]
    """Positions in the mesh of the first group of partners."""
    times: float
    overlapped: bool
    """Whether the compiler overlaps it with other work."""
    op_name: str

    @property
    def received(self) -> float:
        """Bytes that a device receives in one run, with ring algorithms."""
        share = (len(self.group) - 1) / len(self.group)
        return self.nbytes * share * (2 if self.kind == "all-reduce" else 1)


class Program:
    """An optimised module from `compiled.as_text()`.

    Args:
      text: the module.
      loop_trips: trip count of a loop whose count the compiler does not know, from its `op_name`.
    """

    def __init__(self, text: str, loop_trips: Callable[[str], float] = lambda _: 1.0) -> None:
        self.computations, self._entry = _parse(text)
        self._loop_trips = loop_trips

    @cached_property
    def uses(self) -> list[Use]:
        """Every instruction that runs, including those in loops, calls and fusions."""
        return list(self._walk(self._entry, 1.0, False))

    def _walk(self, name: str, times: float, fused: bool) -> Iterator[Use]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield Use(instruction, computation, times, fused)
            if instruction.opcode == "while":
                body = instruction.called("body") or ""
                if body in self.computations:
                    yield from self._walk(body, times * self._trips(instruction), fused)
            elif instruction.opcode == "conditional":
                branches = _NAME.findall(instruction.attribute(r"branch_computations=\{([^}]*)\}") or "")
                branches += [b for key in ("true", "false") if (b := instruction.called(f"{key}_computation"))]
                for branch in branches:
                    yield from self._walk(branch, times / len(branches), fused)
            elif instruction.opcode in ("fusion", "call", "async-start", "custom-call"):
                called = instruction.called("calls") or instruction.called("to_apply") or ""
                if called in self.computations:
                    yield from self._walk(called, times, fused or instruction.opcode == "fusion")

    def _trips(self, loop: Instruction) -> float:
        """Trip count of a loop: the known count, or else the constant in its condition, or else `loop_trips`."""
        if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return float(known)
        condition = self.computations.get(loop.called("condition") or "")
        if condition is not None and condition.root.opcode == "compare" and "direction=LT" in condition.root.attributes:
            bound = condition.instructions.get(condition.root.operands[-1])
            if bound is not None and bound.opcode == "constant" and (count := re.match(r"\((\d+)\)", bound.attributes)):
                return float(count[1])
        return self._loop_trips(loop.op_name)

    @cached_property
    def matrix_flops(self) -> float:
        """Floating-point operations of matrix products, without those in our own kernels."""
        return sum(flops * use.times for use, flops in self.matrix_products())

    def matrix_products(self) -> Iterator[tuple[Use, float]]:
        """Every matrix product and the operations of one run of it.

        |lhs| · |rhs| · |out| is b³ (m k n)² for every form of a product, which gives 2 b m k n without its layout.
        """
        for use in self.uses:
            instruction = use.instruction
            product = instruction.opcode in ("dot", "convolution") or (
                instruction.opcode == "custom-call"
                and re.search(r'custom_call_target="[^"]*(gemm|matmul)', instruction.attributes)
            )
            if not product:
                continue
            operands = [use.computation.instructions[name] for name in instruction.operands[:2]]
            if len(operands) < 2:
                continue
            batch_dims = instruction.attribute(r"lhs_batch_dims=\{([\d,]*)\}")
            sizes = operands[0].arrays[0][1]
            batch = math.prod(sizes[int(dim)] for dim in batch_dims.split(",")) if batch_dims else 1
            volume = operands[0].elements * operands[1].elements * instruction.elements
            yield use, 2 * math.sqrt(volume / batch)

    @cached_property
    def collectives(self) -> list[Collective]:
        found: dict[str, Collective] = {}
        for use in self.uses:
            instruction = use.instruction
            if between := _between_slices(instruction):
                kind, group = between
                dtype, dims = instruction.arrays[0]
                found[instruction.name] = Collective(
                    kind, _nbytes(dtype, dims), group, use.times, True, instruction.op_name
                )
                continue
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            # A TPU program splits one collective over several fusions, which have the same channel.
            channel = instruction.attribute(r"channel_id=(\d+)") or instruction.name
            if channel in found:
                continue
            group = replica_group(instruction.attributes)
            size, total = len(group), instruction.nbytes
            in_and_out = instruction.opcode.endswith("-start")
            if kind == "all-gather":
                total = total * size // (size + 1) if in_and_out else total
            elif kind == "reduce-scatter":
                total = total * size // (size + 1) if in_and_out else total * size
            elif kind == "collective-permute":
                total = total // 2 if in_and_out else total
            elif kind == "all-reduce" and len(instruction.arrays) == 2 * len(instruction.operands):
                total //= 2  # its start has operands and results since jax 0.12, before that only results
            overlapped = (
                '"is_sync":false' in instruction.attributes
                or "async_collective" in instruction.attributes
                or "chain_id" in instruction.attributes
            )
            if size > 1:
                found[channel] = Collective(kind, total, group, use.times, overlapped, instruction.op_name)
        return list(found.values())

    @cached_property
    def memory_traffic(self) -> float:
        """Bytes read and written in device memory: results and operands of instructions outside of fusions."""
        return sum(use.times * self._traffic(use) for use in self.uses if not use.fused)

    def _traffic(self, use: Use) -> float:
        instruction, scope = use.instruction, use.computation.instructions
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            return 0
        operands = [scope[name] for name in instruction.operands if name in scope]
        if opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * instruction.stored_bytes
        if opcode == "dynamic-update-slice":
            return 2 * operands[1].stored_bytes
        if 'custom_call_target="AllocateBuffer"' in instruction.attributes:
            return 0
        fused = self.computations.get(instruction.called("calls") or "")
        if fused is None:
            return instruction.stored_bytes + sum(operand.stored_bytes for operand in operands)
        read = (self._read(fused, number, operand.stored_bytes) for number, operand in enumerate(operands))
        return self._written(fused, fused.root) + sum(read)

    def _written(self, fused: Computation, result: Instruction) -> float:
        """Bytes that a fusion writes for a result; for an in-place update, only the part that changes."""
        scope = fused.instructions
        while result.opcode == "bitcast" and result.operands[0] in scope:
            result = scope[result.operands[0]]
        if result.opcode == "tuple":
            return sum(self._written(fused, scope[name]) for name in result.operands)
        if result.opcode == "dynamic-update-slice":
            return scope[result.operands[1]].nbytes
        inner = self.computations.get(result.called("calls") or "") if result.opcode == "fusion" else None
        return min(self._written(inner, inner.root), result.stored_bytes) if inner else result.stored_bytes

    def _read(self, fused: Computation, number: int, nbytes: float) -> float:
        """Bytes that a fusion reads of its operand; if it slices one of several stacked layers, or updates one, only
        that layer. Follows nested fusions."""
        total = 0.0
        pending = [i.name for i in fused.instructions.values() if i.is_number(number)]
        while pending:
            name = pending.pop()
            for user in fused.users(name):
                inner = self.computations.get(user.called("calls") or "") if user.opcode == "fusion" else None
                if user.opcode == "bitcast":
                    pending.append(user.name)
                elif user.opcode in ("dynamic-slice", "slice", "gather"):
                    total += user.nbytes
                elif inner:
                    total += sum(self._read(inner, i, nbytes) for i, n in enumerate(user.operands) if n == name)
                elif user.opcode not in ("dynamic-update-slice", "tuple") or name in user.operands[1:]:
                    return nbytes
        return min(total, nbytes)


def _between_slices(instruction: Instruction) -> tuple[str, tuple[int, ...]] | None:
    """A collective between slices of a TPU program: its kind, and the first device of each participating slice.

    After a collective within the slice, every device passes its share to the runtime for the network between slices.
    """
    kind = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
    target = re.search(r'_xla_megascale_target="\{([\d,]+)\}x\{(\d+):(\d+)\}"', instruction.attributes)
    if instruction.opcode != "send" or kind is None or target is None:
        return None
    slices, size = len(target[1].split(",")), int(target[3]) - int(target[2]) + 1
    return kind.lower().replace("_", "-"), tuple(index * size for index in range(slices))


def replica_group(attributes: str) -> tuple[int, ...]:
    """The first group of partners, as positions in the mesh, from any form in XLA's text."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))?\s*\{([^}]*)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        taken = re.findall(r"'(\w+)'", found[3])
        positions = _positions(found[2], math.prod(axes.values())).reshape(tuple(axes.values()))
        index = tuple(slice(None) if name in taken else 0 for name in axes)
        return tuple(int(i) for i in np.ravel(positions[index]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        groups, size = int(found[1]), int(found[2])
        return tuple(int(i) for i in _positions(found[3], groups * size).reshape(groups, size)[0])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(i) for i in found[1].split(","))
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return tuple(sorted({int(found[1]), int(found[2])}))
    return ()


def _positions(order: str | None, count: int) -> np.ndarray:
    """0, 1, 2, ... in an order given as `[16,8]T(1,0)` (reshaped, transposed), as a list, or not at all."""
    if not order:
        return np.arange(count)
    if found := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?", order):
        ids = np.arange(count).reshape([int(size) for size in found[1].split(",")])
        return ids.transpose([int(axis) for axis in found[2].split(",")]).ravel() if found[2] else ids.ravel()
    return np.array([int(position) for position in re.findall(r"\d+", order)])


def _arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in _ARRAY.findall(text)]


def _nbytes(dtype: str, dims: tuple[int, ...]) -> int:
    if dtype in _BYTES:
        size: float = _BYTES[dtype]
    elif dtype.startswith("f8"):
        size = 1
    else:
        size = int(re.sub(r"\D", "", dtype) or 0) / 8  # s4, u8, s32, ...
    return int(math.prod(dims) * size)


def _parse(text: str) -> tuple[Mapping[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[1], Computation(header[1]))
            entry = header[1] if line.startswith("ENTRY") else entry
        elif current is not None and " = " in line and line.startswith("  "):
            instruction = _parse_instruction(line)
            current.instructions[instruction.name] = instruction
    return computations, entry


def _parse_instruction(line: str) -> Instruction:
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = re.sub(r"/\*.*?\*/", "", rest[:end]), rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing - 1]
    attributes = rest[closing:]
    opcode = rest[:opening]
    if opcode in ("parameter", "constant"):  # a number, or a value
        attributes = f"({arguments}){attributes}"
    return Instruction(name.lstrip("%"), shape, opcode, tuple(_NAME.findall(arguments)), attributes)


def _closing(text: str, opening: int) -> int:
    """Index after the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index + 1
    return len(text)
