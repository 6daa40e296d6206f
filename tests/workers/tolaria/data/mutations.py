"""Bytes of a file, damaged at random."""

import random


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A copy with one to four places overwritten, cut or lengthened."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed))
        changed[at : at + chance.choice([0, 1, 1, 9])] = chance.randbytes(chance.choice([0, 1, 1, 5]))
    return bytes(changed)
