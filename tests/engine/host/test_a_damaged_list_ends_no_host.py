"""What a worker says is written down; where that cannot be, the host goes on with the node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.host import messages as api
from tests.engine.host.elsewhere import Desk, Elsewhere

pytestmark = pytest.mark.network


def _damage(path: Path) -> None:
    path.write_text("[")


def _put_a_folder_there(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("spoil", [_damage, _put_a_folder_there])
def test_a_node_that_cannot_be_written_down_is_there_until_the_host_ends(
    tmp_path: Path, own_settings: Path, spoil: Callable[[Path], None]
) -> None:
    with Elsewhere(tmp_path / "attic") as attic, Desk() as desk:
        desk.node("this", "ready")
        spoil(own_settings / "nodes.json")
        desk.call(api.AddNode, token=attic.token)
        assert desk.node("attic", "ready").devices
        # A person who asks for a change of the list is told.
        with pytest.raises(ConfigError, match=r"nodes\.json"):
            desk.call(api.ForgetNode, name="attic")
        assert desk.node("attic", "ready").key == attic.key
