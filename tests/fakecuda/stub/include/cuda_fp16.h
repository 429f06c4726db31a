/* Only the sizes: the real header needs a CUDA compiler, and the stub computes nothing. */
#pragma once
typedef struct { unsigned short bits; } __half;
typedef struct { unsigned int bits; } __half2;
