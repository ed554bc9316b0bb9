"""What neither encrypts nor authenticates is refused unless every node's network is trusted."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from engine.errors import EngineError, PlanError
from engine.host.trusted_network import NodeTrust, check_trusted_network
from engine.plan.plan import PlanShape
from engine.plan.presets import even
from engine.session import Session, SessionOptions, simulated_devices
from tests.tiny_models import save_tiny_llama

THIS = NodeTrust("this", is_trusted=False, is_local=True)
ATTIC = NodeTrust("attic", is_trusted=False, is_local=False)
CELLAR = NodeTrust("cellar", is_trusted=True, is_local=False)


def test_sockets_need_no_trust() -> None:
    check_trusted_network("zmq", [THIS, ATTIC])


def test_trusted_nodes_may_use_torch() -> None:
    check_trusted_network("torch", [CELLAR, THIS._replace(is_trusted=True)])


def test_the_error_names_the_nodes_that_lack_it_and_what_to_do() -> None:
    with pytest.raises(PlanError) as caught:
        check_trusted_network("torch", [ATTIC, CELLAR])
    assert str(caught.value) == (
        "the plan asks for transport torch, which neither encrypts nor authenticates, and the "
        "network of attic is not marked as trusted; start shardmix-worker with --trusted-network "
        "on attic, or use transport zmq"
    )


def test_this_computer_is_marked_by_a_variable() -> None:
    with pytest.raises(PlanError, match=r"SHARDMIX_TRUSTED_NETWORK=1 on this computer") as caught:
        check_trusted_network("torch", [THIS, ATTIC])
    assert "--trusted-network on attic" in str(caught.value)


@pytest.mark.network
def test_a_plan_is_refused_and_the_one_before_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHARDMIX_TRUSTED_NETWORK", raising=False)
    save_tiny_llama(tmp_path)
    with Session(SessionOptions(model=str(tmp_path), dtype="float32", num_workers=2)) as session:
        before = session.generate("abc", raw=True, max_tokens=5).token_ids
        shape = PlanShape.from_config(session.model.config)
        plan = msgspec.structs.replace(even(shape, simulated_devices(2)), transport="torch")
        with pytest.raises(
            EngineError, match="local-1, local-2 is not marked as trusted"
        ) as caught:
            session.apply(plan)
        assert "\n" not in str(caught.value)
        assert session.generate("abc", raw=True, max_tokens=5).token_ids == before
