/* opencl.c: see nexus_opencl.h. The few declarations of OpenCL that are used here are our own: they are facts
 * of its binary interface (OpenCL 1.2), so neither headers nor a library are needed to build. */
#include "nexus_opencl.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels_internal.h"

/* -- OpenCL's interface ------------------------------------------------------------------------- */

typedef struct cl_object *cl_handle; /* platforms, devices, contexts, queues, programs, kernels, buffers */

enum {
    CL_DEVICE_TYPE = 0x1000,
    CL_DEVICE_SINGLE_FP_CONFIG = 0x101b,
    CL_DEVICE_ENDIAN_LITTLE = 0x1026,
    CL_DEVICE_NAME = 0x102b,
    CL_PROGRAM_BUILD_LOG = 0x1183,
    CL_TYPE_GPU = 1 << 2,
    CL_FP_ROUND_TO_NEAREST = 1 << 2,
    CL_MEM_READ_WRITE = 1 << 0,
    CL_MEM_READ_ONLY = 1 << 2,
};
#define CL_TYPE_ALL 0xffffffffu

/* X(result, name without "cl", arguments) */
#define CL_FUNCTIONS(X)                                                                                              \
    X(int32_t, GetPlatformIDs, (uint32_t, cl_handle *, uint32_t *))                                                  \
    X(int32_t, GetDeviceIDs, (cl_handle, uint64_t, uint32_t, cl_handle *, uint32_t *))                               \
    X(int32_t, GetDeviceInfo, (cl_handle, uint32_t, size_t, void *, size_t *))                                       \
    X(cl_handle, CreateContext,                                                                                      \
      (const intptr_t *, uint32_t, const cl_handle *, void (*)(const char *, const void *, size_t, void *), void *,  \
       int32_t *))                                                                                                   \
    X(cl_handle, CreateCommandQueue, (cl_handle, cl_handle, uint64_t, int32_t *))                                    \
    X(cl_handle, CreateProgramWithSource, (cl_handle, uint32_t, const char **, const size_t *, int32_t *))           \
    X(int32_t, BuildProgram,                                                                                         \
      (cl_handle, uint32_t, const cl_handle *, const char *, void (*)(cl_handle, void *), void *))                   \
    X(int32_t, GetProgramBuildInfo, (cl_handle, cl_handle, uint32_t, size_t, void *, size_t *))                      \
    X(cl_handle, CreateKernel, (cl_handle, const char *, int32_t *))                                                 \
    X(cl_handle, CreateBuffer, (cl_handle, uint64_t, size_t, void *, int32_t *))                                     \
    X(int32_t, SetKernelArg, (cl_handle, uint32_t, size_t, const void *))                                            \
    X(int32_t, EnqueueWriteBuffer,                                                                                   \
      (cl_handle, cl_handle, uint32_t, size_t, size_t, const void *, uint32_t, const cl_handle *, cl_handle *))      \
    X(int32_t, EnqueueReadBuffer,                                                                                    \
      (cl_handle, cl_handle, uint32_t, size_t, size_t, void *, uint32_t, const cl_handle *, cl_handle *))            \
    X(int32_t, EnqueueNDRangeKernel,                                                                                 \
      (cl_handle, cl_handle, uint32_t, const size_t *, const size_t *, const size_t *, uint32_t, const cl_handle *,  \
       cl_handle *))                                                                                                 \
    X(int32_t, Finish, (cl_handle))                                                                                  \
    X(int32_t, ReleaseMemObject, (cl_handle))

static struct {
#define CL_FIELD(result, name, arguments) result(*name) arguments;
    CL_FUNCTIONS(CL_FIELD)
#undef CL_FIELD
} cl;

/* -- the device --------------------------------------------------------------------------------- */

/* Codes are two bits, 16 inputs a word; a word of all rows follows the same word of all rows, so that
 * neighbouring items read neighbouring memory. One item is one row and one column. */
