/* Runs of a simulation, each of which is a function of a string of bytes: from a seed, from libFuzzer, or given.
 *
 *     PROGRAM --seed N --runs N --seconds N     runs N, N + 1 and so on, until one fails or the time is over
 *     PROGRAM --all N --seconds N               all runs that differ in their first N decisions, each of which takes 0,
 *                                               1, 2 and its last value; what is decided later is 0
 *     PROGRAM --replay HEX                      one run again; SIM_TRACE=1 in the environment says what happens
 *     PROGRAM --size N                          bytes of a run at most
 *
 * Runs are made in a child, so that nothing ends the one who looks on. A run that fails is shrunk, in further children:
 * parts of its bytes are taken out or made 0 as long as it fails in the same way; what is left is printed, as the
 * option that replays it. The last line is `N passed, N failed, N skipped`.
 *
 * Included behind what it runs: d_run(data, size), which aborts when something is wrong. */
#ifndef SIM_DRIVER_H
#define SIM_DRIVER_H

/* This is the real system's part of the program: none of the names is the model's. */
#include <stdio.h>

static void d_run(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    d_run(data, size);
    return 0;
}

#ifndef SIM_FUZZER

#include "process.h"

enum { D_MOST = 4096, D_RUN_SECONDS = 20, D_VALUES = 4 };

static const char *const d_usage =
    "[--seed N] [--runs N] [--all N] [--seconds N] [--size N] [--tries N] [--replay HEX] [--verbose]";

/* What child and parent share. */
typedef struct d_shared {
    unsigned long seed; /* of the run that is under way */
    uint8_t bytes[D_MOST]; /* the same, with --all */
    unsigned long runs;
    bool whole; /* --all has come to its end */
    char message[200]; /* why it failed */
} d_shared;

static d_shared *d_state;
static size_t d_size = 600;
static bool d_verbose;
static int d_tries = 2000; /* to make a failing run smaller */

static size_t d_bytes_of(unsigned long seed, uint8_t *bytes)
{
    uint64_t state = (uint64_t)seed * 0x9E3779B97F4A7C15u + 0x1234567u;
    size_t size;
    for (size_t i = 0; i < d_size; i++) {
        state += 0x9E3779B97F4A7C15u;
        uint64_t mixed = (state ^ state >> 30) * 0xBF58476D1CE4E5B9u;
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBu;
        bytes[i] = (uint8_t)(mixed >> 33);
    }
    size = 4 + state % d_size; /* short ones too: they are what shrinks to little */
    return size < d_size ? size : d_size;
}

/* What a run has said to stderr is why it failed; ends of it that differ from run to run are cut. */
static void d_note(const char *output)
{
    const char *line = strstr(output, "VIOLATION: ");
    if (line == NULL) {
        line = strstr(output, "Assertion");
    }
    if (line == NULL) {
        line = strstr(output, "ERROR: ");
    }
    if (line == NULL) {
        line = strstr(output, "runtime error: ");
    }
    snprintf(d_state->message, sizeof d_state->message, "%.*s", line == NULL ? 0 : (int)strcspn(line, "\n"),
             line == NULL ? "" : line);
}

/* Two messages are of one kind when they differ in numbers only. */
static bool d_is_kin(const char *a, const char *b)
{
    for (;;) {
        while (*a >= '0' && *a <= '9') {
            a++;
        }
        while (*b >= '0' && *b <= '9') {
            b++;
        }
        if (*a != *b || *a == 0) {
            return *a == *b;
        }
        a++, b++;
    }
}

/* Run bytes in a child. Returns whether it went well; else d_state->message says why. */
static bool d_try(const uint8_t *bytes, size_t size)
{
    static char output[20000];
    p_child child;
    if (p_fork(&child)) {
        p_limit(D_RUN_SECONDS);
        d_run(bytes, size);
        p_leave();
    }
    if (p_await(&child, output, sizeof output)) {
        d_state->message[0] = 0;
        return true;
    }
    d_note(output);
    if (d_state->message[0] == 0) {
        snprintf(d_state->message, sizeof d_state->message, "%s", p_how(&child));
    }
    if (d_verbose) {
        fputs(output, stdout);
    }
    return false;
}

