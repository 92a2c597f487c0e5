/* Buffers and queues (>>buffer) and the heap of timers (>>heap), each against a naive oracle, in random orders. */
#include "test.h"

static uint32_t seed;

/* xorshift: the same numbers in every run. */
static uint32_t any(uint32_t below)
{
    seed ^= seed << 13;
    seed ^= seed >> 17;
    seed ^= seed << 5;
    return seed % below;
}

/* ---- search ---------------------------------------------------------------------------------*/

/* Offset behind the first delimiter, or 0: byte by byte. */
static size_t find_naively(const char *data, size_t size, const char *delimiter, size_t delimiter_size)
{
    for (size_t end = delimiter_size; end <= size; end++) {
        if (memcmp(data + end - delimiter_size, delimiter, delimiter_size) == 0) {
            return end;
        }
    }
    return 0;
}

/* Bytes of two kinds, so that delimiters nearly match again and again. */
static void fill(char *data, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        data[i] = "ab"[any(2)];
    }
}

/* Input comes in pieces; after each piece one of two delimiters is searched, and what is found is taken. */
static void search_in_pieces(void)
{
    char delimiters[2][6];
    size_t sizes[2];
    tsrvi_pool pool = {0};
    tsrvi_buffer *buffer = tsrvi_buffer_new(&pool, 2000);
    CHECK(buffer != NULL);
    for (int i = 0; i < 2; i++) {
        sizes[i] = 1 + any(5);
        fill(delimiters[i], sizes[i]);
    }
    while (buffer->capacity - buffer->end > 40) {
        size_t piece = 1 + any(40);
        int which = any(4) == 0;
        fill(buffer->data + buffer->end, piece);
        buffer->end += piece;
        size_t found = tsrvi_buffer_find(buffer, delimiters[which], sizes[which]);
        CHECK_INT(found, find_naively(buffer->data + buffer->begin, tsrvi_buffer_size(buffer), delimiters[which],
                                      sizes[which]));
        if (found != 0) {
            tsrvi_buffer_drop(buffer, found);
        }
    }
    tsrvi_buffer_free(&pool, buffer);
    CHECK_INT(pool.size, 0);
}

TEST_ONCE(search_finds_what_a_naive_one_finds)
{
    seed = 1;
    for (int i = 0; i < 3000; i++) {
        search_in_pieces();
    }
}

/* Every place of a byte and every size around what is looked at at once; behind the size all bytes would do, and in a
 * buffer that is full nothing behind its memory is read (AddressSanitizer, Valgrind). */
TEST_ONCE(a_byte_is_found_up_to_the_size_and_no_further)
{
    tsrvi_pool pool = {0};
    for (size_t size = 0; size <= 200; size++) {
        tsrvi_buffer *buffer = tsrvi_buffer_new(&pool, 200);
        CHECK(buffer != NULL);
        memset(buffer->data, '\n', 200);
        memset(buffer->data + 200 - size, 'x', size);
        for (size_t at = 0; at <= size; at++) {
            for (size_t shown = 0; shown <= size; shown++) {
                char *data = buffer->data + 200 - size;
                data[at] = (char)(at == size ? data[at] : '\n');
                CHECK_INT(tsrvi_find_byte(data, shown, '\n'), at < shown ? at + 1 : 0);
                data[at] = (char)(at == size ? data[at] : 'x');
            }
        }
        tsrvi_buffer_free(&pool, buffer);
    }
}

/* ---- slices ---------------------------------------------------------------------------------*/

