/* libcuda.so.1, as far as torch, Triton and bitsandbytes call it: every call succeeds. */
#include <string.h>

#include "card.h"

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}
int cuCtxGetCurrent(void **context) {
  *context = (void *)1;
  return 0;
}
int cuCtxGetDevice(int *device) {
  *device = 0;
  return 0;
}
int cuCtxPopCurrent_v2(void **context) { return cuCtxGetCurrent(context); }
int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return 0;
}
int cuDeviceGetCount(int *count) {
  *count = device_count();
  return 0;
}
/* Numbers of CUdevice_attribute, which Triton asks for. */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 1: *value = 1024; break; /* threads of a block */
    case 8: *value = 49152; break; /* shared memory of a block */
    case 10: *value = 32; break; /* warp size */
    case 12: *value = 65536; break; /* registers of a block */
    case 16: *value = card()->multiprocessors; break;
    case 39: *value = card()->threads_per_multiprocessor; break;
    case 75: *value = card()->major; break;
    case 76: *value = card()->minor; break;
    case 81: *value = card()->shared_bytes_per_multiprocessor; break;
    case 97: *value = card()->shared_bytes_per_block_optin; break;
    default: *value = 0;
  }
  return 0;
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return cuCtxGetCurrent(context); }
int cuGetErrorString(int error, const char **text) {
  *text = "an error of the fake CUDA driver";
  return 0;
}
int cuGetErrorName(int error, const char **text) { return cuGetErrorString(error, text); }
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : attribute == 3 ? 0 : 32; /* most threads; local bytes; the rest */
  return 0;
}
/* A function is its name, by which its launches are counted; both live as long as the process. */
int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = strdup(name);
  return 0;
}
int cuModuleLoadData(void **module, const void *image) {
  *module = (void *)16;
  return 0;
}

/* Of libfakecuda.so, which is in front of all other libraries. */
void fake_count(const void *key, const char *name);
int cuLaunchKernel(void *function) {
  fake_count(function, function);
  return 0;
}
int cuLaunchKernelEx(const void *config, void *function) {
  fake_count(function, function);
  return 0;
}

#define DOES_NOTHING(name) \
  int name() { return 0; }
DOES_NOTHING(cuCtxSetCurrent)
DOES_NOTHING(cuCtxPushCurrent_v2)
DOES_NOTHING(cuCtxCreate_v4)
DOES_NOTHING(cuCtxSetLimit)
DOES_NOTHING(cuCtxGetLimit)
DOES_NOTHING(cuFuncSetAttribute)
DOES_NOTHING(cuFuncSetCacheConfig)
DOES_NOTHING(cuLaunchCooperativeKernel)
DOES_NOTHING(cuLinkAddData_v2)
DOES_NOTHING(cuLinkComplete)
DOES_NOTHING(cuLinkCreate_v2)
DOES_NOTHING(cuModuleLoad)
DOES_NOTHING(cuModuleLoadDataEx)
DOES_NOTHING(cuModuleUnload)
DOES_NOTHING(cuMemcpyHtoD_v2)
DOES_NOTHING(cuStreamSynchronize)
DOES_NOTHING(cuOccupancyMaxActiveBlocksPerMultiprocessor)
DOES_NOTHING(cuOccupancyMaxActiveClusters)
DOES_NOTHING(cuPointerGetAttribute)
DOES_NOTHING(cuTensorMapEncodeTiled)
DOES_NOTHING(cuTensorMapEncodeIm2col)
