#!/usr/bin/env python3
"""Do the tests notice when tcpserver.h is wrong? Changes one place of its implementation at random, builds the test
programs of the section that the place is in, and runs them: what they do not notice has survived.
    tests/mutants.py [--seed 1] [--count 60] [--sections 'read write'] [--jobs 2] [--least 95] [--line N]
Prints the survivors, each as it stands and as it was changed, then `killed/count`. A change that the compiler turns
into the same code is none. Survivors that change nothing a program can see are listed in tests/mutants.txt by the
changed line, with the reason, and are not counted. A test that fails is run once more alone: it has to fail again."""
import argparse
import concurrent.futures
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading

BUILD = os.path.join(os.environ.get('BUILD', 'build'), 'mutants')
LOCK = threading.Lock()
SUPERVISOR, LOOP = 'supervisor process supervisor_fault', 'loops reads fault'
TESTS = {  # the programs of a section: files of tests, or groups of them; those that see most are first
    'platform': 'util loops', 'list': 'loops', 'globals': 'util loops', 'util': 'util loops reads', 'log': 'util streams',
    'buffer': 'loops reads util', 'heap': 'loops reads', 'backend': LOOP, 'epoll': LOOP, 'poll': LOOP, 'loop': LOOP + ' streams',
    'slow': 'reads', 'sources': LOOP, 'turn': LOOP, 'stacks': LOOP, 'coroutine': LOOP, 'condition': 'loops', 'work': LOOP,
    'socket': 'netutil client servers', 'handed': 'netutil servers supervisor', 'bound': 'netutil servers supervisor',
    'bind': 'netutil servers', 'tls': 'tls_options tls', 'tls_files': 'tls_options tls tls_fault',
    'tls_options': 'tls_options tls tls_fault',
    'shared': 'process servers', 'peer': 'streams servers reads', 'proxy_header': 'reads', 'proxy': 'reads',
    'addresses': 'streams', 'tls_session': 'tls iostream_tls', 'tls_hello': 'tls tls_options tls_fault',
    'tls_transport': 'tls iostream_tls tls_fault', 'tls_stream': 'tls tls_fault', 'server': 'streams servers server',
    'admit': 'streams servers reads', 'accept': 'streams servers server fault process',
    'listen': 'servers streams server reads', 'metrics': 'reads process', 'client': 'client',
    'drain': 'streams servers server', 'cpus': 'servers', 'notify': 'servers supervisor', 'start': SUPERVISOR,
    'worker': SUPERVISOR + ' tls', 'identity': SUPERVISOR, 'process': SUPERVISOR, 'children': SUPERVISOR,
    'supervise': SUPERVISOR + ' tls',
    'rounds': SUPERVISOR, 'serve': SUPERVISOR}
STREAM = 'stream transport wait output ends input attempt read write files state handler settle event'
TESTS.update(dict.fromkeys(STREAM.split(), 'reads streams servers fault iostream_tls'))
CHANGES = [  # what a line is searched for, and what comes in its place
    (r' == ', ' != '), (r' != ', ' == '), (r' < ', ' <= '), (r' > ', ' >= '), (r' <= ', ' < '), (r' >= ', ' > '),
    (r' && ', ' || '), (r' \|\| ', ' && '), (r' \+ ', ' - '), (r' - ', ' + '), (r' \+= ', ' -= '), (r'\+\+', '--'),
    (r' \? ', ' != 0 ? 0 * '), (r'\btrue\b', 'false'), (r'\bfalse\b', 'true'), (r'\b0\b', '1'), (r'\b1\b', '2'),
    (r'(?<=[ (])([2-9]|\d\d+)\b', r'(\1 + 1)'), (r'\bif \((.*)\) \{$', r'if (!(\1)) {'), (r'\bwhile \((.*)\) \{$', r'while (!(\1)) {'),
    (r'^( +)return [^;]*;$', r'\1return 0;'), (r'^( +)return TSRV_OK;$', r'\1return TSRV_EINVAL;'),
    (r'^( +)[a-z][a-z_]*\(.*\);$', r'\1;'), (r'^( +)[a-z][\w.>\[\]-]* [|&+-]?= .*;$', r'\1;')]


def draw(lines, sections, rng, only, at):
    """A line's number, and what it becomes."""
    while True:
        number = at or rng.randrange(1, len(lines))
        line = lines[number - 1]
        section = sections[number - 1]
        if section in TESTS and (not only or section in only) and not re.match(r'\s*(#|\*|/\*|//|TSRV_ASSERT)', line):
            pattern, new = rng.choice(CHANGES)
            places = list(re.finditer(pattern, line))
            if places and '/*' not in line:
                place = rng.choice(places)
                return number, line[:place.start()] + place.expand(new) + line[place.end():]


