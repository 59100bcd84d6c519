/* nexus_view.h: a GGUF for a program that opens the file itself, of a model that is stored otherwise.
 *
 * The view is a file whose bytes are the header alone. Weights are read by the backend from where the
 * manifest says, so the view needs their size only: a hole. Whatever a program reads there itself would
 * be zeros, and this is what these functions are against:
 *   - until the backend is in the process the file ends behind the header, and llama.cpp refuses it;
 *   - tensors that the program keeps from the backend are put into its mapping of the file, before it reads
 *     any (nx_view_settle); without a mapping they are refused;
 *   - when they are loaded the file ends behind the header again: nobody else takes it for a model.
 */
#ifndef NEXUS_VIEW_H
#define NEXUS_VIEW_H

#include "nexus_core.h"

#ifdef __cplusplus
extern "C" {
#endif

/* 1: the manifest names a view. */
NX_API int nx_model_has_view(const nx_model *);
/* Give the file the size that the header promises. NX_E_IO: it cannot be opened or grow; NX_E_CHANGED: it
 * is not the header of this model. */
NX_API nx_status nx_view_show(nx_model *, nx_error *);
/* Let it end behind the header. */
NX_API void nx_view_hide(nx_model *);
/* 1: some of the file is mapped into this process. */
NX_API int nx_view_is_mapped(const nx_model *);
/* The program will give this extent to the backend. */
NX_API void nx_view_expect(nx_model *, const nx_extent *);
/* The program has mapped the view, if it does so at all, and has read nothing of it: put the extents there
 * that are not expected. NX_E_UNSUPPORTED: there are such, and no mapping. The error is noted. */
NX_API nx_status nx_view_settle(nx_model *);
/* The program hands over `data` as the bytes of extent `at`; by now all that the backend gets are claimed.
 * NX_E_INVALID: they are of another file; NX_E_UNSUPPORTED: an extent that was expected did not come. The
 * error is noted. */
NX_API nx_status nx_view_check(nx_model *, const void *data, uint64_t nbytes, const nx_extent *at);

#ifdef __cplusplus
}
#endif
#endif
