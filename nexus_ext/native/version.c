#include "nexus_version.h"

const char *nx_version(void) {
    return NX_VERSION; /* from nexus_ext/_version.py, by CMakeLists.txt */
}
