/* libc headers and even the declarations come first. In the compiler's GNU mode the implementation
 * still compiles: it has fallbacks for what only _GNU_SOURCE shows. */
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "tcpserver.h"

#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"

#include "smoke.h"

int main(void) { return smoke(true); }
