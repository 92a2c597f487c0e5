/* The other half of static_twice_a.c. */
#define TSRV_STATIC
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"

#include "smoke.h"

#ifdef __cplusplus
extern "C"
#endif
int smoke_b(void);

int smoke_b(void) { return smoke(true); }
