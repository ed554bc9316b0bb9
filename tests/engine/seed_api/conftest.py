"""Small models here, too: see the model tests."""

from tests.engine.model.conftest import one_thread

__all__ = ["one_thread"]
