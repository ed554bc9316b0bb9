"""A model's template gives the text transformers gives, or a PromptError in time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.errors import PromptError
from engine.text.chat_template import FALLBACK_TEMPLATE, ChatTemplate, Message, encode_chat
from engine.text.tokenizer import Tokenizer

CHATS = [
    [Message("user", "hi")],
    [Message("system", "Be brief."), Message("user", "  two  spaces\n")],
    [
        Message("user", "Écris « café » 🙂"),
        Message("assistant", "café"),
        Message("user", "{{ 7 * 7 }} {% raw %} <b>&amp;</b> 日本"),
    ],
    [Message("user", ""), Message("assistant", " \n"), Message("tool", "x <|im_end|x|")],
]
# The deadline of these tests, and what a busy machine may add to it.
SECONDS = 1.0
SLACK_SECONDS = 8.0


def dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in messages]


@pytest.mark.parametrize("opens_turn", [True, False])
def test_the_default_model_renders_as_transformers_does(
    smollm: Tokenizer, reference_smollm: Any, opens_turn: bool
) -> None:
    with ChatTemplate.for_tokenizer(smollm) as template:
        for messages in CHATS:
            expected = reference_smollm.apply_chat_template(
                dicts(messages), add_generation_prompt=opens_turn, tokenize=False
            )
            assert template.render(messages, opens_turn) == expected
            ids = reference_smollm.encode(expected, add_special_tokens=False)
            assert encode_chat(smollm, template, messages, opens_turn) == ids


FEATURES = [
    "{{ messages | tojson }} {{ messages | tojson(indent=2) }}",
    (
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n  {{ m.content | trim }}\n"
        "  {% else %}\n{% continue %}\n  {% endif %}\n{% endfor %}\n"
    ),
    "{% for m in messages %}{% if not loop.first %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = 1 + s.n %}{% endfor %}{{s.n}}",
    "{{ bos_token }}{% generation %}{{ messages[-1:] }}{% endgeneration %}{{ eos_token }}",
    "{{ strftime_now('%Y') }} {{ tools is none }} {{ documents is defined }} {{ missing }}",
    "{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m('a' ~ 2) }} {{ 'x' * 3 }} {{ 7 % 3 }} {{ 2**3 }}",
    "{{ '%s-%s' % ('a', 'b') }} {{ range(3) | list }} {{ 'a,b'.split(',') | reverse | list }}",
]


@pytest.mark.parametrize("source", FEATURES)
def test_other_templates_render_as_transformers_does(reference_smollm: Any, source: str) -> None:
    with ChatTemplate(source, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}) as template:
        for messages in CHATS[:3]:
            expected = reference_smollm.apply_chat_template(
                dicts(messages), chat_template=source, add_generation_prompt=True, tokenize=False
            )
            assert template.render(messages) == expected


HARMFUL = [
    ("{{ ''.__class__.__mro__ }}", "is not allowed"),
    ("{{ cycler.__init__.__globals__.os.system('id') }}", "is not allowed"),
    ("{{ self.__init__.__globals__ }}", "is not allowed"),
    ("{{ raise_exception.__globals__['os'] }}", "is not allowed|is wrong"),
    ("{{ strftime_now.__globals__ }}", None),
    ("{{ ''['__cl' ~ 'ass__']['__mro__'] }}", "is not allowed|is wrong"),
    ("{{ ('' | attr('__class__')).mro() }}", "is not allowed|is wrong"),
    ("{{ messages.append(1) }}", "is not allowed"),
    ("{{ messages.clear() }}", "is not allowed"),
    ("{{ '{0.__class__}'.format(1) }}", None),
    ("{% include '/etc/passwd' %}", "is wrong"),
    ("{% for i in range(10 ** 9) %}x{% endfor %}", "is wrong"),
    (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "longer than",
    ),
    ("{{ range(99999) | batch(1) | map('list') | list | map('string') | sort | list }}" * 40, None),
    ("{{ 'a' * 1000000000 }}", "writes too much"),
    ("{{ [0] * 1000000000 }}", "writes too much"),
    ("{{ 'a'.ljust(1000000000) }}", "writes too much|longer than"),
    ("{{ '%01000000000d' % 1 }}", "writes too much|longer than"),
    ("{{ '{:>1000000000}'.format(1) }}", "writes too much|longer than"),
    ("{{ 10 ** 100000000 }}", "writes too much"),
    ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 4,194,304 characters"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "is wrong"),
    ("{% if %}", "is wrong: line 1"),
    ("{{ nothing.at.all }}", "is wrong"),
    ("{{ raise_exception('roles must\nalternate') }}", "refuses the conversation: roles must alt"),
]


@pytest.mark.parametrize(("source", "message"), HARMFUL, ids=[case[0][:40] for case in HARMFUL])
def test_a_harmful_template_ends_in_time_with_one_line(source: str, message: str | None) -> None:
    start = time.monotonic()
    with ChatTemplate(source, render_seconds=SECONDS) as template:
        try:
            text = template.render([Message("user", "x")])
            assert message is None, text[:100]
            assert "built-in" not in text
            assert "class" not in text
        except PromptError as error:
            assert "\n" not in str(error)
            if message is not None:
                with pytest.raises(PromptError, match=message):
                    raise
    assert time.monotonic() - start < SECONDS + SLACK_SECONDS


def test_the_next_conversation_works_after_one_was_stopped() -> None:
    source = (
        "{% if messages[0].content == 'loop' %}"
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        "{% endif %}{{ messages[0].content }}"
    )
    with ChatTemplate(source, render_seconds=0.3) as template:
        assert template.render([Message("user", "a")]) == "a"
        with pytest.raises(PromptError, match=r"longer than 0.3 s"):
            template.render([Message("user", "loop")])
        assert template.render([Message("user", "b")]) == "b"
        first = template._child
        assert template.render([Message("user", "c")]) == "c"
        assert template._child is first


def test_a_killed_child_is_told_and_replaced() -> None:
    with ChatTemplate("{{ messages[0].content }}") as template:
        template.render([Message("user", "a")])
        assert template._child is not None
        template._child.kill()
        template._child.wait()
        assert template.render([Message("user", "b")]) == "b"


def test_a_long_conversation_fits_and_an_endless_one_does_not() -> None:
    with ChatTemplate("{{ messages[0].content }}") as template:
        text = "é🙂\0\x7f" * 200_000
        assert template.render([Message("user", text)]) == text
        with pytest.raises(PromptError, match="at most 4,194,304"):
            template.render([Message("user", "x" * 5_000_000)])
        with pytest.raises(PromptError, match="0 messages"):
            template.render([])
        with pytest.raises(PromptError, match="10,001 messages"):
            template.render([Message("user", "x")] * 10_001)


def test_a_model_without_template_gets_a_transcript(smollm: Tokenizer) -> None:
    with ChatTemplate(FALLBACK_TEMPLATE, {"bos_token": ""}) as template:
        messages = [Message("system", "Be brief."), Message("user", "hi")]
        assert template.render(messages) == "System: Be brief.\n\nUser: hi\n\nAssistant:"
        ids = encode_chat(smollm, template, messages)
        assert smollm.decode(ids) == "System: Be brief.\n\nUser: hi\n\nAssistant:"


PARENT = """
import sys, threading
sys.path.insert(0, {root!r})
from engine.text.chat_template import ChatTemplate, Message
template = ChatTemplate({source!r}, render_seconds=60.0)
template.render([Message("user", "a")])
print(template._child.pid, flush=True)
template.render([Message("user", "loop")])
"""


@pytest.mark.parametrize("is_busy", [False, True])
def test_the_child_ends_with_its_parent(is_busy: bool) -> None:
    """Also in the middle of an endless loop, and although nobody closed the template."""
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    source = "{% if messages[0].content == 'loop' %}" + (loop if is_busy else "") + "{% endif %}"
    root = str(Path(__file__).resolve().parents[3])
    script = PARENT.format(root=root, source=source)
    if not is_busy:
        script += "threading.Event().wait(60)\n"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout is not None
            child = psutil.Process(int(parent.stdout.readline()))
        finally:
            parent.kill()
    gone, alive = psutil.wait_procs([child], timeout=10)
    assert gone, alive
    assert not alive


def test_the_parent_does_not_load_jinja_torch_or_transformers() -> None:
    script = (
        "import sys, engine.text.chat_template, engine.text.tokenizer, engine.weights.checkpoint, "
        "engine.weights.models, gguf, tokenizers\n"
        "bad = {'torch', 'transformers', 'jinja2'} & sys.modules.keys()\n"
        "sys.exit(', '.join(bad) or 0)"
    )
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=environment)
