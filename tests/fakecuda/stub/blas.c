/* cuBLAS and cuBLASLt that multiply nothing; every product is counted by its shape. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include "card.h"
#include "cublasLt.h"
#include "cublas_api.h"

/* Count a product under one name for all of its shape. */
static void count_product(const char *call, int m, int n, int k) {
  enum { SHAPES = 4096 };
  static char *names[SHAPES];
  static int known = 0;
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  char name[96];
  snprintf(name, sizeof name, "GEMM %s m=%d n=%d k=%d", call, m, n, k);
  pthread_mutex_lock(&lock);
  int at = 0;
  while (at < known && strcmp(names[at], name)) at++;
  if (at == known && known < SHAPES) names[known++] = strdup(name);
  pthread_mutex_unlock(&lock);
  if (at < SHAPES) fake_count(names[at], names[at]);
}

/* FAKE_CUDA_NO_BLAS: there is no memory left for its workspace. */
cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
  if (getenv("FAKE_CUDA_NO_BLAS")) return CUBLAS_STATUS_ALLOC_FAILED;
  *handle = malloc(64);
  return 0;
}
cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
  *mode = 0;
  return 0;
}
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) {
  *mode = 0;
  return 0;
}
cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m,
                            int n, int k, const void *alpha, const void *a, cudaDataType at, int lda,
                            const void *b, cudaDataType bt, int ldb, const void *beta, void *c,
                            cudaDataType ct, int ldc, cublasComputeType_t type, cublasGemmAlgo_t how) {
  count_product("plain", m, n, k);
  return 0;
}
cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m,
                              int n, int k, const float *alpha, const float *a, int lda, const float *b,
                              int ldb, const float *beta, float *c, int ldc) {
  count_product("float32", m, n, k);
  return 0;
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t ta,
                                          cublasOperation_t tb, int m, int n, int k, const void *alpha,
                                          const void *a, cudaDataType at, int lda, long long sa,
                                          const void *b, cudaDataType bt, int ldb, long long sb,
                                          const void *beta, void *c, cudaDataType ct, int ldc,
                                          long long sc, int batch, cublasComputeType_t type,
                                          cublasGemmAlgo_t how) {
  count_product("batched", m, n, k);
  return 0;
}
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, cublasOperation_t ta,
                                         cublasOperation_t tb, int m, int n, int k, const float *alpha,
                                         const float *a, int lda, long long sa, const float *b, int ldb,
                                         long long sb, const float *beta, float *c, int ldc,
                                         long long sc, int batch) {
  count_product("batched float32", m, n, k);
  return 0;
}

typedef struct {
  uint64_t rows, columns;
} Layout;

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type,
                                          uint64_t rows, uint64_t columns, int64_t stride) {
  Layout *made = malloc(sizeof *made);
  *made = (Layout){rows, columns};
  *layout = (void *)made;
  return 0;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  free(layout);
  return 0;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                const void *value, size_t bytes) {
  return 0;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *made, cublasComputeType_t compute,
                                        cudaDataType scale) {
  *made = calloc(1, 64);
  return 0;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t made) {
  free(made);
  return 0;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t made,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void *value, size_t bytes) {
  return 0;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *made) {
  *made = calloc(1, 64);
  return 0;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t made) {
  free(made);
  return 0;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t made,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void *value, size_t bytes) {
  return 0;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t what,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t *results, int *found) {
  memset(results, 0, sizeof *results);
  *found = 1;
  return 0;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t what, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                              cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
                              cublasLtMatrixLayout_t c_layout, void *d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t *how, void *workspace, size_t workspace_bytes,
                              cudaStream_t stream) {
  const Layout *left = (const void *)a_layout, *out = (const void *)d_layout;
  uint64_t inner = left->rows == out->rows ? left->columns : left->rows;
  count_product("with epilogue", out->rows, out->columns, inner);
  return 0;
}
size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }
