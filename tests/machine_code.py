"""What the machine code of a Hopper kernel writes to while its tensor cores may still be reading it.

A product with its left operand in registers (HGMMA with R twice) reads them until the group of products that it is in is done:
``gsb0`` closes a group, and ``WARPGROUP.DEPBAR.LE gsb0, n`` waits until at most the last n of them are not done. No tool tells of a
register that is written before: the assembler has been seen to make such code.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LEFT = re.compile(r"HGMMA\S* R\d+, R(\d+), gdesc")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
_TARGET = re.compile(r"^BRA .*?\b0x([0-9a-f]+)")
_WRITTEN = re.compile(r"^\S+ (?:P\w+, )*R(\d+)\b")  # the first register named is written, behind predicates that are
_NOT_WRITING = {"ST", "STG", "STS", "STL", "STSM", "RED", "HGMMA", "SYNCS", "BAR", "R2UR", "EXIT", "BRA"}
_MOST_GROUPS = 8


class Instruction(NamedTuple):
    """Of a kernel: its address, whether a predicate may skip it, and what it does."""

    address: int
    skipped: bool
    text: str


def instructions(sass: str) -> list[Instruction]:
    """What a kernel executes."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(\S+)\s+)?([^;]*?)\s*;", sass, re.MULTILINE)
    return [Instruction(int(address, 16), bool(predicate), text) for address, predicate, text in found]


def _written(text: str) -> set[int]:
    """The registers that an instruction writes to."""
    name = text.split()[0]
    found = _WRITTEN.match(text)
    if name.split(".")[0] in _NOT_WRITING or not found:
        return set()
    width = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name or name == "CS2R" else 1
    return set(range(int(found[1]), int(found[1]) + width))


def overwritten(kernel: list[Instruction]) -> list[tuple[Instruction, Instruction]]:
    """Products, with an instruction that may write to their left operand while they read it."""
    place = {instruction.address: i for i, instruction in enumerate(kernel)}
    found = []
    for i, product in enumerate(kernel):
        left = _LEFT.match(product.text)
        if not left:
            continue
        operand = set(range(int(left[1]), int(left[1]) + 4))
        closed = int("gsb0" in product.text)  # groups closed from its own on
        seen, open_ways = set(), [(i + 1, closed)]
        while open_ways:
            at, closed = open_ways.pop()
            if (at, closed) in seen or at == len(kernel):
                continue
            seen.add((at, closed))
            text = kernel[at].text
            if text.startswith("HGMMA") and "gsb0" in text:
                closed = min(closed + 1, _MOST_GROUPS)
            wait = _WAIT.match(text)
            if wait and closed > int(wait[1], 16):
                continue
            if operand & _written(text):
                found.append((product, kernel[at]))
                break
            if target := _TARGET.match(text):
                open_ways.append((place[int(target[1], 16)], closed))
            if kernel[at].skipped or not text.startswith(("BRA", "EXIT")):
                open_ways.append((at + 1, closed))
    return found
