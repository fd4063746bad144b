#include "module.h"

#include <dirent.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "../launch.h"

namespace standin {
namespace ptx {
namespace {

constexpr uint32_t kFatBinary = 0xba55ed50;

// The folder of this library, which lies in <target>/<profile>/standin (or in a folder of it).
std::string default_folder() {
  Dl_info self;
  if (!dladdr(reinterpret_cast<void*>(&open_module), &self) || !self.dli_fname) return "";
  std::string path = self.dli_fname;
  size_t at = path.rfind("/standin/");
  if (at == std::string::npos) return "";
  at = path.rfind('/', at - 1);
  return at == std::string::npos ? "kernels" : path.substr(0, at) + "/kernels";
}

bool read_file(const std::string& path, std::string* text) {
  FILE* file = fopen(path.c_str(), "rb");
  if (!file) return false;
  char buffer[1 << 16];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, file)) > 0;) text->append(buffer, n);
  fclose(file);
  return true;
}

// The bytes of a fat binary: its header says how many follow it.
size_t size_of_image(const void* image) {
  uint16_t header;
  uint64_t rest;
  memcpy(&header, static_cast<const char*>(image) + 6, sizeof header);
  memcpy(&rest, static_cast<const char*>(image) + 8, sizeof rest);
  return header + rest;
}

// The image is compressed, but the build keeps the text that went into it beside a copy of it.
bool find_text(const void* image, Source* source, Error* error) {
  std::string folder = options().ptx.empty() ? default_folder() : options().ptx;
  size_t bytes = size_of_image(image);
  if (DIR* entries = opendir(folder.c_str())) {
    while (dirent* entry = readdir(entries)) {
      std::string name = entry->d_name;
      size_t dot = name.rfind(".fatbin");
      std::string contents;
      struct stat found;
      if (dot == std::string::npos || dot + 7 != name.size() || stat((folder + "/" + name).c_str(), &found) ||
          static_cast<size_t>(found.st_size) != bytes)
        continue;
      if (!read_file(folder + "/" + name, &contents) || memcmp(contents.data(), image, bytes)) continue;
      source->name = folder + "/" + name.substr(0, dot) + ".ptx";
      if (!read_file(source->name, &source->text)) continue;
      closedir(entries);
      return true;
    }
    closedir(entries);
  }
  *error = format(
      "no PTX of an image of %zu bytes in %s: build the program with nvcc, or name the folder of its images "
      "and PTX by the option ptx",
      bytes, folder.empty() ? "(no folder)" : folder.c_str());
  return false;
}

}  // namespace

std::shared_ptr<Module> open_module(const void* image, Error* error) {
  auto module = std::make_shared<Module>();
  Source& source = module->source;
  uint32_t magic = 0;
  if (image) memcpy(&magic, image, sizeof magic);
  if (!image) {
    *error = "a module without an image has no PTX";
    return nullptr;
  }
  if (magic == kFatBinary) {
    if (!find_text(image, &source, error)) return nullptr;
  } else {
    source.name = "image.ptx";
    source.text = static_cast<const char*>(image);
    if (source.text.find(".version") == std::string::npos) {
      *error = "an image that is neither a fat binary nor PTX";
      return nullptr;
    }
  }
  *error = read_outline(source);
  if (!error->empty()) return nullptr;
  for (const Variable& v : source.variables) {
    if (v.space == "shared") continue;
    size_t words = (v.bytes + 7) / 8 + 2;
    module->memory.emplace_back(new uint64_t[words]());
    // Tables of 16-byte values are read 16 bytes at a time.
    uint64_t at = (reinterpret_cast<uint64_t>(module->memory.back().get()) + 15) & ~uint64_t{15};
    if (v.initialised) memcpy(reinterpret_cast<void*>(at), v.value.data(), v.value.size());
    module->tables[v.name] = at;
    module->ranges.push_back({at, at + v.bytes});
  }
  return module;
}

const Program* find_program(Module& module, const std::string& name, Error* error) {
  auto known = module.programs.find(name);
  if (known != module.programs.end()) return known->second.get();
  auto function = module.source.functions.find(name);
  if (function == module.source.functions.end() || !function->second.entry) return nullptr;
  auto program = std::make_unique<Program>();
  *error = assemble(module, function->second, program.get());
  if (!error->empty()) return nullptr;
  // The source that the host's compiler read must be the one that nvcc read.
  if (const Kernel* other = find_kernel(name.c_str())) {
    bool same = other->argument_count == program->kernel.argument_count;
    for (uint32_t a = 0; same && a < other->argument_count; ++a)
      same = other->arguments[a].size == program->arguments[a].size;
    if (!same) {
      *error =
          format("kernel `%s` has other arguments in %s than in the sources that the stand-in was built from",
                 name.c_str(), module.source.name.c_str());
      return nullptr;
    }
  }
  return (module.programs[name] = std::move(program)).get();
}

}  // namespace ptx
}  // namespace standin
