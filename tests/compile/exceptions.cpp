// The exceptions that are being handled go with the coroutine: waiting inside a catch block, or in a
// destructor that an exception runs, leaves those of others alone. With DECLARATIONS_ONLY the
// implementation is elsewhere, in C.
#ifndef DECLARATIONS_ONLY
#define TCPSERVER_IMPLEMENTATION
#endif
#include "tcpserver.h"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>

#define CHECK(condition)                                                                           \
    ((condition) ? (void)0                                                                         \
                 : (std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition), std::exit(1)))

static int finished;

static bool is_unwinding()
{
#if __cplusplus >= 201703L
    return std::uncaught_exceptions() > 0;
#else
    return std::uncaught_exception();
#endif
}

// What waits while an exception passes.
struct waiter {
    bool unwinds;
    ~waiter()
    {
        CHECK(is_unwinding() == unwinds);
        tsrv_sleep(0);
        tsrv_sleep(0);
        CHECK(is_unwinding() == unwinds);
    }
};

static void nest(int number, int depth)
{
    try {
        if (depth == 0) {
            waiter w = {true};
            throw number;
        }
        nest(number, depth - 1);
    } catch (int caught) {
        CHECK(caught == number);
        tsrv_sleep(0);
        throw;
    }
}

static void throw_often(void *context)
{
    int number = *static_cast<int *>(context);
    CHECK(std::current_exception() == nullptr); // also when tsrv_loop_run is called in a catch block
    CHECK(!is_unwinding());
    for (int i = 0; i < 20; i++) {
        try {
            {
                waiter w = {false};
            }
            nest(number, i % 5);
        } catch (int caught) {
            CHECK(caught == number);
            for (int j = 0; j < number % 3; j++) {
                tsrv_sleep(0);
            }
            std::exception_ptr current = std::current_exception();
            CHECK(current != nullptr);
            tsrv_sleep(0);
            CHECK(current == std::current_exception());
        }
        CHECK(std::current_exception() == nullptr);
    }
    finished++;
}

// One whose loop is freed stays in its catch block.
static void stay(void *)
{
    try {
        throw std::runtime_error("kept");
    } catch (const std::exception &) {
        while (tsrv_sleep(3600000) == TSRV_OK) {
        }
        tsrv_sleep(3600000);
        std::exit(1);
    }
}

static void quiet(int, const char *, void *)
{
}

int main()
{
    static int numbers[10];
    tsrv_loop *loop = nullptr;
    tsrv_set_log(quiet, nullptr);
    CHECK(tsrv_loop_new(&loop, nullptr) == TSRV_OK);
    for (int i = 0; i < 10; i++) {
        numbers[i] = i;
        CHECK(tsrv_spawn(loop, throw_often, &numbers[i]) == TSRV_OK);
    }
    try {
        throw std::runtime_error("outside");
    } catch (const std::exception &outside) {
        CHECK(tsrv_loop_run(loop) == TSRV_OK);
        CHECK(finished == 10);
        CHECK(tsrv_spawn(loop, stay, nullptr) == TSRV_OK);
        CHECK(tsrv_loop_run_once(loop, 0) > 0);
        CHECK(tsrv_loop_free(loop) == TSRV_OK);
        try {
            throw;
        } catch (const std::runtime_error &again) {
            CHECK(&again == &outside);
        }
    }
    CHECK(std::current_exception() == nullptr);
    return 0;
}
