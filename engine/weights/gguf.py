"""Reads the header of a GGUF file, trusting nothing in it.

In: the path of one GGUF file, version 2 or 3. Out: its metadata as plain values and the place of
every tensor, each checked with unbounded integers against the length of the file before anything
is allocated. It gives tensors no meaning (see `names`), reads no tensor data and writes nothing.

Source: the format's description in ggml's docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import CheckpointError
from engine.weights.formats import FORMAT_OF_GGML_TYPE, num_bytes
from engine.weights.mapped import MappedFile, StoredTensor, one_line

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_KEY_BYTES = 1 << 12
MAX_NAME_BYTES = 64
MAX_DIMENSIONS = 4
MAX_ARRAY_STRINGS = 1 << 22
MAX_STRING_BYTES = 1 << 24

_SCALARS: dict[int, tuple[str, str]] = {
    0: ("uint8", "<B"),
    1: ("int8", "<b"),
    2: ("uint16", "<H"),
    3: ("int16", "<h"),
    4: ("uint32", "<I"),
    5: ("int32", "<i"),
    6: ("float32", "<f"),
    7: ("bool", "<B"),
    10: ("uint64", "<Q"),
    11: ("int64", "<q"),
    12: ("float64", "<d"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MIN_KEY_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

NumericArray = NDArray[Any]
Value = int | float | bool | str | list[str] | NumericArray


class _Cursor:
    """A position in the header; every read is checked against the end of the file."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.offset = 0

    def take(self, size: int, what: str) -> int:
        """Step over `size` bytes and return where they start."""
        start = self.offset
        if size > self.file.size - start:
            raise CheckpointError(
                f"{self.file.path}: {what} of {size:,} bytes at offset {start:,} passes the end "
                f"of the file ({self.file.size:,} bytes); the file is cut short or damaged, fetch it again"
            )
        self.offset = start + size
        return start

    def scalar(self, code: str, what: str) -> int | float:
        """One little-endian number."""
        start = self.take(struct.calcsize(code), what)
        return struct.unpack_from(code, self.file.bytes, start)[0]

    def count(self, what: str, code: str = "<Q") -> int:
        """One unsigned number."""
        return int(self.scalar(code, what))

    def string(self, what: str, limit: int) -> str:
        """One length-prefixed UTF-8 string of at most `limit` bytes."""
        size = self.count(f"the length of {what}")
        start = self.take(size, what)
        if size > limit:
            raise CheckpointError(
                f"{self.file.path}: {what} is {size:,} bytes long, at most {limit:,} are allowed"
            )
        try:
            return self.file.bytes[start : self.offset].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.file.path}: {what} at offset {start:,} is not UTF-8; the file is damaged"
            ) from error

    def name(self, what: str, limit: int) -> str:
        """A string that identifies something: not empty, no NUL."""
        text = self.string(what, limit)
        if not text or "\0" in text:
            raise CheckpointError(
                f"{self.file.path}: {what} before offset {self.offset:,} is empty or contains NUL"
            )
        return text


