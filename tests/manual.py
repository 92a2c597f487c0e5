#!/usr/bin/env python3
"""What the manual at the top of tcpserver.h says, held against the code: every code and every option is in its table
and nothing else is, defaults are the code's, each mistake is made in a test, the C++ block and the Python block are
programs that answer.

    tests/manual.py [build directory]       CXX and CC choose the compilers
"""
import os
import re
import shutil
import socket
import subprocess
import sys

HEADER = open(os.path.join(os.path.dirname(__file__), "..", "tcpserver.h"), encoding="utf-8").read()
MANUAL = [line[3:] for line in HEADER.split(" */", 1)[0].split("\n")]
BUILD = os.path.join(sys.argv[1] if len(sys.argv) > 1 else "build", "manual")
CXX_MAIN = """
static int handle(tsrv_stream *stream, const tsrv_address *, void *)
{
    try {
        for (;;) {
            std::string line = "<" + read_line(stream);
            tsrv_write(stream, line.data(), line.size());
        }
    } catch (const failure &e) {
        return e.code;
    }
}

int main()
{
    server_ptr server = listen(0, handle);
    return check(tsrv_loop_run(nullptr));
}
"""
# What the code takes for 0.
DEFAULTS_MAIN = """
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"
#include <stdio.h>
#define SIZE(name) printf("tsrv_server_options %s %zu\\n", #name, o.name)
#define TIME(name) printf("tsrv_server_options %s %d\\n", #name, o.name)
int main(void)
{
    tsrv_server_options o = {0};
    tsrv_loop *loop;
    tsrvi_supervisor s;
    tsrvi_server_defaults(&o);
    SIZE(max_buffer_size), SIZE(read_chunk_size), SIZE(max_write_buffer_size), SIZE(write_high_water);
    SIZE(stack_size), SIZE(data_size), TIME(max_connections), TIME(max_per_address);
    TIME(handshake_timeout_ms), TIME(idle_timeout_ms), TIME(read_timeout_ms), TIME(write_timeout_ms);
    TIME(close_timeout_ms), TIME(grace_ms);
    if (tsrv_loop_new(&loop, NULL) != TSRV_OK || tsrvi_supervisor_open(&s, 1, NULL) != TSRV_OK) {
        return 1;
    }
    printf("tsrv_loop_options max_threads %d\\n", loop->work.most);
    printf("tsrv_loop_options slow_ms %llu\\n", (unsigned long long)(loop->slow.limit / TSRVI_MS));
    printf("tsrv_bind_options backlog %d\\n", tsrvi_backlog(NULL));
    printf("tsrv_fork_options max_restarts %d\\n", s.options.max_restarts);
    printf("tsrv_fork_options grace_ms %d\\n", s.options.grace_ms);
    printf("tsrv_fork_options start_timeout_ms %d\\n", s.options.start_timeout_ms);
    printf("tsrv_connect_options timeout_ms %d\\n", TSRVI_CONNECT_MS);
    return 0;
}
"""
# Where each of the manual's mistakes is made, and what is seen of it.
MISTAKES = {
    1: "slow_test.c slow_handler_is_named_with_its_peer",
    2: "stream_test.c debug_overwrites_what_a_slice_held",
    3: "stream_test.c debug_names_a_read_that_is_not_the_one_that_waited",
    4: "stream_test.c debug_names_a_wait_that_the_handler_swallows",
    5: "stream_test.c debug_names_a_loop_over_calls_that_fail",
    6: "stream_test.c debug_names_calls_that_need_a_coroutine",
    7: "stream_test.c debug_names_a_call_on_another_thread",
    8: "coroutine_test.c stack_overflow_ends_in_the_guard",
    9: "process_test.c refused_when_a_loop_exists",
    10: "coroutine_test.c another_coroutine_changes_what_is_shared_during_a_wait",
    11: "supervisor_test.c exit_handlers_run_where_main_ends",
    12: "read_test.c who_says_nothing_stays_where_no_time_is_set",
    13: "client_test.c connects_to_unix_sockets",
}
counts = {"ok": 0, "FAIL": 0, "skip": 0}


