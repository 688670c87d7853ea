/* A step of few tokens on one rank alone, from token ids to the best tokens: embedding, layers, last norm, head. Called from
 * kernels/whole_step.py.
 *
 * The same operations as one by one, to the bit; what is saved is the way through Python between them.
 */
#include <string.h>

#include "fused.h"
#include "rows.h"
#include "vector.h"
#include "weight.h"

/* The structs are mirrored by kernels/whole_step.py. */
typedef struct {
    const void *embedding;          /* [vocabulary, hidden], */
    const Weight *packed_embedding; /* or packed; neither: x is given */
    const void *norm;               /* [hidden], or null */
    const Weight *head;
    const float *const *rotations; /* tables [positions, rotary_dims[i]] */
    const int64_t *rotary_dims;
    int64_t num_layers, num_rotations, hidden;
    float eps, offset; /* of the norm */
} Model;

/* cos_sins[i] [num_tokens, rotary_dims[i]]; rows: the tokens that sample, [num_rows]; normed [num_rows, hidden]; logits [num_rows,
 * vocabulary]; best, values [num_rows]: the best tokens and their logits. */
typedef struct {
    const int64_t *token_ids, *positions, *rows;
    const Step *const *steps;
    float *const *cos_sins;
    char *x, *branch, *scratch, *normed, *logits;
    int64_t *best;
    float *values;
    int64_t num_tokens, num_rows;
} Work;

static void begin(const Model *m, const Work *w) {
    const int64_t row = m->hidden * element_size(m->head->type);
    for (int64_t t = 0; m->embedding && t < w->num_tokens; t++)
        memcpy(w->x + t * row, (const char *)m->embedding + w->token_ids[t] * row, (size_t)row);
    if (m->packed_embedding) shoal_unpack_rows(m->packed_embedding, w->token_ids, w->num_tokens, w->x, 1);
    for (int64_t i = 0; i < m->num_rotations; i++)
        for (int64_t t = 0, dim = m->rotary_dims[i]; t < w->num_tokens; t++)
            memcpy(w->cos_sins[i] + t * dim, m->rotations[i] + w->positions[t] * dim, (size_t)dim * sizeof(float));
}

static void end(const Model *m, const Work *w, int threads) {
    const int type = m->head->type;
    const int64_t size = element_size(type), row = m->hidden * size, columns = m->head->columns;
    for (int64_t r = 0; r < w->num_rows; r++) {
        char *normed = w->normed + r * row;
        memcpy(normed, w->branch + w->rows[r] * row, (size_t)row);
        add_row(type, normed, w->x + w->rows[r] * row, m->hidden);
        if (m->norm) rms_norm_row(type, normed, m->norm, normed, m->hidden, m->eps, m->offset);
    }
    shoal_multiply(m->head, w->normed, m->hidden, m->head->bias, w->logits, columns, w->num_rows, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && w->num_rows > 1 && w->num_rows * columns > 65536)
    for (int64_t r = 0; r < w->num_rows; r++) {
        const char *logits = w->logits + r * columns * size;
        w->best[r] = largest_of_row(type, logits, columns);
        w->values[r] = load_part(logits + w->best[r] * size, type, 1)[0];
    }
}

/* A run of layers, the model's [first, first + count); before its first layer also what comes before, after its last one what comes after:
 * the caller may want to be seen alive in between. Returns 0, or -1 without memory. */
int shoal_whole_step(const Model *m, const Work *w, const Layer *layers, int64_t first, int64_t count, int threads) {
    if (!first) begin(m, w);
    const int status = shoal_fused_layers(layers, count, w->steps, (const float *const *)w->cos_sins, w->x, w->branch, first > 0, w->scratch, threads);
    if (!status && first + count == m->num_layers && w->num_rows) end(m, w, threads);
    return status;
}