class GgufFile:
    """A checked GGUF header.

    Attributes:
        metadata: key to value; numeric arrays are numpy arrays of the stored type.
        tensors: file name of a tensor to its place, in file order.
    """

    def __init__(self, path: Path) -> None:
        """Map and check the file.

        Raises: CheckpointError: anything about the header breaks the format.
        """
        self.path = path
        self.metadata: dict[str, Value] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self._types: dict[str, str] = {}
        self._file = MappedFile(path)
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Unmap the file; the metadata stays readable."""
        self._file.close()

    def _fail(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {text}")

    def _read(self) -> None:
        cursor = _Cursor(self._file)
        num_tensors, num_keys = self._read_counts(cursor)
        for _ in range(num_keys):
            self._read_key(cursor)
        alignment = self._alignment()
        places: list[tuple[str, str, tuple[int, ...], int, int]] = []
        names: set[str] = set()
        for _ in range(num_tensors):
            place = self._read_tensor(cursor, alignment)
            if place[0] in names:
                raise self._fail(f"tensor {one_line(place[0])!r} appears twice")
            names.add(place[0])
            places.append(place)
        data_start = -(-cursor.offset // alignment) * alignment
        self._check_places(places, data_start)
        for name, format, shape, offset, _ in places:
            self.tensors[name] = StoredTensor(self._file, name, format, shape, data_start + offset)

    def _read_counts(self, cursor: _Cursor) -> tuple[int, int]:
        magic = self._file.bytes[:4]
        if magic != MAGIC:
            raise self._fail(
                f"not a GGUF file (starts with {magic.hex(' ')}, expected {MAGIC.hex(' ')}); give "
                "a .gguf file, or a model's folder"
            )
        cursor.take(4, "the magic number")
        version = cursor.count("the version", "<I")
        if version not in VERSIONS:
            if version and version & 0xFFFF == 0:
                raise self._fail(
                    "a byte-swapped (big-endian) GGUF file; convert it to little-endian"
                )
            raise self._fail(f"GGUF version {version} is not supported (2, 3)")
        num_tensors = cursor.count("the number of tensors")
        num_keys = cursor.count("the number of keys")
        room = self._file.size - cursor.offset
        for count, what, smallest, limit in (
            (num_tensors, "tensors", _MIN_TENSOR_BYTES, MAX_TENSORS),
            (num_keys, "metadata keys", _MIN_KEY_BYTES, MAX_KEYS),
        ):
            most = min(room // smallest, limit)
            if count > most:
                raise self._fail(
                    f"header announces {count} {what}, file has room for at most {most}; it is cut "
                    "short or damaged, fetch it again"
                )
        return num_tensors, num_keys

    def _read_key(self, cursor: _Cursor) -> None:
        key = cursor.name("a metadata key", MAX_KEY_BYTES)
        shown = one_line(key)
        if key in self.metadata:
            raise self._fail(f"key {shown!r} appears twice")
        kind = cursor.count(f"the type of key {shown!r}", "<I")
        if kind == _ARRAY:
            element = cursor.count(f"the element type of key {shown!r}", "<I")
            if element == _ARRAY:
                raise self._fail(f"key {shown!r} is an array of arrays; nesting deeper than 1")
            self.metadata[key] = self._read_array(cursor, shown, element)
            element_name = "string" if element == _STRING else _SCALARS[element][0]
            self._types[key] = f"{element_name}[]"
        else:
            self.metadata[key] = self._read_scalar(cursor, shown, kind)
            self._types[key] = "string" if kind == _STRING else _SCALARS[kind][0]

    def _read_scalar(self, cursor: _Cursor, shown: str, kind: int) -> Value:
        if kind == _STRING:
            text = cursor.string(f"the value of key {shown!r}", MAX_STRING_BYTES)
            if "\0" in text:
                raise self._fail(f"the value of key {shown!r} contains NUL")
            return text
        if kind not in _SCALARS:
            raise self._fail(f"value type {kind} of key {shown!r} is unknown (0 to 12)")
        value = cursor.scalar(_SCALARS[kind][1], f"the value of key {shown!r}")
        if kind == _BOOL:
            if value not in (0, 1):
                raise self._fail(f"key {shown!r} is a bool with value {value}; 0 or 1 are allowed")
            return bool(value)
        return value

    def _read_array(self, cursor: _Cursor, shown: str, element: int) -> Value:
        count = cursor.count(f"the length of array {shown!r}")
        what = f"array {shown!r} of {count} items"
        if element == _STRING:
            if count > MAX_ARRAY_STRINGS or 8 * count > self._file.size - cursor.offset:
                raise self._fail(
                    f"{what} passes the end of the file or {MAX_ARRAY_STRINGS:,} items"
                )
            item = f"an item of array {shown!r}"
            return [cursor.string(item, MAX_STRING_BYTES) for _ in range(count)]
        if element not in _SCALARS:
            raise self._fail(f"element type {element} of key {shown!r} is unknown (0 to 12)")
        dtype = np.dtype(_SCALARS[element][1])
        start = cursor.take(count * dtype.itemsize, what)
        values = self._file.view(start, count * dtype.itemsize).copy().view(dtype)
        if element == _BOOL:
            if count and int(values.max()) > 1:
                raise self._fail(f"array {shown!r} of bools has a value other than 0 and 1")
            return values.astype(np.bool_)
        return values

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        kind = self._types.get("general.alignment", "uint32")
        if kind != "uint32" or not isinstance(value, int):
            raise self._fail(f"general.alignment is stored as {kind}, uint32 is required")
        if not 8 <= value <= 65536 or value & (value - 1):
            raise self._fail(f"alignment {value} is not a power of two between 8 and 65536")
        return value

    def _read_tensor(
        self, cursor: _Cursor, alignment: int
    ) -> tuple[str, str, tuple[int, ...], int, int]:
        """Returns: name, format, torch shape, offset in the data section, size in bytes."""
        name = cursor.name("a tensor name", MAX_NAME_BYTES)
        shown = one_line(name)
        num_dimensions = cursor.count(f"the dimensions of {shown!r}", "<I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self._fail(
                f"tensor {shown!r} has {num_dimensions} dimensions (1 to {MAX_DIMENSIONS})"
            )
        dimensions = [cursor.count(f"a dimension of {shown!r}") for _ in range(num_dimensions)]
        for dimension in dimensions:
            if not 1 <= dimension < 1 << 63:
                raise self._fail(
                    f"tensor {shown!r} has dimension {dimension}; at least 1 is required"
                )
        number = cursor.count(f"the type of {shown!r}", "<I")
        entry = FORMAT_OF_GGML_TYPE.get(number)
        if entry is None:
            raise self._fail(f"tensor {shown!r} has type {number}, which is not supported")
        shape = tuple(reversed(dimensions))
        try:
            size = num_bytes(entry.name, shape)
        except CheckpointError as error:
            raise self._fail(f"tensor {shown!r}: {error}") from error
        if size > self._file.size:
            raise self._fail(
                f"tensor {shown!r} would need {size:,} bytes, file has {self._file.size:,}"
            )
        offset = cursor.count(f"the offset of {shown!r}")
        if offset % alignment:
            raise self._fail(f"tensor {shown!r} at offset {offset} is not aligned to {alignment}")
        return name, entry.name, shape, offset, size

    def _check_places(
        self, places: list[tuple[str, str, tuple[int, ...], int, int]], data_start: int
    ) -> None:
        previous_name, previous_end = "", 0
        for name, _, _, offset, size in sorted(places, key=lambda place: place[3]):
            if offset < previous_end:
                raise self._fail(
                    f"tensors {one_line(previous_name)!r} and {one_line(name)!r} overlap"
                )
            previous_name, previous_end = name, offset + size
            if data_start + previous_end > self._file.size:
                raise self._fail(
                    f"tensor {one_line(name)!r} ends at {data_start + previous_end:,}, file ends "
                    f"at {self._file.size:,}; the file is cut short, fetch it again"
                )

    def type_of(self, key: str) -> str:
        """How a key is stored, such as "uint32" or "float32[]"; "nothing" where it is absent."""
        return self._types.get(key, "nothing")


def metadata_strings(path: Path, metadata: Mapping[str, Value], key: str) -> list[str] | None:
    """A string array, or None where the key is absent.

    Raises: CheckpointError: the key holds something else.
    """
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, list):
        return value
    found = (
        f"{value.dtype}[{value.size}]" if isinstance(value, np.ndarray) else type(value).__name__
    )
    raise CheckpointError(f"{path}: {key} must be string[], found {found}")
