/* chunks.h: tensors that are stored in chunks, each encoded and hashed by itself (formats/SPEC.md), and the
 * threads that read, check and decode them. Knows files and bytes; knows nothing of tensors and models.
 *
 * A tensor in chunks is an nx_file whose bytes are the decoded ones. A read of it is given to nx_io as any
 * other, and the engine passes it on to the pool that it was told of. Nothing but the bytes that were asked
 * for is written.
 */
#ifndef NEXUS_CHUNKS_H
#define NEXUS_CHUNKS_H

#include "io_internal.h"

/* From NX_CODEC_PLUGIN on: codecs of plugins, in the order in which they were registered. */
typedef enum { NX_CODEC_RAW = 0, NX_CODEC_ANS = 1, NX_CODEC_ZSTD = 2, NX_CODEC_PLUGIN = 3 } nx_codec;

typedef struct nx_chunk {
    nx_file *file;
    uint64_t offset, hash;
    uint32_t stored, raw; /* bytes */
    nx_codec codec;
} nx_chunk;

/* When hashes of chunks are compared that are stored as they are; of encoded ones they always are. */
typedef enum { NX_VERIFY_NEVER = 0, NX_VERIFY_FIRST = 1, NX_VERIFY_ALWAYS = 2 } nx_verify;

/* Byte i of matrix m is in chunk m * per_matrix + i / chunk_bytes. */
typedef struct nx_chunks {
    nx_file as_file; /* what reads of it name */
    uint64_t nbytes, matrix_bytes, chunk_bytes;
    uint32_t per_matrix, n;
    nx_verify verify;
    uint8_t *verified; /* by chunk: its hash was compared. Atomic */
    nx_chunk chunk[];
} nx_chunks;

/* n matrices of matrix_bytes, cut every chunk_bytes; the chunks are the caller's to fill in, but for `raw`.
 * NULL: no memory, or more than 2^26 chunks. */
nx_chunks *nx_chunks_create(uint64_t nbytes, uint64_t n_matrices, uint64_t chunk_bytes);
void nx_chunks_free(nx_chunks *);
/* These decoded bytes lie in one file as they are, at *offset. */
bool nx_chunks_lie(const nx_chunks *, uint64_t from, uint64_t nbytes, nx_file **file, uint64_t *offset);
/* They do, and may be read there: with nx_chunks_check afterwards, or without it. Bytes of chunks that are to
 * be checked and of which others are not wanted are read by the pool. */
typedef enum { NX_PLAIN_NOT = 0, NX_PLAIN, NX_PLAIN_CHECK } nx_plain;
nx_plain nx_chunks_plain(const nx_chunks *, uint64_t from, uint64_t nbytes, nx_file **file, uint64_t *offset);
/* Compare the hashes of whole chunks that are stored as they are with `data`, where that is to be done. Counts
 * what was compared in *checked (may be NULL). NX_E_DAMAGED: *bad is the chunk. */
nx_status nx_chunks_check(const nx_chunks *, uint64_t from, uint64_t nbytes, const void *data, uint32_t *bad,
                          uint64_t *checked);
/* For nx_read.check: check_ctx are the chunks, check_item the first byte. */
nx_status nx_chunks_check_read(nx_read *);
/* Its hash was compared. */
void nx_chunks_verified(const nx_chunks *, uint32_t chunk);
/* The chunk with this decoded byte, and where in the tensor its decoded bytes begin. */
uint32_t nx_chunks_at(const nx_chunks *, uint64_t byte, uint64_t *begin);
/* Read without the pool; *bad is the chunk at which it failed. */
nx_status nx_chunks_read(const nx_chunks *, uint64_t from, void *dst, uint64_t nbytes, uint32_t *bad, int *sys_errno);

/* Compare the hash of stored bytes, then decode them: NX_E_DAMAGED when they are not what was written. */
nx_status nx_chunk_decode(const nx_chunk *, const void *stored, void *raw);
/* Whether chunks of this codec can be decoded here: zstd needs the system's libzstd. */
int nx_codec_available(nx_codec);
/* The codec of this name; 0: nobody knows it. */
int nx_codec_find(const char *name, nx_codec *out);
/* codec_plugin.c; the name is NULL where there is no such plugin. */
const char *nx_codec_plugin_name(nx_codec);
nx_status nx_codec_plugin_decode(nx_codec, const void *stored, size_t stored_bytes, void *raw, size_t raw_bytes);

typedef struct nx_chunk_pool nx_chunk_pool;

/* Threads that each have room for one chunk of up to `stored` bytes and one of up to `raw`. */
nx_status nx_pool_create(uint32_t n_threads, uint64_t stored, uint64_t raw, nx_chunk_pool **out);
void nx_pool_destroy(nx_chunk_pool *); /* after every nx_io that was told of it */
uint64_t nx_pool_bytes(const nx_chunk_pool *);
typedef struct nx_pool_stats {
    uint64_t stored_bytes, raw_bytes, decode_ns, bytes_read, retries;
} nx_pool_stats;
void nx_pool_get_stats(nx_chunk_pool *, nx_pool_stats *);
/* Bytes that were checked elsewhere. The pool may be NULL. */
void nx_pool_count(nx_chunk_pool *, uint64_t nbytes, uint64_t ns);
nx_status nx_pool_inject(nx_chunk_pool *, const nx_fault *);
void nx_pool_clear_faults(nx_chunk_pool *);

/* For io.c, which calls them with the nx_io that the read was given to. */
void nx_pool_submit(nx_io *, nx_read *, bool front);
void nx_pool_collect(nx_io *); /* reads that have ended are `done` after this */
void nx_pool_wait(nx_io *, int64_t ns); /* until some have ended */
void nx_pool_raise(nx_io *, nx_read *);
/* As nx_io_drop and nx_io_cancel. */
int nx_pool_drop(nx_io *, nx_read *);
int nx_pool_cancel(nx_io *, nx_read *);
void nx_pool_leave(nx_io *); /* nothing of this nx_io is in its hands after this */

#endif