def tell(kind, text, why=""):
    counts[kind] += 1
    print(f"{kind:4}  manual: {text}" + ("\n      " + str(why) if why else ""), flush=True)


def section(title):
    """The lines of a section: from its title, in capitals, to the next one."""
    begin = next(i for i, line in enumerate(MANUAL) if re.match(title + r"(?!\w)", line))
    end = begin + 1
    while end < len(MANUAL) and not re.match(r"[A-Z][A-Z+]+(?!\w)", MANUAL[end]):
        end += 1
    return MANUAL[begin:end]


def code_after(lines, start):
    """The indented block behind the line that begins with `start`."""
    begin = next(i for i, line in enumerate(lines) if start in line) + 1
    block = []
    for line in lines[begin:]:
        if line.startswith("    ") or not line.strip():
            block.append(line[4:])
        elif any(block):
            break
    return "\n".join(block).strip("\n") + "\n"


def same(what, wanted, there):
    missing, extra = sorted(wanted - there), sorted(there - wanted)
    if missing or extra or not wanted:
        tell("FAIL", what, f"not in the manual: {missing}; only there: {extra}")
    else:
        tell("ok", what)


def check_codes():
    wanted = set(re.findall(r"^    X\((TSRV_E\w+),", HEADER, re.M))
    there = {line.split()[0] for line in section("CODES") if line.startswith("  TSRV_")}
    same("CODES has every code", wanted, there)


def fields_of(struct):
    body = re.search(r"typedef struct " + struct + r" \{(.*?)\n\} " + struct + ";", HEADER, re.S).group(1)
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
    names = set()
    for declaration in body.split(";"):
        function = re.search(r"\(\*(\w+)\)", declaration)
        plain = re.search(r"(\w+)\s*$", declaration)
        names |= {(function or plain).group(1)} if function or plain else set()
    return names


def check_options():
    """The tables' names, and for the first name of a line what is behind it."""
    tables, texts, struct = {}, {}, None
    for line in section("OPTIONS"):
        words = line.split()
        if not words:
            struct = None
        elif struct is None and words[0].startswith("tsrv_"):
            struct = words[0]
            tables[struct] = set()
        elif struct is not None and line.startswith("  ") and line[2] != " ":
            first = words[0]
            while words and re.fullmatch(r"[a-z_]+,?", words[0]):
                name = words.pop(0)
                tables[struct].add(name.rstrip(","))
                if not name.endswith(","):
                    break
            texts[struct, first] = " ".join(words)
    structs = set(re.findall(r"^\} (tsrv_\w+_options);", HEADER, re.M))
    same("OPTIONS has every struct of options", structs, set(tables))
    for struct in sorted(structs & set(tables)):
        same(f"OPTIONS has every field of {struct}", fields_of(struct), tables[struct])
    return texts


def number(text, name):
    """What a table's "16 MiB", "5 s", "0 = off" or "the server's, 30 s" is for the code."""
    found = re.search(r"(?:^|, )(\d+)(?: (KiB|MiB|s)\b| = (off)\b)?", text)
    if not found:
        return None
    if found.group(3):
        return -1
    unit = {"KiB": 1024, "MiB": 1024 * 1024, "s": 1000}.get(found.group(2), 1)
    return int(found.group(1)) * unit


