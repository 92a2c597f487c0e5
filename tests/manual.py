#!/usr/bin/env python3
"""What the manual at the top of tcpserver.h says, held against the code: every code and every option is in its table
and nothing else is, the C++ block and the Python block are programs that answer.

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
    tables, struct = {}, None
    for line in section("OPTIONS"):
        words = line.split()
        if not words:
            struct = None
        elif struct is None and words[0].startswith("tsrv_"):
            struct = words[0]
            tables[struct] = set()
        elif struct is not None and line.startswith("  ") and line[2] != " ":
            while words and re.fullmatch(r"[a-z_]+,?", words[0]):
                name = words.pop(0)
                tables[struct].add(name.rstrip(","))
                if not name.endswith(","):
                    break
    structs = set(re.findall(r"^\} (tsrv_\w+_options);", HEADER, re.M))
    same("OPTIONS has every struct of options", structs, set(tables))
    for struct in sorted(structs & set(tables)):
        same(f"OPTIONS has every field of {struct}", fields_of(struct), tables[struct])


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
check_options()
check_cxx()
check_python()
print(f"{counts['ok']} passed, {counts['FAIL']} failed, {counts['skip']} skipped")
sys.exit(counts["FAIL"] > 0 or (counts["skip"] > 0 and os.environ.get("CI") == "true"))
