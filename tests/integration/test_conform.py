"""`bench conform`: a client's program runs, and its outcomes are read."""

import asyncio
import sys

from bench.conform.__main__ import read
from bench.conform.suites import HERE, environment
from tests.support.api_harness import local, route, running_api
from tests.support.fake_upstream import Call, fake_upstream


async def test_a_program_runs() -> None:
    async def engine(call: Call) -> None:
        choice = b'{"index":0,"finish_reason":"length","message":{"role":"assistant","content":"words"}}'
        usage = b'{"prompt_tokens":2,"completion_tokens":4,"total_tokens":6}'
        body = b'{"id":"c","object":"chat.completion","created":1,"model":"m","choices":[%b],"usage":%b}'
        await call.respond(body % (choice, usage), kind=b"application/json")

    async with fake_upstream(engine) as upstream, running_api([route("small", local(upstream.address))]) as api:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(HERE / "clients" / "openai_python.py"),
            env=environment({"CONFORM_URL": api.url, "CONFORM_MODEL": "small"}),
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
    outcomes = {outcome.case: outcome for outcome in read(output)}
    assert process.returncode == 0
    assert outcomes["models.list"].passed
    assert outcomes["chat.completions"].passed, outcomes["chat.completions"].reason
    failed = outcomes["chat.completions, tools"]
    assert (failed.passed, failed.reason[:8]) == (False, "NotFound")
