"""Text to token ids and back, for one vocabulary.

In: a `Vocabulary`, made from a model's file or folder by the reader of its form. Out: ids,
bytes of ids, and which ids are control tokens. Control tokens are kept out of the segmentation
altogether, so that no text can become one unless the caller asks for it. It renders no chat
templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from engine.errors import CheckpointError, ConfigError, PromptError, one_line
from engine.text.byte_level import to_bytes
from engine.text.gguf_vocabulary import read_gguf_vocabulary
from engine.text.hf_vocabulary import FILE_NAME as HF_NAME
from engine.text.hf_vocabulary import read_hf_vocabulary
from engine.text.model_vocabulary import FILE_NAME as MODEL_NAME
from engine.text.model_vocabulary import read_model_vocabulary
from engine.text.segmenters import make_segmenter
from engine.text.vocabulary import Vocabulary

MAX_TEXT_CHARACTERS = 1 << 22


class Tokenizer:
    """See the module; safe to use from several threads.

    Attributes:
        vocab_size: one more than the largest id that has a token.
        bos_id: begins a text, or None.
        eos_ids: each ends an answer.
        unk_id: stands for what the vocabulary cannot write, or None.
        pad_id: fills batches, or None.
        adds_bos: whether the model wants `bos_id` before a prompt that is no chat.
        chat_template: Jinja source, or None.
        special_tokens: variables for the template, such as bos_token.
        protected: texts that user input cannot turn into one token.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Build the segmentation.

        Raises: CheckpointError: the vocabulary is inconsistent.
        """
        self.path = vocabulary.path
        self.vocab_size = max(vocabulary.tokens, default=-1) + 1
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.adds_bos = vocabulary.adds_bos
        self.chat_template = vocabulary.chat_template
        self.special_tokens = dict(vocabulary.special_tokens)
        self.protected = frozenset(vocabulary.protected)
        self._vocabulary = vocabulary
        self.unk_id = vocabulary.unknown_id
        self.pad_id = vocabulary.pad_id
        self._bytes: dict[int, bytes] = {}
        self._pattern = literal_pattern(vocabulary.protected)
        self._forbidden = {*vocabulary.protected.values()} - {vocabulary.unknown_id}
        self._segmenter = make_segmenter(vocabulary)

    def encode(self, text: str, *, parse_control: bool = False) -> list[int]:
        """Segment a text; no BOS is added.

        A byte-level vocabulary need not have all 256 bytes (SmolLM2 lacks some that begin only
        unassigned characters): a byte without a token is left out, as transformers does.

        Args:
            text: at most MAX_TEXT_CHARACTERS characters, no lone surrogates; NUL is a character.
            parse_control: whether the text of a protected token becomes that token. Never set it
                for text of a user.
        Returns: ids, each below `vocab_size`.
        Raises: PromptError: the text is too long or is not Unicode.
        """
        check_text(text)
        if not parse_control:
            return self._encode_run(text, is_first=True)
        return self.encode_mixed([text], is_plain=[False])

    def encode_mixed(self, parts: Sequence[str], *, is_plain: Sequence[bool]) -> list[int]:
        """Segment a text of which parts must stay text.

        Args:
            parts: pieces of one text in order; words may run across their borders.
            is_plain: for each part, whether protected tokens in it are ordinary text.
        Returns: ids as of the whole text.
        Raises: PromptError: as `encode`.
        """
        ids: list[int] = []
        run: list[str] = []
        strip_next = False
        is_first = True

        def end_run(strip: bool) -> None:
            nonlocal is_first, strip_next
            text = "".join(run)
            run.clear()
            text = text.lstrip() if strip_next else text
            text = text.rstrip() if strip else text
            strip_next = False
            ids.extend(self._encode_run(text, is_first=is_first))
            is_first = False

        for part, plain in zip(parts, is_plain, strict=True):
            check_text(part)
            position = 0
            if not plain:
                for match in self._pattern.finditer(part):
                    run.append(part[position : match.start()])
                    id = self._vocabulary.protected[match.group()]
                    left, right = self._vocabulary.strips.get(id, (False, False))
                    end_run(left)
                    ids.append(id)
                    strip_next = right
                    position = match.end()
            run.append(part[position:])
        end_run(False)
        return ids

    def _encode_run(self, text: str, *, is_first: bool) -> list[int]:
        """Ids of a text in which nothing is a protected token."""
        if not text:
            return []
        ids = self._segmenter.segment(text, is_first=is_first)
        for id in ids:
            if id in self._forbidden:  # the readers make this impossible
                raise CheckpointError(
                    f"{self.path}: text became protected token {id}; the vocabulary is damaged"
                )
            if id not in self._vocabulary.tokens:
                raise PromptError(
                    "the text has characters that this model's vocabulary cannot write; remove "
                    "characters of other scripts, or use another model"
                )
        return ids

    def token_bytes(self, id: int) -> bytes:
        """Bytes that a token stands for.

        Args:
            id: >= 0. Control tokens and ids without a token give b"".
        """
        found = self._bytes.get(id)
        if found is None:
            found = self._bytes[id] = self._compute_bytes(id)
        return found

    def _compute_bytes(self, id: int) -> bytes:
        text = self._vocabulary.tokens.get(id)
        if text is None or id in self._vocabulary.control:
            return b""
        if id in self._vocabulary.byte_values:
            return bytes([self._vocabulary.byte_values[id]])
        if id in self._vocabulary.raw:
            return text.encode("utf-8", errors="replace")
        if self._vocabulary.kind == "byte_level":
            return to_bytes(text)
        return text.replace("\u2581", " ").encode("utf-8", errors="replace")

    def control_id(self, text: str) -> int | None:
        """The id of a protected token by its text, or None."""
        return self._vocabulary.protected.get(text)

    def is_control(self, id: int) -> bool:
        """Whether the token carries structure and is never shown."""
        return id in self._vocabulary.control

    def decode(self, ids: Iterable[int], *, is_start: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: in order.
            is_start: whether the text begins here; then the space that encoding writes before the
                first word, with vocabularies that do so, is left out.
        """
        data = b"".join(self.token_bytes(id) for id in ids)
        if is_start and self.writes_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    def first_difference(self, other: Tokenizer) -> int | None:
        """The lowest id that does not mean the same in both; None where there is none.

        An embedding may have rows without a token, and one model of a family more than another.
        """
        for id in range(max(self.vocab_size, other.vocab_size)):
            if self._meaning(id) != other._meaning(id):
                return id
        return None

    def show(self, id: int) -> str:
        """A token for a person, such as "' the'"; "missing" for an id without one."""
        text = self._vocabulary.tokens.get(id)
        return "missing" if text is None else repr(one_line(text, 40))

    def _meaning(self, id: int) -> tuple[bool, str | bytes | None]:
        """Whether a token is a control token, and its text or bytes."""
        text = self._vocabulary.tokens.get(id)
        if text == f"[PAD{id}]":  # What GGUF converters call a row without a token.
            text = None
        if text is None or self.is_control(id):
            return True, text
        return False, self.token_bytes(id)

    @property
    def writes_space(self) -> bool:
        """Whether encoding writes a space before the first word."""
        return self._vocabulary.prefix != "none"


