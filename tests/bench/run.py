#!/usr/bin/env python3
"""Measures servers beside each other and writes results.json; report.py makes the table and the pictures of it.

    python3 tests/bench/run.py [--rows "pp50 bulk1m"] [--servers "echo libuv"] [--secs 0.3] [--reps 9]

Every row is run in rounds: each server has a short turn in every round, forwards in one round and backwards in the
next, so that what the machine does meanwhile meets all of them. README.md has the rest.
"""
import argparse
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = str(CORES[0]), str(CORES[-1])
FLOORS = ["floor", "floor again"]

# How servers are started; {bin}, {here} and {port} are filled in. "again" is the floor once more: how far it is from
# itself is how far the figures are from the truth.
COMMANDS = {
    "line": {
        "floor": "{bin}/raw_epoll {port}",
        "floor again": "{bin}/raw_epoll {port}",
        "echo": "{bin}/echo {port}",
        "echo_callback": "{bin}/echo_callback {port}",
        "libuv": "{bin}/libuv {port}",
        "libevent": "{bin}/libevent {port}",
        "libev": "{bin}/libev {port}",
        "asio": "{bin}/asio {port}",
        "go": "{bin}/go {port}",
        "tornado": sys.executable + " {here}/peers/tornado_echo.py {port}",
        "asyncio": sys.executable + " {here}/peers/asyncio_echo.py {port}",
    },
    "transfer": {
        "floor": "{bin}/raw_transfer {port}",
        "floor again": "{bin}/raw_transfer {port}",
        "echo": "{bin}/transfer {port}",
        "echo_callback": "{bin}/transfer_callback {port}",
    },
    "tls": {
        "floor": "{bin}/openssl_echo {port} {bin}/cert.pem {bin}/key.pem",
        "floor again": "{bin}/openssl_echo {port} {bin}/cert.pem {bin}/key.pem",
        "echo": "{bin}/echo_tls {port} {bin}/cert.pem {bin}/key.pem",
        "echo_callback": "{bin}/echo_tls_callback {port} {bin}/cert.pem {bin}/key.pem",
    },
    "http": {
        "nginx": "nginx -p {bin} -c nginx.{port}.conf",
        "http": "{bin}/http {port} {bin}/www",
        "http_callback": "{bin}/http_callback {port} {bin}/www",
    },
    "redis": {
        "redis-server": "redis-server --bind 127.0.0.1 --port {port} --appendonly no --dir {bin} --save",
        "redis": "{bin}/redis {port}",
        "redis_callback": "{bin}/redis_callback {port}",
    },
}

# Rows that are measured in time: which servers, and what the load is told.
TIMED = {
    "pp1": ("line", "-m line -c 1"),
    "pp50": ("line", "-m line -c 50"),
    "pp1000": ("line", "-m line -c 1000"),
    "pipe16": ("line", "-m line -c 50 -P 16"),
    "bulk64k": ("line", "-m line -c 8 -s 65536"),
    "bulk1m": ("line", "-m line -c 4 -s 1048576"),
    "churn": ("line", "-m churn -c 32"),
    "tail": ("line", "-m line -c 1000 -R 10000"),
    "mix": ("line", "-m line -c 10 -i 2000"),
    "upload": ("transfer", "-m up"),
    "download": ("transfer", "-m down"),
    "tls": ("tls", "-c 50"),
    "tlsbulk": ("tls", "-c 8 -s 65536"),
    "http1k": ("http", "1k"),
    "http64k": ("http", "64k"),
    "redis": ("redis", "-t get -c 50 -n 20000"),
    "redis16": ("redis", "-t get -c 50 -P 16 -n 200000"),
}
# Rows that are counted: connections and lines of a round, as lines.c has them. Valgrind does not run Go's programs,
# and would take minutes for Python's.
COUNTED = {"pp50": (50, 1), "pipe16": (50, 16)}
NOT_IN_VALGRIND = ["go", "tornado", "asyncio"]
# Which pages of memory a server is given, and so what stays in the caches, is luck that lasts as long as it runs: it is
# started anew behind so many rounds.
OF_A_START = 3
KEPT = ["cpu_ns", "rate", "p99_us"]  # of a round
SMALL, LARGE = 40, 140  # rounds; what lies between them has no start and no end of a program in it
# Without this the C library picks a memchr for the processor, and the counts would be of this machine only.
PLAIN = "glibc.cpu.hwcaps=-AVX2,-AVX2_Usable,-AVX512F,-AVX512VL,-AVX512BW,-EVEX"


