"""The child process that renders chat templates; run as a script, it imports nothing of ours.

In: frames on stdin, each four bytes of length (big-endian) and a JSON object with `template`,
`variables` and `max_characters`. Out: one frame for each, with `text`, or with `error` and
`kind`. The first frame it sends says that it is up. It ends when stdin ends, also in the middle of
a render.
"""

from __future__ import annotations

import datetime
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterable
from typing import Any, BinaryIO, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MAX_REQUEST_BYTES = 1 << 28
MAX_MEMORY_BYTES = 1 << 30
MAX_PROCESSOR_SECONDS = 20
MAX_PRODUCT = 1 << 24
_OPERATORS = frozenset({"*", "**", "%", "<<"})


class TemplateRefused(Exception):  # noqa: N818 - told to the parent by its text
    """The template itself gave up, with its own words."""


class OutputTooLong(Exception):  # noqa: N818 - told to the parent by its text
    """The text passed its limit."""


class GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks training targets, renders its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Keep the body, drop the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """No access to Python's inside, no change of its arguments, no giant products."""

    intercepted_binops = _OPERATORS

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse the operators that make something huge out of something small."""
        sizes = [len(value) if hasattr(value, "__len__") else 0 for value in (left, right)]
        numbers = [abs(value) if isinstance(value, int) else 0 for value in (left, right)]
        if operator == "*" and (
            sizes[0] * numbers[1] > MAX_PRODUCT or sizes[1] * numbers[0] > MAX_PRODUCT
        ):
            raise OutputTooLong
        if operator == "**" and numbers[0].bit_length() * numbers[1] > MAX_PRODUCT:
            raise OutputTooLong
        if operator == "*" and sum(number.bit_length() for number in numbers) > MAX_PRODUCT:
            raise OutputTooLong
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefused(str(message))


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, as chat templates are written for."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def make_environment() -> Sandbox:
    """The environment that chat templates of Hugging Face are written for."""
    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlocks, jinja2.ext.loopcontrols],
    )
    filters = cast("dict[str, Any]", environment.filters)  # pyright: ignore[reportUnknownMemberType]
    names = cast("dict[str, Any]", environment.globals)  # pyright: ignore[reportUnknownMemberType]
    filters["tojson"] = _tojson
    names.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def render(template: jinja2.Template, variables: dict[str, Any], max_characters: int) -> str:
    """Render, and stop when the text passes its limit."""
    pieces: list[str] = []
    length = 0
    stream: Iterable[str] = template.generate(**variables)
    for piece in stream:
        length += len(piece)
        if length > max_characters:
            raise OutputTooLong
        pieces.append(piece)
    return "".join(pieces)


def _explain(error: BaseException, max_characters: int) -> tuple[str, str]:
    """Returns: a kind that the parent knows, and a text."""
    if isinstance(error, TemplateRefused):
        return "refused", str(error)
    if isinstance(error, OutputTooLong):
        return "too long", f"more than {max_characters:,} characters"
    if isinstance(error, MemoryError):
        return "too long", "more memory than it may have"
    if isinstance(error, jinja2.exceptions.SecurityError):
        return "forbidden", str(error)
    if isinstance(error, jinja2.exceptions.TemplateSyntaxError):
        return "syntax", f"line {error.lineno}: {error.message}"
    return "failed", f"{type(error).__name__}: {error}"


def _read_exactly(stream: BinaryIO, size: int) -> bytes | None:
    data = stream.read(size)
    return data if len(data) == size else None


def _read_requests(stream: BinaryIO, requests: queue.Queue[dict[str, Any]]) -> None:
    """Feed the queue; when the parent is gone, end the process whatever it is doing."""
    while True:
        head = _read_exactly(stream, 4)
        size = int.from_bytes(head, "big") if head else 0
        body = _read_exactly(stream, size) if head and size <= MAX_REQUEST_BYTES else None
        if body is None:
            os._exit(0)
        requests.put(json.loads(body))


def _limit_memory() -> None:
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = MAX_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MAX_MEMORY_BYTES)
        try:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        except (OSError, ValueError):
            return  # some systems have no such limit; the deadline remains


def _limit_processor_time() -> None:
    """A backstop for a parent that was killed while this process holds the interpreter lock."""
    if sys.platform != "win32":
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + MAX_PROCESSOR_SECONDS
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        limit = seconds if hard == resource.RLIM_INFINITY else min(hard, seconds)
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
        except (OSError, ValueError):
            return


def main() -> None:
    """Answer requests until stdin ends."""
    output = sys.stdout.buffer

    def send(answer: dict[str, str]) -> None:
        data = json.dumps(answer).encode("ascii")
        output.write(len(data).to_bytes(4, "big") + data)
        output.flush()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a key press is the parent's to answer
    _limit_memory()
    environment = make_environment()
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(
        target=_read_requests, args=(sys.stdin.buffer, requests), name="requests", daemon=True
    ).start()
    send({"text": "up"})
    source: str | None = None
    template: jinja2.Template | None = None
    while True:
        request = requests.get()
        _limit_processor_time()
        limit = int(request["max_characters"])
        try:
            if template is None or source != request["template"]:
                source, template = request["template"], None
                template = environment.from_string(request["template"])
            answer = {"text": render(template, request["variables"], limit)}
        except Exception as error:  # noqa: BLE001 - the border of this process
            kind, text = _explain(error, limit)
            answer = {"kind": kind, "error": text[:500]}
        send(answer)


if __name__ == "__main__":
    main()
