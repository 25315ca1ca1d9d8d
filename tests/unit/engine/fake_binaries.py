"""Executables that answer like llama.cpp's, without llama.cpp: Python scripts with the programs' names."""

import sys
from pathlib import Path

# Rough copies of the real answers' form; the arguments of each start are appended to `started.txt`.
_SERVER = """#!{python}
import http.server, pathlib, sys
here = pathlib.Path(__file__).parent
arguments = sys.argv[1:]
if "--version" in arguments:
    print("version: 0.26.0 (build 6871, commit 9a9a2cc)\\nbuilt with GNU 13.3.0 for Linux x86_64", file=sys.stderr)
    sys.exit(0)
if "--list-devices" in arguments:
    print("Available devices:\\n  CUDA0: NVIDIA RTX 4090 (24217 MiB, 23816 MiB free)")
    sys.exit(0)
if "--help" in arguments:
    flags = "--model --rpc --api-key-file --fit --slots --spec-type --model-draft"
    print("\\n".join(flags.split()))
    sys.exit(0)
(here / "started.txt").write_text("\\n".join(arguments))
key = pathlib.Path(arguments[arguments.index("--api-key-file") + 1]).read_text()

class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        loading = Handler.asked < 3
        body = b'{{"total_slots": 2, "default_generation_settings": {{"n_ctx": 512}}}}'
        known = self.path == "/health" or self.headers["authorization"] == f"Bearer {{key}}"
        self.send_response(503 if loading else 200 if known else 401)
        self.end_headers()
        self.wfile.write(b"" if loading else body)

server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print("main: HTTP server is listening, hostname: 127.0.0.1, port: %d, http threads: 5" % server.server_port, flush=True)
server.serve_forever()
"""

_RPC = """#!{python}
import socket, struct, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind((arguments["--host"], int(arguments["--port"])))
listener.listen(1)
while True:
    client, _ = listener.accept()
    if len(client.recv(33, socket.MSG_WAITALL)) == 33:
        client.sendall(struct.pack("<Q", 28) + bytes((8, 0, 0, 0)) + bytes(24))
    client.close()
"""


def write_server(directory: Path) -> Path:
    """A llama-server that is loading at first, then healthy."""
    return _write(directory / "llama-server", _SERVER)


def write_rpc_server(directory: Path, name: str = "rpc-server") -> Path:
    """An RPC server that answers HELLO."""
    return _write(directory / name, _RPC)


def write_program(path: Path, text: str) -> Path:
    """A Python program of any text."""
    return _write(path, "#!{python}\n" + text)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.format(python=sys.executable))
    path.chmod(0o755)
    return path