static bool d_fails_so(const uint8_t *bytes, size_t size, const char *message)
{
    return !d_try(bytes, size) && d_is_kin(d_state->message, message);
}

/* Make a failing run smaller. Returns its size. */
static size_t d_shrink(uint8_t *bytes, size_t size, const char *message)
{
    static uint8_t shorter[D_MOST];
    int tries = 0;
    bool smaller = true;
    while (smaller && tries < d_tries) {
        smaller = false;
        for (size_t part = size / 2 + 1; part > 0 && tries < d_tries; part /= 2) {
            for (size_t at = 0; at < size && tries < d_tries;) {
                size_t gone = part < size - at ? part : size - at;
                memcpy(shorter, bytes, at);
                memcpy(shorter + at, bytes + at + gone, size - at - gone);
                tries++;
                if (d_fails_so(shorter, size - gone, message)) {
                    memcpy(bytes, shorter, size - gone);
                    size -= gone;
                    smaller = true;
                } else {
                    at += part;
                }
            }
        }
        for (size_t at = 0; at < size && tries < d_tries; at++) {
            uint8_t before = bytes[at];
            for (int i = 0; i < 2 && before != 0 && bytes[at] == before; i++) {
                bytes[at] = i == 0 ? 0 : (uint8_t)(before / 2);
                tries++;
                if (bytes[at] == before || !d_fails_so(bytes, size, message)) {
                    bytes[at] = before;
                } else {
                    smaller = true;
                }
            }
        }
    }
    return size;
}

static void d_print(const uint8_t *bytes, size_t size)
{
    printf("--replay ");
    for (size_t i = 0; i < size; i++) {
        printf("%02x", bytes[i]);
    }
    printf("%s\n", size == 0 ? "''" : "");
}

/* Look at the run that failed. */
static void d_report(unsigned long seed, size_t all)
{
    static uint8_t bytes[D_MOST];
    char message[200];
    size_t size = all != 0 ? all : d_bytes_of(seed, bytes);
    memcpy(message, d_state->message, sizeof message);
    if (all != 0) {
        memcpy(bytes, d_state->bytes, all);
        printf("FAIL run %lu: ", d_state->runs + 1);
    } else {
        printf("FAIL seed %lu: ", seed);
    }
    if (d_try(bytes, size)) {
        printf("%s, but only behind the runs before it: run it again with --%s %lu --runs %lu\n", message,
               all != 0 ? "all" : "seed", all != 0 ? (unsigned long)all : seed - d_state->runs, d_state->runs + 1);
        return;
    }
    memcpy(message, d_state->message, sizeof message);
    printf("%s\n", message);
    fflush(stdout);
    size = d_shrink(bytes, size, message);
    d_print(bytes, size);
}

static void d_child(unsigned long seed, unsigned long runs, double end)
{
    static uint8_t bytes[D_MOST];
    for (; d_state->runs < runs && p_seconds() < end; seed++, d_state->runs++) {
        d_state->seed = seed;
        if (d_state->runs % 64 == 0) {
            p_limit(D_RUN_SECONDS);
        }
        d_run(bytes, d_bytes_of(seed, bytes));
    }
    p_leave();
}

/* The next of all runs: the last decision that had another value takes that, and those behind it begin anew. Returns
 * false after the last one. */
static bool d_next(uint8_t *values, size_t decisions)
{
    size_t i = k_asked_count < decisions ? k_asked_count : decisions;
    while (i > 0) {
        unsigned below = k_asked[i - 1] < D_VALUES ? k_asked[i - 1] : D_VALUES;
        if (values[i - 1] + 1u < below) {
            values[i - 1]++;
            return true;
        }
        values[--i] = 0;
    }
    return false;
}

