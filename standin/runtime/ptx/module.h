// Finds the PTX of the images that the driver is given.
#pragma once

#include <memory>
#include <string>

#include "program.h"

namespace standin {
namespace ptx {

// The module of an image: of PTX as text, or of a fat binary, whose PTX lies beside a copy of it in the
// folder of the option `ptx`. Null with an error if there is none or if it cannot be read.
std::shared_ptr<Module> open_module(const void* image, Error* error);

// A kernel of a module, ready to run. Null without an error: there is none of that name.
const Program* find_program(Module& module, const std::string& name, Error* error);

}  // namespace ptx
}  // namespace standin
