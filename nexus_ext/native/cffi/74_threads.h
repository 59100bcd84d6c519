#include "nexus_threads.h"

#define NX_MAX_CORES ...

nx_status nx_model_set_cores(nx_model *, const uint32_t *cpus, size_t n);
size_t nx_model_cores(nx_model *, uint32_t *cpus);
