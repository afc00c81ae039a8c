"""What an ablation is made of: its students, and the form their answers are kept in."""

from __future__ import annotations

from collections.abc import Sequence

# Name of a student: its losses, and whether it is also trained with quantised weights.
METHODS = {
    "ce": ("ce", True),
    "gdkd-fixed": ("gdkd", False),
    "rcka": ("rcka", False),
    "gdkd": ("gdkd", False),
    "grace": ("grace", True),
    "kl": ("kl", True),
}


def pack(right: Sequence[bool]) -> str:
    """Return a vector of right (1) and wrong (0) as hexadecimal digits, four questions each, zeros at the end.

    Example:
        >>> pack([True, False, False, True, True])
        '98'
    """
    text = "".join("1" if value else "0" for value in right)
    text += "0" * (-len(text) % 4)
    return "".join(f"{int(text[i : i + 4], 2):x}" for i in range(0, len(text), 4))


def unpack(digits: str, count: int) -> list[bool]:
    """Return what :func:`pack` was given.

    Example:
        >>> unpack("98", 5)
        [True, False, False, True, True]
    """
    return [bit == "1" for digit in digits for bit in f"{int(digit, 16):04b}"][:count]
