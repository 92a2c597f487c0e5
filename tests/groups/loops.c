/* Several files of tests as one program: the header is compiled once for all of them. No two of
 * them may use one name for two things. */
#include "../buffer_test.c"
#include "../gdb_test.c"
#include "../condition_test.c"
#include "../work_test.c"
#include "../coroutine_test.c"
#include "../ioloop_test.c"
