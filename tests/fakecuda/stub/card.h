/* The card that the stub pretends to be, and what its parts share.
 *
 * FAKE_CUDA_CARD is H100 (default), A100, L4, T4 or MIG (a part of an H100); FAKE_CUDA_DEVICES is how many there are. */
#pragma once
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  const char *key, *name;
  int major, minor;
  size_t memory_bytes;
  int multiprocessors;
  int threads_per_multiprocessor;
  int blocks_per_multiprocessor;
  int shared_bytes_per_block_optin;
  int shared_bytes_per_multiprocessor;
  int l2_bytes;
  int bus_bits;
} Card;

/* From NVIDIA's tables of compute capabilities; memory is what such a card reports as total. */
static const Card CARDS[] = {
    {"H100", "NVIDIA H100 80GB HBM3", 9, 0, 85029158912UL, 132, 2048, 32, 232448, 233472, 52428800, 5120},
    {"A100", "NVIDIA A100-SXM4-80GB", 8, 0, 85097971712UL, 108, 2048, 32, 166912, 167936, 41943040, 5120},
    {"L4", "NVIDIA L4", 8, 9, 23586209792UL, 58, 1536, 24, 101376, 102400, 50331648, 192},
    {"MIG", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9, 0, 10468982784UL, 16, 2048, 32, 232448, 233472, 6553600, 640},
    {"T4", "Tesla T4", 7, 5, 15828320256UL, 40, 1024, 16, 65536, 65536, 4194304, 256},
};

static inline const Card *card(void) {
  const char *key = getenv("FAKE_CUDA_CARD");
  for (size_t i = 0; key && i < sizeof CARDS / sizeof *CARDS; i++)
    if (!strcmp(key, CARDS[i].key)) return &CARDS[i];
  return &CARDS[0];
}

static inline int device_count(void) {
  const char *count = getenv("FAKE_CUDA_DEVICES");
  return count ? atoi(count) : 1;
}

/* Count one call under a key; the name is what the key is reported as. */
void fake_count(const void *key, const char *name);

/* Write a line of what is asked of streams into the file that `fake_trace_to` has named, if any. */
void fake_trace(const char *format, ...);
