#include "nexus_kernels.h"

typedef enum { NX_ISA_REF, NX_ISA_AVX2, NX_ISA_AVX512, NX_ISA_NEON, NX_ISA_COUNT, ... } nx_isa;

nx_isa nx_kernels_isa(void);
const char *nx_kernels_isa_name(nx_isa isa);
int nx_kernels_isa_usable(nx_isa isa);
const char *nx_kernels_why(void);
double nx_kernels_dots_per_second(void);
nx_status nx_kernels_use_isa(nx_isa isa);
