/* postgres_text.h - what a statement has answered, as lines of text: as PostgreSQL's COPY writes it. */
#include <string.h>

/* A value ends neither its line nor its column. */
static void write_value(tsrv_stream *stream, const char *text)
{
    static const char special[] = "\t\n\r\\", letters[] = "tnr\\";
    size_t plain = strcspn(text, special);
    for (; text[plain] != 0; text += plain + 1, plain = strcspn(text, special)) {
        tsrv_write(stream, text, plain);
        tsrv_printf(stream, "\\%c", letters[strchr(special, text[plain]) - special]);
    }
    tsrv_write(stream, text, plain);
}

/* Rows, each a line of columns between tabs; \N is NULL. */
static void write_rows(tsrv_stream *stream, const PGresult *result)
{
    int columns = PQnfields(result), values = PQntuples(result) * columns;
    for (int i = 0; i < values; i++) {
        if (PQgetisnull(result, i / columns, i % columns)) {
            tsrv_write(stream, "\\N", 2);
        } else {
            write_value(stream, PQgetvalue(result, i / columns, i % columns));
        }
        tsrv_write(stream, (i + 1) % columns == 0 ? "\n" : "\t", 1);
    }
}
