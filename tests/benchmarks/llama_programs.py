"""Stand-ins for llama.cpp's programs, which a test machine does not have.

`llama-bench` prints what its arguments ask for in the fields that its documentation lists, at fixed
speeds; the RPC server listens.
"""

from __future__ import annotations

import sys
from pathlib import Path

PROMPT_SPEED, DECODE_SPEED = 640.0, 32.0

_BENCH = f"""\
import json, socket, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert open(options["-m"], "rb").read(4) == b"GGUF"
assert options["-o"] == "json" and options["-r"] == "1"
for server in filter(None, options.get("--rpc", "").split(",")):
    host, port = server.split(":")
    socket.create_connection((host, int(port)), 10).close()
tests = [
    {{"n_prompt": int(options["-p"]), "n_gen": int(options["-n"]), "n_depth": int(depth),
     "n_threads": int(options["-t"]), "avg_ts": {PROMPT_SPEED} if int(options["-p"]) else {DECODE_SPEED}}}
    for depth in options.get("-d", "0").split(",")
]
print(json.dumps(tests))
"""
_SERVER = """\
import socket, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert options["-t"] == "1"
with socket.create_server((options["-H"], int(options["-p"]))) as server:
    while True:
        server.accept()[0].close()
"""


def write_programs(folder: Path, *, bench: str = _BENCH, server: str = _SERVER) -> None:
    """Put them into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, code in (("llama-bench", bench), ("rpc-server", server)):
        path = folder / name
        path.write_text(f"#!{sys.executable}\n{code}", encoding="utf-8")
        path.chmod(0o755)
