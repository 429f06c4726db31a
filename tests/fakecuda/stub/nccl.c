/* NCCL that moves nothing and writes down what it was asked for, so that ranks can be compared.
 *
 * Where FAKE_NCCL_LOG names a file, each collective is a line of it: communicator, its place in the
 * order of that communicator, name, elements, datatype, root. A communicator is called by its
 * unique id, or by the one that it was split from; ranks that share it call it by the same name. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include "card.h"
#include "nccl.h"

typedef struct {
  char name[128];
  int rank, ranks, calls, splits;
} Communicator;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void note(Communicator *at, const char *call, size_t count, int type, int root) {
  static FILE *file = NULL;
  fake_count((const void *)call, call);
  const char *path = getenv("FAKE_NCCL_LOG");
  if (!path) return;
  pthread_mutex_lock(&lock);
  if (!file) file = fopen(path, "a");
  fprintf(file, "%s %d %s %zu %d %d\n", at->name, at->calls++, call, count, type, root);
  fflush(file);
  pthread_mutex_unlock(&lock);
}

static Communicator *make(const char *name, int rank, int ranks) {
  Communicator *made = calloc(1, sizeof *made);
  snprintf(made->name, sizeof made->name, "%s", name);
  made->rank = rank;
  made->ranks = ranks;
  note(made, "begin", ranks, 0, 0);
  return made;
}

ncclResult_t ncclGetVersion(int *version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  FILE *random = fopen("/dev/urandom", "r");
  unsigned char bytes[8];
  fread(bytes, 1, sizeof bytes, random);
  fclose(random);
  memset(id, 0, sizeof *id);
  for (int i = 0; i < 8; i++) sprintf(id->internal + 2 * i, "%02x", bytes[i]);
  return ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t *made, int ranks, ncclUniqueId id, int rank) {
  *made = (ncclComm_t)make(id.internal, rank, ranks);
  return ncclSuccess;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t *made, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t *config) {
  return ncclCommInitRank(made, ranks, id, rank);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t *made, int ranks, int rank, int ids, ncclUniqueId *id,
                                      ncclConfig_t *config) {
  return ncclCommInitRank(made, ranks, *id, rank);
}
/* How many ranks a color has only a real exchange could tell. */
ncclResult_t ncclCommSplit(ncclComm_t parent, int color, int key, ncclComm_t *made, ncclConfig_t *config) {
  Communicator *from = (Communicator *)parent;
  note(from, "split", 0, 0, 0);
  char name[128];
  snprintf(name, sizeof name, "%.90s/%d.%d", from->name, from->splits++, color);
  *made = color < 0 ? NULL : (ncclComm_t)make(name, key, 0);
  return ncclSuccess;
}
ncclResult_t ncclCommCount(const ncclComm_t at, int *ranks) {
  *ranks = ((Communicator *)at)->ranks;
  return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t at, int *rank) {
  *rank = ((Communicator *)at)->rank;
  return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t at, ncclResult_t *error) {
  *error = ncclSuccess;
  return ncclSuccess;
}
const char *ncclGetErrorString(ncclResult_t error) { return "an error of the fake NCCL"; }
const char *ncclGetLastError(ncclComm_t at) { return ""; }

#define COLLECTIVE(name, call, root, ...)                             \
  ncclResult_t name(__VA_ARGS__, ncclComm_t at, cudaStream_t stream) { \
    note((Communicator *)at, call, count, type, root);                \
    fake_trace("%s %p %zu", call, (void *)stream, (size_t)count);     \
    return ncclSuccess;                                               \
  }
COLLECTIVE(ncclAllReduce, "all-reduce", op, const void *from, void *to, size_t count, ncclDataType_t type,
           ncclRedOp_t op)
COLLECTIVE(ncclReduceScatter, "reduce-scatter", op, const void *from, void *to, size_t count,
           ncclDataType_t type, ncclRedOp_t op)
COLLECTIVE(ncclAllGather, "all-gather", 0, const void *from, void *to, size_t count, ncclDataType_t type)
COLLECTIVE(ncclBroadcast, "broadcast", root, const void *from, void *to, size_t count, ncclDataType_t type,
           int root)
COLLECTIVE(ncclBcast, "broadcast", root, void *to, size_t count, ncclDataType_t type, int root)
COLLECTIVE(ncclReduce, "reduce", root, const void *from, void *to, size_t count, ncclDataType_t type,
           ncclRedOp_t op, int root)
COLLECTIVE(ncclAlltoAll, "all-to-all", 0, const void *from, void *to, size_t count, ncclDataType_t type)

ncclResult_t ncclGroupStart(void) { return ncclSuccess; }
ncclResult_t ncclGroupEnd(void) { return ncclSuccess; }
ncclResult_t ncclCommFinalize(ncclComm_t at) { return ncclSuccess; }
ncclResult_t ncclCommDestroy(ncclComm_t at) { return ncclSuccess; }
ncclResult_t ncclCommAbort(ncclComm_t at) { return ncclSuccess; }
ncclResult_t ncclCommRegister(const ncclComm_t at, void *memory, size_t bytes, void **handle) {
  return ncclSuccess;
}
ncclResult_t ncclCommDeregister(const ncclComm_t at, void *handle) { return ncclSuccess; }
ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t *op, void *scalar, ncclDataType_t type,
                                      ncclScalarResidence_t residence, ncclComm_t at) {
  *op = ncclSum;
  return ncclSuccess;
}
ncclResult_t ncclRedOpDestroy(ncclRedOp_t op, ncclComm_t at) { return ncclSuccess; }
