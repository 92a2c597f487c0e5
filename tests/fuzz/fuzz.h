/* What the fuzzers share: the script that libFuzzer's bytes are, how to fail, and the seams. Included before the
 * header. */
#ifndef FUZZ_H
#define FUZZ_H

#include "../seam.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

#ifndef FUZZ_HEADER
#define FUZZ_HEADER "../../tcpserver.h"
#endif

/* What is done in every turn has nothing to tell the fuzzer. */
#ifdef __clang__
#define UNTRACED __attribute__((no_sanitize("coverage")))
#else
#define UNTRACED
#endif

static bool tracing;

#define TRACE(...) (tracing ? (void)fprintf(stderr, __VA_ARGS__) : (void)0)

static void (*before_failing)(void); /* if set */

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "VIOLATION: ");
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    if (before_failing != NULL) {
        before_failing();
    }
    abort();
}

/* ---- the script ---------------------------------------------------------------------------*/

static const uint8_t *script;
static size_t script_front, script_back; /* what is left lies between them */

static void script_is(const uint8_t *data, size_t size)
{
    script = data;
    script_front = 0;
    script_back = size;
}

static bool script_is_over(void)
{
    return script_front >= script_back;
}

/* A number below `below`, from the front; 0 when the script is over. */
static unsigned draw(unsigned below)
{
    return script_is_over() ? 0 : script[script_front++] % below;
}

#define PICK(table) (table)[draw(sizeof(table) / sizeof((table)[0]))]

/* ---- what must not be left ----------------------------------------------------------------*/

static int open_descriptors(void)
{
    int count = 0;
    for (int fd = 0; fd < 64; fd++) {
        count += fcntl(fd, F_GETFD) >= 0;
    }
    return count;
}

#endif
