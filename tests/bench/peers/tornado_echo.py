"""Tornado's TCPServer: tornado_echo.py <port>"""
import sys

from tornado.ioloop import IOLoop
from tornado.iostream import StreamClosedError
from tornado.tcpserver import TCPServer


class Echo(TCPServer):
    async def handle_stream(self, stream, address):
        stream.set_nodelay(True)
        try:
            while True:
                line = await stream.read_until(b"\n", max_bytes=1 << 20)
                await stream.write(line)
        except StreamClosedError:
            pass


Echo().listen(int(sys.argv[1]), "127.0.0.1", backlog=4096)
IOLoop.current().start()
