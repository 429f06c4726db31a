/* A CUDA runtime that does nothing, to be loaded in front of the real one (LD_PRELOAD).
 *
 * What it does: torch's own CUDA code runs on a machine without a GPU - its dispatcher, autograd
 * threads, streams and caching allocator, bitsandbytes' and DeepSpeed's CUDA code, Triton's
 * launches. Every kernel launch, copy and wait is counted by name. Device memory is address space
 * without pages: up to the card's size it is given out, beyond it an allocation fails as it would.
 * A read or write of it by the host, which on a card is an error, is one here too (SIGSEGV).
 *
 * What it cannot: no kernel runs, so there are no values: a copy to the host gives zeros, and code
 * that branches on values takes the branch for zero. There is no time. NCCL (nccl.c) moves nothing
 * and writes down what it was asked for; cuBLAS and cuSOLVER (blas.c, solver.c) compute nothing.
 * cuDNN is not there: code that needs it fails. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include "card.h"
#include "cuda_runtime_api.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- counts, by the address of a kernel's host function or of the runtime's own ---- */

enum { SLOTS = 1 << 18 };
static struct {
  const void *key;
  const char *name;
  unsigned long count;
} slots[SLOTS];

static unsigned find_slot(const void *key) {
  unsigned long hash = (unsigned long)key;
  hash ^= hash >> 33;
  hash *= 0xff51afd7ed558ccdUL;
  hash ^= hash >> 33;
  unsigned at = hash & (SLOTS - 1);
  while (slots[at].key && slots[at].key != key) at = (at + 1) & (SLOTS - 1);
  return at;
}

void fake_count(const void *key, const char *name) {
  pthread_mutex_lock(&lock);
  unsigned at = find_slot(key);
  if (!slots[at].key) {
    slots[at].key = key;
    slots[at].name = name;
  }
  slots[at].count++;
  pthread_mutex_unlock(&lock);
}

/* Begin to count anew. */
void fake_reset_counts(void) {
  for (unsigned i = 0; i < SLOTS; i++) slots[i].count = 0;
}

/* Write names and counts of all that was called, at most `room` of them; return how many. */
size_t fake_counts(const char **names, unsigned long *counts, size_t room) {
  size_t found = 0;
  for (unsigned i = 0; i < SLOTS; i++)
    if (slots[i].count && found < room) {
      names[found] = slots[i].name ? slots[i].name : "a kernel without a name";
      counts[found++] = slots[i].count;
    }
  return found;
}

/* ---- what is asked of streams, in the order in which the host asks ---- */

static FILE *trace;

/* Begin a trace; NULL: end it. */
void fake_trace_to(const char *path) {
  pthread_mutex_lock(&lock);
  if (trace) fclose(trace);
  trace = path ? fopen(path, "w") : NULL;
  pthread_mutex_unlock(&lock);
}

void fake_trace(const char *format, ...) {
  va_list values;
  pthread_mutex_lock(&lock);
  if (trace) {
    va_start(values, format);
    vfprintf(trace, format, values);
    va_end(values);
    fputc('\n', trace);
  }
  pthread_mutex_unlock(&lock);
}

static void count_launch(const void *kernel, cudaStream_t stream) {
  fake_count(kernel, NULL);
  fake_trace("kernel %p", (void *)stream);
}

#define COUNTED fake_count((const void *)__func__, __func__)

/* ---- kernels: registered by name when a library is loaded, then launched by host address ---- */

void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[4];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external,
                       size_t size, int constant, int global) {}
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name,
                            int thread_limit, void *tid, void *bid, void *block, void *grid, int *warp) {
  pthread_mutex_lock(&lock);
  unsigned at = find_slot(host);
  slots[at].key = host;
  slots[at].name = name;
  pthread_mutex_unlock(&lock);
}

static __thread struct {
  dim3 grid, block;
  size_t shared;
  void *stream;
} configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configuration.grid = grid;
  configuration.block = block;
  configuration.shared = shared;
  configuration.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *(void **)stream = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) {
  *kernel = (cudaKernel_t)host;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments,
                               size_t shared, cudaStream_t stream) {
  count_launch((const void *)kernel, stream);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
  count_launch(kernel, stream);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *kernel, void **arguments) {
  count_launch(kernel, how->stream);
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  function(data);
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *data,
                                  unsigned flags) {
  function(stream, cudaSuccess, data);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->ptxVersion = found->binaryVersion = 10 * card()->major + card()->minor;
  found->maxDynamicSharedSizeBytes = card()->shared_bytes_per_block_optin;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value) {
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int threads,
                                                          size_t shared) {
  *blocks = 2;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel,
                                                                   int threads, size_t shared,
                                                                   unsigned flags) {
  *blocks = 2;
  return cudaSuccess;
}

/* ---- devices ---- */

static __thread int current = 0;

