/* The portable stack switch, which other systems take where there is none in assembly. */
#define TSRV_USE_UCONTEXT
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"

#include "smoke.h"

int main(void) { return smoke(true); }
