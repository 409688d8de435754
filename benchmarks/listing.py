"""Reads PTX and SASS listings, and finds what a thread of a full block executes.

```
blocks   the listing, cut at labels and branches; an edge for each branch that may be taken
element  an access is one to element data where its address depends on the thread's number; those to tables do not,
         or are of 64-bit words, which in PTX no element is
loops    the natural loops: what leads back to a branch's target; bodies count as often as they run
path     from the entry to an exit, through every loop body once
```

In PTX a masked access is predicated, so the full-block paths are those whose element accesses are all unpredicated.
In SASS the same path is one that makes the same element accesses (the compiler may have predicated one of them where a
branch was short): both listings are read independently, and where no path of the SASS agrees with the PTX, that is an
error and no number. Of several that agree the longest counts, but a thread that may leave and has no element ahead of
it leaves (inspect's search for the guilty losses, behind that point, is for overflows). A
block that calls a subroutine (division and root of extraordinary operands) is not on the path; the test before it is.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True, order=True)
class Access:
    """An access to global memory by a thread."""

    kind: str  # "load" or "store"
    width: int  # bytes


@dataclass
class Instruction:
    """One line of a listing."""

    op: str
    guarded: bool
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    access: Access | None = None
    address: tuple[str, ...] = ()
    target: str | None = None  # of a branch
    ends: bool = False  # the thread, or the subroutine
    calls: bool = False
    source: bool = False  # reads the thread's number
    step: int = 0  # the constant that an integer addition adds to a register
    element: bool = False


@dataclass
class Block:
    """Instructions that are executed together."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)

    @cached_property
    def accesses(self) -> Counter[Access]:
        """Those to element data that it always makes."""
        return Counter(i.access for i in self.instructions if i.element and i.access and not i.guarded)

    @cached_property
    def predicated(self) -> Counter[Access]:
        """Those to element data that it may make."""
        return Counter(i.access for i in self.instructions if i.element and i.access and i.guarded)

    @property
    def slow(self) -> bool:
        """Whether it always calls a subroutine."""
        return any(i.calls and not i.guarded for i in self.instructions)


@dataclass(frozen=True)
class Loop:
    """A natural loop: its first block, and all of them."""

    head: int
    blocks: frozenset[int]


# How often each access is made, predicated or not, in which loops.
_Made = frozenset[tuple[tuple[Access | None, bool, frozenset[int]], int]]


