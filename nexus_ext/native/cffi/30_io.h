#include "nexus_io.h"

typedef struct {
    uint32_t block_bytes;
    uint32_t depth;
    int random;
    uint64_t max_bytes;
    uint64_t max_ns;
    int engine;
    uint64_t seed;
} nx_probe_options;

typedef struct {
    uint64_t bytes;
    uint64_t ns;
    int direct;
    int engine;
    char how_cold[96];
    int sys_errno;
} nx_probe_result;

nx_status nx_io_probe(const char *path, const nx_probe_options *options, nx_probe_result *out);

typedef struct {
    uint64_t nbytes;
    uint64_t device, inode;
    int64_t mtime_ns;
    uint32_t offset_align, mem_align;
    int direct;
    char reason[96];
    int sys_errno;
} nx_file_info;

#define NX_FAULT_EIO ...
#define NX_FAULT_SHORT ...
#define NX_FAULT_EOF ...
#define NX_FAULT_EINVAL ...
#define NX_FAULT_EAGAIN ...

typedef struct {
    uint64_t offset_begin, offset_end;
    int kind;
    int32_t count;
} nx_fault;

#define NX_IO_ENGINE_URING ...

typedef struct nx_file nx_file;
typedef enum { NX_IO_DIRECT, NX_IO_BUFFERED, ... } nx_io_mode;
nx_status nx_file_open(const char *path, nx_io_mode wanted, nx_file **out);
void nx_file_get_info(const nx_file *file, nx_file_info *out);
void nx_file_close(nx_file *file);
