#include "lineas.h"

const char *lns_version(void)
{
    return LNS_VERSION;
}
