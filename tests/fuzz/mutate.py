"""Damage to a file, by chance: bits, bytes, cuts, repeats, numbers and words that parsers trip over."""

from __future__ import annotations

import random

TOKENS = [
    b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b"18446744073709551616", b"{}", b"[]",
    b'""',
    b"[[[[[[[[", b"{" * 200, b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"../../etc/passwd", b"/etc/passwd",
    b"!!python/object/apply:os.system ['true']", b"&a [*a]", b"<<: *a", b"\\ud800", b"F64",
]  # fmt: skip


def mutate(data: bytes, chance: random.Random) -> bytes:
    """A few changes to an input."""
    made = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(made) + 1)
        end = min(len(made), at + chance.choice((1, 1, 2, 8, 64)))
        match chance.randrange(7):
            case 0 if at < len(made):
                made[at] ^= 1 << chance.randrange(8)
            case 1:
                made[at:end] = b""
            case 2:
                made[at:at] = chance.choice(TOKENS)
            case 3:
                made[at:end] = chance.choice(TOKENS)
            case 4:
                made[at:at] = made[at:end] * chance.randint(1, 4)
            case 5:
                made[at:] = b"" if chance.random() < 0.3 else made[at:]
            case _:
                made[at:end] = chance.randbytes(end - at)
    return bytes(made)
