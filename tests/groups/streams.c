/* Several files of tests as one program: the header is compiled once for all of them. No two of
 * them may use one name for two things. */
#include "../stream_test.c"
#include "../fairness_test.c"
#include "../ends_test.c"
#include "../accept_test.c"
#include "../drain_test.c"
