"""Python that runs a kernel's PTX for one thread, by what the PTX manual says of each instruction that our assembly uses."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import torch

WORD = 0xFFFFFFFF


def float32(bits: int) -> np.float32:
    """The number that 32 bits stand for."""
    return np.array(bits & WORD, np.uint32).view(np.float32)[()]


def bits32(number: float) -> int:
    """The bits of a number in float32."""
    return int(np.array(number, np.float32).view(np.uint32))


def _lop3(a: int, b: int, c: int, table: int) -> int:
    bits = [(a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1) for i in range(32)]
    return sum((table >> bit & 1) << i for i, bit in enumerate(bits))


def _prmt(a: int, b: int, selected: int) -> int:
    source = a | b << 32
    return sum((source >> 8 * (selected >> 4 * i & 7) & 255) << 8 * i for i in range(4))


def _fma(a: int, b: int, c: int) -> int:
    x, y, z = (np.float64(float32(bits)) for bits in (a, b, c))  # exact here, so that it is rounded once
    return bits32(x * y + z)


# By the beginnings of their names.
OPERATIONS = {
    "mov": lambda a: a,
    "add.f32": lambda a, b: bits32(float32(a) + float32(b)),
    "add": lambda a, b: a + b,
    "mul.wide": lambda a, b: a * b,
    "mad.wide": lambda a, b, c: a * b + c,
    "shl": lambda a, b: a << b,
    "xor": lambda a, b: a ^ b,
    "selp": lambda a, b, p: a if p else b,
    "lop3": _lop3,
    "prmt": _prmt,
    "fma.rn.f32": _fma,
    "cvt.rn.bf16.f32": lambda a: int(torch.tensor(float32(a)).bfloat16().view(torch.int16)) & 0xFFFF,
}


class Machine:
    """A program of which one thread is run. ``memory`` is in words; ``written`` has what is written in halves, by address."""

    def __init__(
        self,
        ptx: str,
        operands: dict[str, int],
        thread: int = 0,
        memory: Counter[int] | None = None,
        written: dict[int, int] | None = None,
    ) -> None:
        lines = [line.strip() for line in re.split(r"[;\n]", ptx)]
        self.lines = [line for line in lines if line not in ("", "{", "}") and not line.startswith(".reg")]
        self.labels = {line[:-1]: place for place, line in enumerate(self.lines) if line.endswith(":")}
        self.held = operands | {"%tid.x": thread}
        self.memory = Counter() if memory is None else memory
        self.written = {} if written is None else written
        self.at = 0

    def value(self, name: str) -> int:
        if name.startswith("0f"):
            return int(name[2:], 16)
        return self.held[name] if name in self.held else int(name, 0)

    def run(self) -> bool:
        """Run until the program waits; return whether it has ended."""
        while self.at < len(self.lines):
            line = self.lines[self.at]
            self.at += 1
            if line.endswith(":"):
                continue
            condition = re.match(r"@(\w+) ", line)
            if condition:
                line = line[condition.end() :]
                if not self.held[condition.group(1)]:
                    continue
            what, *names = re.findall(r"[\w.%$+-]+", line)
            if what == "nanosleep.u32":
                return False
            if what == "bra":
                self.at = self.labels[names[0]]
            else:
                self.step(what, names)
        return True

    def step(self, what: str, names: list[str]) -> None:
        value = self.value
        if what.startswith(("st.relaxed", "ld.relaxed")):
            address, pair = (names[:3], names[3:]) if what.startswith("st") else (names[2:], names[:2])
            first = (value(address[0]) + value(address[-1])) // 4
            for place, name in enumerate(pair):
                if what.startswith("st"):
                    self.memory[first + place] = value(name) & WORD
                else:
                    self.held[name] = self.memory[first + place]
        elif what == "st.global.b16":
            assert value(names[0]) not in self.written
            self.written[value(names[0])] = value(names[1])
        elif what.startswith("setp"):
            _, how, *_ = what.split(".")
            a, b = value(names[1]), value(names[2])
            if what.endswith("f32"):
                a, b = float32(a), float32(b)
            elif what.endswith("b32"):
                a, b = a & WORD, b & WORD
            found = {"eq": a == b, "ne": a != b, "gt": a > b}[how]
            self.held[names[0]] = bool(found or (".or." in what and self.held[names[3]]))
        else:
            does = next(does for name, does in OPERATIONS.items() if what.startswith(name))
            found = does(*map(value, names[1:]))
            is_word = what.endswith((".b32", ".u32")) and ".wide" not in what
            self.held[names[0]] = found & WORD if is_word else found


def run_ptx(ptx: str, inputs: dict[str, int], outputs: int) -> list[int]:
    """What a few lines of PTX leave in $0 and after."""
    machine = Machine(ptx, inputs)
    assert machine.run()
    return [machine.held[f"${place}"] for place in range(outputs)]
