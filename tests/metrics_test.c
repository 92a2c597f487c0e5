/* Counters as text (>>metrics). Of workers: see process_test.c. */
#include "script.h"

#include "handlers.h"

static const tsrv_server_options defaults;

/* Is this a sample of Prometheus' text format, "name{label="value",...} number"? */
static bool is_sample(const char *line, size_t size)
{
    char name[64], labels[128], value[64];
    int end = 0;
    return sscanf(line, "%63[a-z_]{%127[a-z0-9=\",]} %63[0-9.]%n", name, labels, value, &end) == 3 &&
           (size_t)end == size && strncmp(labels, "worker=\"", 8) == 0 && labels[strlen(labels) - 1] == '"';
}

/* Every family has its HELP and TYPE once, in front of its samples; counters end in _total, gauges do not. */
static void check_format(const char *text)
{
    char family[64] = "", seen[4096] = "|";
    int samples = 0;
    for (const char *line = text; *line != 0; line = strchr(line, '\n') + 1) {
        const char *end = strchr(line, '\n');
        char name[64], type[16];
        CHECK(end != NULL);
        if (sscanf(line, "# HELP %63s", name) == 1) {
            char quoted[70];
            snprintf(quoted, sizeof quoted, "|%s|", name);
            CHECK(strstr(seen, quoted) == NULL);
            strcat(strcat(seen, name), "|");
            CHECK(family[0] == 0 || samples > 0);
            strcpy(family, name);
            samples = 0;
            CHECK(end - line > (ptrdiff_t)(strlen("# HELP ") + strlen(name) + 5) && end[-1] == '.');
        } else if (sscanf(line, "# TYPE %63s %15s", name, type) == 2) {
            bool total = strcmp(name + strlen(name) - 6, "_total") == 0;
            CHECK(strcmp(name, family) == 0 && samples == 0);
            CHECK(strcmp(type, total ? "counter" : "gauge") == 0);
        } else {
            CHECK(is_sample(line, (size_t)(end - line)));
            CHECK(strncmp(line, family, strlen(family)) == 0 && line[strlen(family)] == '{');
            samples++;
        }
    }
    CHECK(samples > 0);
}

static void expect_sample(const char *text, const char *sample)
{
    char line[256];
    snprintf(line, sizeof line, "\n%s\n", sample);
    if (strstr(text, line) == NULL) {
        T_FAIL("no line \"%s\" in\n%s", sample, text);
    }
}

TEST_LOOP(counters_are_told_as_prometheus_reads_them)
{
    static char text[8192];
    s_open_with(echo_lines, defaults);
    int one = t_connect(s_port), other = t_connect(s_port);
    s_echo(one, "hello\n");
    s_echo(other, "hi\n");
    s_finish(one);
    s_until(&s_closed, 1);
    s_server->stats->lag_max_ms = 1234;
    CHECK((size_t)tsrv_metrics_format(s_server, text, sizeof text) == strlen(text));
    check_format(text);
    expect_sample(text, "tsrv_connections_accepted_total{worker=\"0\"} 2");
    expect_sample(text, "tsrv_connections_open{worker=\"0\"} 1");
    expect_sample(text, "tsrv_connections_closed_total{worker=\"0\"} 1");
    expect_sample(text, "tsrv_connections_refused_total{worker=\"0\"} 0");
    expect_sample(text, "tsrv_connections_ended_total{worker=\"0\",reason=\"well\"} 1");
    expect_sample(text, "tsrv_connections_ended_total{worker=\"0\",reason=\"error\"} 0");
    expect_sample(text, "tsrv_received_bytes_total{worker=\"0\"} 9");
    expect_sample(text, "tsrv_sent_bytes_total{worker=\"0\"} 9");
    expect_sample(text, "tsrv_loop_lag_max_seconds{worker=\"0\"} 1.234");
    t_close(other);
    s_until(&s_closed, 2);
    s_close();
}

/* Every counter has its line. */
TEST_LOOP(no_counter_is_left_out)
{
    static char text[8192];
    uint64_t counters[sizeof(tsrv_stats) / sizeof(uint64_t)], value = 1000000;
    s_open_with(echo_lines, defaults);
    tsrv_stats before = *s_server->stats;
    for (size_t i = 0; i < COUNT(counters); i++) {
        counters[i] = value + i;
    }
    memcpy(s_server->stats, counters, sizeof counters);
    tsrv_metrics_format(s_server, text, sizeof text);
    for (size_t i = 0; i < COUNT(counters); i++) {
        char whole[32], seconds[32];
        snprintf(whole, sizeof whole, "} %d\n", (int)(value + i));
        snprintf(seconds, sizeof seconds, "} %d.%03d\n", (int)((value + i) / 1000), (int)((value + i) % 1000));
        CHECK(strstr(text, whole) != NULL || strstr(text, seconds) != NULL);
    }
    *s_server->stats = before;
    s_close();
}

/* As snprintf: what fits, a 0, and the size of all. */
TEST_LOOP(buffer_of_any_size_takes_what_fits)
{
    static char all[8192], part[8192];
    s_open_with(echo_lines, defaults);
    int size = tsrv_metrics_format(s_server, NULL, 0);
    CHECK_INT(tsrv_metrics_format(s_server, all, sizeof all), size);
    CHECK_INT(strlen(all), size);
    for (int room = 1; room <= size + 2; room++) {
        memset(part, 'x', sizeof part);
        CHECK_INT(tsrv_metrics_format(s_server, part, (size_t)room), size);
        CHECK_INT(strlen(part), room <= size ? room - 1 : size);
        CHECK(strncmp(part, all, strlen(part)) == 0);
        CHECK_INT(part[room], 'x');
    }
    s_close();
}
