/* kernels_neon.c: the kernels for AArch64 with NEON and the dot product instructions. */
#include "kernels_internal.h"

#if defined(__aarch64__)
#include <arm_neon.h>

/* A table of 16 floats is 64 bytes, which is what one table lookup takes: byte k of a product of code c is
 * byte 4 c + k of the table. */
static void residual_rows(const uint8_t *const *rows, const float *products, size_t n, size_t n_lines, float *sums) {
    const uint32x4_t four = vdupq_n_u32(0x04040404u), bytes = vdupq_n_u32(0x03020100u);
    for (size_t r = 0; r < n; r++) {
        const uint8x16x4_t table = vld1q_u8_x4((const uint8_t *)(products + 16 * r));
        for (size_t quarter = 0; quarter < 4 * n_lines; quarter++) {
            uint32x4_t words = vreinterpretq_u32_u8(vld1q_u8(rows[r] + 16 * quarter));
            float *sum = sums + 128 * (quarter / 4) + 4 * (quarter % 4);
            for (size_t j = 0; j < 8; j++) {
                const uint32x4_t code = vandq_u32(words, vdupq_n_u32(15));
                const uint32x4_t index = vmlaq_u32(bytes, code, four);
                const float32x4_t product = vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(index)));
                vst1q_f32(sum + 16 * j, vaddq_f32(vld1q_f32(sum + 16 * j), product));
                words = vshrq_n_u32(words, 4);
            }
        }
    }
}

const nx_kernel_table *nx_kernels_neon(void) {
    static const nx_kernel_table table = {.residual_rows = residual_rows};
    return &table;
}
#else
const nx_kernel_table *nx_kernels_neon(void) { return NULL; }
#endif
