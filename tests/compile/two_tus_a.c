/* The translation unit with the implementation; the programs that use it are elsewhere. */
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"
