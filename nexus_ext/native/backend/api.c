/* api.c: find ggml's functions in the runtime that loads this backend. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* dladdr */
#endif
#include "api.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

gx_api gx;

static bool find(void *host, const char *name, void *slot) {
    void *symbol = dlsym(host, name); /* looks into what `host` depends on as well */
    memcpy(slot, &symbol, sizeof symbol);
    return symbol != NULL;
}

/* The number of an operation or a type: the names are stable, the numbers are not. */
static int32_t by_name(const char *(*name_of)(int32_t), const char *name, int32_t end) {
    for (int32_t i = 0; i < end; i++) {
        const char *candidate = name_of(i);
        if (candidate && strcmp(candidate, name) == 0) return i;
    }
    return -1;
}

bool gx_resolve(const void *inside_host, char *why, size_t why_size) {
    Dl_info info;
    if (!dladdr(inside_host, &info) || !info.dli_fname) {
        snprintf(why, why_size, "the library that loads the backend cannot be identified");
        return false;
    }
    void *host = dlopen(info.dli_fname, RTLD_NOLOAD | RTLD_LAZY);
    if (!host) host = dlopen(NULL, RTLD_LAZY); /* ggml linked into the program itself */
    if (!host) {
        snprintf(why, why_size, "%s is loaded but cannot be opened: %s", info.dli_fname, dlerror());
        return false;
    }
    if (gx.host && gx.host != host) {
        snprintf(why, why_size, "the backend already serves another copy of ggml in this process; "
                                "%s would be the second", info.dli_fname);
        dlclose(host);
        return false;
    }
#define GX_FIND(result, name, arguments)                                                     \
    if (!find(host, "ggml_" #name, &gx.name)) {                                              \
        snprintf(why, why_size, "%s has no function ggml_%s", info.dli_fname, #name);        \
        dlclose(host);                                                                       \
        return false;                                                                        \
    }
    GX_FUNCTIONS(GX_FIND)
#undef GX_FIND
    gx.op_none = by_name(gx.op_name, "NONE", 1);
    gx.op_mul_mat = by_name(gx.op_name, "MUL_MAT", 64);
    gx.op_mul_mat_id = by_name(gx.op_name, "MUL_MAT_ID", 64);
    gx.op_get_rows = by_name(gx.op_name, "GET_ROWS", 64);
    gx.op_reshape = by_name(gx.op_name, "RESHAPE", 64);
    gx.op_view = by_name(gx.op_name, "VIEW", 64);
    gx.op_permute = by_name(gx.op_name, "PERMUTE", 64);
    gx.op_transpose = by_name(gx.op_name, "TRANSPOSE", 64);
    gx.op_custom = by_name(gx.op_name, "CUSTOM", 128);
    gx.type_f32 = by_name(gx.type_name, "f32", 40);
    gx.type_i32 = by_name(gx.type_name, "i32", 40);
    if (gx.op_none < 0 || gx.op_mul_mat < 0 || gx.op_mul_mat_id < 0 || gx.op_get_rows < 0 ||
        gx.op_reshape < 0 || gx.op_view < 0 || gx.op_permute < 0 || gx.op_transpose < 0 ||
        gx.type_f32 < 0 || gx.type_i32 < 0) {
        snprintf(why, why_size, "ggml %s does not know an operation that the backend needs", gx.version());
        dlclose(host);
        return false;
    }
    gx.host = host; /* kept open: a backend is never unloaded */
    return true;
}
