// What libcublasLt.so needs of libcuda.so beyond the driver's functions.
#pragma once

#define STANDIN_EXPORT __attribute__((visibility("default")))
