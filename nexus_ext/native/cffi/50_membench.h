#include "nexus_membench.h"

typedef struct {
    uint32_t n_threads;
    uint64_t buffer_bytes;
    uint64_t max_ns;
} nx_membench_options;

typedef struct {
    double bytes_s;
    uint64_t bytes;
    uint64_t ns;
    uint64_t buffer_bytes;
    uint32_t n_threads;
    uint32_t n_passes;
    uint64_t checksum;
} nx_membench_result;

nx_status nx_membench_read(const nx_membench_options *options, nx_membench_result *out);
