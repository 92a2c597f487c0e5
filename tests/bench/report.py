#!/usr/bin/env python3
"""Makes table.md, and pictures if matplotlib is there, from the results.json that run.py has written.

    python3 tests/bench/report.py [directory of results.json]
"""
import json
import os
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
WHERE = sys.argv[1] if len(sys.argv) > 1 else HERE + "/results"
OURS = {"echo": "coroutine", "echo_callback": "callback"}
LABELS = {"floor": "floor", "floor again": "floor again", **OURS, "libuv": "libuv", "libevent": "libevent",
          "libev": "libev", "asio": "asio", "go": "Go", "tornado": "Tornado", "asyncio": "asyncio"}
WORDS = {
    "pp1": "64 bytes there and back, 1 connection",
    "pp50": "the same, 50 connections",
    "pp1000": "the same, 1000 connections",
    "pipe16": "50 connections, 16 lines under way on each",
    "bulk64k": "lines of 64 KiB, 8 connections",
    "bulk1m": "lines of 1 MiB, 4 connections",
    "churn": "connect, one line, close",
    "tail": "10,000 lines a second over 1000 connections",
    "mix": "10 busy connections beside 2000 silent ones",
    "upload": "64 MiB to the server",
    "download": "64 MiB from the server",
    "tls": "64 bytes over TLS, 50 connections",
    "tlsbulk": "lines of 64 KiB over TLS, 8 connections",
}
OTHERS = {"http1k": "a file of 1 KiB, 50 connections", "http64k": "a file of 64 KiB, 50 connections",
          "redis": "GET, 50 connections", "redis16": "GET, 16 under way on each of 50 connections"}


def values(row, server, key="cpu_ns"):
    return row["rounds"].get(server, {}).get(key, [])


def median(numbers):
    numbers = [n for n in numbers if n is not None]
    return statistics.median(numbers) if numbers else None


def ratios(row, server, base="floor", key="cpu_ns"):
    """To the floor in the same round."""
    return [a / b for a, b in zip(values(row, server, key), values(row, base, key)) if a and b]


def ratio(row, server, base="floor"):
    return median(ratios(row, server, base))


def show(number, digits=2):
    if number is None:
        return "-"
    return f"{number:,.{digits}f}" if number < 10 or digits == 0 else f"{number:,.1f}"