/* The last of a decision's values stands for those that are not tried. */
static void d_spell(const uint8_t *values, size_t decisions, uint8_t *bytes)
{
    for (size_t i = 0; i < decisions; i++) {
        bool last = i < k_asked_count && k_asked[i] > D_VALUES && values[i] == D_VALUES - 1;
        bytes[i] = last ? (uint8_t)(k_asked[i] - 1) : values[i];
    }
}

static void d_child_of_all(size_t decisions, unsigned long runs, double end)
{
    static uint8_t values[D_MOST];
    bool more = true;
    for (; more && d_state->runs < runs && p_seconds() < end; d_state->runs++) {
        if (d_state->runs % 64 == 0) {
            p_limit(D_RUN_SECONDS);
        }
        d_spell(values, decisions, d_state->bytes);
        k_asked_count = 0;
        d_run(d_state->bytes, decisions);
        more = d_next(values, decisions);
    }
    d_state->whole = !more;
    p_leave();
}

static size_t d_unhex(const char *text, uint8_t *bytes)
{
    size_t size = 0;
    unsigned value;
    while (size < D_MOST && sscanf(text + 2 * size, "%2x", &value) == 1) {
        bytes[size++] = (uint8_t)value;
    }
    return size;
}

static int d_soak(unsigned long seed, size_t all, unsigned long runs, double seconds)
{
    static char output[20000];
    double begin = p_seconds(), took;
    p_child child;
    bool good;
    if (p_fork(&child)) {
        if (all != 0) {
            d_child_of_all(all, runs, begin + seconds);
        }
        d_child(seed, runs, begin + seconds);
    }
    good = p_await(&child, output, sizeof output);
    took = p_seconds() - begin;
    if (all != 0) {
        printf("%lu runs, %s with %lu decisions, in %.1f s\n", d_state->runs,
               d_state->whole ? "all that there are" : "not all that there are", (unsigned long)all, took);
    } else {
        printf("%lu runs from seed %lu in %.1f s, %.0f a second\n", d_state->runs, seed, took,
               (double)d_state->runs / took);
    }
    if (!good) {
        d_report(d_state->seed, all);
    }
    printf("%d passed, %d failed, 0 skipped\n", good, !good);
    return !good;
}

int main(int argc, char **argv)
{
    unsigned long seed = 1, runs = (unsigned long)-1;
    size_t all = 0;
    double seconds = 60;
    d_state = (d_shared *)p_shared(sizeof *d_state);
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "0";
        if (strcmp(argv[i], "--seed") == 0) {
            seed = strtoul(value, NULL, 10), i++;
        } else if (strcmp(argv[i], "--runs") == 0) {
            runs = strtoul(value, NULL, 10), i++;
        } else if (strcmp(argv[i], "--all") == 0) {
            all = strtoul(value, NULL, 10), i++;
            all = all < D_MOST ? all : D_MOST;
        } else if (strcmp(argv[i], "--seconds") == 0) {
            seconds = strtod(value, NULL), i++;
        } else if (strcmp(argv[i], "--size") == 0) {
            d_size = strtoul(value, NULL, 10), i++;
            d_size = d_size < 8 ? 8 : d_size > D_MOST ? D_MOST : d_size;
        } else if (strcmp(argv[i], "--tries") == 0) {
            d_tries = atoi(value), i++;
        } else if (strcmp(argv[i], "--verbose") == 0) {
            d_verbose = true;
        } else if (strcmp(argv[i], "--replay") == 0) {
            static uint8_t bytes[D_MOST];
            d_run(bytes, d_unhex(value, bytes));
            puts("1 passed, 0 failed, 0 skipped");
            return 0;
        } else {
            printf("%s %s\n", argv[0], d_usage);
            return 2;
        }
    }
    return d_soak(seed, all, runs, seconds);
}

#endif
#endif
