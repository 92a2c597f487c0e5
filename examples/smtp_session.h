/* smtp_session.h - what smtp.c answers to each line, and the mail that comes: nothing about
 * connections. A line that was too long comes as an empty one. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { MAX_MAIL = 1024 * 1024, MAIL_STEP = 4096 };

enum { NEW, START, MAIL, RCPT, DATA, QUIT, STAY };

static const struct verb {
    const char *text, *answer;
    int from, to; /* the step that it needs, and the one that it leads to */
} verbs[] = {{"HELO ", "250 hello", START, START},
             {"EHLO ", "250 hello", START, START},
             {"MAIL FROM:", "250 ok", START, MAIL},
             {"RCPT TO:", "250 ok", MAIL, RCPT},
             {"DATA\r\n", "354 go on", RCPT, DATA},
             {"RSET\r\n", "250 ok", START, START},
             {"NOOP", "250 ok", START, STAY},
             {"QUIT\r\n", "221 bye", START, QUIT},
             {"VRFY ", "252 try it", START, STAY},
             {"", "500 what?", START, STAY}}; /* every line begins with "" */

typedef struct session {
    int step;
    bool skip;           /* the rest of a line that was too long has still to come */
    char *mail;          /* in memory until all of it is there; NULL = nothing is */
    size_t size;         /* of the mail */
    const char *refusal; /* what will be answered to it; NULL = it will be taken */
} session;

static void drop_mail(session *s)
{
    free(s->mail);
    s->mail = NULL;
    s->size = 0;
    s->refusal = NULL;
}

static const char *command(session *s, const char *line, size_t size)
{
    const struct verb *verb = verbs;
    while (strncasecmp(line, verb->text, strlen(verb->text)) != 0) {
        verb++;
    }
    if (size == 0) {
        return "500 line too long";
    }
    if (s->step < verb->from || (verb->to == MAIL && s->step != START)) {
        return "503 not now";
    }
    s->step = verb->to == STAY ? s->step : verb->to;
    return verb->answer;
}

/* Adds a line. Of its first dot the client has made two. */
static void add_to_mail(session *s, const char *line, size_t size)
{
    size_t dot = line[0] == '.', more = size - dot, room = s->size + MAIL_STEP - 1;
    char *mail = s->mail;
    if (size == 0) {
        s->refusal = "500 line too long";
    } else if (more > MAX_MAIL - s->size) {
        s->refusal = "552 too much mail";
    } else if ((room + more) / MAIL_STEP > room / MAIL_STEP &&
               (mail = (char *)realloc(mail, (room + more) / MAIL_STEP * MAIL_STEP)) == NULL) {
        s->refusal = "452 no room for it";
    }
    if (s->refusal == NULL) {
        s->mail = mail;
        memcpy(mail + s->size, line + dot, more);
        s->size += more;
    }
}

/* A line of a mail, which "." ends. Returns the answer; NULL = the mail goes on. Printed in one
 * piece, mails that come side by side do not mix; and what has been answered with 250 must not be
 * lost any more. (A real server writes to a file: a slow reader of stdout holds up all clients.) */
static const char *content(session *s, const char *line, size_t size)
{
    const char *answer = s->refusal != NULL ? s->refusal : "250 thank you";
    if (strcmp(line, ".\r\n") != 0) {
        add_to_mail(s, line, size);
        return NULL;
    }
    if (s->refusal == NULL &&
        (fwrite(s->mail, 1, s->size, stdout) != s->size || fflush(stdout) != 0)) {
        answer = "451 cannot keep it";
    }
    drop_mail(s);
    s->step = START;
    return answer;
}
