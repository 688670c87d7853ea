/* Point-to-point messages over shared memory: a bounded byte ring for each ordered pair of a group. Called from parallel/shm.py.
 *
 * A message is its header and its bytes. The sender returns when all of it is in the ring; a message longer than the ring flows through it.
 * Ring: head (bytes written; line 0), tail (bytes read; line 1), sleepers of either beside them, then the data.
 */
#ifdef __linux__
#include "shm.h"

#include <string.h>

#define PIECE 65536 /* bytes published at a time, so that both ends of a long message copy at once */

typedef struct {
    _Atomic uint32_t head, head_sleepers;
    uint8_t pad0[56];
    _Atomic uint32_t tail, tail_sleepers;
    uint8_t pad1[56 + 64];
    uint8_t data[];
} ring;

static ring *ring_between(shoal_group *g, int from, int to) {
    int64_t control = (192 + (int64_t)sizeof(shoal_member) * g->size + 4095) / 4096 * 4096;
    int64_t slots = 2 * g->size * g->slot_bytes;
    int64_t index = (int64_t)from * (g->size - 1) + to - (to > from);
    return (ring *)(g->base + control + slots + index * (SHOAL_RING_CONTROL + g->ring_bytes));
}

static uint32_t least(uint32_t a, int64_t b) { return (int64_t)a < b ? a : (uint32_t)b; }

static int write_bytes(shoal_group *g, ring *r, int to, const uint8_t *bytes, int64_t count) {
    uint32_t capacity = (uint32_t)g->ring_bytes;
    while (count > 0) {
        uint32_t head = atomic_load_explicit(&r->head, memory_order_relaxed);
        uint32_t tail = atomic_load_explicit(&r->tail, memory_order_acquire);
        if (head - tail == capacity) {
            int status = shoal_wait_change(g, &r->tail, tail, &r->tail_sleepers, (uint64_t)1 << to);
            if (status != SHOAL_OK) return status;
            continue;
        }
        uint32_t at = head & (capacity - 1), piece = capacity - at;
        piece = least(least(least(piece, capacity - (head - tail)), count), PIECE);
        memcpy(r->data + at, bytes, piece);
        shoal_publish(&r->head, head + piece, &r->head_sleepers);
        bytes += piece, count -= piece;
    }
    return SHOAL_OK;
}

static int read_bytes(shoal_group *g, ring *r, int from, uint8_t *bytes, int64_t count) {
    uint32_t capacity = (uint32_t)g->ring_bytes;
    while (count > 0) {
        uint32_t tail = atomic_load_explicit(&r->tail, memory_order_relaxed);
        uint32_t head = atomic_load_explicit(&r->head, memory_order_acquire);
        if (head == tail) {
            int status = shoal_wait_change(g, &r->head, head, &r->head_sleepers, (uint64_t)1 << from);
            if (status != SHOAL_OK) return status;
            continue;
        }
        uint32_t at = tail & (capacity - 1), piece = capacity - at;
        piece = least(least(least(piece, head - tail), count), PIECE);
        memcpy(bytes, r->data + at, piece);
        shoal_publish(&r->tail, tail + piece, &r->tail_sleepers);
        bytes += piece, count -= piece;
    }
    return SHOAL_OK;
}

int shoal_shm_send(shoal_group *g, shoal_header *header, const uint8_t *data, int64_t bytes, int to) {
    header->seq = ++g->sent[to];
    int status = shoal_begin(g, header->op, header->seq, to);
    ring *r = ring_between(g, g->rank, to);
    if (status == SHOAL_OK) status = write_bytes(g, r, to, (const uint8_t *)header, sizeof *header);
    if (status == SHOAL_OK) status = write_bytes(g, r, to, data, bytes);
    if (status == SHOAL_OK) shoal_end(g);
    else g->missing = (uint64_t)1 << to;
    return status;
}

/* header: what is expected, with the sender's op code, so that equal messages are equal bytes. */
int shoal_shm_recv(shoal_group *g, shoal_header *header, uint8_t *data, int64_t bytes, int from, uint32_t doing) {
    header->seq = ++g->received[from];
    int status = shoal_begin(g, doing, header->seq, from);
    ring *r = ring_between(g, from, g->rank);
    if (status == SHOAL_OK) status = read_bytes(g, r, from, (uint8_t *)&g->theirs, sizeof g->theirs);
    if (status == SHOAL_OK && memcmp(&g->theirs, header, sizeof *header)) status = SHOAL_MISMATCH;
    if (status == SHOAL_OK) status = read_bytes(g, r, from, data, bytes);
    if (status == SHOAL_OK) shoal_end(g);
    else g->missing = (uint64_t)1 << from;
    return status;
}
#endif