class Program:
    """The control flow of one kernel."""

    def __init__(self, lines: list[tuple[str, Instruction]]) -> None:
        self.blocks = _cut(lines)
        _mark_elements(self.blocks)
        self.order, self.backward = _order(self.blocks)
        self.loops = _loops(self.blocks, self.backward)

    def paths(self, allowed: Callable[[Block], bool]) -> list[list[int]]:
        """Paths from the entry to an exit through blocks that are allowed and not slow.

        Of those that make the same element accesses in the same loops, the longest alone.
        """
        ahead: dict[int, dict[_Made, tuple[int, list[int]]]] = {}  # {block: {accesses from there: (length, path)}}
        for b in self.order:
            block = self.blocks[b]
            ahead[b] = {}
            if block.slow or not allowed(block):
                continue
            context = frozenset(loop.head for loop in self.loops if b in loop.blocks)
            own = Counter((i.access, i.guarded, context) for i in block.instructions if i.element)
            ends: list[tuple[_Made, int, list[int]]] = []
            if may_end := any(i.ends for i in block.instructions):
                ends.append((frozenset(), 0, []))
            for n in block.successors:
                if (b, n) not in self.backward:
                    ends += [(made, *rest) for made, rest in ahead[n].items() if made or not may_end]
            for made, length, path in ends:
                key = frozenset((own + Counter(dict(made))).items()) if own else made
                length += len(block.instructions)
                if length > ahead[b].get(key, (0,))[0]:
                    ahead[b][key] = (length, [b, *path])
        return [path for _, path in ahead[0].values()]

    def accesses(self, path: list[int]) -> Counter[Access]:
        """Element accesses of a path, each loop's body once."""
        return sum((self.blocks[b].accesses for b in path), Counter())

    def runs(self, path: list[int], trips: dict[int, float]) -> list[float]:
        """How often each block of a path runs; `trips` of the loops by their first blocks, 1 where it does not say."""
        return [math.prod(trips.get(loop.head, 1) for loop in self.loops if b in loop.blocks) for b in path]

    def within(self, loop: Loop, path: list[int]) -> Counter[Access]:
        """Element accesses of the part of a path that lies in a loop."""
        return self.accesses([b for b in path if b in loop.blocks])

    def makes(self, wanted: Counter[Access], path: list[int], loop: Loop | None = None) -> bool:
        """Whether a path, or its part in a loop, can make exactly these accesses: predicated ones are made or not."""
        part = [self.blocks[b] for b in path if loop is None or b in loop.blocks]
        certain = sum((block.accesses for block in part), Counter())
        possible = sum((block.predicated for block in part), certain)
        return certain <= wanted <= possible

    def busy_loops(self, path: list[int]) -> list[Loop]:
        """The loops on a path that access elements, in the order of their first blocks on it."""

        def touched(b: int) -> bool:
            return bool(self.blocks[b].accesses or self.blocks[b].predicated)

        on = [loop for loop in self.loops if loop.head in path and any(touched(b) for b in path if b in loop.blocks)]
        return sorted(on, key=lambda loop: path.index(loop.head))

    def step(self, loop: Loop) -> int:
        """The step of the counter that a loop of PTX compares at its end, beside the loops within it; 0 if none has."""
        inner = {b for other in self.loops if other.blocks < loop.blocks for b in other.blocks}
        own = [i for b in loop.blocks - inner for i in self.blocks[b].instructions]
        compared = {r for i in own if i.op.startswith("setp") for r in i.reads}
        return max((i.step for i in own if i.step and not compared.isdisjoint(i.writes)), default=0)

    def loads_in_flight(self, path: list[int]) -> int:
        """The most bytes of elements that a thread has asked for before it needs the first of them."""
        waiting: dict[tuple[str, ...], int] = {}
        most = 0
        for instruction in (i for b in path for i in self.blocks[b].instructions):
            used = set(instruction.reads) | set(instruction.address) | set(instruction.writes)
            waiting = {registers: n for registers, n in waiting.items() if used.isdisjoint(registers)}
            if instruction.element and instruction.access and instruction.access.kind == "load":
                waiting[instruction.writes] = instruction.access.width
                most = max(most, sum(waiting.values()))
        return most


def full_paths(ptx: Program) -> list[list[int]]:
    """The full-block paths, one for each set of element accesses."""
    found = [path for path in ptx.paths(lambda block: not block.predicated) if ptx.accesses(path)]
    return found


def same_path(sass: Program, wanted: Counter[Access], in_loops: list[Counter[Access]]) -> list[int]:
    """The longest path of a SASS listing with exactly these element accesses, and these of them in its loops.

    Raises:
        ValueError: There is none, so the listings contradict each other.
    """

    def allowed(block: Block) -> bool:
        return block.accesses <= wanted and (not block.predicated or not wanted.keys().isdisjoint(block.predicated))

    best: list[int] = []
    length = 0
    for path in sass.paths(allowed):
        size = sum(len(sass.blocks[b].instructions) for b in path)
        loops = sass.busy_loops(path)
        if size <= length or len(loops) != len(in_loops) or not sass.makes(wanted, path):
            continue
        if all(sass.makes(part, path, loop) for part, loop in zip(in_loops, loops, strict=True)):
            best, length = path, size
    if not best:
        raise ValueError(f"no path of the SASS makes the element accesses of the PTX, {dict(wanted)}")
    return best


def _cut(lines: list[tuple[str, Instruction]]) -> list[Block]:
    """Blocks of (label before it or "", instruction)."""
    blocks: list[Block] = []
    labels: dict[str, int] = {}
    fresh = True
    for label, instruction in lines:
        if fresh or label:
            blocks.append(Block())
        for name in label.split():
            labels[name] = len(blocks) - 1
        blocks[-1].instructions.append(instruction)
        fresh = instruction.target is not None or instruction.ends or instruction.calls
    for n, block in enumerate(blocks):
        last = block.instructions[-1]
        if last.target is not None:
            block.successors.append(labels[last.target])
        if (last.guarded or not (last.target or last.ends)) and n + 1 < len(blocks):
            block.successors.append(n + 1)
    return blocks


