"""An OpenAI-compatible server that fails with seeded chance: for what asks servers, and must live with theirs.

    python -m kimi_lite.tools.serve.faulty --port 8090 --seed 3 --chance 0.3

It refuses (429 with and without `Retry-After`, 500, 502, 503), resets the connection before or in the middle of an
answer, falls silent, ends an answer without an end, sends an error, a page or junk instead, or spoils the arguments of
a tool call. What happens to a request depends on the seed, its messages and how often they were asked before, and on
nothing else: however requests are interleaved, the same ones fail in the same way.

Without a script of its own it answers with the last message's text.
"""

import asyncio
import hashlib
import json
import random
import socket
import struct
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import typer

Fault = Literal[
    "429", "500", "502", "503", "reset", "reset midway", "silence", "silence midway", "cut", "error", "page", "junk",
    "spoiled call",
]  # fmt: skip
FAULTS: Sequence[Fault] = get_args(Fault)
Message = Mapping[str, Any]
Script = Callable[[Sequence[Message], Sequence[Message]], Message]  # (messages, tools) -> the assistant's message
_PIECE = 7  # characters of a delta
_SPOILED = ("", "{", '{"a": ', "[1, 2]", "null", '{"prompt": 3}', "\x00", '{"a": "b"} {"a": "b"}', "<|im_end|>")


def echo(messages: Sequence[Message], tools: Sequence[Message]) -> Message:
    """Says what was said last."""
    return {"role": "assistant", "content": f"You said: {messages[-1]['content']}"}


@dataclass(slots=True)
class FaultyServer:
    """`chance`: of a fault for each request; `faults`: those there are. `asked` and `failed` count what happened."""

    script: Script = echo
    seed: int = 0
    chance: float = 0.3
    faults: Sequence[Fault] = FAULTS
    model: str = "faulty"
    asked: Counter[str] = field(default_factory=Counter)  # how often each question came, by its digest
    failed: Counter[Fault] = field(default_factory=Counter)
    connections: set[asyncio.Task[None]] = field(default_factory=set)  # open ones
    url: str = ""  # once it listens

    @asynccontextmanager
    async def listening(self, port: int = 0) -> AsyncIterator["FaultyServer"]:
        """On this event loop, on 127.0.0.1; 0: any free port."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", port)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        try:
            yield self
        finally:
            server.close()
            for connection in self.connections:
                connection.cancel()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self.connections.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._answer(reader, writer)
        finally:
            self.connections.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        method, path, _ = head.split(" ", 2)
        if method == "GET":
            document = {"data": [{"id": self.model}]} if path.endswith("/models") else {"error": "no such page"}
            await _send(writer, 200 if path.endswith("/models") else 404, json.dumps(document))
            return
        length = next(
            int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length")
        )
        body = json.loads(await reader.readexactly(length))
        fault, chance = self._fault_of(body["messages"])
        await self._play(fault, chance, body, reader, writer)

    def _fault_of(self, messages: Sequence[Message]) -> tuple[Fault | None, random.Random]:
        """What happens to this question, and the chance of the details."""
        digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
        chance = random.Random(f"{self.seed} {digest} {self.asked[digest]}")
        self.asked[digest] += 1
        fault = chance.choice(self.faults) if self.faults and chance.random() < self.chance else None
        if fault is not None:
            self.failed[fault] += 1
        return fault, chance

    async def _play(
        self,
        fault: Fault | None,
        chance: random.Random,
        body: Mapping[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        match fault:
            case "429" | "500" | "502" | "503":
                more = {"Retry-After": str(chance.randint(1, 20))} if chance.random() < 0.5 else {}
                await _send(writer, int(fault), json.dumps({"error": {"message": f"fault {fault}"}}), more)
                return
            case "reset":
                _reset(writer)
                return
            case "silence":
                await reader.read()  # until the client hangs up
                return
            case "page":
                await _send(writer, 200, "<html><body>Welcome</body></html>", kind="text/html")
                return
        message = self.script(body["messages"], body.get("tools", ()))
        events = list(_events(_spoiled(message, chance) if fault == "spoiled call" else message))
        middle = chance.randrange(len(events) - 1)  # before the finish reason
        await _send_head(writer, 200, "text/event-stream")
        for i, event in enumerate(events):
            if i == middle and fault in ("reset midway", "silence midway", "cut", "error", "junk"):
                await self._break_off(fault, reader, writer)
                return
            writer.write(f"data: {json.dumps(event)}\n\n".encode())
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()

    async def _break_off(self, fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await writer.drain()
        match fault:
            case "reset midway":
                _reset(writer)
            case "silence midway":
                await reader.read()
            case "error":
                writer.write(b'data: {"error": {"message": "out of memory"}}\n\n')
            case "junk":
                writer.write(b"data: {oops\n\n")


def _events(message: Message) -> list[dict[str, Any]]:
    """The message as a stream of deltas, the reason it ended, the usage."""
    content, calls = message.get("content") or "", message.get("tool_calls") or ()
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": content[i : i + _PIECE]} for i in range(0, len(content), _PIECE)]
    for index, call in enumerate(calls):
        function = call["function"]
        head = {
            "index": index,
            "id": call["id"],
            "type": "function",
            "function": {"name": function["name"], "arguments": ""},
        }
        deltas.append({"tool_calls": [head]})
        written = function["arguments"]
        for i in range(0, len(written), _PIECE):
            deltas.append({"tool_calls": [{"index": index, "function": {"arguments": written[i : i + _PIECE]}}]})
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if calls else "stop"}]})
    usage = {"prompt_tokens": 10, "completion_tokens": len(deltas)}
    return [*events, {"choices": [], "usage": usage}]


def _spoiled(message: Message, chance: random.Random) -> Message:
    """With the arguments of one call spoiled; as it is where it calls nothing."""
    calls = [dict(call) for call in message.get("tool_calls") or ()]
    if not calls:
        return message
    call = chance.choice(calls)
    call["function"] = {**call["function"], "arguments": chance.choice(_SPOILED)}
    return {**message, "tool_calls": calls}


async def _send(
    writer: asyncio.StreamWriter,
    status: int,
    text: str,
    headers: Mapping[str, str] | None = None,
    kind: str = "application/json",
) -> None:
    await _send_head(writer, status, kind, headers)
    writer.write(text.encode())
    await writer.drain()


async def _send_head(
    writer: asyncio.StreamWriter, status: int, kind: str, headers: Mapping[str, str] | None = None
) -> None:
    lines = [f"HTTP/1.1 {status} -", f"Content-Type: {kind}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End the connection as a process that dies does: without the end of a stream."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def main(
    port: Annotated[int, typer.Option(help="On 127.0.0.1.")] = 8090,
    seed: Annotated[int, typer.Option(help="Another one fails otherwise.")] = 0,
    chance: Annotated[float, typer.Option(help="Of a fault for each request.", min=0, max=1)] = 0.3,
    faults: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(FAULTS)}.")] = ",".join(FAULTS),
) -> None:
    """Serve what was said last, with faults, until Ctrl-C."""
    chosen = [fault.strip() for fault in faults.split(",")]
    unknown = [fault for fault in chosen if fault not in FAULTS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(FAULTS)}")

    async def serve() -> None:
        async with FaultyServer(seed=seed, chance=chance, faults=chosen).listening(port) as server:
            print(f"{server.url}, seed {seed}", file=sys.stderr)
            await asyncio.Event().wait()

    with suppress(KeyboardInterrupt):
        asyncio.run(serve())


if __name__ == "__main__":
    typer.run(main)
