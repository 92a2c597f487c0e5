/* A program that only sees the declarations; also compiled as C++ against the C implementation. */
#include "tcpserver.h"

#include "smoke.h"

int main(void) { return smoke(true); }
