/* Several files of tests as one program: the header is compiled once for all of them. No two of
 * them may use one name for two things. */
#include "../iostream_test.c"
#include "../tcpserver_test.c"
#include "../systemd_test.c"
