/* A run's decisions, from its string of bytes: sim.c's and supervisor.c's. Included behind sys.h. */
#ifndef SIM_SCRIPT_H
#define SIM_SCRIPT_H

static bool tracing;
#define TRACE(...) (tracing ? (void)fprintf(stderr, __VA_ARGS__) : (void)0)

static const uint8_t *script;
static size_t script_at, script_size;

static void script_begin(const uint8_t *data, size_t size)
{
    script = data;
    script_size = size;
    script_at = 0;
}

static bool script_is_over(void)
{
    return script_at >= script_size;
}

/* Below `below`, which is 256 at most; 0, at which all is well, when the script is over. */
static unsigned draw(unsigned below)
{
    if (script_is_over()) {
        return 0;
    }
    k_asks(script_at, below);
    return script[script_at++] % below;
}

#define PICK(table) (table)[draw(sizeof(table) / sizeof((table)[0]))]

#endif
