/* Must not compile with -std=c99 on Linux: a libc header came first, so _GNU_SOURCE comes too late
 * and most of what the implementation needs is hidden. Wanted is one clear #error. */
#include <stdio.h>

#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"

int main(void) { return 0; }