def literal_pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds the leftmost, then longest, of some literal texts; nothing if there are none."""
    ordered = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def check_text(text: str) -> None:
    """Raises: PromptError: the text is too long, or contains half of a surrogate pair."""
    if len(text) > MAX_TEXT_CHARACTERS:
        raise PromptError(
            f"the text has {len(text):,} characters, at most {MAX_TEXT_CHARACTERS:,} are taken; "
            "shorten it"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"character {error.start} of the text is half of a surrogate pair, which is no Unicode "
            "character; remove it"
        ) from error


def load_tokenizer(path: Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        path: a GGUF file, a tokenizer.json, a tokenizer.model (SentencePiece, or Meta's base64
            ranks), or a folder with one of the latter two and the files that belong to it.
        vocab_size: rows of the model's embedding, where there is a model. Tokens that were added
            to the trained ones without a row, such as those for images beside a text model, cannot
            be computed: they are left out, and their texts are ordinary ones.
    Returns: a tokenizer whose ids are all below `vocab_size`.
    Raises:
        CheckpointError: there is none, or it is damaged or of an unsupported kind.
        ConfigError: it wants to run its own code, its files contradict each other, or it has
            trained tokens without a row.
    """
    tokenizer = Tokenizer(_read_vocabulary(path, vocab_size))
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"{path}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model embeddings for "
            f"{vocab_size:,}; files of two models are mixed"
        )
    return tokenizer


def _read_vocabulary(path: Path, vocab_size: int | None) -> Vocabulary:
    if path.is_dir():
        if (path / HF_NAME).is_file():
            return read_hf_vocabulary(path, vocab_size)
        if (path / MODEL_NAME).is_file():
            return read_model_vocabulary(path, vocab_size)
        raise CheckpointError(
            f"{path}: no {HF_NAME} in this folder, and no {MODEL_NAME}; copy the model's tokenizer "
            "there (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    if path.suffix == ".json":
        return read_hf_vocabulary(path, vocab_size)
    if path.suffix == ".model":
        return read_model_vocabulary(path, vocab_size)
    return read_gguf_vocabulary(path)
