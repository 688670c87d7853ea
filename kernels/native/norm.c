/* The norm that a layer says it has, of one row. */
#include "rows.h"

/* RMSNorm is rounded before its bias is added, as by single operations; LayerNorm after. */
void normalise_row(const Norm *n, int type, const void *x, void *out) {
    if (n->layer) {
        layer_norm_row(type, x, n->weight, n->bias, out, n->size, n->eps);
        return;
    }
    rms_norm_row(type, x, n->weight, out, n->size, n->eps, n->offset);
    if (n->bias) add_row(type, out, n->bias, n->size);
}
