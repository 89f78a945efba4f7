"""A server that looks like a replica: python fake_replica.py NAME. Answers say who gave them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

NAME = sys.argv[1]
STATE = {"requests": 0, "status": 200}


async def complete(request: Request) -> Response:
    """Streams `max_tokens` events, 20 ms apart; `model: kill` ends this process, `full` is full."""
    body = await request.json()
    STATE["requests"] += 1
    if body.get("model") == f"kill-{os.environ['REPLICA']}":
        os.kill(os.getpid(), signal.SIGKILL)
    if body.get("model") == "full":
        return JSONResponse({"error": {"message": "full"}}, 429)
    facts = {"replica": NAME, "process": os.getpid(), "key": request.headers.get("authorization")}
    if not body.get("stream"):
        await asyncio.sleep(0.02 * body.get("max_tokens", 1))
        return JSONResponse(facts)

    async def events() -> AsyncIterator[bytes]:
        for number in range(body["max_tokens"]):
            data = f"data: {json.dumps(facts | {'number': number})}\n\n".encode()
            yield data[:9]  # events are torn on their way
            await asyncio.sleep(0.02)
            yield data[9:]
        yield b"data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def health(request: Request) -> Response:
    return JSONResponse({}, STATE["status"])


async def metrics(request: Request) -> Response:
    text = "# HELP tokenspeed_requests_finished_total Answers\n"
    text += "# TYPE tokenspeed_requests_finished_total counter\n"
    text += f'tokenspeed_requests_finished_total{{reason="stop"}} {STATE["requests"]}\n'
    return PlainTextResponse(text)


def main() -> None:
    routes = [
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/messages", complete, methods=["POST"]),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"ready at http://127.0.0.1:{listener.getsockname()[1]}/v1", file=sys.stderr, flush=True)
    # A signal ends its streams at once: whoever wants to keep them waits for their end.
    app = Starlette(routes=routes)
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=0)
    uvicorn.Server(config).run([listener])


if __name__ == "__main__":
    main()
