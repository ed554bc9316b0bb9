"""How a name table is written: a row pairs one of our tensors with a part of a file's tensor.

It holds no table (see `families`) and opens no file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from engine.errors import CheckpointError
from engine.weights.mapped import StoredTensor, one_line

Source = Literal["huggingface", "meta", "gguf"]
SOURCE_TITLES: dict[Source, str] = {
    "huggingface": "Hugging Face",
    "meta": "Meta",
    "gguf": "GGUF",
}
# How a dimension is written in a table.
LETTERS = {
    "V": "vocabulary",
    "M": "model width",
    "Q": "query rows: heads x head width",
    "K": "key or value rows: KV heads x head width",
    "D": "head width",
    "F": "MLP columns, of one expert where there are experts",
    "E": "experts",
}


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a stored tensor is ours; steps are taken in the order of the attributes.

    Attributes:
        is_expert: the matrix of expert `{e}` in a stack.
        axis, pieces, index: of the stored rows (0) or columns (1), which are the `pieces` one after
            the other, a letter of LETTERS each, the one at `index`; no pieces: all.
        is_transposed: the file has inputs as rows, outputs as columns.
    """

    is_expert: bool = False
    axis: int = 0
    pieces: str = ""
    index: int = 0
    is_transposed: bool = False

    def __str__(self) -> str:
        words: list[str] = []
        if self.is_expert:
            words.append("matrix {e}")
        if self.pieces:
            what = "columns" if self.axis else "rows"
            words.append(f"{what} {self.index + 1} of {'+'.join(self.pieces)}")
        if self.is_transposed:
            words.append("transposed")
        return ", ".join(words)

    def of(
        self, tensor: StoredTensor, sizes: Mapping[str, int], expert: int | None
    ) -> StoredTensor:
        """The part of a stored tensor.

        Args:
            tensor: as the file has it.
            sizes: of the letters.
            expert: number of the expert, where our tensor belongs to one.
        Raises: CheckpointError: the tensor has no such part.
        """
        if self.is_expert:
            assert expert is not None, "a part of a stack needs the number of an expert"
            tensor = tensor.expert(expert, sizes["E"])
        if self.pieces:
            widths = [sizes[letter] for letter in self.pieces]
            if len(tensor.shape) <= self.axis or tensor.shape[self.axis] != sum(widths):
                raise CheckpointError(
                    f"{tensor.file.path}: {one_line(tensor.name)} {list(tensor.shape)} does not "
                    f"hold {' + '.join(map(str, widths))} {'columns' if self.axis else 'rows'}; "
                    "the file is damaged or mixed from two models"
                )
            start = sum(widths[: self.index])
            tensor = tensor.piece(self.axis, start, start + widths[self.index])
        return tensor.transposed() if self.is_transposed else tensor


WHOLE = Part()


@dataclass(frozen=True, slots=True)
class NameRow:
    """One line of a table; `{i}` stands for the layer, `{e}` for the expert."""

    canonical: str
    stored: str
    part: Part = WHOLE


@dataclass(frozen=True, slots=True)
class NameTable:
    """What one source calls the tensors of one family.

    Attributes:
        rows: several may name the same tensor of ours; the first whose file name exists is taken.
        prefixes: a file's name that begins with the left text is read as if with the right one.
        ignored: whole names, after `prefixes`, that carry nothing of use.
    """

    rows: tuple[NameRow, ...]
    prefixes: tuple[tuple[str, str], ...] = ()
    ignored: re.Pattern[str] = re.compile(r"(?!)")

    def read_as(self, name: str) -> str:
        """The name in the words of `rows`."""
        for left, right in self.prefixes:
            if name.startswith(left):
                return right + name[len(left) :]
        return name


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: one table for each source that it comes from."""

    name: str
    tables: Mapping[Source, NameTable] = field(default_factory=dict[Source, NameTable])
