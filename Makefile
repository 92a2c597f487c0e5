# tcpserver.h: make help

# ---- settings, all of which combine: make test CC=clang SAN=address BACKEND=poll STD=c11 ----
CC      = cc
STD     = c99
OPT     = -O2
SAN     =
BACKEND =
QEMU    =
PREFIX  = /usr/local
BUILD   = build
TESTS   = $(patsubst tests/%_test.c,%,$(wildcard tests/*_test.c))
# ----------------------------------------------------------------------------------------------

WARNINGS = -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wundef -Wvla \
           -Wwrite-strings -Wstrict-prototypes -Wmissing-prototypes -Wold-style-definition
CFLAGS   = -std=$(STD) $(OPT) -g $(WARNINGS) -Werror
# Tests use GNU's and POSIX's functions around the header, and are not held to all of its warnings.
T_CFLAGS = -std=$(STD:c%=gnu%) -O1 -g -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror

# A build of its own for every combination, so that they never mix.
DIR = $(BUILD)/$(notdir $(CC))-$(STD)$(if $(SAN),-$(SAN))$(if $(KQUEUE),-kqueue)

SAN_FLAGS_address   = -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
SAN_FLAGS_undefined = -fsanitize=undefined -fno-sanitize-recover=all
SAN_FLAGS_thread    = -fsanitize=thread
SAN_FLAGS_valgrind  = -DTSRV_VALGRIND
SAN_FLAGS = $(SAN_FLAGS_$(SAN))

# KQUEUE=1 builds the kqueue backend on Linux too, over tests/kqueue.
KQUEUE_FLAGS = $(if $(KQUEUE),-Itests/kqueue)

RUN_valgrind = valgrind -q --error-exitcode=99 --leak-check=full --track-fds=no
RUN = $(QEMU) $(RUN_$(SAN))
export TSAN_OPTIONS = atexit_sleep_ms=0
export TEST_TIMEOUT_SCALE ?= $(if $(SAN),10,1)

EXAMPLES = $(patsubst examples/%.c,$(DIR)/%,$(wildcard examples/*.c))
PROGRAMS = $(TESTS:%=$(DIR)/%_test)

all: examples

help:
	@echo "make run       build the echo server and run it on port 8888"
	@echo "make test      build and run the tests: each in a process of its own, on every backend,"
	@echo "               in both modes, and once more in hard mode"
	@echo "make examples  build the examples"
	@echo "make check     what the compiler cannot check: see tests/check_header.sh, tests/compile.sh"
	@echo "make install   copy the header to PREFIX/include ($(PREFIX))"
	@echo "make clean     remove $(BUILD)/"
	@echo "variables      CC=clang SAN=address|undefined|thread|valgrind BACKEND=epoll|poll|kqueue"
	@echo "               STD=c99|c11|c17 KQUEUE=1 TESTS='ioloop iostream'"

run: $(DIR)/echo
	$(DIR)/echo 8888

examples: $(EXAMPLES)

test: $(EXAMPLES) $(PROGRAMS)
	@EXAMPLES='$(DIR)' sh tests/run.sh '$(strip $(RUN))' '$(BACKEND)' $(PROGRAMS)

check:
	CC='$(CC)' BUILD='$(BUILD)' sh tests/check_header.sh
	CC='$(CC)' BUILD='$(BUILD)' sh tests/compile.sh

install:
	mkdir -p '$(DESTDIR)$(PREFIX)/include'
	cp tcpserver.h '$(DESTDIR)$(PREFIX)/include/tcpserver.h'

clean:
	rm -rf '$(BUILD)'

$(DIR)/%: examples/%.c $(wildcard examples/*.h) tcpserver.h | $(DIR)
	$(CC) $(CFLAGS) $(SAN_FLAGS) $(KQUEUE_FLAGS) -o $@ $< -lpthread

$(DIR)/%_test: tests/%_test.c $(wildcard tests/*.h) tcpserver.h | $(DIR)
	$(CC) $(T_CFLAGS) $(SAN_FLAGS) $(KQUEUE_FLAGS) -o $@ $< -lpthread

$(DIR):
	mkdir -p $@

.PHONY: all help run examples test check install clean
