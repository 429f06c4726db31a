/* Calls of cuBLAS that need no answer; without its headers, so without its arguments. */
#define DOES_NOTHING(name) \
  int name() { return 0; }
DOES_NOTHING(cublasDestroy_v2)
DOES_NOTHING(cublasSetMathMode)
DOES_NOTHING(cublasSetPointerMode_v2)
DOES_NOTHING(cublasSetSmCountTarget)
DOES_NOTHING(cublasSetStream_v2)
DOES_NOTHING(cublasSetWorkspace_v2)
DOES_NOTHING(cublasSdot_v2)
DOES_NOTHING(cublasSgemv_v2)
DOES_NOTHING(cublasDotEx)
