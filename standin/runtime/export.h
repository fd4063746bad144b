// The functions of libcuda.so that libcublasLt.so needs, besides the driver's.
#pragma once

#define STANDIN_EXPORT __attribute__((visibility("default")))
