"""The engine host process: `python -m engine.host shardmix-host`, started by `engine.client`."""

from __future__ import annotations

import logging
import os
import sys

from engine.cluster.processes import answer_address, end_with_parent, read_greeting
from engine.errors import EngineError
from engine.host.host import EngineHost


def main() -> None:
    """Listen, tell the client where, serve until it is gone."""
    logging.basicConfig(level=os.environ.get("SHARDMIX_LOG", "WARNING"), format="%(message)s")
    greeting = read_greeting()
    try:
        host = EngineHost(greeting.parent_key.encode("ascii"))
    except EngineError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the last words, which the client hears
        raise SystemExit(1) from None
    end_with_parent(host.end_soon, grace_seconds=2.5)
    answer_address([host.endpoint], host.keys.public)
    try:
        host.run()
    finally:
        host.close()


if __name__ == "__main__":
    main()