def _mark_elements(blocks: list[Block]) -> None:
    """Marks the accesses whose address may depend on the thread's number."""
    entering: list[set[str]] = [set() for _ in blocks]
    todo = list(range(len(blocks)))
    while todo:
        n = todo.pop()
        tainted = set(entering[n])
        for instruction in blocks[n].instructions:
            instruction.element = instruction.access is not None and not tainted.isdisjoint(instruction.address)
            depends = instruction.source or (not instruction.access and not tainted.isdisjoint(instruction.reads))
            if depends:
                tainted.update(instruction.writes)
            elif not instruction.guarded:
                tainted.difference_update(instruction.writes)
        for follower in blocks[n].successors:
            if not tainted <= entering[follower]:
                entering[follower] |= tainted
                todo.append(follower)


def _order(blocks: list[Block]) -> tuple[list[int], set[tuple[int, int]]]:
    """The blocks that are reached, each behind what follows it, and the edges backward to what it follows."""
    done: list[int] = []
    backward: set[tuple[int, int]] = set()
    state = {0: "open"}
    stack = [(0, iter(blocks[0].successors))]
    while stack:
        n, rest = stack[-1]
        follower = next(rest, None)
        if follower is None:
            state[n] = "done"
            done.append(n)
            stack.pop()
        elif state.get(follower) == "open":
            backward.add((n, follower))
        elif follower not in state:
            state[follower] = "open"
            stack.append((follower, iter(blocks[follower].successors)))
    return done, backward


def _loops(blocks: list[Block], backward: set[tuple[int, int]]) -> list[Loop]:
    before: dict[int, list[int]] = {n: [] for n in range(len(blocks))}
    for n, block in enumerate(blocks):
        for follower in block.successors:
            before[follower].append(n)
    found: dict[int, set[int]] = {}
    for end, head in backward:
        body = found.setdefault(head, {head})
        todo = [end]
        while todo:
            n = todo.pop()
            if n not in body:
                body.add(n)
                todo += before[n]
    return [Loop(head, frozenset(body)) for head, body in sorted(found.items())]


