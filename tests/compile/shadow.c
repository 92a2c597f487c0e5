/* Every public function can be linked, and the declarations hide nothing of what common headers
 * declare before them. compile.sh makes functions.inc from the header: FUNCTION(name) for each. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "tcpserver.h"

typedef void (*shadow_function)(void);

static const struct {
    const char *name;
    shadow_function function;
} shadow_functions[] = {
#ifdef __cplusplus
#define FUNCTION(name) {#name, reinterpret_cast<shadow_function>(name)},
#else
#define FUNCTION(name) {#name, (shadow_function)name},
#endif
#include "functions.inc"
#undef FUNCTION
};

int main(void)
{
    const size_t count = sizeof(shadow_functions) / sizeof(shadow_functions[0]);
    size_t i, j;
    for (i = 0; i < count; i++) {
        for (j = 0; j < i; j++) {
            if (shadow_functions[i].function != shadow_functions[j].function) continue;
            fprintf(stderr, "%s is %s\n", shadow_functions[i].name, shadow_functions[j].name);
            return 1;
        }
    }
    return count == 0;
}
