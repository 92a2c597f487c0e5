#!/usr/bin/env python3
"""The branches of tcpserver.h that llvm-cov has counted, by section.
    report.py all.json floor 'sections, or nothing for all'
Prints those that were never true or never false, then one line for each section and one for all. A branch counts once,
over all programs and all macros that it came from. What TSRV_ASSERT asserts never happens, and is counted apart."""
import json
import re
import sys

MOST_MARKED = 40
CONSTANT = r'!?TSRVI_HAS_\w+|TSRVI_MADV_\w+ < 0'  # the compiler has decided: no branch is left to count


def read_header():
    """The lines; for each of them the section and the function that it is in; the lines of assertions, their number."""
    lines = open('tcpserver.h').read().split('\n')
    tag, function, places, marked, places_marked = '', '', [], set(), 0
    for number, line in enumerate(lines, 1):
        found = re.match(r' \* >>(\w+)  ', line)
        tag = found.group(1) if found else tag
        found = re.match(r'(?:static |TSRV_API )[^=;]*?(\w+)\([^;]*$', line)
        function = found.group(1) if found else function
        places.append((tag, function))
        if re.search(r'\b(TSRV_ASSERT|TSRVI_NEVER)\(', line) and not line.startswith(('#', ' *', '/*')):
            places_marked += 1
            end = number
            while ';' not in lines[end - 1] and '{' not in lines[end - 1]:
                end += 1
            marked.update(range(number, end + 1))
    return lines, places, marked, places_marked


def read_counts(path):
    """{(line, column, end line, end column): [times true, times false]}; a macro's branches are where it is used."""
    taken = {}

    def add(key, counts):
        old = taken.setdefault(key, [0, 0])
        old[0] += counts[0]
        old[1] += counts[1]

    for file in json.load(open(path))['data'][0]['files']:
        if not file['filename'].endswith('tcpserver.h'):
            continue
        for branch in file['branches']:
            add(tuple(branch[:4]), branch[4:6])
        for expansion in file['expansions']:
            if not any(name.endswith('seam.h') for name in expansion['filenames'][1:]):
                for index, branch in enumerate(expansion['branches']):
                    add(tuple(expansion['source_region'][:4]) + (index,), branch[4:6])
    return taken


def main():
    lines, places, marked, places_marked = read_header()
    taken = read_counts(sys.argv[1])
    floor, wanted = float(sys.argv[2]), sys.argv[3].split()
    sections = {}
    for key, (true, false) in sorted(taken.items()):
        line = key[0]
        section, function = places[line - 1]
        if line in marked or (wanted and section not in wanted):
            continue
        code = lines[line - 1][key[1] - 1:key[3] - 1] if key[2] == line else lines[line - 1].strip()
        if true == false == 0 and re.fullmatch(CONSTANT, code):
            continue
        count = sections.setdefault(section, [0, 0])
        count[0] += 2
        count[1] += (true > 0) + (false > 0)
        if true == 0 or false == 0:
            never = 'never reached' if true == false == 0 else 'never true' if true == 0 else 'never false'
            print('%d: %s: %s: %s' % (line, function, never, code))
    for section, (count, good) in sections.items():
        print('>>%s: %d of %d branches, %.1f %%' % (section, good, count, 100.0 * good / count))
    count, good = (sum(column) for column in zip(*sections.values()))
    print('all: %.2f %% of the branches: %d of %d; %d places never happen, at most %d' % (
        100.0 * good / count, good, count, places_marked, MOST_MARKED))
    return places_marked > MOST_MARKED or 100.0 * good / count < floor


sys.exit(main())
