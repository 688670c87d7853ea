/* Waiting on words in shared memory: spin briefly, then sleep on a futex; notice deadlines, aborts and dead peers.
 *
 * How long to spin is learnt: doubled when it was worth it, halved when not, so that ranks that share a core do not hold it. No
 * sched_yield: on a busy machine it hands the core to strangers for whole time slices.
 */
#define _GNU_SOURCE
#ifdef __linux__
#include "shm.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LEAST_SPINS 16
#define PROBE 64 /* every so many waits, spin as long as allowed */
#define NAP_NS 10000000 /* how long a sleeping waiter takes to notice an abort or a death */

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static _Atomic uint32_t *abort_word(shoal_group *g) { return (_Atomic uint32_t *)(g->segment + 12); }
static uint8_t *record(shoal_group *g, int global_rank) { return g->segment + 64 + 384 * (int64_t)global_rank; }

/* Bits of those peers that had attached and whose lock is gone. */
static uint64_t dead_peers(shoal_group *g, uint64_t peers) {
    uint64_t dead = 0;
    for (int m = 0; m < g->size; m++) {
        if (m == g->rank || !(peers >> m & 1)) continue;
        if (!atomic_load((_Atomic uint32_t *)record(g, g->ranks[m]))) continue;
        struct flock lock;
        memset(&lock, 0, sizeof lock);
        lock.l_type = F_WRLCK;
        lock.l_whence = SEEK_SET;
        lock.l_start = g->ranks[m];
        lock.l_len = 1;
        if (fcntl(g->fd, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_UNLCK) dead |= (uint64_t)1 << m;
    }
    return dead;
}

int shoal_wait_change(shoal_group *g, _Atomic uint32_t *word, uint32_t old, _Atomic uint32_t *sleepers, uint64_t peers) {
    if (++g->waits % PROBE == 0) g->spin = g->most_spins; /* things may have changed */
    for (int i = 0; i < g->spin; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != old) {
            g->spin = 2 * g->spin < g->most_spins ? 2 * g->spin : g->most_spins;
            return SHOAL_OK;
        }
        relax();
    }
    g->spin = g->spin / 2 > LEAST_SPINS ? g->spin / 2 : LEAST_SPINS; /* in vain: the peer is busy or has no core, let it have ours */
    const struct timespec nap = {0, NAP_NS};
    if (g->deadline_s == 0) g->deadline_s = now_s() + g->timeout_s;
    for (;;) {
        atomic_fetch_add(sleepers, 1);
        if (atomic_load(word) == old) syscall(SYS_futex, word, FUTEX_WAIT, old, &nap, NULL, 0);
        atomic_fetch_sub(sleepers, 1);
        if (atomic_load(word) != old) return SHOAL_OK;
        if (atomic_load(abort_word(g))) return SHOAL_ABORTED;
        uint64_t dead = dead_peers(g, peers);
        if (atomic_load(word) != old) return SHOAL_OK; /* its last act before it ended may have been this one */
        if (dead) {
            g->dead = dead;
            return SHOAL_DEAD;
        }
        if (now_s() > g->deadline_s) return SHOAL_TIMEOUT;
    }
}

void shoal_publish(_Atomic uint32_t *word, uint32_t value, _Atomic uint32_t *sleepers) {
    atomic_store(word, value);
    if (atomic_load(sleepers)) syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

int shoal_begin(shoal_group *g, uint32_t op, uint32_t seq, int peer) {
    g->deadline_s = 0;
    g->missing = g->dead = 0;
    if (atomic_load_explicit(abort_word(g), memory_order_relaxed)) return SHOAL_ABORTED;
    uint64_t doing = (uint64_t)op << 56 | (uint64_t)(g->index & 0xffff) << 40 | (uint64_t)(peer & 0xff) << 32 | seq;
    atomic_store_explicit((_Atomic uint64_t *)(record(g, g->ranks[g->rank]) + 8), doing, memory_order_relaxed);
    return SHOAL_OK;
}

void shoal_end(shoal_group *g) {
    atomic_store_explicit((_Atomic uint64_t *)(record(g, g->ranks[g->rank]) + 8), 0, memory_order_relaxed);
}
#endif
