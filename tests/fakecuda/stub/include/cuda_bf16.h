/* Only the size: the real header needs a CUDA compiler, and the stub computes nothing. */
#pragma once
typedef struct { unsigned short bits; } __nv_bfloat16;
