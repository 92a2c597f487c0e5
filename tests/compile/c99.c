/* The usual way: the implementation before everything else, in plain C. */
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"

#include "smoke.h"

int main(void) { return smoke(true); }
