"""Sockets are plain only where a benchmark asks for it, and never where another computer reaches."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zmq
from zmq.utils.monitor import parse_monitor_message

from engine.cluster.plaintext import PLAINTEXT_VARIABLE, is_plaintext
from engine.cluster.security import Gatekeeper, new_key_pair
from engine.cluster.transport import connect, listen, new_local_endpoint
from engine.errors import ProtocolError
from engine.session import Session, SessionOptions
from tests.tiny_models import save_tiny_llama

pytestmark = pytest.mark.network

LOOPBACK = ("tcp://127.0.0.1:*", "tcp://127.0.0.1:5000-5064", "tcp://[::1]:5000", "ipc://@name")
ELSEWHERE = (
    "tcp://192.168.1.7:47500",
    "tcp://0.0.0.0:*",
    "tcp://*:47500",
    "tcp://[::]:47500",
    "tcp://localhost:47500",
    "tcp://127.0.0.1.example.com:47500",
    "tcp://10.77.0.1:47500/127.0.0.1:1",
    "udp://127.0.0.1:5000",
    "tcp://127.0.0.1:0;192.168.1.7:47500",
    "",
)
DEADLINE_MS = 10_000


@pytest.mark.parametrize("endpoint", ELSEWHERE)
def test_the_switch_is_refused_where_another_computer_reaches(
    monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv(PLAINTEXT_VARIABLE, "1")
    keys = new_key_pair()
    with zmq.Context() as context:
        with pytest.raises(ProtocolError, match="only benchmarks on the loopback may do without"):
            listen(context, zmq.ROUTER, keys, "worker", endpoint)
        with pytest.raises(ProtocolError, match="only benchmarks on the loopback may do without"):
            connect(context, zmq.DEALER, keys, keys.public, endpoint)


@pytest.mark.parametrize("host", ["192.0.2.7", "127.0.0.1"])
def test_a_worker_for_other_computers_does_not_start_with_the_switch(host: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "workers.cli", "run", "--host", host],
        env=dict(os.environ, **{PLAINTEXT_VARIABLE: "1"}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert not done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert PLAINTEXT_VARIABLE in line


@pytest.mark.parametrize("value", [None, "", "0", "true"])
def test_nothing_but_a_one_switches(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(PLAINTEXT_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(PLAINTEXT_VARIABLE, value)
    assert not any(is_plaintext(endpoint) for endpoint in (*LOOPBACK, *ELSEWHERE))


def has_failed(monitor: zmq.Socket[Any]) -> bool:
    """Whether a client's handshake fails; False where it succeeds."""
    while True:
        assert monitor.poll(DEADLINE_MS)
        event = parse_monitor_message(monitor.recv_multipart())["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return False
        if event in (
            zmq.EVENT_HANDSHAKE_FAILED_AUTH,
            zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
            zmq.EVENT_DISCONNECTED,
        ):
            return True


@pytest.mark.parametrize(
    ("switch", "is_known", "is_heard"), [("1", True, True), ("1", False, False), ("0", True, False)]
)
def test_a_plain_peer_needs_the_switch_and_a_name_on_the_list(
    monkeypatch: pytest.MonkeyPatch, switch: str, is_known: bool, is_heard: bool
) -> None:
    monkeypatch.setenv(PLAINTEXT_VARIABLE, switch)
    context: zmq.Context[Any] = zmq.Context()
    gatekeeper = Gatekeeper(context)
    key = new_key_pair().public
    gatekeeper.allow("exchange", key if is_known else new_key_pair().public)
    with ExitStack() as stack:
        keys, where = new_key_pair(), new_local_endpoint()
        server, endpoint = listen(context, zmq.PULL, keys, "exchange", where)
        stack.enter_context(server)
        client = stack.enter_context(context.socket(zmq.PUSH))
        client.linger = 0
        client.plain_username, client.plain_password = key, b"-"
        monitor = stack.enter_context(client.get_monitor_socket())
        client.connect(endpoint)
        assert has_failed(monitor) != is_heard
        if is_heard:
            client.send(b"plain")
            assert server.poll(DEADLINE_MS)
            assert server.recv() == b"plain"
        client.disable_monitor()
    gatekeeper.close()
    context.destroy(linger=0)


def test_the_gatekeeper_refuses_plain_peers_without_the_switch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even at a socket that offers it; and outlives names that are no keys."""
    key = new_key_pair().public
    context: zmq.Context[Any] = zmq.Context()
    gatekeeper = Gatekeeper(context)
    gatekeeper.allow_any("exchange")
    with ExitStack() as stack:
        server = stack.enter_context(context.socket(zmq.PULL))
        server.plain_server = True
        server.setsockopt_string(zmq.ZAP_DOMAIN, "exchange")
        server.bind(endpoint := new_local_endpoint())

        def is_refused(name: bytes) -> bool:
            with context.socket(zmq.PUSH) as client:
                client.linger = 0
                client.plain_username, client.plain_password = name, b"-"
                with client.get_monitor_socket() as monitor:
                    client.connect(endpoint)
                    has_come_to_nothing = has_failed(monitor)
                    client.disable_monitor()
                return has_come_to_nothing

        monkeypatch.delenv(PLAINTEXT_VARIABLE, raising=False)
        assert is_refused(key)
        monkeypatch.setenv(PLAINTEXT_VARIABLE, "1")
        for name in (b"\xff" * 40, "schlüssel".encode(), b"short", key[:-1] + b"\0"):
            assert is_refused(name)
        assert not is_refused(key)
        assert [refusal.key for refusal in gatekeeper.refusals()] == [b""] * 5
    gatekeeper.close()
    context.destroy(linger=0)


def test_the_switch_is_warned_of_once() -> None:
    script = (
        "from engine.cluster.plaintext import is_plaintext\n"
        "assert is_plaintext('ipc://@a') and is_plaintext('tcp://127.0.0.1:*')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=dict(os.environ, **{PLAINTEXT_VARIABLE: "1"}),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr.count("NOTHING IS ENCRYPTED") == 1


def test_plain_processes_compute_what_transformers_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    oracle = save_tiny_llama(tmp_path)
    ids = [5, 71, 33, 98, 5]
    monkeypatch.setenv(PLAINTEXT_VARIABLE, "1")
    options = SessionOptions(model=str(tmp_path), dtype="float32", num_workers=2)
    with Session(options) as session, torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0].numpy()
        assert np.abs(session.logits(ids) - expected).max() < 1e-5
