// Kernels by name, and work spread over the host's threads.
#pragma once

#include <stdint.h>

#include <functional>
#include <vector>

#include "export.h"

namespace standin {

struct Kernel;

// Null if there is no kernel of that name.
const Kernel* find_kernel(const char* name);
std::vector<const Kernel*> all_kernels();

STANDIN_EXPORT uint32_t host_threads();
// `body(0)` to `body(count - 1)` in parallel; returns when all have finished.
STANDIN_EXPORT void parallel(uint32_t count, const std::function<void(uint32_t)>& body);

}  // namespace standin
