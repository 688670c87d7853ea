/* A step of few tokens on one rank, from token ids or hidden states to the best tokens or hidden states: embedding, layers, last norm,
 * head, and what tensor ranks tell each other in between. Called from kernels/whole_step.py.
 *
 * The same operations as one by one, to the bit; what is saved is the way through Python between them.
 */
#include <math.h>
#include <string.h>

#include "fused.h"
#include "rows.h"
#include "vector.h"
#include "weight.h"

/* The structs are mirrored by kernels/whole_step.py. */
typedef struct {
    const void *embedding;          /* rows of the tokens [first_token, first_token + num_embedded), */
    const Weight *packed_embedding; /* or packed; neither: x is given */
    const void *learned;            /* a row for every position, added to its token's; or null */
    const Weight *head;             /* of the tokens from first_output on; or null: hidden states are all that is wanted */
    const float *const *rotations;  /* tables [positions, rotary_dims[i]] */
    const int64_t *rotary_dims;
    Norm norm; /* before the head */
    int64_t type, num_layers, num_rotations, hidden, first_token, num_embedded, first_output;
    float embed_scale, softcap; /* of embeddings and logits; 0: none */
} Model;

/* cos_sins[i] [num_tokens, rotary_dims[i]]; rows: the tokens that sample, [num_rows]; normed [num_rows, hidden]; logits [num_rows,
 * vocabulary]; best, values [num_rows]: the best tokens and their logits. ranks: null for one rank alone; gather: what ranks say before they
 * compare their best tokens, told [num_rows], heard [ranks, num_rows]. */
typedef struct {
    const int64_t *token_ids, *positions, *rows;
    const Step *const *steps;
    float *const *cos_sins;
    char *x, *branch, *scratch, *normed, *logits;
    int64_t *best;
    float *values;
    const Ranks *ranks;
    shoal_header *gather;
    struct Best *told, *heard;
    int64_t num_tokens, num_rows;
} Work;

/* A rank's best token of a row, and its logit; a row of two float64, whose 53 bits hold any token. */
typedef struct Best {
    double logit, token;
} Best;

/* The tokens' embeddings: of one rank alone, or this rank's part of the sum of all. */
static void look_up(const Model *m, const Work *w) {
    const int64_t row = m->hidden * element_size((int)m->type);
    for (int64_t t = 0; t < w->num_tokens; t++) {
        const int64_t id = w->token_ids[t] - m->first_token;
        char *x = w->x + t * row;
        if (id < 0 || id >= m->num_embedded) memset(x, 0, (size_t)row);
        else if (m->embedding) memcpy(x, (const char *)m->embedding + id * row, (size_t)row);
        else shoal_unpack_rows(m->packed_embedding, &id, 1, x, 1);
    }
}

/* What becomes of the embeddings of all ranks: scaled, then with their positions. */
static void finish_embeddings(const Model *m, const Work *w) {
    const int64_t row = m->hidden * element_size((int)m->type);
    for (int64_t t = 0; t < w->num_tokens; t++) {
        if (m->embed_scale != 0.0f) scale_row((int)m->type, w->x + t * row, m->embed_scale, m->hidden);
        if (m->learned) add_row((int)m->type, w->x + t * row, (const char *)m->learned + w->positions[t] * row, m->hidden);
    }
}

static int begin(const Model *m, const Work *w) {
    for (int64_t i = 0; i < m->num_rotations; i++)
        for (int64_t t = 0, dim = m->rotary_dims[i]; t < w->num_tokens; t++)
            memcpy(w->cos_sins[i] + t * dim, m->rotations[i] + w->positions[t] * dim, (size_t)dim * sizeof(float));
    if (!m->embedding && !m->packed_embedding) return SHOAL_OK;
    look_up(m, w);
    const int status = add_up(w->ranks, w->x);
    if (!status) finish_embeddings(m, w);
    return status;
}

/* The best of all ranks' best: the first among equals, of the lowest tokens; the first that is no number, when there is one. */
static int compare(const Work *w) {
#ifdef __linux__
    const int size = w->ranks->group->size;
    int64_t bytes[SHOAL_MAX_RANKS];
    for (int m = 0; m < size; m++) bytes[m] = w->num_rows * (int64_t)sizeof(Best);
    for (int64_t r = 0; r < w->num_rows; r++) w->told[r] = (Best){w->values[r], (double)w->best[r]};
    const int status = shoal_shm_all_gather(w->ranks->group, w->gather, (const uint8_t *)w->told, (uint8_t *)w->heard, 1, bytes);
    for (int64_t r = 0; r < w->num_rows && !status; r++) {
        Best found = w->heard[r];
        for (int m = 1; m < size && !isnan(found.logit); m++) {
            const Best other = w->heard[m * w->num_rows + r];
            if (other.logit > found.logit || isnan(other.logit)) found = other;
        }
        w->values[r] = (float)found.logit, w->best[r] = (int64_t)found.token;
    }
    return status;
#else
    return SHOAL_OK;
#endif
}

/* Where the best logit of a row is, and what it is. */
static int64_t best_of_row(const Model *m, const char *logits, int64_t columns, float *value) {
    const int type = (int)m->type;
    if (m->softcap != 0.0f) return largest_capped_of_row(type, logits, columns, m->softcap, value);
    const int64_t column = largest_of_row(type, logits, columns);
    *value = load_part(logits + column * element_size(type), type, 1)[0];
    return column;
}

static int end(const Model *m, const Work *w, int threads) {
    const int type = (int)m->type;
    const int64_t size = element_size(type), row = m->hidden * size;
    if (!m->head || !w->num_rows) return SHOAL_OK;
    for (int64_t r = 0; r < w->num_rows; r++) {
        const char *x = w->x + w->rows[r] * row;
        if (m->norm.weight) normalise_row(&m->norm, type, x, w->normed + r * row);
        else memcpy(w->normed + r * row, x, (size_t)row);
    }
    const int64_t columns = m->head->columns;
    shoal_multiply(m->head, w->normed, m->hidden, m->head->bias, w->logits, columns, w->num_rows, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && w->num_rows > 1 && w->num_rows * columns > 65536)
    for (int64_t r = 0; r < w->num_rows; r++) {
        const char *logits = w->logits + r * columns * size;
        w->best[r] = m->first_output + best_of_row(m, logits, columns, &w->values[r]);
    }
    return w->ranks ? compare(w) : SHOAL_OK;
}

/* A run of layers, the model's [first, first + count); before its first layer also what comes before, after its last one what comes after:
 * the caller may want to be seen alive in between. Returns 0, -1 without memory, or why the ranks cannot go on. */
int shoal_whole_step(const Model *m, const Work *w, const Layer *layers, int64_t first, int64_t count, int threads) {
    int status = first ? SHOAL_OK : begin(m, w);
    if (!status)
        status = shoal_fused_layers(layers, count, w->steps, (const float *const *)w->cos_sins, w->x, w->branch, w->ranks, w->scratch, threads);
    return !status && first + count == m->num_layers ? end(m, w, threads) : status;
}
