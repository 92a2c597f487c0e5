/* Counts the bytes that the library has allocated. Included before script.h or test.h. */
#ifndef MEMORY_H
#define MEMORY_H

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "seam.h"

enum { M_HEAD = 32 }; /* bytes before each allocation, for its size */

static long m_live; /* bytes; atomic, as is the other one */
static long m_most; /* at any moment since m_forget */

static inline void *m_counted(char *memory, size_t size)
{
    long live;
    if (memory == NULL) {
        return NULL;
    }
    memcpy(memory, &size, sizeof size);
    live = __atomic_add_fetch(&m_live, (long)size, __ATOMIC_RELAXED);
    if (live > __atomic_load_n(&m_most, __ATOMIC_RELAXED)) {
        __atomic_store_n(&m_most, live, __ATOMIC_RELAXED);
    }
    return memory + M_HEAD;
}

/* The allocation itself; it is not counted any more. */
static inline char *m_uncounted(void *memory)
{
    size_t size;
    char *head = (char *)memory;
    if (head == NULL) {
        return NULL;
    }
    head -= M_HEAD;
    memcpy(&size, head, sizeof size);
    __atomic_sub_fetch(&m_live, (long)size, __ATOMIC_RELAXED);
    return head;
}

static inline void *m_malloc(size_t size)
{
    return m_counted((char *)t_malloc(size + M_HEAD), size);
}

static inline void *m_realloc(void *old, size_t size)
{
    char *head = m_uncounted(old);
    char *memory = (char *)t_realloc(head, size + M_HEAD);
    if (memory == NULL && head != NULL) {
        size_t before;
        memcpy(&before, head, sizeof before);
        m_counted(head, before);
    }
    return m_counted(memory, size);
}

static inline void m_free(void *memory)
{
    t_free(m_uncounted(memory));
}

#undef TSRV_MALLOC
#undef TSRV_REALLOC
#undef TSRV_FREE
#define TSRV_MALLOC(size) m_malloc(size)
#define TSRV_REALLOC(pointer, size) m_realloc(pointer, size)
#define TSRV_FREE(pointer) m_free(pointer)

/* What is allocated now; from now on m_most is the most since now. */
static inline long m_forget(void)
{
    long live = __atomic_load_n(&m_live, __ATOMIC_RELAXED);
    __atomic_store_n(&m_most, live, __ATOMIC_RELAXED);
    return live;
}

static inline long m_grown_since(long before)
{
    return __atomic_load_n(&m_most, __ATOMIC_RELAXED) - before;
}

#endif
