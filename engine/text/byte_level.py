"""The alphabet of byte-level BPE: every byte has one printable character.

In: a token's text in that alphabet, or raw bytes. Out: the other one. Source: the GPT-2 encoder.
"""

from __future__ import annotations


def _alphabet() -> dict[str, int]:
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if chr(byte) not in table)
    # Bytes without a visible character of their own take the code points from 256 on, in order.
    table.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return table


BYTE_OF_CHARACTER = _alphabet()
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}


def to_bytes(token: str) -> bytes:
    """Bytes of a token; characters outside the alphabet stand for themselves, in UTF-8."""
    found = bytearray()
    for character in token:
        byte = BYTE_OF_CHARACTER.get(character)
        if byte is None:
            found += character.encode("utf-8", errors="replace")
        else:
            found.append(byte)
    return bytes(found)
