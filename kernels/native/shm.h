/* Shared-memory groups: the layout both sides agree on, and waiting. Python's side of the layout: parallel/shm_segment.py.
 *
 * Segment:  64 bytes (abort word at 12), then one 384-byte record per rank (attached u32, 4 bytes, doing u64, text).
 * Group:    control lines, one 320-byte record per member, double-buffered slots, rings.
 *
 * A rank holds an open-file-description lock on byte `rank` of the segment's file: the kernel drops it when the process ends, however it
 * ends, so a waiter can tell a dead peer from a slow one.
 */
#ifndef SHOAL_SHM_H
#define SHOAL_SHM_H

#include <stdatomic.h>
#include <stdint.h>

#define SHOAL_MAX_RANKS 64
#define SHOAL_HEADER_BYTES 128
#define SHOAL_RING_CONTROL 192

enum { SHOAL_OK = 0, SHOAL_TIMEOUT = 1, SHOAL_DEAD = 2, SHOAL_ABORTED = 3, SHOAL_MISMATCH = 4 };

/* What a rank is about to do; compared byte for byte. seq is filled in here, the rest by Python. */
typedef struct {
    uint32_t op, seq, dtype, root;
    int64_t numel, extra;
    int64_t shape[12];
} shoal_header;

/* One group as one of its ranks sees it. Mirrored by parallel/shm.py. */
typedef struct {
    uint8_t *segment, *base;
    int64_t slot_bytes, ring_bytes;
    double timeout_s, deadline_s;
    int32_t fd, rank, size, index, most_spins, spin;
    int32_t ranks[SHOAL_MAX_RANKS];
    uint32_t syncs, ops, chunks, waits;
    uint32_t sent[SHOAL_MAX_RANKS], received[SHOAL_MAX_RANKS];
    uint64_t missing, dead; /* bit per member, set when an operation fails */
    shoal_header theirs;    /* the peer's header when a received message does not match */
} shoal_group;

typedef struct {
    _Atomic uint32_t arrived;
    uint8_t pad[60];
    shoal_header headers[2];
} shoal_member;

/* Wait while *word == old. peers: bit per member whose death ends the wait. Returns SHOAL_OK or why not. */
int shoal_wait_change(shoal_group *g, _Atomic uint32_t *word, uint32_t old, _Atomic uint32_t *sleepers, uint64_t peers);
/* Store a word others wait for and wake them. */
void shoal_publish(_Atomic uint32_t *word, uint32_t value, _Atomic uint32_t *sleepers);
/* Note what this rank is doing, for the others' error messages, and start the operation's clock. Returns SHOAL_ABORTED when aborted. */
int shoal_begin(shoal_group *g, uint32_t op, uint32_t seq, int peer);
void shoal_end(shoal_group *g);

/* Operations of the whole group, all with the same header but seq. Return SHOAL_OK or why not: shm_collectives.c. */
int shoal_shm_all_reduce(shoal_group *g, shoal_header *header, uint8_t *data);
int shoal_shm_all_gather(shoal_group *g, shoal_header *header, const uint8_t *data, uint8_t *out, int64_t outer, const int64_t *rows);

#endif
