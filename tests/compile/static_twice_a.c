/* Two translation units, each with an implementation of its own: no symbol may clash. */
#define TSRV_STATIC
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"

#include "smoke.h"

#ifdef __cplusplus
extern "C"
#endif
int smoke_b(void);

int main(void) { return smoke(true) != 0 || smoke_b() != 0; }