def compile_header(directory):
    """The library's code, to tell whether a change is one; None: it does not compile."""
    done = subprocess.run(['cc', '-std=gnu99', '-O1', '-w', '-DTCPSERVER_IMPLEMENTATION', '-DTSRV_DEBUG', '-DTSRV_TLS_OPENSSL',
                           '-c', '-o', 'x.o', '-x', 'c', 'tcpserver.h'], cwd=directory, stderr=subprocess.DEVNULL)
    return open(directory + '/x.o', 'rb').read() if done.returncode == 0 else None


def run(directory, command, stop_at_failure):
    """What a test program prints, or with stop_at_failure the label of the first test that fails, or None."""
    process = subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors='replace', start_new_session=True, env=dict(os.environ, CI='', TEST_TIMEOUT_SCALE='1'))
    label, closing = None, False
    for line in process.stdout:
        closing = closing or re.match(r'\d+ passed, \d+ failed', line) is not None
        if line.startswith('FAIL ') and label is None:
            label = line[5:].split(':')[0]
            if stop_at_failure:
                os.kill(process.pid, signal.SIGTERM)
    process.wait()
    return label if label or closing else 'no summary'


def build(directory, program):
    name, flags = (program[:-4], ['-DT_TLS', '-DTSRV_TLS_OPENSSL']) if program.endswith('_tls') else (program, [])
    source = 'tests/%s_test.c' % name if os.path.exists('tests/%s_test.c' % name) else 'tests/groups/%s.c' % name
    libs = ['-lpthread'] + (['-lssl', '-lcrypto'] if 'tls' in program else [])
    return subprocess.run(['cc', '-std=gnu99', '-O0', '-w', '-DTSRV_DEBUG', '-DT_SECONDS=25', '-DT_PATIENCE=15'] + flags +
                          ['-o', program, source] + libs, cwd=directory, stderr=subprocess.DEVNULL).returncode == 0


def fails_anyway(program, label):
    """Does it fail with the header as it is? Then it says nothing."""
    with LOCK:
        if not os.path.exists(os.path.join(BUILD, 'original', program)):
            build(os.path.join(BUILD, 'original'), program)
    return run(os.path.join(BUILD, 'original'), ['./' + program, '--exact', label], False) is not None


def killed_by(directory, section):
    """The test that notices the change, or None."""
    for program in TESTS[section].split():
        if not build(directory, program):
            return 'the compiler'
        command = ['./' + program, '--short', '--backend', 'poll' if section == 'poll' else 'epoll']
        parts = [command + ['--part', '%d/6' % part] for part in range(6)]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            for label in filter(None, pool.map(lambda part: run(directory, part, True), parts)):
                if label == 'no summary':
                    return '%s: it has crashed' % program
                if run(directory, ['./' + program, '--exact', label], False) and not fails_anyway(program, label):
                    return '%s: %s' % (program, label)
    return None


def main():
    parser = argparse.ArgumentParser()
    for name, default in (('seed', 1), ('count', 60), ('jobs', 2), ('least', 95), ('line', 0)):
        parser.add_argument('--' + name, type=int, default=default)
    parser.add_argument('--sections', default='', help='some of them only')
    options = parser.parse_args()
    lines = open('tcpserver.h').read().split('\n')
    tag, sections = '', []
    for line in lines:
        found = re.match(r' \* >>(\w+)  ', line)
        tag = found.group(1) if found else tag
        sections.append(tag)
    known = [line.split('\t')[0].strip() for line in open('tests/mutants.txt') if line.strip() and not line.startswith('#')]
    shutil.rmtree(BUILD, ignore_errors=True)

    def prepare(name):
        directory = os.path.join(BUILD, name)
        shutil.copytree('tests', directory + '/tests')
        os.mkdir(directory + '/build')
        shutil.copy('tcpserver.h', directory)
        return directory

    original = compile_header(prepare('original'))

    def test(index):
        directory, rng = prepare(str(index)), random.Random('%d %d' % (options.seed, index))
        while True:  # until it is a change that compiles
            number, line = draw(lines, sections, rng, options.sections.split(), options.line)
            open(directory + '/tcpserver.h', 'w').write('\n'.join(lines[:number - 1] + [line] + lines[number:]))
            code = compile_header(directory)
            here = '>>%s %s' % (sections[number - 1], line.strip())
            if code is not None and code != original and line.strip() not in known and here not in known:
                break
        by = killed_by(directory, sections[number - 1])
        print('%-8s >>%s %d: %s\n      -> %s%s' % ('killed' if by else 'SURVIVED', sections[number - 1], number,
              lines[number - 1].strip(), line.strip(), '\n      by %s' % by if by else ''), flush=True)
        shutil.rmtree(directory)
        return by is not None

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        killed = sum(pool.map(test, range(options.count)))
    percent = 100.0 * killed / options.count
    text = '%.1f %% of the mutants: %d of %d, seed %d' % (percent, killed, options.count, options.seed)
    print(text)
    os.makedirs(os.path.join(BUILD, '..', 'trust'), exist_ok=True)
    open(os.path.join(BUILD, '..', 'trust', 'mutants.txt'), 'w').write(text + '\n')
    return 100 * killed < options.least * options.count


sys.exit(main())
