/* Calls of cuSOLVER that need no answer; without its headers, so without its arguments. */
#include "card.h"

#define FACTORS(name)                               \
  int name() {                                      \
    fake_count((const void *)name, "factor " #name); \
    return 0;                                       \
  }
#define DOES_NOTHING(name) \
  int name() { return 0; }
FACTORS(cusolverDnSgesvdj)
FACTORS(cusolverDnSgesvdjBatched)
FACTORS(cusolverDnSgeqrf)
FACTORS(cusolverDnSorgqr)
FACTORS(cusolverDnXgeqrf)
DOES_NOTHING(cusolverDnDestroy)
DOES_NOTHING(cusolverDnSetStream)
DOES_NOTHING(cusolverDnDestroyGesvdjInfo)
DOES_NOTHING(cusolverDnDestroyParams)
DOES_NOTHING(cusolverDnXgesvdjSetTolerance)
DOES_NOTHING(cusolverDnXgesvdjSetMaxSweeps)
DOES_NOTHING(cusolverDnXgesvdjSetSortEig)
