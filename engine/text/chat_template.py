"""Conversations to prompts: the model's own Jinja template, rendered where it can do no harm.

In: messages and a template from a model's file. Out: the prompt's text, or its token ids with a
guarantee that nothing a person wrote became a control token. The template runs in a sandbox in a
child process that is killed at its deadline. It keeps no conversation and counts no tokens.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import msgspec

from engine.errors import PromptError
from engine.text.chat_masks import (
    Masks,
    Pieces,
    hide_everything,
    hide_symbols,
    hide_tokens,
    symbol_pattern,
)
from engine.text.tokenizer import Tokenizer, check_text, literal_pattern
from engine.weights.mapped import one_line

RENDER_SECONDS = 2.0
START_SECONDS = 30.0
MAX_OUTPUT_CHARACTERS = 1 << 22
MAX_MESSAGES = 10_000
MAX_IMAGES = 1_000
# What a template makes of a list of parts that it writes down as if it were a text.
_WRITTEN_PART = re.compile(r"""(["'])type\1: (["'])image\2""")
_ROLE = re.compile(r"[a-z_]{1,32}")

_CHILD_SCRIPT = Path(__file__).with_name("template_process.py")

# For a model that brings no template: a transcript. The beginning-of-text token, if the model
# wants one, then every turn with its role, then an open turn of the assistant.
FALLBACK_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One turn.

    Attributes:
        role: a word such as system, user or assistant.
        content: what was written.
        num_images: images before the text, 0 to MAX_IMAGES. With any, the template gets the
            content as a list of parts, as templates of vision models expect it.
    """

    role: str
    content: str
    num_images: int = 0

    def for_template(self) -> dict[str, Any]:
        """The turn as templates know it."""
        content: str | list[dict[str, str]] = self.content
        if self.num_images:
            images = [{"type": "image"} for _ in range(self.num_images)]
            content = [*images, {"type": "text", "text": self.content}]
        return {"role": self.role, "content": content}


class ChatTemplate:
    """One template with its child process, which starts at the first render.

    Safe to use from several threads, one render at a time. `close` ends the child; it also ends
    by itself when this process does.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        render_seconds: float = RENDER_SECONDS,
        max_characters: int = MAX_OUTPUT_CHARACTERS,
    ) -> None:
        """Keep a template; nothing runs yet.

        Args:
            source: Jinja, at most as long as a GGUF string.
            special_tokens: variables for the template, such as bos_token.
            render_seconds: deadline of one render, > 0, not counting the start of the child.
            max_characters: limit of the rendered text.
        """
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self.render_seconds = render_seconds
        self.max_characters = max_characters
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template of a model, or the fallback where it brings none."""
        if tokenizer.chat_template is not None:
            return cls(tokenizer.chat_template, tokenizer.special_tokens)
        bos = tokenizer.special_tokens.get("bos_token", "") if tokenizer.adds_bos else ""
        return cls(FALLBACK_TEMPLATE, {**tokenizer.special_tokens, "bos_token": bos})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Render a conversation.

        Args:
            messages: in order, 1 to MAX_MESSAGES.
            add_generation_prompt: whether to open a turn of the assistant.
        Returns: text in which control tokens are still written out.
        Raises: PromptError: the template refuses the conversation, is not allowed to do what it
            does, is wrong, takes too long or writes too much.
        """
        if not 1 <= len(messages) <= MAX_MESSAGES:
            raise PromptError(
                f"the conversation has {len(messages):,} messages; 1 to {MAX_MESSAGES:,} are taken"
            )
        for message in messages:
            if not _ROLE.fullmatch(message.role):
                raise PromptError(
                    f"role {one_line(message.role)!r} is not a short lower-case word such as user"
                )
            if not 0 <= message.num_images <= MAX_IMAGES:
                raise PromptError(
                    f"a message has {message.num_images} images; 0 to {MAX_IMAGES:,} are taken; "
                    "send fewer"
                )
            check_text(message.content)
        variables = {
            **self.special_tokens,
            "messages": [turn.for_template() for turn in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        request = {
            "template": self.source,
            "variables": variables,
            "max_characters": self.max_characters,
        }
        data = json.dumps(request).encode("ascii")
        with self._lock:
            child = self._started_child()
            answer = self._exchange(child, data, self.render_seconds)
        if "text" in answer:
            return answer["text"]
        raise PromptError(_explain(answer["kind"], answer["error"]))

    def close(self) -> None:
        """End the child; a later render starts another."""
        with self._lock:
            self._end_child()

    def _started_child(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._end_child()
        # -P keeps this folder off the child's import path.
        command = [sys.executable, "-P", str(_CHILD_SCRIPT)]
        flags = getattr(subprocess, "CREATE_NO_WINDOW", 0)
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            creationflags=flags,
            env={**os.environ, "PYTHONUTF8": "1"},
        )
        self._exchange(self._child, None, START_SECONDS)
        return self._child

    def _exchange(
        self, child: subprocess.Popen[bytes], data: bytes | None, seconds: float
    ) -> dict[str, str]:
        """Send a frame, if any, and read one; kill the child at the deadline or at nonsense."""
        assert child.stdin is not None
        assert child.stdout is not None
        has_expired = threading.Event()

        def expire() -> None:
            has_expired.set()
            child.kill()

        timer = threading.Timer(seconds, expire)
        timer.name = "chat-template-deadline"
        timer.start()
        try:
            if data is not None:
                child.stdin.write(len(data).to_bytes(4, "big") + data)
                child.stdin.flush()
            head = child.stdout.read(4)
            size = int.from_bytes(head, "big")
            # JSON writes one character in at most 12.
            is_whole = len(head) == 4 and size <= 12 * self.max_characters + 4096
            body = child.stdout.read(size) if is_whole else b""
            if is_whole and len(body) == size:
                return cast("dict[str, str]", json.loads(body))
        except OSError:
            pass  # the child is gone; told below
        except BaseException:
            self._end_child()  # an interrupted exchange leaves half a frame behind
            raise
        finally:
            timer.cancel()
            timer.join()
        self._end_child()
        if has_expired.is_set():
            raise PromptError(
                f"the chat template of this model took longer than {seconds:g} s and was stopped; "
                "use another model or give the prompt without a template"
            )
        raise PromptError(
            "the chat template of this model ended its process (memory or processor time); "
            "use another model or give the prompt without a template"
        )

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with suppress(OSError):  # unsent bytes of a pipe whose reader is gone
                    pipe.close()
        child.wait()


def _explain(kind: str, text: str) -> str:
    shown = one_line(" ".join(text.split()), 300)
    if kind == "refused":
        return f"the chat template of this model refuses the conversation: {shown}"
    if kind == "forbidden":
        return f"the chat template of this model is not allowed to do this: {shown}"
    if kind == "too long":
        return f"the chat template of this model writes too much: {shown}; shorten the conversation"
    return f"the chat template of this model is wrong: {shown}; use another model"


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a conversation; only the template itself can write control tokens.

    A template that passes contents on as they are is given random words in their place, and the
    contents come back as ordinary text. One that looks into contents sees them, with everything
    hidden that is, or with text around it could become, a protected token; where pieces of
    contents would still join into one, all characters that it needs are hidden too.

    Args:
        tokenizer: of the same model.
        template: of the same model.
        messages: in order, at least one.
        add_generation_prompt: whether to open a turn of the assistant.
    Returns: ids; BOS is there only if the template writes it.
    Raises: PromptError: see `ChatTemplate.render`; or the template takes hidden text apart, or
        knows no images.
    """

    def render(masks: Masks, hide: Callable[[str], str]) -> Pieces:
        hidden = [Message(turn.role, hide(turn.content), turn.num_images) for turn in messages]
        return masks.split(template.render(hidden, add_generation_prompt))

    masks = Masks()
    opaque = render(masks, lambda content: hide_everything(content, masks))
    if any(turn.num_images for turn in messages) and opaque.found(_WRITTEN_PART):
        raise PromptError(
            "the conversation has images, but the chat template of this model takes only text; "
            "remove the images, or use a vision model"
        )
    if opaque.is_whole and opaque.text() == template.render(messages, add_generation_prompt):
        return tokenizer.encode_mixed(opaque.parts, is_plain=opaque.is_plain)
    protected = sorted(tokenizer.protected)
    pattern, symbols = literal_pattern(protected), symbol_pattern(protected)
    pieces = render(masks, lambda content: hide_tokens(content, pattern, protected, masks))
    safe = render(masks, lambda content: hide_symbols(content, symbols, masks))
    if not pieces.is_whole or pieces.found(pattern) != safe.found(pattern):
        pieces = safe
    if not pieces.is_whole:
        raise PromptError(
            "the chat template of this model takes apart text that looks like a control token; "
            "remove such text from the conversation"
        )
    return tokenizer.encode_mixed(pieces.parts, is_plain=pieces.is_plain)
