/* kernels.c: which implementation of the kernels runs here, and why. */
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>

#include "kernels_internal.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1ul << 20)
#endif
#endif

static const char *const names[NX_ISA_COUNT] = {"reference", "avx2", "avx512-vnni", "neon-dotprod"};

/* -1: not decided yet. */
static atomic_int chosen = -1;

const char *nx_kernels_isa_name(nx_isa isa) {
    return (unsigned)isa < NX_ISA_COUNT ? names[isa] : "unknown";
}

static const nx_kernel_table *table_of(nx_isa isa) {
    switch (isa) {
    case NX_ISA_REF: return nx_kernels_ref();
    case NX_ISA_AVX2: return nx_kernels_avx2();
    case NX_ISA_AVX512: return nx_kernels_avx512();
    case NX_ISA_NEON: return nx_kernels_neon();
    default: return NULL;
    }
}

static bool cpu_has(nx_isa isa) {
    switch (isa) {
    case NX_ISA_REF: return true;
#if defined(__x86_64__)
    case NX_ISA_AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case NX_ISA_AVX512:
        return cpu_has(NX_ISA_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__) && defined(__linux__)
    case NX_ISA_NEON: return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
    case NX_ISA_NEON: return true; /* every Apple CPU that runs macOS */
#endif
    default: return false;
    }
}

int nx_kernels_isa_usable(nx_isa isa) { return table_of(isa) != NULL && cpu_has(isa); }

nx_isa nx_kernels_isa(void) {
    int isa = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (isa >= 0) return (nx_isa)isa;
    static const nx_isa best_first[] = {NX_ISA_AVX512, NX_ISA_AVX2, NX_ISA_NEON, NX_ISA_REF};
    size_t i = 0;
    while (!nx_kernels_isa_usable(best_first[i])) i++;
    isa = (int)best_first[i];
    atomic_store_explicit(&chosen, isa, memory_order_relaxed);
    return (nx_isa)isa;
}

double nx_kernels_dots_per_second(void) {
    const nx_kernel_table *table = nx_kernels_table();
    return table->dots_per_second ? table->dots_per_second() : 0;
}

nx_status nx_kernels_use_isa(nx_isa isa) {
    if ((unsigned)isa >= NX_ISA_COUNT) return NX_E_INVALID;
    if (!nx_kernels_isa_usable(isa)) return NX_E_UNSUPPORTED;
    atomic_store_explicit(&chosen, (int)isa, memory_order_relaxed);
    return NX_OK;
}

const char *nx_kernels_why(void) {
    switch (nx_kernels_isa()) {
    case NX_ISA_AVX512: return "avx512-vnni: the CPU has AVX-512 F, BW, DQ, VL and VNNI";
    case NX_ISA_AVX2: return "avx2: the CPU has AVX2, FMA and F16C, but not all of AVX-512 F, BW, DQ, VL and VNNI";
    case NX_ISA_NEON: return "neon-dotprod: the CPU has the dot product instructions";
    default:
        return "reference: portable C, because the CPU lacks AVX2, FMA and F16C (x86) or dot products (ARM); slow";
    }
}

const nx_kernel_table *nx_kernels_table(void) { return table_of(nx_kernels_isa()); }
