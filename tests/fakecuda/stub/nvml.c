/* libnvidia-ml.so.1 that counts the devices and knows nothing else of them. */
#include "card.h"

enum { NOT_SUPPORTED = 3 };

int nvmlInit(void) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) {
  *count = device_count();
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  *handle = (void *)1;
  return 0;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **handle) {
  *handle = (void *)1;
  return 0;
}
/* torch asks who else is there when it is out of memory. */
int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, void *found) {
  *count = 0;
  return 0;
}
const char *nvmlErrorString(int error) { return "not supported by the fake NVML"; }

#define UNKNOWN(name) \
  int name() { return NOT_SUPPORTED; }
UNKNOWN(nvmlDeviceGetNvLinkRemoteDeviceType)
UNKNOWN(nvmlDeviceGetNvLinkRemotePciInfo_v2)
UNKNOWN(nvmlSystemGetCudaDriverVersion_v2)
UNKNOWN(nvmlDeviceGetUUID)

/* The cards hang on no NVSwitch fabric, which is what the caller has filled in. */
int nvmlDeviceGetGpuFabricInfoV(void *device, void *found) { return 0; }
