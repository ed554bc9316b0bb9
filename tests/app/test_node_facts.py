"""What is told of a node: states with their time, facts with units, a dash where unknown."""

from __future__ import annotations

import hashlib
from typing import get_args

import msgspec
import pytest

from app.cluster.node_facts import (
    Action,
    Surroundings,
    actions,
    devices_to_add,
    fingerprint,
    link_text,
    loaded_text,
    node_facts,
)
from app.cluster.node_rows import STATE_ROLES, STATE_WORDS, InUse, node_rows, state_text, summary
from app.figures import UNKNOWN
from app.look import ICONS
from engine.cluster.messages import DeviceSpeed, GpuUsage
from engine.host import messages as api

from .conftest import node, remote_node

NOW = 1_000.0
KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"


def _facts(state: api.NodeState, **more: object) -> dict[str, str]:
    around = Surroundings(
        own_version="0.1.0",
        links=more.get("links", {}),  # type: ignore[arg-type]
        loaded=more.get("loaded", {}),  # type: ignore[arg-type]
        label=lambda device: device.partition("/")[0],
    )
    return {fact.title: fact.value for fact in node_facts(state, around)}


def test_every_state_has_a_word_a_colour_and_an_icon() -> None:
    states = set(get_args(api.NodeStateName))
    assert set(STATE_WORDS) == set(STATE_ROLES) == states
    assert {f"state {state}" for state in states} <= set(ICONS)


def test_a_state_tells_since_when_and_why() -> None:
    stale = remote_node("attic", "stale", since_s=NOW - 42.3, reason="no word from its worker")
    assert state_text(stale, NOW) == "stale 42 s: no word from its worker"
    lost = remote_node("attic", "lost", since_s=NOW - 600, reason="killed by SIGKILL")
    assert state_text(lost, NOW) == "lost 10 min: killed by SIGKILL"
    # Its state changes with every answer, so the time would only flicker.
    assert state_text(remote_node("attic", "busy", since_s=NOW - 2), NOW) == "computing"


def test_the_summary_counts_every_state_apart() -> None:
    nodes = (
        node("this", "busy"),
        remote_node("a", "loading"),
        remote_node("b", "discovered"),
        remote_node("c", "stale"),
        remote_node("d", "lost"),
    )
    assert summary(nodes) == "2 nodes ready · 1 discovered · 1 stale · 1 lost"


def test_the_summary_says_that_nothing_runs() -> None:
    """After the loss of a runner all nodes are there, and the page said only "3 nodes ready"."""
    nodes = (node("this"), node("local-1"), node("local-2"))
    assert summary(nodes, is_stopped=True) == "3 nodes ready · no split is running"


def test_the_fingerprint_is_the_short_sha256_of_the_key() -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    assert fingerprint(KEY).replace(":", "") == digest[:16]
    assert len(fingerprint(KEY)) == 23
    assert fingerprint("") == UNKNOWN


def test_what_is_not_known_is_a_dash() -> None:
    facts = _facts(remote_node("attic", "ready", version=""))
    assert facts["Version"] == UNKNOWN
    assert facts["Link to here"] == UNKNOWN
    assert facts["CPU"] == f"{UNKNOWN} · {UNKNOWN} °C · {UNKNOWN} W"
    assert facts["Speed"] == UNKNOWN