static const char source[] =
    "#pragma OPENCL FP_CONTRACT OFF\n"
    "int four(uint w, global const char *q) {\n"
    "    return (int)(w & 3) * q[0] + (int)(w >> 2 & 3) * q[1] + (int)(w >> 4 & 3) * q[2] + (int)(w >> 6 & 3) * q[3];\n"
    "}\n"
    "float all_lanes(const float *s) {\n"
    "    const float a = s[4] + s[0], b = s[5] + s[1], c = s[6] + s[2], d = s[7] + s[3];\n"
    "    return (a + c) + (b + d);\n"
    "}\n"
    "#define ARGUMENTS global const uint *codes, global const float *scales, global const char *q, \\\n"
    "                  global const float *d, global const int *extra, global float *y, uint n_blocks, uint n_out\n"
    "kernel void lanes(ARGUMENTS) {\n" /* Q8_K: blocks of 256, extra: 8 starts */
    "    const size_t o = get_global_id(0), c = get_global_id(1);\n"
    "    if (o >= n_out) return;\n"
    "    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};\n"
    "    for (size_t b = 0; b < n_blocks; b++) {\n"
    "        const size_t a = c * n_blocks + b;\n"
    "        int dot[8];\n"
    "        for (int i = 0; i < 8; i++) dot[i] = extra[8 * a + i];\n"
    "        for (int w = 0; w < 16; w++) {\n"
    "            const uint word = codes[(16 * b + w) * n_out + o];\n"
    "            for (int i = 0; i < 4; i++) dot[w % 2 * 4 + i] += four(word >> 8 * i, q + 256 * a + 16 * w + 4 * i);\n"
    "        }\n"
    "        const float scale = d[a] * scales[b * n_out + o];\n"
    "        for (int i = 0; i < 8; i++) sum[i] = fma((float)dot[i], scale, sum[i]);\n"
    "    }\n"
    "    y[c * n_out + o] = all_lanes(sum);\n"
    "}\n"
    "kernel void rows(ARGUMENTS) {\n" /* Q8_0: blocks of 2 x 32, extra: 2 starts */
    "    const size_t o = get_global_id(0), c = get_global_id(1);\n"
    "    if (o >= n_out) return;\n"
    "    float sum = 0;\n"
    "    for (size_t b = 0; b < n_blocks; b++) {\n"
    "        const size_t a = c * n_blocks + b;\n"
    "        float part = 0;\n"
    "        for (int h = 0; h < 2; h++) {\n"
    "            int dot = extra[2 * a + h];\n"
    "            for (int w = 2 * h; w < 2 * h + 2; w++) {\n"
    "                const uint word = codes[(4 * b + w) * n_out + o];\n"
    "                for (int i = 0; i < 4; i++) dot += four(word >> 8 * i, q + 64 * a + 16 * w + 4 * i);\n"
    "            }\n"
    "            part = fma(d[2 * a + h], (float)dot, part);\n"
    "        }\n"
    "        sum = fma(scales[b * n_out + o], part, sum);\n"
    "    }\n"
    "    y[c * n_out + o] = sum;\n"
    "}\n"
    "kernel void bits(ARGUMENTS) {\n" /* Q8_0: blocks of 4 x 32, extra: 4 x 8 sums of four inputs */
    "    const size_t o = get_global_id(0), c = get_global_id(1);\n"
    "    if (o >= n_out) return;\n"
    "    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};\n"
    "    for (size_t b = 0; b < n_blocks; b++) {\n"
    "        const size_t a = c * n_blocks + b;\n"
    "        float part[8];\n"
    "        for (int w = 0; w < 8; w++) {\n"
    "            const uint word = codes[(8 * b + w) * n_out + o];\n"
    "            const float factor = d[4 * a + w / 2];\n"
    "            for (int k = 0; k < 4; k++) {\n"
    "                const int i = w % 2 * 4 + k;\n"
    "                const int twice = 2 * four(word >> 8 * k, q + 128 * a + 16 * w + 4 * k);\n"
    "                const float s = (float)(twice - extra[32 * a + w / 2 * 8 + i]);\n"
    "                part[i] = w < 2 ? factor * s : fma(factor, s, part[i]);\n"
    "            }\n"
    "        }\n"
    "        for (int i = 0; i < 8; i++) sum[i] = fma(scales[b * n_out + o], part[i], sum[i]);\n"
    "    }\n"
    "    y[c * n_out + o] = all_lanes(sum);\n"
    "}\n";