def note(text):
    print(text, file=sys.stderr, flush=True)


class Server:
    """A server on a core and a port of its own."""
    next_port = 20000 + os.getpid() % 1000 * 10

    def __init__(self, kind, name, front=(), patience=10):
        Server.next_port += 1
        self.name, self.port, self.traced = name, Server.next_port, "strace" in front
        if name == "nginx":
            write_nginx_conf(self.port)
        command = COMMANDS[kind][name].format(bin=ARGS.bin, here=HERE, port=self.port).split()
        if shutil.which(command[0]) is None:
            raise OSError(command[0] + " is not there")
        command += [""] if name == "redis-server" else []  # --save "": nothing is written to the disk
        self.process = subprocess.Popen(["taskset", "-c", SERVER_CORE, *front, *command], stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        env=dict(os.environ, GLIBC_TUNABLES=PLAIN) if front else None)
        self.wait_for_port(patience)

    def wait_for_port(self, patience):
        until = time.monotonic() + patience
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > until:
                    self.stop()
                    raise OSError(self.name + " did not start") from None
                time.sleep(0.02)

    def pid(self):
        """Of the server itself, which is strace's child when that stands in front."""
        if not self.traced:
            return self.process.pid
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children", encoding="ascii") as f:
            return int(f.read().split()[0])

    def cpu_ns(self):
        total = 0
        for task in os.listdir(f"/proc/{self.pid()}/task"):
            with open(f"/proc/{self.pid()}/task/{task}/schedstat", encoding="ascii") as f:
                total += int(f.read().split()[0])
        return total

    def memory(self):
        """Bytes of memory that it has touched."""
        with open(f"/proc/{self.pid()}/smaps_rollup", encoding="ascii") as f:
            return int(re.search(r"^Rss:\s+(\d+) kB", f.read(), re.M).group(1)) * 1024

    def stop(self, how=signal.SIGKILL):
        if self.process.poll() is None:
            os.kill(self.pid(), how)
            self.process.wait(60)


def write_nginx_conf(port):
    with open(HERE + "/peers/nginx.conf", encoding="ascii") as f:
        text = f.read().replace("{port}", str(port))
    with open(f"{ARGS.bin}/nginx.{port}.conf", "w", encoding="ascii") as f:
        f.write(text)


def wanted(kind):
    chosen = [n for n in COMMANDS[kind] if kind != "line" or not ARGS.servers or n in ARGS.servers + FLOORS]
    return [n for n in chosen if (kind, n) not in LEFT_OUT]


def once(kind):
    return [n for n in wanted(kind) if n != "floor again"]


def start_all(kind):
    servers = []
    for name in wanted(kind):
        try:
            servers.append(Server(kind, name))
        except OSError as e:
            note(f"left out: {name}: {e}")
            LEFT_OUT.add((kind, name))
    return servers


# ---- rows that are measured ----

def client(command, **more):
    return subprocess.run(["taskset", "-c", LOAD_CORE, *command], capture_output=True, text=True, timeout=120, **more)


def with_load(program, server, args):
    """The programs of this directory measure the server themselves."""
    r = client([f"{ARGS.bin}/{program}", "-p", str(server.port), "-u", str(server.pid()), "-t", str(ARGS.secs),
                *args.split()])
    return json.loads(r.stdout) if r.stdout else {"failed": r.stderr.strip()}


