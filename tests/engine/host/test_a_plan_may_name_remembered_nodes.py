"""A remembered node takes its share in a plan without further ado, and is not forgotten meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import PlanError
from engine.host import messages as api
from engine.plan.plan import PlanShape
from engine.plan.presets import from_percentages, single
from engine.session import Session, SessionOptions
from tests.engine.host.elsewhere import Elsewhere, remember, remembered
from tests.tiny_models import save_tiny_llama

pytestmark = pytest.mark.network


def test_a_plan_waits_for_a_remembered_node_and_keeps_it(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model")
    attic = Elsewhere(tmp_path / "attic")
    remember(attic)
    options = SessionOptions(model=str(tmp_path / "model"), dtype="float32")
    with attic, Session(options) as session:
        alone = session.generate("abc", raw=True, max_tokens=8)
        shape = PlanShape.from_config(session.model.config)
        session.apply(from_percentages(shape, ["this/cpu", "attic/cpu"], [40, 60]))
        together = session.generate("abc", raw=True, max_tokens=8)
        assert together.token_ids == alone.token_ids
        assert {device.device for device in together.devices} == {"this/cpu", "attic/cpu"}

        def forget() -> None:
            call = api.ForgetNode(request_id=session.client.next_request_id(), name="attic")
            session.client.run(call, timeout_seconds=30)

        with pytest.raises(PlanError, match="attic has a share in the plan in force"):
            forget()
        session.apply(single(shape, "this/cpu"))
        forget()
        assert remembered() == []


def test_a_plan_with_a_node_that_does_not_come_is_one_error(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model")
    attic = Elsewhere(tmp_path / "attic")
    remember(attic)
    with Session(SessionOptions(model=str(tmp_path / "model"))) as session:
        plan = single(PlanShape.from_config(session.model.config), "attic/cpu")
        with pytest.raises(PlanError, match="attic/cpu cannot take part: nothing listens at 127"):
            session.apply(plan)