enum { LANES, ROWS, BITS, N_KERNELS };

static struct {
    bool opened, usable; /* guarded by `lock`, as all below */
    char why[400];
    cl_handle device, context, queue, kernels[N_KERNELS];
    cl_handle q, d, extra, y; /* what one product needs beside its matrix */
    size_t q_bytes, d_bytes, extra_bytes, y_bytes;
    void *staging;
    size_t staging_bytes;
} dev;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local char error_text[120];

static nx_status failed(const char *call, int32_t code) {
    snprintf(error_text, sizeof error_text, "OpenCL's cl%s failed with %d", call, (int)code);
    return NX_E_IO;
}

const char *nx_opencl_error(void) { return error_text; }

static bool load(void) {
    const char *asked = getenv("NEXUS_OPENCL_LIBRARY");
#ifdef __APPLE__
    static const char *const usual[] = {"/System/Library/Frameworks/OpenCL.framework/OpenCL"};
#else
    static const char *const usual[] = {"libOpenCL.so.1", "libOpenCL.so"};
#endif
    void *library = NULL;
    if (asked && *asked) library = dlopen(asked, RTLD_NOW | RTLD_LOCAL);
    else
        for (size_t i = 0; i < sizeof usual / sizeof *usual && !library; i++)
            library = dlopen(usual[i], RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(dev.why, sizeof dev.why, "there is no OpenCL: %s", dlerror());
        return false;
    }
#define CL_FIND(result, name, arguments)                                                                   \
    {                                                                                                      \
        void *symbol = dlsym(library, "cl" #name);                                                         \
        if (!symbol) {                                                                                     \
            snprintf(dev.why, sizeof dev.why, "the OpenCL library has no cl" #name);                       \
            return false;                                                                                  \
        }                                                                                                  \
        memcpy(&cl.name, &symbol, sizeof symbol);                                                          \
    }
    CL_FUNCTIONS(CL_FIND)
#undef CL_FIND
    return true;
}

/* What products need: little endian, rounding to the nearest. */
static bool is_good(cl_handle device, char *name, size_t name_bytes) {
    uint64_t config = 0;
    uint32_t little = 0;
    if (cl.GetDeviceInfo(device, CL_DEVICE_NAME, name_bytes - 1, name, NULL) != 0) return false;
    return cl.GetDeviceInfo(device, CL_DEVICE_ENDIAN_LITTLE, sizeof little, &little, NULL) == 0 && little &&
           cl.GetDeviceInfo(device, CL_DEVICE_SINGLE_FP_CONFIG, sizeof config, &config, NULL) == 0 &&
           (config & CL_FP_ROUND_TO_NEAREST);
}

#define MOST 16 /* platforms, and devices of each */

static bool choose_device(char *name, size_t name_bytes) {
    const char *asked = getenv("NEXUS_OPENCL_DEVICE");
    cl_handle platforms[MOST];
    uint32_t n_platforms = 0, n_seen = 0;
    const int32_t code = cl.GetPlatformIDs(MOST, platforms, &n_platforms);
    if (code != 0) n_platforms = 0; /* of a loader without drivers it is an error */
    if (n_platforms > MOST) n_platforms = MOST;
    for (uint32_t p = 0; p < n_platforms; p++) {
        cl_handle devices[MOST];
        uint32_t n = 0;
        if (cl.GetDeviceIDs(platforms[p], CL_TYPE_ALL, MOST, devices, &n) != 0) continue;
        for (uint32_t i = 0; i < n && i < MOST; i++) {
            char found[128] = {0};
            uint64_t type = 0;
            n_seen++;
            if (!is_good(devices[i], found, sizeof found) || (asked && *asked && !strstr(found, asked))) continue;
            (void)cl.GetDeviceInfo(devices[i], CL_DEVICE_TYPE, sizeof type, &type, NULL);
            if (dev.device && !(type & CL_TYPE_GPU)) continue;
            dev.device = devices[i];
            snprintf(name, name_bytes, "%s", found);
            if (type & CL_TYPE_GPU) return true;
        }
    }
    if (dev.device) return true;
    if (!n_seen) snprintf(dev.why, sizeof dev.why, "OpenCL has no device (%u platforms, status %d)", n_platforms, code);
    else
        snprintf(dev.why, sizeof dev.why, "none of OpenCL's %u devices rounds to the nearest%s%s", n_seen,
                 asked && *asked ? " and is called " : "", asked ? asked : "");
    return false;
}

static bool compile(void) {
    int32_t code = 0;
    const char *text = source;
    const char *call = "CreateContext";
    dev.context = cl.CreateContext(NULL, 1, &dev.device, NULL, NULL, &code);
    if (code == 0) {
        call = "CreateCommandQueue";
        dev.queue = cl.CreateCommandQueue(dev.context, dev.device, 0, &code);
    }
    cl_handle program = NULL;
    if (code == 0) {
        call = "CreateProgramWithSource";
        program = cl.CreateProgramWithSource(dev.context, 1, &text, NULL, &code);
    }
    if (code == 0) {
        call = "BuildProgram";
        code = cl.BuildProgram(program, 1, &dev.device, "", NULL, NULL);
        if (code != 0) {
            char log[240] = {0};
            (void)cl.GetProgramBuildInfo(program, dev.device, CL_PROGRAM_BUILD_LOG, sizeof log - 1, log, NULL);
            snprintf(dev.why, sizeof dev.why, "the OpenCL device cannot compile our kernels (%d): %s", code, log);
            return false;
        }
    }
    static const char *const names[N_KERNELS] = {"lanes", "rows", "bits"};
    for (int k = 0; k < N_KERNELS && code == 0; k++) {
        call = "CreateKernel";
        dev.kernels[k] = cl.CreateKernel(program, names[k], &code);
    }
    if (code != 0) snprintf(dev.why, sizeof dev.why, "OpenCL's cl%s failed with %d", call, (int)code);
    return code == 0;
}

nx_status nx_opencl_open(void) {
    pthread_mutex_lock(&lock);
    if (!dev.opened) {
        char name[128];
        dev.opened = true;
        dev.usable = load() && choose_device(name, sizeof name) && compile();
        if (dev.usable) snprintf(dev.why, sizeof dev.why, "opencl: %s", name);
    }
    const bool usable = dev.usable;
    pthread_mutex_unlock(&lock);
    return usable ? NX_OK : NX_E_UNSUPPORTED;
}

const char *nx_opencl_why(void) { return dev.opened ? dev.why : "OpenCL was not asked for"; }

/* -- matrices ----------------------------------------------------------------------------------- */

struct nx_opencl_matrix {
    nx_ternary_type type;
    uint32_t n_in, n_out, block;
    cl_handle codes, scales;
    uint64_t codes_bytes, scales_bytes;
};

void nx_opencl_matrix_free(nx_opencl_matrix *m) {
    if (!m) return;
    if (m->codes) (void)cl.ReleaseMemObject(m->codes);
    if (m->scales) (void)cl.ReleaseMemObject(m->scales);
    free(m);
}

uint64_t nx_opencl_matrix_bytes(const nx_opencl_matrix *m) { return m->codes_bytes + m->scales_bytes; }

static nx_status upload(cl_handle *buffer, const void *from, size_t nbytes) {
    int32_t code = 0;
    *buffer = cl.CreateBuffer(dev.context, CL_MEM_READ_ONLY, nbytes, NULL, &code);
    if (code != 0) {
        *buffer = NULL;
        (void)failed("CreateBuffer", code);
        return NX_E_NOMEM;
    }
    code = cl.EnqueueWriteBuffer(dev.queue, *buffer, 1, 0, nbytes, from, 0, NULL, NULL);
    return code == 0 ? NX_OK : failed("EnqueueWriteBuffer", code);
}

nx_status nx_opencl_matrix_create(nx_ternary_type t, const void *rows, size_t stride, uint32_t n_in, uint32_t n_out,
                                  nx_opencl_matrix **out) {
    *out = NULL;
    if ((unsigned)t >= NX_TERNARY_TYPES || n_in == 0 || n_out == 0 || n_in % nx_ternary_block(t)) return NX_E_INVALID;
    if (nx_opencl_open() != NX_OK) return NX_E_UNSUPPORTED;
    const uint32_t block = nx_ternary_block(t), words = block / 16;
    const uint64_t n_blocks = n_in / block;
    nx_opencl_matrix *m = calloc(1, sizeof *m);
    if (!m) return NX_E_NOMEM;
    *m = (nx_opencl_matrix){.type = t, .n_in = n_in, .n_out = n_out, .block = block,
                            .codes_bytes = n_blocks * words * n_out * sizeof(uint32_t),
                            .scales_bytes = n_blocks * n_out * sizeof(float)};
    uint32_t *codes = malloc(m->codes_bytes);
    float *scales = malloc(m->scales_bytes);
    nx_status status = codes && scales ? NX_OK : NX_E_NOMEM;
    for (uint32_t o = 0; o < n_out && status == NX_OK; o++)
        for (uint64_t b = 0; b < n_blocks; b++) {
            uint8_t code[256];
            const uint8_t *at = (const uint8_t *)rows + o * stride + b * nx_ternary_block_bytes(t);
            scales[b * n_out + o] = nx_half_to_float(nx_ternary_unpack_block(t, at, code));
            for (uint32_t w = 0; w < words; w++) {
                uint32_t word = 0;
                for (uint32_t i = 0; i < 16; i++) word |= (uint32_t)code[16 * w + i] << 2 * i;
                codes[(b * words + w) * n_out + o] = word;
            }
        }
    pthread_mutex_lock(&lock);
    if (status == NX_OK) status = upload(&m->codes, codes, m->codes_bytes);
    if (status == NX_OK) status = upload(&m->scales, scales, m->scales_bytes);
    pthread_mutex_unlock(&lock);
    free(codes);
    free(scales);
    if (status == NX_OK) *out = m;
    else nx_opencl_matrix_free(m);
    return status;
}

/* -- products ----------------------------------------------------------------------------------- */

static nx_status reserve(cl_handle *buffer, size_t *capacity, size_t nbytes) {
    if (nbytes <= *capacity) return NX_OK;
    if (*buffer) (void)cl.ReleaseMemObject(*buffer);
    int32_t code = 0;
    *buffer = cl.CreateBuffer(dev.context, CL_MEM_READ_WRITE, nbytes, NULL, &code);
    *capacity = code == 0 ? nbytes : 0;
    if (code == 0) return NX_OK;
    *buffer = NULL;
    return failed("CreateBuffer", code);
}

/* Of all columns: numbers, then scales, then what the kernels call extra. Sizes of one block. */
typedef struct layout {
    uint32_t n_d, n_extra;
    int kernel;
} layout;

static layout layout_of(nx_ternary_type t) {
    if (t == NX_Q2_0) return (layout){2, 2, ROWS};
    if (t == NX_Q1_0) return (layout){4, 32, BITS};
    return (layout){1, 8, LANES};
}

static void stage(const nx_opencl_matrix *m, const void *block, int8_t *q, float *d, int32_t *extra) {
    if (m->type == NX_Q2_0) {
        const nx_act_64 *a = block;
        memcpy(q, a->q, sizeof a->q);
        for (int h = 0; h < 2; h++) d[h] = a->d[h][0], extra[h] = a->start[h][0];
    } else if (m->type == NX_Q1_0) {
        const nx_act_128 *a = block;
        memcpy(q, a->q, sizeof a->q);
        memcpy(d, a->d, sizeof a->d);
        for (int i = 0; i < 32; i++) extra[i] = (int32_t)a->lane[i / 8][i % 8];
    } else {
        const nx_act_256 *a = block;
        memcpy(q, a->q, sizeof a->q);
        d[0] = a->d[0];
        memcpy(extra, a->start[0], sizeof a->start[0]);
    }
}

static nx_status set_argument(cl_handle kernel, uint32_t index, size_t nbytes, const void *value) {
    const int32_t code = cl.SetKernelArg(kernel, index, nbytes, value);
    return code == 0 ? NX_OK : failed("SetKernelArg", code);
}

static nx_status write(cl_handle buffer, const void *from, size_t nbytes) {
    const int32_t code = cl.EnqueueWriteBuffer(dev.queue, buffer, 0, 0, nbytes, from, 0, NULL, NULL);
    return code == 0 ? NX_OK : failed("EnqueueWriteBuffer", code);
}

static nx_status run(const nx_opencl_matrix *m, uint32_t n_columns, int kernel_index) {
    const cl_handle kernel = dev.kernels[kernel_index];
    const cl_handle buffers[] = {m->codes, m->scales, dev.q, dev.d, dev.extra, dev.y};
    const uint32_t numbers[] = {m->n_in / m->block, m->n_out};
    nx_status status = NX_OK;
    for (uint32_t i = 0; i < 6 && status == NX_OK; i++) status = set_argument(kernel, i, sizeof buffers[i], &buffers[i]);
    for (uint32_t i = 0; i < 2 && status == NX_OK; i++) status = set_argument(kernel, 6 + i, sizeof numbers[i], &numbers[i]);
    if (status != NX_OK) return status;
    const size_t items[2] = {(m->n_out + (size_t)63) / 64 * 64, n_columns}, local[2] = {64, 1};
    const int32_t code = cl.EnqueueNDRangeKernel(dev.queue, kernel, 2, NULL, items, local, 0, NULL, NULL);
    return code == 0 ? NX_OK : failed("EnqueueNDRangeKernel", code);
}

static nx_status multiply(const nx_opencl_matrix *m, const uint8_t *columns, uint32_t n_columns, float *y,
                          size_t y_stride) {
    const layout l = layout_of(m->type);
    const uint64_t act_bytes = nx_ternary_activation_bytes(m->type, m->block), blocks = m->n_in / m->block * (uint64_t)n_columns;
    const size_t q_bytes = blocks * m->block, d_bytes = blocks * l.n_d * sizeof(float);
    const size_t extra_bytes = blocks * l.n_extra * sizeof(int32_t), y_bytes = (size_t)n_columns * m->n_out * sizeof *y;
    const size_t in_bytes = q_bytes + d_bytes + extra_bytes, all = in_bytes > y_bytes ? in_bytes : y_bytes;
    if (all > dev.staging_bytes) {
        free(dev.staging);
        dev.staging = malloc(all);
        dev.staging_bytes = dev.staging ? all : 0;
        if (!dev.staging) return NX_E_NOMEM;
    }
    int8_t *q = dev.staging;
    float *d = (float *)(void *)((char *)dev.staging + q_bytes);
    int32_t *extra = (int32_t *)(void *)((char *)dev.staging + q_bytes + d_bytes);
    for (uint64_t b = 0; b < blocks; b++)
        stage(m, columns + b * act_bytes, q + b * m->block, d + b * l.n_d, extra + b * l.n_extra);
    nx_status status = reserve(&dev.q, &dev.q_bytes, q_bytes);
    if (status == NX_OK) status = reserve(&dev.d, &dev.d_bytes, d_bytes);
    if (status == NX_OK) status = reserve(&dev.extra, &dev.extra_bytes, extra_bytes);
    if (status == NX_OK) status = reserve(&dev.y, &dev.y_bytes, y_bytes);
    if (status == NX_OK) status = write(dev.q, q, q_bytes);
    if (status == NX_OK) status = write(dev.d, d, d_bytes);
    if (status == NX_OK) status = write(dev.extra, extra, extra_bytes);
    if (status == NX_OK) status = run(m, n_columns, l.kernel);
    int32_t code = 0;
    if (status == NX_OK)
        code = cl.EnqueueReadBuffer(dev.queue, dev.y, 1, 0, y_bytes, dev.staging, 0, NULL, NULL);
    if (code != 0) status = failed("EnqueueReadBuffer", code);
    if (status != NX_OK) (void)cl.Finish(dev.queue); /* what was staged may be on its way */
    for (uint32_t c = 0; c < n_columns && status == NX_OK; c++)
        memcpy(y + c * y_stride, (const float *)dev.staging + (size_t)c * m->n_out, m->n_out * sizeof *y);
    return status;
}

nx_status nx_opencl_multiply(const nx_opencl_matrix *m, const void *columns, uint32_t n_columns, float *y,
                             size_t y_stride) {
    pthread_mutex_lock(&lock);
    const nx_status status = n_columns ? multiply(m, columns, n_columns, y, y_stride) : NX_OK;
    pthread_mutex_unlock(&lock);
    return status;
}
