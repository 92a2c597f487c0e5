"""asyncio's streams: asyncio_echo.py <port>"""
import asyncio
import sys


async def handle(reader, writer):
    try:
        while True:
            line = await reader.readline()
            if not line:
                break
            writer.write(line)
            await writer.drain()
    except (ConnectionError, ValueError):
        pass
    finally:
        writer.close()


async def main():
    server = await asyncio.start_server(handle, "127.0.0.1", int(sys.argv[1]), backlog=4096, limit=1 << 20)
    async with server:
        await server.serve_forever()


asyncio.run(main())