_WIDTHS = {".U8": 1, ".S8": 1, ".U16": 2, ".S16": 2, ".64": 8, ".128": 16, ".256": 32}
_SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?)(U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_UNREADABLE = ("BRX", "JMP", "JMX", "BRA.DIV", "BRA.CONV", "BREAK", "ATOM", "RED.", "LD.", "ST.", "LDGSTS", "UBLK")


def read_sass(text: str) -> Program:
    """The control flow of a listing that `nvdisasm` wrote.

    Raises:
        ValueError: It has an instruction that this reader would misjudge.
    """
    lines: list[tuple[str, Instruction]] = []
    label = ""
    for line in text.splitlines():
        if re.match(r"^[.$\w]+:$", line):
            label += " " + line[:-1]
        elif match := _SASS_LINE.match(line):
            lines.append((label, _sass_instruction(match[2] not in (None, "PT", "UPT"), match[3], match[4])))
            label = ""
    return Program(lines)


def _sass_instruction(guarded: bool, op: str, rest: str) -> Instruction:
    if op.startswith(_UNREADABLE):
        raise ValueError(f"cannot follow {op} {rest}")
    operands = re.split(r",\s*(?![^\[(]*[\])])", rest) if rest else []
    if op.startswith("BRA"):
        target = re.search(r"\((.*?)\)", rest)
        conditional = guarded or any(re.fullmatch(r"!?U?P\d", o) for o in operands)
        if not target:
            raise ValueError(f"cannot follow {op} {rest}")
        return Instruction(op, conditional, (), (), target=target[1])
    if op.startswith(("EXIT", "RET")):
        return Instruction(op, guarded or bool(re.match(r"!?U?P\d", rest)), (), (), ends=True)
    if op.startswith("CALL"):
        return Instruction(op, guarded, (), (), calls=True)
    made = Instruction(op, guarded, (), ())
    if op.startswith(("LDG", "STG")):
        width = next((n for suffix, n in _WIDTHS.items() if suffix in op), 4)
        made.access = Access("load" if op.startswith("LDG") else "store", width)
        place = next(o for o in operands if "[" in o)
        made.address = _registers(re.sub(r"desc\[\w+\]", "", place))
        operands = [o for o in operands if o is not place]
        words = max(width // 4, 1)
    else:
        words = 4 if ".128" in op else 2 if ".64" in op or "WIDE" in op or re.match(r"D[A-Z]|CS2R|F2F.F64", op) else 1
    # Destinations come first: predicates, which are not followed, and one register, or the value of a store.
    first = next((n for n, o in enumerate(operands) if not re.fullmatch(r"U?P(\d|T)", o)), len(operands))
    named = _registers(operands[first]) if first < len(operands) else ()
    if made.access and made.access.kind == "store":
        made.reads = _span(named, words)
    elif not op.startswith(("ST", "BAR", "BSSY", "BSYNC", "WARPSYNC")) and "SETP" not in op:
        made.writes = _span(named, words)
        made.reads = tuple(r for o in operands[first + 1 :] for r in _registers(o))
    else:
        made.reads = tuple(r for o in operands for r in _registers(o))
    made.source = "SR_TID" in rest or "SR_LANEID" in rest
    return made


def _registers(operand: str) -> tuple[str, ...]:
    found: list[str] = []
    for name, wide in re.findall(r"\b(U?R\d+)\b(\.64)?", operand):
        found += _span((name,), 2 if wide else 1)
    return tuple(found)


def _span(named: tuple[str, ...], words: int) -> tuple[str, ...]:
    if not named:
        return ()
    prefix, number = re.match(r"(U?R)(\d+)", named[0]).groups()  # type: ignore[union-attr]
    return tuple(f"{prefix}{int(number) + n}" for n in range(max(words, len(named))))


def read_ptx(text: str) -> Program:
    """The control flow of the kernel in a PTX text."""
    body = text[text.index(".entry") :]
    body = body[body.index("{") + 1 : body.index("\n}")]
    lines: list[tuple[str, Instruction]] = []
    label = ""
    for line in re.sub(r"//.*", "", body).splitlines():
        line = line.strip()
        if match := re.match(r"(\$[\w$]+):$", line):
            label += " " + match[1]
        elif match := re.match(r"(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*);$", line):
            lines.append((label, _ptx_instruction(match[1] is not None, match[2], match[3])))
            label = ""
    return Program(lines)


def _ptx_instruction(guarded: bool, op: str, rest: str) -> Instruction:
    if op.startswith("bra"):
        return Instruction(op, guarded, (), (), target=rest.strip())
    if op in ("ret", "exit"):
        return Instruction(op, guarded, (), (), ends=True)
    operands = [o.strip() for o in re.split(r",(?![^{\[]*[}\]])", rest)]
    names = [tuple(re.findall(r"%\w+", o)) for o in operands]
    made = Instruction(op, guarded, (), tuple(n for group in names for n in group))
    if match := re.match(r"(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[a-z](\d+)$", op):
        made.access = Access("load" if match[1] == "ld" else "store", int(match[2] or 1) * int(match[3]) // 8)
        if int(match[3]) < 64:
            made.address = next(n for o, n in zip(operands, names, strict=True) if o.startswith("["))
    elif op.startswith(("ld.global", "st.global")):
        raise ValueError(f"cannot read the width of {op}")
    if names and not op.startswith(("st.", "bar", "red.", "prefetch")):
        made.writes, made.reads = names[0], tuple(n for group in names[1:] for n in group)
    made.source = "%tid" in rest or "%laneid" in rest
    if op in ("add.s32", "add.s64") and re.fullmatch(r"-?\d+", operands[-1]):
        made.step = int(operands[-1])
    return made
