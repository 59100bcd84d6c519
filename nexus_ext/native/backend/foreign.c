/* foreign.c: the backend inside a program that knows nothing of nexus_ext (`nexus exec`).
 *
 * NEXUS_MANIFEST names the file that describes the one model to page. NEXUS_REPORT names a file to which
 * one line is appended for each thing that the parent process must know: it cannot ask us.
 *
 *   registered VERSION | refused WHY | allocated | freed | failed WHY
 *   stats BYTES_READ BYTES_USED PIECES PIECES_READY WAIT_NS COMPUTE_NS PASSES
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend.h"
#include "nexus_view.h"

static pthread_once_t once = PTHREAD_ONCE_INIT;
static nx_model *model;
static bool taken;

void nxb_foreign_report(const char *event, const char *detail) {
    const char *path = getenv("NEXUS_REPORT");
    if (!path) return;
    char line[1024];
    const int n = snprintf(line, sizeof line, "%s %s\n", event, detail);
    const int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) return; /* the parent sees the missing line, and says so */
    const ssize_t written = write(fd, line, n < (int)sizeof line ? (size_t)n : sizeof line - 1);
    (void)written;
    close(fd);
}

static void report_stats(void) {
    if (!model) return;
    nx_stats s;
    nx_model_get_stats(model, &s);
    char text[256];
    snprintf(text, sizeof text,
             "%" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64, s.bytes_read,
             s.bytes_used, s.pieces, s.pieces_ready, s.wait_ns, s.compute_ns, s.passes);
    nxb_foreign_report("stats", text);
    nx_error error;
    nx_model_last_error(model, &error);
    if (error.status != NX_OK) nxb_foreign_report("failed", error.text);
}

static char *read_file(const char *path, size_t *nbytes) {
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    char *text = NULL;
    long size = -1;
    if (fseek(f, 0, SEEK_END) == 0 && (size = ftell(f)) >= 0 && fseek(f, 0, SEEK_SET) == 0 &&
        (text = malloc((size_t)size + 1)) && fread(text, 1, (size_t)size, f) != (size_t)size) {
        free(text);
        text = NULL;
    }
    fclose(f);
    *nbytes = size > 0 ? (size_t)size : 0;
    return text;
}

static void open_model(void) {
    const char *path = getenv("NEXUS_MANIFEST");
    if (!path) return;
    size_t nbytes;
    char *text = read_file(path, &nbytes);
    if (!text) {
        nxb_foreign_report("refused", "the manifest named by NEXUS_MANIFEST cannot be read");
        return;
    }
    nx_error error;
    nx_status status = nx_model_create(text, nbytes, "", 0, &model, &error);
    if (status == NX_OK && nx_model_has_view(model) && (status = nx_view_show(model, &error)) != NX_OK) {
        nx_model_release(model);
        model = NULL;
    }
    if (status != NX_OK) nxb_foreign_report("refused", error.text);
    else atexit(report_stats);
    free(text);
}

nx_model *nxb_foreign_model(void) {
    pthread_once(&once, open_model);
    return model;
}

nx_model *nxb_foreign_available(void) { return taken ? NULL : nxb_foreign_model(); }

/* Report what the model has failed with, or `text`. */
static void refuse(nx_model *m, const char *text) {
    nx_error error;
    nx_model_last_error(m, &error);
    nxb_foreign_report("refused", error.status != NX_OK ? error.text : text);
}

void nxb_foreign_taken(bool now) {
    taken = now;
    nxb_foreign_report(now ? "allocated" : "freed", "");
    nx_error error;
    if (now && nx_model_has_view(model) && nx_view_settle(model) != NX_OK) refuse(model, "the program cannot read the model");
    if (!now && nx_model_has_view(model) && nx_view_show(model, &error) != NX_OK) /* it may be loaded again */
        nxb_foreign_report("refused", error.text);
}

void nxb_foreign_offer(nx_extent *e) {
    if (e->model == model && nx_model_has_view(model)) nx_view_expect(model, e);
}

void nxb_foreign_set(nx_extent *e, const void *data, size_t nbytes) {
    nx_model *m = e->model;
    if (nx_model_has_view(m)) {
        if (nx_view_check(m, data, nbytes, e) != NX_OK) refuse(m, "the program cannot read the model");
        return;
    }
    char ours[64];
    if (nbytes > sizeof ours) nbytes = sizeof ours;
    if (nx_model_read(m, e, 0, ours, nbytes) == NX_OK && memcmp(ours, data, nbytes) == 0) return;
    nx_error error;
    nx_error_set(&error, NX_E_INVALID, 0, "the plan is for another file: tensor %s begins with other bytes", e->name);
    nx_model_fail(m, &error);
    nxb_foreign_report("refused", error.text);
}

bool nxb_foreign_context(void) {
    if (!model || !nx_model_has_view(model)) return true;
    if (taken) {
        nx_view_hide(model); /* all of it is loaded */
        return true;
    }
    if (!nx_view_is_mapped(model)) return true;
    nxb_foreign_report("refused", "the program keeps all weights from the backend, and cannot read them itself");
    return false;
}