cudaError_t cudaGetDeviceCount(int *count) {
  *count = device_count();
  return *count ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int *device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return cudaErrorInvalidDevice;
  current = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
  COUNTED;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the fake CUDA runtime";
}
const char *cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorFake";
}
#undef cudaGetDeviceProperties
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  const Card *it = card();
  memset(found, 0, sizeof *found);
  strcpy(found->name, it->name);
  found->major = it->major;
  found->minor = it->minor;
  found->totalGlobalMem = it->memory_bytes;
  found->multiProcessorCount = it->multiprocessors;
  found->maxThreadsPerMultiProcessor = it->threads_per_multiprocessor;
  found->maxBlocksPerMultiProcessor = it->blocks_per_multiprocessor;
  found->sharedMemPerBlock = 49152;
  found->sharedMemPerBlockOptin = it->shared_bytes_per_block_optin;
  found->sharedMemPerMultiprocessor = it->shared_bytes_per_multiprocessor;
  found->l2CacheSize = it->l2_bytes;
  found->memoryBusWidth = it->bus_bits;
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->maxGridSize[0] = 2147483647;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
  found->maxThreadsDim[2] = 64;
  found->unifiedAddressing = found->concurrentKernels = found->cooperativeLaunch = 1;
  found->pciBusID = device + 1;
  found->uuid.bytes[0] = (char)(device + 1);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp all;
  cudaGetDeviceProperties(&all, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = all.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = all.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = all.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = all.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = all.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = all.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = all.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = all.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxGridDimX: *value = all.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = all.maxGridSize[1]; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = all.maxThreadsPerBlock; break;
    case cudaDevAttrWarpSize: *value = all.warpSize; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = all.regsPerBlock; break;
    case cudaDevAttrL2CacheSize: *value = all.l2CacheSize; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
  snprintf(text, size, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}

/* ---- memory ---- */

enum { BLOCKS = 1 << 16, PIECES = 1 << 20, DEVICES = 64 };
static const size_t PAGE = 2097152; /* what a card gives out at least */
typedef struct {
  char *start;
  size_t bytes;
  int device;
} Block;
static Block blocks[BLOCKS], pinned[BLOCKS];
static int block_count = 0, pinned_count = 0;
static size_t used[DEVICES], peak[DEVICES];

/* Bytes of a device that are given out. */
size_t fake_used_bytes(int device) { return used[device]; }
size_t fake_peak_bytes(int device) { return peak[device]; }

/* Bytes of a device that other processes hold: FAKE_CUDA_TAKEN is a list of GiB, by device. */
static size_t taken(int device) {
  const char *at = getenv("FAKE_CUDA_TAKEN");
  for (; at && device > 0; device--) at = (at = strchr(at, ',')) ? at + 1 : NULL;
  return at ? (size_t)atol(at) << 30 : 0;
}
/* Take bytes of a device, under the lock; return whether it has them. */
static int take(int device, size_t bytes) {
  if (taken(device) + used[device] + bytes > card()->memory_bytes) return 0;
  used[device] += bytes;
  if (used[device] > peak[device]) peak[device] = used[device];
  return 1;
}
static int holds(const Block *all, int count, const void *at) {
  for (int i = 0; i < count; i++)
    if ((char *)at >= all[i].start && (char *)at < all[i].start + all[i].bytes) return i + 1;
  return 0;
}
static void *addresses(void *wanted, size_t bytes) {
  void *at = mmap(wanted, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return at == MAP_FAILED ? NULL : at;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  *total = card()->memory_bytes;
  *free_bytes = *total - used[current] - taken(current);
  return cudaSuccess;
}
cudaError_t cudaMalloc(void **found, size_t bytes) {
  COUNTED;
  size_t whole = (bytes + PAGE - 1) & ~(PAGE - 1);
  cudaError_t result = cudaErrorMemoryAllocation;
  pthread_mutex_lock(&lock);
  if (block_count < BLOCKS && take(current, whole)) {
    *found = addresses(NULL, whole);
    blocks[block_count++] = (Block){*found, whole, current};
    result = cudaSuccess;
  }
  pthread_mutex_unlock(&lock);
  return result;
}
cudaError_t cudaFree(void *at) {
  if (!at) return cudaSuccess;
  COUNTED;
  pthread_mutex_lock(&lock);
  int found = holds(blocks, block_count, at);
  if (found) {
    Block *block = &blocks[found - 1];
    munmap(block->start, block->bytes);
    used[block->device] -= block->bytes;
    *block = blocks[--block_count];
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **found, size_t bytes, unsigned flags) {
  COUNTED;
  size_t whole = (bytes + 4095) & ~4095UL;
  *found = aligned_alloc(4096, whole);
  pthread_mutex_lock(&lock);
  pinned[pinned_count++] = (Block){*found, whole, 0};
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void *at) {
  pthread_mutex_lock(&lock);
  int found = holds(pinned, pinned_count, at);
  if (found) pinned[found - 1] = pinned[--pinned_count];
  pthread_mutex_unlock(&lock);
  free(at);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void *at, size_t bytes, unsigned flags) {
  pthread_mutex_lock(&lock);
  pinned[pinned_count++] = (Block){at, bytes, 0};
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *at) {
  pthread_mutex_lock(&lock);
  int found = holds(pinned, pinned_count, at);
  if (found) pinned[found - 1] = pinned[--pinned_count];
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
/* Bytes of host memory that are page-locked. */
size_t fake_pinned_bytes(void) {
  size_t total = 0;
  for (int i = 0; i < pinned_count; i++) total += pinned[i].bytes;
  return total;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *at) {
  memset(found, 0, sizeof *found);
  pthread_mutex_lock(&lock);
  int block = holds(blocks, block_count, at);
  if (block) {
    found->type = cudaMemoryTypeDevice;
    found->device = blocks[block - 1].device;
    found->devicePointer = (void *)at;
  } else if (holds(pinned, pinned_count, at)) {
    found->type = cudaMemoryTypeHost;
  } else {
    found->type = cudaMemoryTypeUnregistered;
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

/* Copy, as far as the host can see: what comes from a device is zero. */
static void copy(void *to, const void *from, size_t bytes) {
  pthread_mutex_lock(&lock);
  int to_device = holds(blocks, block_count, to), from_device = holds(blocks, block_count, from);
  int from_pinned = holds(pinned, pinned_count, from);
  pthread_mutex_unlock(&lock);
  static const char within = 0, up_pinned = 0, up = 0, down = 0;
  if (to_device && from_device)
    fake_count(&within, "copy within a device");
  else if (to_device)
    from_pinned ? fake_count(&up_pinned, "copy to a device from pinned memory")
                : fake_count(&up, "copy to a device from pageable memory");
  else if (from_device) {
    fake_count(&down, "copy to the host");
    memset(to, 0, bytes);
  } else
    memcpy(to, from, bytes);
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  COUNTED;
  copy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  copy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int device, const void *from, int peer, size_t bytes,
                                cudaStream_t stream) {
  copy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes, size_t offset,
                               enum cudaMemcpyKind kind) {
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **found, const void *symbol) {
  *found = (void *)symbol;
  return cudaSuccess;
}
cudaError_t cudaMemset(void *at, int value, size_t bytes) {
  COUNTED;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *at, int value, size_t bytes, cudaStream_t stream) {
  COUNTED;
  return cudaSuccess;
}

/* ---- the driver's calls that torch's allocator uses for segments that can grow ---- */

static size_t piece_bytes[PIECES];
static int piece_device[PIECES];
static unsigned long piece_count = 1;

static int reserve(unsigned long *found, size_t bytes, size_t alignment, unsigned long wanted,
                   unsigned long long flags) {
  void *at = addresses((void *)wanted, bytes);
  if (!at) return cudaErrorMemoryAllocation;
  pthread_mutex_lock(&lock);
  blocks[block_count++] = (Block){at, bytes, current};
  pthread_mutex_unlock(&lock);
  *found = (unsigned long)at;
  return 0;
}
static int granularity(size_t *bytes, const void *properties, int option) {
  *bytes = PAGE;
  return 0;
}
static int create(unsigned long *handle, size_t bytes, const void *properties, unsigned long long flags) {
  pthread_mutex_lock(&lock);
  int has = piece_count < PIECES && take(current, bytes);
  if (has) {
    *handle = piece_count;
    piece_bytes[piece_count] = bytes;
    piece_device[piece_count++] = current;
  }
  pthread_mutex_unlock(&lock);
  return has ? 0 : cudaErrorMemoryAllocation;
}
static int release(unsigned long handle) {
  pthread_mutex_lock(&lock);
  used[piece_device[handle]] -= piece_bytes[handle];
  piece_bytes[handle] = 0;
  pthread_mutex_unlock(&lock);
  return 0;
}
static int primary_state(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}
static int error_text(int error, const char **text) {
  *text = "an error of the fake CUDA driver";
  return 0;
}
static int nothing(void) { return 0; }

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *status) {
  static const struct {
    const char *name;
    void *function;
  } known[] = {{"cuMemAddressReserve", reserve},
               {"cuMemGetAllocationGranularity", granularity},
               {"cuMemCreate", create},
               {"cuMemRelease", release},
               {"cuDevicePrimaryCtxGetState", primary_state},
               {"cuGetErrorString", error_text}};
  *found = nothing;
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (!strcmp(name, known[i].name)) *found = known[i].function;
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

/* ---- streams and events: everything has happened as soon as it was asked for ---- */

static void *token(void) { return malloc(16); }

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  *stream = token();
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  COUNTED;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  COUNTED;
  fake_trace("wait %p %p", (void *)stream, (void *)event);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *event) {
  *event = token();
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  COUNTED;
  fake_trace("record %p %p", (void *)stream, (void *)event);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  COUNTED;
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
  *milliseconds = 1.0f;
  return cudaSuccess;
}
