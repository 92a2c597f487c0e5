/* Several files of tests as one program: the header is compiled once for all of them. No two of
 * them may use one name for two things. */
#include "../total_test.c"
#include "../output_test.c"
#include "../read_test.c"
#include "../handler_test.c"
#include "../metrics_test.c"
#include "../slow_test.c"
#include "../proxy_test.c"
#include "../wait_test.c"
#include "../turn_test.c"
#include "../write_test.c"
