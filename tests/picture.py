#!/usr/bin/env python3
"""examples/status.png, README's picture of examples/status.c: three workers under a load that changes, for two minutes,
as Chromium shows them.

    tests/picture.py [program] [picture] [seconds]      default: build/cc-c99/status examples/status.png 125

Needs Linux, Chromium and Python's websockets (in Debian chromium and python3-websockets).
"""
import asyncio
import base64
import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile

import websockets

SIZE = {"width": 1200, "height": 600, "deviceScaleFactor": 1, "mobile": False}
BROWSER = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
           "--hide-scrollbars", "--remote-debugging-port=0", "about:blank"]


async def client(port, chance):
    """One connection: lines for some seconds, and one of the ways in which a connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        size, pause, lines = chance.choice([64, 512, 4000]), chance.uniform(.02, .3), chance.randrange(5, 100)
        for _ in range(lines):
            writer.write(b"x" * (size - 1) + b"\n")
            await reader.readuntil(b"\n")
            await asyncio.sleep(pause)
        end = chance.random()
        if end < .05:
            writer.write(b"x" * 5000)  # a line that is too long
            await reader.read()
        elif end < .14:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif end < .20:
            await reader.read()  # it says nothing until the server has had enough of it
    except (OSError, asyncio.IncompleteReadError):
        pass  # the other end may be faster
    finally:
        writer.close()


async def load(port, chance):
    """Clients come in waves."""
    clients, rate = set(), 10.0
    while True:
        rate = min(40.0, max(1.0, rate * chance.choice([.7, .8, 1, 1.2, 1.4])))
        for _ in range(int(rate)):
            task = asyncio.create_task(client(port, chance))
            clients.add(task)
            task.add_done_callback(clients.discard)
            await asyncio.sleep(1 / rate)


async def call(session, number, method, **parameters):
    """A command of DevTools, and its result."""
    await session.send(json.dumps({"id": number, "method": method, "params": parameters}))
    while True:
        answer = json.loads(await session.recv())
        if answer.get("id") == number:
            return answer["result"]


async def photograph(devtools, url, seconds):
    """What the page is like after so many seconds."""
    async with websockets.connect(devtools) as browser:
        target = await call(browser, 1, "Target.createTarget", url="about:blank")
    page = re.sub("/devtools/.*", "/devtools/page/" + target["targetId"], devtools)
    async with websockets.connect(page, max_size=None) as session:
        await call(session, 1, "Emulation.setDeviceMetricsOverride", **SIZE)
        await call(session, 2, "Page.navigate", url=url)
        await asyncio.sleep(seconds)
        return base64.b64decode((await call(session, 3, "Page.captureScreenshot", format="png"))["data"])


async def find(stream, pattern):
    """The text in the stream that the pattern asks for."""
    async for line in stream:
        found = re.search(pattern, line.decode())
        if found:
            return found.group(1)
    raise SystemExit(f"nobody says {pattern}")


async def start(home, *command, **streams):
    where = {name: home for name in ("HOME", "TMPDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
    return await asyncio.create_subprocess_exec(*command, env={**os.environ, **where}, **streams)


async def main(program="build/cc-c99/status", picture="examples/status.png", seconds="125"):
    started = []
    home = tempfile.mkdtemp(dir=os.path.dirname(program) or ".")
    try:
        server = await start(home, program, "0", "0", "3", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        started.append(server)
        port = int(await find(server.stdout, r"listening on port (\d+)"))
        url = await find(server.stdout, r"look at (\S+)")
        browser = await start(home, *BROWSER, "--user-data-dir=" + home, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE)
        started.append(browser)
        devtools = await find(browser.stderr, r"DevTools listening on (\S+)")
        clients = asyncio.create_task(load(port, random.Random(1)))
        shown = await photograph(devtools, url, float(seconds))
        clients.cancel()
        with open(picture, "wb") as file:
            file.write(shown)
    finally:
        for process in started:
            process.terminate()
            await process.wait()
        shutil.rmtree(home, ignore_errors=True)
    print(f"{picture}: {len(shown)} bytes")


asyncio.run(main(*sys.argv[1:]))
