// CNNOPS_HD marks what both the host and CUDA devices compute; sources for devices define CNNOPS_DEVICE_SOURCE.
#pragma once

#if defined(__CUDACC__)
#define CNNOPS_HD __host__ __device__
#else
#define CNNOPS_HD
#endif
