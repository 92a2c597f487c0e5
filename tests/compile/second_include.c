/* The implementation is asked for three times and is there once. */
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"

#include "tcpserver.h"

#undef TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"

#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"

#include "smoke.h"

int main(void) { return smoke(true); }