/* Bytes are taken, dropped, and copied to buffers of other sizes; what is left is always what was there. */
TEST_ONCE(slices_leave_the_bytes_behind_them_as_they_were)
{
    enum { SIZE = 4000 };
    char all[SIZE];
    tsrvi_pool pool = {0};
    seed = 2;
    for (int round = 0; round < 200; round++) {
        size_t at = 0;
        tsrvi_buffer *buffer = tsrvi_buffer_new(&pool, SIZE);
        CHECK(buffer != NULL);
        for (size_t i = 0; i < SIZE; i++) {
            all[i] = (char)any(256);
        }
        memcpy(buffer->data, all, SIZE);
        buffer->end = SIZE;
        while (at < SIZE) {
            tsrv_slice slice;
            size_t part = 1 + any(100);
            part = part < SIZE - at ? part : SIZE - at;
            if (any(3) == 0) {
                tsrvi_buffer_drop(buffer, part);
            } else {
                tsrvi_buffer_take(buffer, part, &slice);
                CHECK_MEM(slice.data, slice.size, all + at, part);
                CHECK_INT(slice.data[slice.size], 0);
                tsrvi_buffer_release(buffer);
            }
            at += part;
            if (any(10) == 0) {
                tsrvi_buffer *copy = tsrvi_buffer_copy(buffer, &pool, SIZE - at + any(50), false);
                CHECK(copy != NULL);
                tsrvi_buffer_free(&pool, buffer);
                buffer = copy;
            }
            CHECK_MEM(buffer->data + buffer->begin, tsrvi_buffer_size(buffer), all + at, SIZE - at);
        }
        CHECK_INT(tsrvi_pool_in_use(&pool), buffer->capacity);
        tsrvi_buffer_free(&pool, buffer);
    }
}

/* ---- large buffers --------------------------------------------------------------------------*/

/* What the pool keeps, in the order in which it was given. */
typedef struct kept {
    size_t capacities[1000];
    int count;
} kept;

static size_t kept_size(const kept *all)
{
    size_t size = 0;
    for (int i = 0; i < all->count; i++) {
        size += all->capacities[i];
    }
    return size;
}

/* Takes the smallest that will do, or the largest, away. Returns its capacity; 0 = there is none. */
static size_t take_kept(kept *all, size_t size, bool roomy)
{
    int best = -1;
    for (int i = 0; i < all->count; i++) {
        size_t capacity = all->capacities[i];
        if (capacity >= size && (best < 0 || (roomy ? capacity > all->capacities[best]
                                                    : capacity < all->capacities[best]))) {
            best = i;
        }
    }
    if (best < 0) {
        return 0;
    }
    size = all->capacities[best];
    all->capacities[best] = all->capacities[--all->count];
    return size;
}

TEST_ONCE(large_buffers_are_kept_as_a_naive_pool_would)
{
    enum { MOST = 60 };
    static kept all;
    tsrvi_buffer *out[MOST];
    tsrvi_pool pool = {0};
    int used = 0, from_the_pool = 0;
    seed = 7;
    for (int i = 0; i < 20000; i++) {
        if (used == 0 || (used < MOST && any(2) == 0)) {
            size_t size = TSRVI_LARGE + any(1 << 20);
            bool roomy = any(3) == 0;
            size_t expected = take_kept(&all, size, roomy);
            out[used] = tsrvi_pool_take_large(&pool, size, roomy);
            CHECK(out[used] != NULL);
            if (expected != 0) {
                CHECK_INT(out[used]->capacity, expected);
                from_the_pool++;
            }
            CHECK(out[used]->capacity >= size && out[used]->begin == 0 && out[used]->end == 0);
            used++;
        } else {
            tsrvi_buffer *buffer = out[--used];
            if (kept_size(&all) + buffer->capacity <= TSRVI_LARGE_MOST) {
                all.capacities[all.count++] = buffer->capacity;
            }
            tsrvi_pool_give(&pool, buffer);
        }
        CHECK_INT(pool.large_size, kept_size(&all));
        CHECK(pool.large_size <= TSRVI_LARGE_MOST);
    }
    CHECK(from_the_pool > 1000);
    while (used > 0) {
        tsrvi_pool_give(&pool, out[--used]);
    }
    tsrvi_pool_trim(&pool);
    CHECK(pool.large == NULL && pool.large_size == 0);
    tsrvi_pool_free(&pool);
}

/* ---- queues ---------------------------------------------------------------------------------*/