def with_other_client(server, command, requests_of):
    """Other programs do not: all that the server has used meanwhile, connecting included, by the requests."""
    before = server.cpu_ns()
    r = client(command)
    requests = requests_of(r.stdout)
    if not requests:
        return {"failed": (r.stdout + r.stderr)[-300:]}
    return {"requests": requests, "cpu_ns": round((server.cpu_ns() - before) / requests, 1)}


def with_wrk(server, name):
    def requests_of(text):
        found = re.search(r"(\d+) requests in", text)
        return int(found.group(1)) if found and "Non-2xx" not in text else 0
    return with_other_client(server, ["wrk", "-t1", "-c50", "-d1s", f"http://127.0.0.1:{server.port}/{name}"],
                             requests_of)


def with_redis_benchmark(server, args):
    def requests_of(text):
        return int(re.search(r"-n (\d+)", args).group(1)) if '"GET"' in text else 0
    base = ["redis-benchmark", "-p", str(server.port), "--csv", "-d", "64"]
    client(base + "-t set -n 100".split())  # the key that is asked for
    return with_other_client(server, base + args.split(), requests_of)


def measure(kind, server, args):
    if kind == "http":
        return with_wrk(server, args)
    if kind == "redis":
        return with_redis_benchmark(server, args)
    return with_load("tls_load" if kind == "tls" else "load", server, args)


def timed(row):
    kind, args = TIMED[row]
    servers = start_all(kind)
    rounds = {s.name: {key: [] for key in KEPT} for s in servers}
    try:
        for i in range(ARGS.reps):
            if i > 0 and i % OF_A_START == 0:
                for server in servers:
                    server.stop()
                servers = start_all(kind)
            for server in servers if i % 2 == 0 else servers[::-1]:
                result = measure(kind, server, args)
                if "failed" in result:
                    note(f"failed: {row} {server.name}: {result['failed']}")
                for key in KEPT:  # a round that has failed is null
                    rounds[server.name][key].append(result.get(key))
    finally:
        for server in servers:
            server.stop()
    return {"load": args, "secs": ARGS.secs, "reps": ARGS.reps, "rounds": rounds}


# ---- memory ----