def test_figures_have_units() -> None:
    full = remote_node(
        "attic",
        "ready",
        devices=("cpu", "cuda0"),
        key=KEY,
        endpoint="tcp://10.0.0.7:47500",
        cpu_percent=71.0,
        cpu_temperature_c=64.4,
        cpu_power_w=23.44,
        round_trip_seconds=0.0004,
        bytes_per_second=117.5e6,
        speeds=(DeviceSpeed(device="cpu", flops=2.1e11, memory_bytes_per_second=3.4e10),),
        gpus=(
            GpuUsage(
                device="cuda0",
                percent=38.0,
                memory_used_bytes=7_100_000_000,
                memory_total_bytes=12_000_000_000,
                temperature_c=61.0,
                power_w=None,
            ),
        ),
    )
    links = {
        ("attic/cpu", "this/cpu"): api.Link(
            from_device="attic/cpu",
            to_device="this/cpu",
            round_trip_seconds=0.00042,
            bytes_per_second=116e6,
        ),
        ("this/cpu", "attic/cpu"): api.Link(
            from_device="this/cpu",
            to_device="attic/cpu",
            round_trip_seconds=1.0,
            bytes_per_second=1.0,
        ),
    }
    facts = _facts(full, links=links)
    assert facts["Address"] == "10.0.0.7:47500"
    assert facts["Encrypted"] == "yes"
    assert facts["Version"] == "0.1.0 (same as here)"
    assert facts["CPU"] == "71 % · 64 °C · 23.4 W"
    assert facts["Link to here"] == "0.400 ms, 940 Mbit/s"
    assert facts["attic to this"] == "0.420 ms, 928 Mbit/s"
    assert facts["a chip"] == f"38 % · 7.10 GB of 12.0 GB · 61 °C · {UNKNOWN} W"
    assert facts["Speed of CPU"] == "210 GFLOP/s · memory 34.0 GB/s"
    (row,) = node_rows((full,), InUse(part_of=str, progress_of=lambda _: None), NOW)
    assert row.children[1].texts[2:4] == ("38 %", "7.10 GB of 12.0 GB")


def test_another_version_is_a_warning() -> None:
    around = Surroundings("0.1.0", {}, {}, str)
    facts = node_facts(remote_node("attic", "ready", version="0.0.9"), around)
    (version,) = [fact for fact in facts if fact.title == "Version"]
    assert version.value == "0.0.9 (here 0.1.0)"
    assert version.is_warning


def test_where_weights_came_from_is_told() -> None:
    cached = api.LoadedBytes(device="attic/cpu", received=0, cached=98_362_432, local=0)
    assert loaded_text(cached) == "0 B sent, 98.4 MB from its disk"
    local = api.LoadedBytes(device="attic/cpu", received=1_000, cached=0, local=5_000_000)
    assert loaded_text(local) == "1.00 kB sent, 5.00 MB from its own copy of the model"
    facts = _facts(remote_node("attic", "ready"), loaded={"attic/cpu": cached})
    assert facts["Weights"] == loaded_text(cached)


def test_half_a_link_is_half_a_dash() -> None:
    assert link_text(0.001, None) == f"1.00 ms, {UNKNOWN}"


@pytest.mark.parametrize(
    ("state", "is_computing", "expected"),
    [
        ("discovered", False, [Action.PAIR]),
        ("pairing", False, []),
        ("starting", False, [Action.FORGET]),
        ("ready", False, [Action.ADD, Action.FORGET]),
        ("ready", True, [Action.FORGET]),
        ("stale", False, [Action.FORGET]),
        ("lost", False, [Action.FORGET]),
    ],
)
def test_every_state_offers_what_makes_sense(
    state: str, is_computing: bool, expected: list[Action]
) -> None:
    assert actions(remote_node("attic", state), is_computing) == expected


def test_this_computer_cannot_be_forgotten() -> None:
    assert actions(node("this", "lost"), False) == []
    assert actions(node("local-1"), False) == [Action.ADD]


def test_a_node_with_gpus_gives_those_to_the_plan() -> None:
    assert devices_to_add(node("b", devices=("cpu", "cuda0", "cuda1"))) == ["b/cuda0", "b/cuda1"]
    assert devices_to_add(node("b")) == ["b/cpu"]


def test_loading_is_told_per_device() -> None:
    progress = api.Progress(
        request_id=0, phase="weights", subject="a/cpu", done=12_000_000, total=40_000_000
    )
    in_use = InUse(part_of=str, progress_of={"a/cpu": progress}.get)
    loading = msgspec.structs.replace(node("a", "loading"), since_s=NOW - 3)
    (row,) = node_rows((loading,), in_use, NOW)
    assert row.texts[1] == "loading weights 3 s"
    assert row.children[0].texts[1] == "loading 30 % · 12.0 MB of 40.0 MB"
