/* fake_opencl.c: an OpenCL library for tests. Programs are compiled by the C compiler, with the few words of
 * OpenCL C that ours use defined away, and run item by item; so the text of our kernels is tested wherever
 * there is a compiler, and any call can be made to fail.
 *
 *   FAKE_OPENCL_DEVICES  kinds of devices in order: "cpu", "gpu", "coarse" (does not round to the nearest);
 *                        default: cpu
 *   FAKE_OPENCL_FAIL     "Name:n": the n-th call of clName fails, counted from 1
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct object {
    uint8_t *bytes;
    size_t nbytes;
    void *library;
    void (*function)(void);
    void (*place)(size_t, size_t);
    unsigned char arguments[8][8];
    char kind[16];
} object;

static object platform, context, queue, devices[4];

static int fails(const char *name) {
    static char last[64];
    static int count;
    const char *wanted = getenv("FAKE_OPENCL_FAIL");
    const size_t n = strlen(name);
    if (!wanted || strncmp(wanted, name, n) != 0 || wanted[n] != ':') return 0;
    if (strcmp(last, wanted) != 0) {
        snprintf(last, sizeof last, "%s", wanted);
        count = 0;
    }
    return ++count == atoi(wanted + n + 1);
}

#define FAIL(name) \
    if (fails(name)) return -5
#define FAIL_NULL(name) \
    if ((*status = fails(name) ? -4 : 0)) return NULL

int32_t clGetPlatformIDs(uint32_t most, object **out, uint32_t *n) {
    FAIL("GetPlatformIDs");
    if (most) out[0] = &platform;
    *n = 1;
    return 0;
}

int32_t clGetDeviceIDs(object *p, uint64_t type, uint32_t most, object **out, uint32_t *n) {
    (void)p;
    (void)type;
    FAIL("GetDeviceIDs");
    const char *kinds = getenv("FAKE_OPENCL_DEVICES");
    char text[64];
    snprintf(text, sizeof text, "%s", kinds ? kinds : "cpu");
    *n = 0;
    for (char *kind = strtok(text, ","); kind && *n < most && *n < 4; kind = strtok(NULL, ",")) {
        snprintf(devices[*n].kind, sizeof devices[*n].kind, "%.15s", kind);
        out[*n] = &devices[*n];
        ++*n;
    }
    return 0;
}

int32_t clGetDeviceInfo(object *device, uint32_t what, size_t nbytes, void *out, size_t *used) {
    (void)used;
    FAIL("GetDeviceInfo");
    memset(out, 0, nbytes);
    if (what == 0x102b) snprintf(out, nbytes, "fake %s", device->kind);
    const uint64_t number = what == 0x1000   ? (strcmp(device->kind, "gpu") == 0 ? 4 : 2)
                            : what == 0x101b ? (strcmp(device->kind, "coarse") == 0 ? 2 : 7)
                                             : 1;
    if (what != 0x102b) memcpy(out, &number, nbytes < 8 ? nbytes : 8);
    return 0;
}

object *clCreateContext(const intptr_t *properties, uint32_t n, object *const *d, void (*f)(void), void *p, int32_t *status) {
    (void)properties, (void)n, (void)d, (void)f, (void)p;
    FAIL_NULL("CreateContext");
    return &context;
}

object *clCreateCommandQueue(object *c, object *d, uint64_t properties, int32_t *status) {
    (void)c, (void)d, (void)properties;
    FAIL_NULL("CreateCommandQueue");
    return &queue;
}

static const char prelude[] = "#include <math.h>\n#include <stddef.h>\n"
                              "typedef unsigned int uint;\nstatic size_t at[2];\n"
                              "void fake_place(size_t a, size_t b) { at[0] = a; at[1] = b; }\n"
                              "#define get_global_id(i) at[i]\n#define global\n#define kernel\n#define fma fmaf\n";

object *clCreateProgramWithSource(object *c, uint32_t n, const char **text, const size_t *lengths, int32_t *status) {
    (void)c, (void)n, (void)lengths;
    FAIL_NULL("CreateProgramWithSource");
    object *program = calloc(1, sizeof *program);
    program->nbytes = strlen(prelude) + strlen(text[0]) + 1;
    program->bytes = malloc(program->nbytes);
    snprintf((char *)program->bytes, program->nbytes, "%s%s", prelude, text[0]);
    return program;
}

int32_t clBuildProgram(object *program, uint32_t n, object *const *d, const char *options, void (*f)(void), void *p) {
    (void)n, (void)d, (void)options, (void)f, (void)p;
    FAIL("BuildProgram");
    const char *base = getenv("TMPDIR");
    char folder[200], path[220], library[220], command[600];
    snprintf(folder, sizeof folder, "%s/fake-opencl-XXXXXX", base && *base ? base : "/tmp");
    if (!mkdtemp(folder)) return -11;
    snprintf(path, sizeof path, "%s/program.c", folder);
    snprintf(library, sizeof library, "%s/program.so", folder);
    FILE *file = fopen(path, "w");
    if (!file) return -11;
    fputs((const char *)program->bytes, file);
    fclose(file);
    snprintf(command, sizeof command,
             "${CC:-cc} -O1 -w -fsigned-char -ffp-contract=off -fPIC -shared %s -o %s -lm", path, library);
    if (system(command) == 0) program->library = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    unlink(path);
    unlink(library);
    rmdir(folder);
    return program->library ? 0 : -11;
}

int32_t clGetProgramBuildInfo(object *program, object *d, uint32_t what, size_t nbytes, void *out, size_t *used) {
    (void)program, (void)d, (void)what, (void)used;
    snprintf(out, nbytes, "the fake compiler is tired");
    return 0;
}

object *clCreateKernel(object *program, const char *name, int32_t *status) {
    FAIL_NULL("CreateKernel");
    object *k = calloc(1, sizeof *k);
    void *symbol = dlsym(program->library, name), *place = dlsym(program->library, "fake_place");
    memcpy(&k->function, &symbol, sizeof symbol);
    memcpy(&k->place, &place, sizeof place);
    if (!symbol) *status = -46;
    return k;
}

object *clCreateBuffer(object *c, uint64_t flags, size_t nbytes, void *host, int32_t *status) {
    (void)c, (void)flags, (void)host;
    FAIL_NULL("CreateBuffer");
    object *b = calloc(1, sizeof *b);
    b->bytes = malloc(nbytes);
    memset(b->bytes, 0xa5, nbytes);
    b->nbytes = nbytes;
    return b;
}

int32_t clReleaseMemObject(object *b) {
    free(b->bytes);
    free(b);
    return 0;
}

int32_t clSetKernelArg(object *k, uint32_t index, size_t nbytes, const void *value) {
    FAIL("SetKernelArg");
    if (index >= 8 || nbytes > 8) return -50;
    memcpy(k->arguments[index], value, nbytes);
    return 0;
}

int32_t clEnqueueWriteBuffer(object *q, object *b, uint32_t blocking, size_t offset, size_t nbytes, const void *from,
                             uint32_t n, object *const *events, object **event) {
    (void)q, (void)blocking, (void)n, (void)events, (void)event;
    FAIL("EnqueueWriteBuffer");
    if (offset + nbytes > b->nbytes) return -30;
    memcpy(b->bytes + offset, from, nbytes);
    return 0;
}

int32_t clEnqueueReadBuffer(object *q, object *b, uint32_t blocking, size_t offset, size_t nbytes, void *to, uint32_t n,
                            object *const *events, object **event) {
    (void)q, (void)blocking, (void)n, (void)events, (void)event;
    FAIL("EnqueueReadBuffer");
    if (offset + nbytes > b->nbytes) return -30;
    memcpy(to, b->bytes + offset, nbytes);
    return 0;
}

int32_t clEnqueueNDRangeKernel(object *q, object *k, uint32_t dimensions, const size_t *from, const size_t *items,
                               const size_t *local, uint32_t n, object *const *events, object **event) {
    (void)q, (void)from, (void)n, (void)events, (void)event;
    FAIL("EnqueueNDRangeKernel");
    if (dimensions != 2 || items[0] % local[0] || items[1] % local[1]) return -54;
    void *p[6];
    uint32_t numbers[2];
    for (int i = 0; i < 6; i++) {
        object *b;
        memcpy(&b, k->arguments[i], sizeof b);
        p[i] = b->bytes;
    }
    for (int i = 0; i < 2; i++) memcpy(&numbers[i], k->arguments[6 + i], sizeof numbers[i]);
    void (*run)(void *, void *, void *, void *, void *, void *, uint32_t, uint32_t);
    memcpy(&run, &k->function, sizeof run);
    for (size_t c = 0; c < items[1]; c++)
        for (size_t o = 0; o < items[0]; o++) {
            k->place(o, c);
            run(p[0], p[1], p[2], p[3], p[4], p[5], numbers[0], numbers[1]);
        }
    return 0;
}

int32_t clFinish(object *q) {
    (void)q;
    return 0;
}