def idle_growth(name, count, size):
    """By how many bytes it has grown for each of so many connections."""
    server = Server("line", name)
    try:
        with_load("load", server, "-m line -c 1 -n 50")  # what the first connection brings with it is no growth
        before = server.memory()
        args = f"-m idle -p {server.port} -c {count} -s {size}".split()
        load = subprocess.Popen(["taskset", "-c", LOAD_CORE, ARGS.bin + "/load", *args], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        load.stdout.readline()
        time.sleep(0.5)  # it may have accepted the last ones only now
        after = server.memory()
        out, _ = load.communicate("")
        dead = json.loads(out)["dead"]
        return round((after - before) / count) if dead == 0 else None
    finally:
        server.stop()


def idle(_):
    count = min(4000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100)
    result = {"connections": count, "never": {}, "after": {}}
    for name in once("line"):
        try:
            result["never"][name] = idle_growth(name, count, 1)
            result["after"][name] = idle_growth(name, count, 64)
        except (OSError, ValueError) as e:
            note(f"left out: {name}: {e}")
    return result


# ---- rows that are counted ----

def play(name, front, connections, lines, rounds):
    server = Server("line", name, front, patience=60)
    try:
        client([ARGS.bin + "/lines", str(server.port), str(connections), str(lines), "64", str(rounds)], check=True)
    finally:
        server.stop(signal.SIGTERM)


def instructions(name, connections, lines, rounds):
    path = ARGS.bin + "/counted"
    play(name, ["valgrind", "-q", "--tool=callgrind", "--callgrind-out-file=" + path], connections, lines, rounds)
    with open(path, encoding="ascii", errors="replace") as f:
        return int(re.search(r"^(?:summary|totals): (\d+)", f.read(), re.M).group(1))


def calls(name, connections, lines, rounds):
    path = ARGS.bin + "/counted"
    play(name, ["strace", "-f", "-c", "-U", "calls,name", "-o", path], connections, lines, rounds)
    with open(path, encoding="ascii") as f:
        return int(re.search(r"^\s*(\d+)\s+total", f.read(), re.M).group(1))


def counted(what, tool, names):
    result = {row: {} for row in COUNTED}
    if shutil.which(tool) is None:
        note(f"left out: {what.__name__}, for want of {tool}")
        return result
    for name in names:
        for row, (connections, lines) in COUNTED.items():
            try:
                few = what(name, connections, lines, SMALL)
                many = what(name, connections, lines, LARGE)
            except (OSError, subprocess.SubprocessError, AttributeError) as e:
                note(f"left out: {what.__name__} of {name}: {e}")
                break
            result[row][name] = round((many - few) / ((LARGE - SMALL) * connections * lines), 2)
    return result


def count_instructions(_):
    return counted(instructions, "valgrind", [n for n in once("line") if n not in NOT_IN_VALGRIND])


def count_calls(_):
    return counted(calls, "strace", once("line"))


# ---- all of it ----

def prepare():
    """Files for http, a certificate for TLS, and enough descriptors for everyone."""
    os.makedirs(ARGS.bin + "/www", exist_ok=True)
    for name, size in (("1k", 1024), ("64k", 65536)):
        with open(f"{ARGS.bin}/www/{name}", "wb") as f:
            f.write(b"x" * size)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def first_line(command):
    try:
        r = subprocess.run(command, capture_output=True, text=True, check=False)
        return (r.stdout + r.stderr).splitlines()[0]
    except (OSError, IndexError):
        return ""


def machine():
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        model = re.search(r"^model name\s*:\s*(.*)", f.read(), re.M)
    return {
        "processor": model.group(1) if model else platform.machine(),
        "processors": len(CORES),
        "kernel": "Linux " + ".".join(platform.release().split(".")[:2]),
        "compiler": first_line(os.environ.get("CC", "cc").split() + ["--version"]),
        "nginx": first_line(["nginx", "-v"]).rpartition("/")[2],
        "redis-server": first_line(["redis-server", "--version"]).partition("v=")[2].partition(" ")[0],
    }


def write_results(results):
    text = json.dumps(results, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s+", " ", found.group()), text)  # a list is one line
    with open(ARGS.out + "/results.json", "w", encoding="ascii") as f:
        f.write(text + "\n")


def old_results():
    try:
        with open(ARGS.out + "/results.json", encoding="ascii") as f:
            return json.load(f)
    except (OSError, ValueError):
        return {"rows": {}}


def arguments():
    parser = argparse.ArgumentParser(description="See tests/bench/README.md.")
    parser.add_argument("--rows", default="", help="of: " + " ".join(ROWS))
    parser.add_argument("--servers", default="", help="beside the floor, of: " + " ".join(COMMANDS["line"]))
    parser.add_argument("--secs", type=float, default=0.3)
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--bin", default="build/bench/bin")
    parser.add_argument("--out", default=HERE + "/results")
    args = parser.parse_args()
    args.bin = os.path.abspath(args.bin)
    args.rows = args.rows.split() or list(ROWS)
    args.servers = args.servers.split()
    for row in args.rows:
        if row not in ROWS:
            parser.error(f"there is no row {row}: they are {' '.join(ROWS)}")
    return args


ROWS = {**{row: timed for row in TIMED}, "idle": idle, "syscalls": count_calls, "instructions": count_instructions}
LEFT_OUT = set()
ARGS = arguments()


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C does: the servers are stopped
    prepare()
    os.makedirs(ARGS.out, exist_ok=True)
    results = old_results()  # rows that are not run now stay as they were
    results["machine"] = machine()
    for row in ARGS.rows:
        began = time.monotonic()
        results["rows"][row] = ROWS[row](row)
        write_results(results)
        note(f"{row}: {time.monotonic() - began:.0f} s")


main()
