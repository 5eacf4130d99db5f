"""MCP servers that misbehave, over stdio in raw JSON lines. `bad_mcp_server.py MODE`"""

import json
import os
import signal
import subprocess
import sys
import time

MODE = sys.argv[1]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
SCHEMAS = [
    {"type": "object", "properties": [1]},
    {"type": "object", "required": "abc"},
    {"type": "object", "required": [1, None, {}]},
    {"type": "object", "properties": {"a": None}},
    {"type": 5},
    {},
]


def send(message: object) -> None:
    sys.stdout.write((message if isinstance(message, str) else json.dumps(message)) + "\n")
    sys.stdout.flush()


def hang() -> None:
    """As stubborn as can be: no signal, no closed pipe, and children in sessions of their own."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    subprocess.Popen(["sleep", sys.argv[2]], start_new_session=True)
    time.sleep(1000)


def answer(method: str, message: dict) -> object:
    """The result of a request."""
    if method == "initialize":
        version = message["params"]["protocolVersion"]
        return {
            "protocolVersion": version,
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "x", "version": "1"},
        }
    if method == "tools/list":
        tools = [{"name": "t", "description": "d", "inputSchema": SCHEMA}]
        if MODE == "many":
            tools *= 5000
        if MODE == "large":
            tools.append({"name": "l", "inputSchema": SCHEMA | {"title": "x" * 100_000}})
        if MODE == "schemas":
            tools = [{"name": f"s{i}", "inputSchema": schema} for i, schema in enumerate(SCHEMAS)]
        if MODE == "names":
            tools = [{"name": name, "inputSchema": SCHEMA} for name in ("", "é b", "x" * 3000, "a\x1b[31m")]
        return {"tools": tools} | ({"nextCursor": "x"} if MODE == "endless pages" else {})
    if method != "tools/call":
        return {}
    text = "x" * (30_000_000 if MODE == "huge" else 100_000)
    return {"content": [{"type": "text", "text": text}]}


if MODE == "hangs":
    hang()
if MODE == "dies":
    sys.stderr.write("\x1b]0;EVIL\x07fatal\n")
    sys.exit(3)
if MODE == "noise":
    for _ in range(2000):
        send("no JSON \xff" * 10)
        send("{no JSON")
if MODE == "log":
    for _ in range(5000):
        sys.stderr.write("e" * 1000 + "\n")
if MODE == "endless line":
    while True:
        sys.stdout.write("x" * 100_000)
for line in sys.stdin:
    message = json.loads(line)
    method, number = message.get("method"), message.get("id")
    hanging = {"hangs in list": "tools/list", "hangs in calls": "tools/call"}.get(MODE)
    if number is None:
        continue
    if MODE == "refuses":
        send({"jsonrpc": "2.0", "id": number, "error": {"code": -1, "message": "\x1b]0;EVIL\x07no"}})
    elif method == hanging:
        hang()
    elif MODE == "leaves a child" and method == "tools/call":
        subprocess.Popen(["sleep", sys.argv[2]], start_new_session=True)
        os._exit(0)
    else:
        send({"jsonrpc": "2.0", "id": number, "result": answer(method, message)})