def with_spread(numbers):
    if len(numbers) < 3:
        return show(median(numbers))
    low, middle, high = statistics.quantiles(numbers, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def line(cells):
    return "| " + " | ".join(cells) + " |"


def table(head, lines):
    return [line(head), line(["---"] + ["--:"] * (len(head) - 1)), *lines, ""]


def names_in(rows, keys):
    return [n for n in LABELS if any(n in rows[k]["rounds"] for k in keys if k in rows)]


def ratio_table(rows):
    names = [n for n in names_in(rows, WORDS) if not n.startswith("floor")]
    head = ["row", "floor, us", "floor again", *[LABELS[n] for n in names]]
    lines = []
    for key in WORDS:
        if key in rows:
            row = rows[key]
            lines.append(line([f"`{key}`", show((median(values(row, "floor")) or 0) / 1000),
                               with_spread(ratios(row, "floor again")), *[show(ratio(row, n)) for n in names]]))
    return ["Processor time of a request, as a multiple of the floor's:", "", *table(head, lines)] if lines else []


def other_table(rows):
    lines = []
    for key, words in OTHERS.items():
        if key in rows:
            base, mine = ("nginx", "http") if key.startswith("http") else ("redis-server", "redis")
            row = rows[key]
            lines.append(line([f"`{key}`", words, base, show((median(values(row, base)) or 0) / 1000),
                               show(ratio(row, mine, base)), show(ratio(row, mine + "_callback", base))]))
    head = ["row", "", "beside", "its us", f"{OURS['echo']}", f"{OURS['echo_callback']}"]
    return ["The examples `http.c` and `redis.c`, as a multiple of what the program beside them uses:", "",
            *table(head, lines)] if lines else []


def count_table(rows):
    """What is no ratio: one line for each figure."""
    figures = {}
    for what in ("syscalls", "instructions"):
        for load, counts in rows.get(what, {}).items():
            if counts:
                figures[f"{what} a line, `{load}`"] = (counts, 2 if what == "syscalls" else 0)
    if "idle" in rows:
        figures["bytes of an idle connection, never active"] = (rows["idle"]["never"], 0)
        figures["bytes of an idle connection, after a line"] = (rows["idle"]["after"], 0)
    if "tail" in rows:
        p99 = {n: median(values(rows["tail"], n, "p99_us")) for n in rows["tail"]["rounds"]}
        figures["99 of 100 lines took less, `tail`, us"] = (p99, 0)
    names = [n for n in LABELS if n != "floor again" and any(n in f for f, _ in figures.values())]
    lines = [line([text, *[show(f.get(n), digits) for n in names]]) for text, (f, digits) in figures.items()]
    return ["Counts, memory and times:", "", *table(["", *[LABELS[n] for n in names]], lines)] if lines else []


def legend(rows):
    lines = [f"- `{key}`: {words}" for key, words in WORDS.items() if key in rows]
    return [*lines, ""]


def conditions(results):
    machine = results["machine"]
    timed = [r for r in results["rows"].values() if "reps" in r]
    reps, secs = sorted({r["reps"] for r in timed}), sorted({r["secs"] for r in timed})
    peers = ", ".join(f"{n} {machine[n]}" for n in ("nginx", "redis-server") if machine.get(n))
    sentence = f"{machine['processor']}, {machine['processors']} processors, {machine['kernel']}, {machine['compiler']}"
    sentence += f", {peers}" if peers else ""
    if timed:
        sentence += f"; rounds of a row: {', '.join(map(str, reps))}, seconds of a round: {', '.join(map(str, secs))}"
    return [sentence + ".", ""]


def write_table(results):
    rows = results["rows"]
    parts = [*ratio_table(rows), *legend(rows), *other_table(rows), *count_table(rows), *conditions(results)]
    with open(WHERE + "/table.md", "w", encoding="ascii") as f:
        f.write("\n".join(parts))


# ---- pictures ----

COLOURS = {"floor again": "#777777", "echo": "#d62728", "echo_callback": "#ff9896", "libuv": "#1f77b4",
           "libevent": "#17becf", "libev": "#6baed6", "asio": "#9467bd", "go": "#2ca02c", "tornado": "#8c564b",
           "asyncio": "#bc9f48"}
MARKS = {"floor again": "x", "echo": "D", "echo_callback": "D", "libuv": "o", "libevent": "s", "libev": "^",
         "asio": "v", "go": "P", "tornado": "X", "asyncio": "*"}


def save(plt, name):
    plt.savefig(f"{WHERE}/{name}.svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight",
                facecolor="white")
    plt.close()


def draw_ratios(plt, rows):
    keys = [k for k in WORDS if k in rows]
    names = [n for n in names_in(rows, keys) if n != "floor"]
    height = 0.46 * len(keys) + 1
    _, axes = plt.subplots(figsize=(9, height))
    axes.axvline(1, color="black", linewidth=1)
    for i, name in enumerate(names):
        points = [(ratio(rows[key], name), y) for y, key in enumerate(keys) if ratio(rows[key], name)]
        shift = (i - (len(names) - 1) / 2) * 0.075  # equal ones do not hide each other
        axes.scatter([x for x, _ in points], [y + shift for _, y in points], s=46 if name in OURS else 32,
                     color=COLOURS[name], marker=MARKS[name], label=LABELS[name], zorder=3 if name in OURS else 2)
    ticks = [0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(0.7, axes.get_xlim()[0]), axes.get_xlim()[1])
    axes.set_yticks(range(len(keys)), keys)
    axes.set_ylim(len(keys) - 0.5, -0.5)
    for y in range(len(keys)):
        axes.axhspan(y - 0.5, y + 0.5, color="#f4f4f4" if y % 2 else "white", zorder=0)
    axes.grid(axis="x", color="#dddddd", zorder=1)
    axes.set_title("Processor time of a request, as a multiple of a bare epoll loop's", fontsize=11)
    axes.legend(loc="upper center", ncol=(len(names) + 1) // 2, bbox_to_anchor=(0.5, -0.35 / height), frameon=False)
    save(plt, "cpu")


def draw_memory(plt, idle):
    names = [n for n in LABELS if idle["after"].get(n)][::-1]
    _, axes = plt.subplots(figsize=(9, 0.36 * len(names) + 0.8))
    sizes = [idle["after"][n] for n in names]
    axes.barh([LABELS[n] for n in names], sizes, color=[COLOURS.get(n, "#777777") for n in names], height=0.65)
    axes.set_xscale("log")
    axes.set_xlim(50, max(sizes) * 2)
    axes.set_xticks([100, 1000, 10000], ["100", "1,000", "10,000"])
    axes.set_xticks([], minor=True)
    for y, size in enumerate(sizes):
        axes.text(size * 1.05, y, f"{size:,}", va="center", fontsize=9)
    axes.set_title("Bytes of an idle connection in the server, after one line", fontsize=11)
    save(plt, "memory")


def draw(rows):
    try:
        import matplotlib
        matplotlib.use("svg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no pictures, for want of python3-matplotlib")
        return
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.family": "sans-serif",
                         "axes.spines.top": False, "axes.spines.right": False})
    if any(k in rows for k in WORDS):
        draw_ratios(plt, rows)
    if any(rows.get("idle", {}).get("after", {}).values()):
        draw_memory(plt, rows["idle"])


def main():
    with open(WHERE + "/results.json", encoding="ascii") as f:
        results = json.load(f)
    write_table(results)
    draw(results["rows"])


main()