/* Small and large pieces go in at the end; buffers are taken off at the front: the bytes come out in order. */
TEST_ONCE(queues_keep_bytes_in_order)
{
    enum { MOST = 50000 };
    tsrvi_pool pool = {0};
    tsrvi_buffer *first = NULL;
    char *piece = (char *)malloc(MOST);
    uint64_t in = 0, out = 0;
    CHECK(piece != NULL);
    seed = 3;
    for (int i = 0; i < 20000; i++) {
        if (any(3) != 0) {
            size_t size = 1 + any(any(20) == 0 ? MOST : 200);
            for (size_t k = 0; k < size; k++) {
                piece[k] = (char)((in + k) % 251);
            }
            CHECK_INT(tsrvi_queue_copy(&first, &pool, piece, size), TSRV_OK);
            in += size;
        } else if (first != NULL) {
            tsrvi_buffer *buffer = tsrvi_queue_pop(&first);
            for (size_t k = buffer->begin; k < buffer->end; k++) {
                CHECK_INT((unsigned char)buffer->data[k], out++ % 251);
            }
            tsrvi_pool_give(&pool, buffer);
            CHECK(pool.count <= TSRVI_POOL_MOST);
        }
    }
    while (first != NULL) {
        tsrvi_buffer *buffer = tsrvi_queue_pop(&first);
        out += tsrvi_buffer_size(buffer);
        tsrvi_pool_give(&pool, buffer);
    }
    CHECK_INT(out, in);
    tsrvi_pool_free(&pool);
    free(piece);
}

/* ---- timers ---------------------------------------------------------------------------------*/

enum { TIMERS = 60 };

/* The earliest of those that are armed; of equal ones the one that was armed first. -1 = none is. */
static int earliest_naively(const uint64_t *dues, const int *armed, int clock)
{
    int best = -1;
    for (int i = 0; i < TIMERS; i++) {
        if (armed[i] != 0 && (best < 0 || dues[i] < dues[best] ||
                              (dues[i] == dues[best] && clock - armed[i] > clock - armed[best]))) {
            best = i;
        }
    }
    return best;
}

/* Sizes that cannot be are as without memory; what would wrap is not asked for. */
TEST_ONCE(impossible_sizes_are_as_without_memory)
{
    tsrvi_pool pool;
    memset(&pool, 0, sizeof pool);
    CHECK(tsrvi_buffer_new(&pool, SIZE_MAX / 2 + 1) == NULL);
    CHECK(tsrvi_buffer_new(&pool, SIZE_MAX - sizeof(tsrvi_buffer)) == NULL);
    CHECK(tsrvi_pool_take(&pool, SIZE_MAX) == NULL);
    CHECK(tsrvi_pool_take(&pool, SIZE_MAX - TSRVI_LARGE + 2) == NULL);
    CHECK_INT(pool.size, 0);
    CHECK_INT(t_live_allocations, 0);
}

TEST_ONCE(heap_gives_the_earliest_and_of_equal_ones_the_first)
{
    tsrvi_heap heap;
    tsrvi_timer timers[TIMERS];
    uint64_t dues[TIMERS];
    int armed[TIMERS] = {0}; /* when, by the count of changes; 0 = it is not */
    memset(&heap, 0, sizeof heap);
    memset(timers, 0, sizeof timers);
    heap.sequence = UINT32_MAX - 5000; /* it wraps */
    seed = 4;
    for (int i = 0; i < TIMERS; i++) {
        CHECK_INT(tsrvi_heap_reserve(&heap, 1), TSRV_OK);
    }
    for (int clock = 1; clock < 100000; clock++) {
        int i = (int)any(TIMERS), best;
        if (any(4) == 0) {
            tsrvi_heap_remove(&heap, &timers[i]);
            armed[i] = 0;
        } else {
            dues[i] = any(20);
            armed[i] = clock;
            tsrvi_heap_set(&heap, &timers[i], dues[i]);
        }
        best = earliest_naively(dues, armed, clock);
        CHECK_INT(heap.count == 0 ? -1 : heap.items[0] - timers, best);
        CHECK(tsrvi_heap_next(&heap) == (best < 0 ? TSRVI_FOREVER : dues[best]));
    }
    TSRV_FREE(heap.items);
}
