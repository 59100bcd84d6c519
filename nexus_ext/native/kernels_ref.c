/* kernels_ref.c: the kernels in portable C. What the other implementations are compared with, and what
 * runs where there is no other. */
#include "kernels_internal.h"

static uint32_t word_at(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void residual_rows(const uint8_t *const *rows, const float *products, size_t n, size_t n_lines, float *sums) {
    for (size_t r = 0; r < n; r++) {
        const float *product = products + 16 * r;
        for (size_t line = 0; line < n_lines; line++)
            for (size_t i = 0; i < 16; i++) {
                const uint32_t word = word_at(rows[r] + 64 * line + 4 * i);
                for (size_t j = 0; j < 8; j++) sums[128 * line + 16 * j + i] += product[word >> 4 * j & 15];
            }
    }
}

const nx_kernel_table *nx_kernels_ref(void) {
    static const nx_kernel_table table = {.residual_rows = residual_rows};
    return &table;
}