def check_defaults(texts):
    source, program = BUILD + "/defaults.c", BUILD + "/defaults"
    with open(source, "w", encoding="utf-8") as file:
        file.write(DEFAULTS_MAIN)
    compiled = subprocess.run([os.environ.get("CC", "cc"), "-std=gnu99", "-I.", "-o", program, source, "-lpthread"],
                              capture_output=True, text=True, check=False)
    if compiled.returncode:
        tell("FAIL", "defaults", compiled.stderr)
        return
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    readme = open("README.md", encoding="utf-8").read()
    declared = HEADER.split(">>api ", 2)[2]
    wrong = []
    for struct, name, value in (line.split() for line in said):
        value = int(value)
        there = number(texts.get((struct, name), ""), name)
        if there != value:
            wrong.append(f"{struct}.{name}: {there} in OPTIONS, {value} in the code")
        # README's table of limits has those of servers and loops, in bold.
        for text in re.findall(rf"\*\*`{name}`\*\*(?: \(loop\))? (\d+ \w+)", readme):
            if struct in ("tsrv_server_options", "tsrv_loop_options") and number(text, name) != value:
                wrong.append(f"{struct}.{name}: {text} in README, {value} in the code")
        # Its declaration's comment: "0 = 60 s".
        body = re.search(r"typedef struct " + struct + r" \{(.*?)\n\} " + struct + ";", declared, re.S).group(1)
        comment = re.search(rf"\b{name};\s*/\*(.*?)\*/", body, re.S).group(1)
        told = re.search(r"\b0 =\s+(\d+(?: \w+)?)", comment)
        if told and number(told.group(1), name) != value:
            wrong.append(f"{struct}.{name}: {told.group(1)} in its declaration, {value} in the code")
    if wrong or not said:
        tell("FAIL", "OPTIONS has the code's defaults", "\n      ".join(wrong))
    else:
        tell("ok", f"OPTIONS, declarations and README have the code's defaults: {len(said)}")


def check_mistakes():
    numbers = {int(line.split()[0]) for line in section("MISTAKES") if re.match(r"  +\d+ ", line)}
    same("each of the MISTAKES is made in a test", {str(n) for n in MISTAKES}, {str(n) for n in numbers})
    for n, test in sorted(MISTAKES.items()):
        file, name = test.split()
        with open("tests/" + file, encoding="utf-8") as source:
            if not re.search(rf"^T?_?TEST\w*\({name}\b", source.read(), re.M):
                tell("FAIL", f"mistake {n}: no test {name} in {file}")


def answers(command, sent, wanted):
    """Does the server of this command answer so? Its log tells its port."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            port = None
            while port is None:
                line = server.stderr.readline()
                if not line:
                    return f"it has ended: {server.wait()}"
                found = re.search(r"listening on 127\.0\.0\.1:(\d+)", line)
                port = int(found.group(1)) if found else None
            with socket.create_connection(("127.0.0.1", port), 20) as client:
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)
                got = client.makefile("rb").read()
            return "" if got == wanted else f"it says {got!r}, not {wanted!r}"
        finally:
            server.kill()


def run(what, tool, compile_command, command, sent, wanted):
    if shutil.which(tool) is None:
        tell("skip", f"{what}: no {tool}")
        return
    compiled = subprocess.run(compile_command, capture_output=True, text=True, check=False)
    why = compiled.stderr if compiled.returncode else answers(command, sent, wanted)
    tell("FAIL" if why else "ok", what, why)


def check_cxx():
    source, program = BUILD + "/raii.cc", BUILD + "/raii"
    with open(source, "w", encoding="utf-8") as file:
        file.write("#define TCPSERVER_IMPLEMENTATION\n#include \"tcpserver.h\"\n#include <cstdlib>\n" +
                   code_after(section(r"C\+\+"), "[compiles as C++]") + CXX_MAIN)
    cxx = os.environ.get("CXX", "g++")
    run("the objects of C++ serve", cxx,
        [cxx, "-std=c++11", "-Wall", "-Wextra", "-Werror", "-I.", "-o", program, source, "-lpthread"],
        [program], b"one\ntwo\n", b"<one\n<two\n")


def check_python():
    lines = section("OTHER LANGUAGES")
    library, script = BUILD + "/libtcpserver.so", BUILD + "/upper.py"
    compile_command = code_after(lines, "layout of a few structs").split()
    compile_command[0] = os.environ.get("CC", "cc")
    compile_command[compile_command.index("-o") + 1] = library
    with open(script, "w", encoding="utf-8") as file:
        file.write(code_after(lines, "In Python ("))
    run("the binding in Python serves", compile_command[0], compile_command, [sys.executable, script, library, "0"],
        b"one\ntwo\n", b"ONE\nTWO\n")


os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
os.makedirs(BUILD, exist_ok=True)
check_codes()
check_defaults(check_options())
check_mistakes()
check_cxx()
check_python()
print(f"{counts['ok']} passed, {counts['FAIL']} failed, {counts['skip']} skipped")
sys.exit(counts["FAIL"] > 0 or (counts["skip"] > 0 and os.environ.get("CI") == "true"))
