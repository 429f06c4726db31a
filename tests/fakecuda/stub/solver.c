/* cuSOLVER, as far as torch's SVD and QR of float32 call it: it factors nothing. */
#include "card.h"
#include "cusolverDn.h"

#define WORK 64 /* elements of workspace that every call is said to need */

cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t *handle) {
  *handle = malloc(64);
  return 0;
}
cusolverStatus_t cusolverDnCreateGesvdjInfo(gesvdjInfo_t *info) {
  *info = malloc(64);
  return 0;
}
cusolverStatus_t cusolverDnSgesvdj_bufferSize(cusolverDnHandle_t handle, cusolverEigMode_t job, int economy,
                                              int m, int n, const float *a, int lda, const float *s,
                                              const float *u, int ldu, const float *v, int ldv, int *work,
                                              gesvdjInfo_t params) {
  *work = WORK;
  return 0;
}
cusolverStatus_t cusolverDnSgesvdjBatched_bufferSize(cusolverDnHandle_t handle, cusolverEigMode_t job, int m,
                                                     int n, const float *a, int lda, const float *s,
                                                     const float *u, int ldu, const float *v, int ldv,
                                                     int *work, gesvdjInfo_t params, int batch) {
  *work = WORK;
  return 0;
}
cusolverStatus_t cusolverDnSgeqrf_bufferSize(cusolverDnHandle_t handle, int m, int n, float *a, int lda,
                                             int *work) {
  *work = WORK;
  return 0;
}
cusolverStatus_t cusolverDnSorgqr_bufferSize(cusolverDnHandle_t handle, int m, int n, int k, const float *a,
                                             int lda, const float *tau, int *work) {
  *work = WORK;
  return 0;
}
cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t *params) {
  *params = malloc(64);
  return 0;
}
cusolverStatus_t cusolverDnXgeqrf_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params, int64_t m,
                                             int64_t n, cudaDataType type, const void *a, int64_t lda,
                                             cudaDataType tau_type, const void *tau, cudaDataType compute,
                                             size_t *on_device, size_t *on_host) {
  *on_device = *on_host = 4 * WORK;
  return 0;
}
