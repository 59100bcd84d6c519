#include "nexus_version.h"

const char *nx_version(void);
