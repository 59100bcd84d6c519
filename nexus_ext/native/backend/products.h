/* products.h: what products.c may compute with in this process. */
#ifndef NXB_PRODUCTS_H
#define NXB_PRODUCTS_H

#include "nexus_products.h"
#include "walk.h"

/* Of ggml. Every one that we run with has so many, and asking for the name of others is not safe. */
#define NXB_TYPES 40

typedef void nxb_round(const float *, void *, int64_t); /* to 8 bits, so many values */

/* ggml's dot products with rows of a type. */
typedef struct nxb_dots {
    void (*dot)(int, float *, size_t, const void *, size_t, const void *, size_t, int); /* NULL: not for us */
    nxb_round *round;
    uint32_t block, block_bytes; /* of a column that is rounded */
} nxb_dots;

typedef struct nxb_ways {
    int32_t types[NX_PRODUCT_COUNT]; /* ggml's number of each type that kernels of ours compute, or -1 */
    nxb_round *round[NX_PRODUCT_COUNT];
    nxb_dots dots[NXB_TYPES]; /* by ggml's number */
    char names[64];           /* of the types of kernels of ours */
} nxb_ways;

/* Found out once, in some milliseconds. */
const nxb_ways *nxb_products_ways(void);

#endif
