// Contexts and handles: the owner of each, the call that made it, and whether it is still alive.
//
// A real driver follows whatever it is given. A destroyed handle, or one whose context is gone, crashes it or leads to
// other objects' memory. Here a handle is the address of a record that is never freed, so each misuse is noticed at its
// call: it is reported, and the process ends with `abort()`.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>
#include <string>

#include "export.h"
#include "stream.h"

namespace standin {

// One life of a GPU's primary context: from its first reference to its last, or to a reset.
struct Primary {
  int card;
  Stream* legacy = nullptr;        // its default stream
  StreamClock ended{};             // of its streams that are no more
  StreamClock ended_blocking{};    // of those of them that the default stream waits for
  int sticky = 0;                  // the error that broke it; every later call in it returns that
  const char* ended_by = nullptr;  // the call that did, once it is over
};

// What a `CUcontext` points to: the same for every life of a GPU's primary context, as in the driver.
struct Card {
  int index;
  uint32_t references = 0;
  Primary* context = nullptr;  // null: none is alive
};

enum class Kind : uint8_t {
  stream,
  event,
  graph,
  executable_graph,
  module,
  function,
  device_memory,
  host_memory,
  registered_memory,
  blaslt,
};

struct Record {
  Kind kind{};
  uint64_t number = 0;             // among its kind, from 1
  Primary* context;                // null: memory that no context owns
  const char* made_by;             // the call
  const char* ended_by = nullptr;  // the call that destroyed it
  std::shared_ptr<void> object;    // until then
  const Record* module = nullptr;  // of a function
  uint64_t address = 0;            // of memory
  size_t bytes = 0;
  bool in_stream_order = false;  // of memory: allocated by cuMemAllocAsync
};

// The call that the program made, for reports: the outermost one of this thread.
class STANDIN_EXPORT Call {
 public:
  explicit Call(const char* name);
  ~Call();
  static const char* name();

 private:
  bool outermost_;
};

// The same for work that runs later: the call that submitted it.
class CallOf {
 public:
  explicit CallOf(const char* name);
  ~CallOf();

 private:
  const char* before_;
};

// Reports the misuse and ends the process.
[[noreturn]] STANDIN_EXPORT void misuse(const std::string& what);

STANDIN_EXPORT Record* make_handle(Kind kind, Primary* context, std::shared_ptr<void> object);
// The record of a handle; ends the process unless it is of this kind and still usable.
STANDIN_EXPORT Record& live(Kind kind, const void* handle);
// Destroys the object of a handle. Returns the error that its context is broken with.
STANDIN_EXPORT int end(Record& record);
// Memory may not be used any more, and is given back later.
void mark_ended(Record& memory);
void give_back(const Record& memory);
template <class T>
T& object_of(const Record& record) {
  return *static_cast<T*>(record.object.get());
}
// Ends the process unless both belong to the same context.
STANDIN_EXPORT void same_context(const Record& record, const Record& other);
// The same for the current context, and for a stream's.
STANDIN_EXPORT void same_context(const Record& record, const Primary& current);

// Records an allocation.
Record* make_memory(Kind kind, Primary* context, uint64_t address, size_t bytes);
// Like `live`, by the start address of an allocation.
Record& live_memory(Kind kind, uint64_t address);
// Ends the process if an address lies in page-locked memory that was freed.
void refuse_freed(uint64_t address);
// Ends the process if work in flight uses this page-locked memory.
void refuse_in_use(const Record& memory);
// Whether an address lies in page-locked memory.
bool page_locked(uint64_t address);
// Ends the process if an address lies in memory of another GPU's context.
STANDIN_EXPORT void refuse_foreign(uint64_t address, const Primary& context);

// The GPU of a `CUcontext`, or null.
Card* card_of(const void* context);
Card& card(int index);
// The stack of contexts of this thread; the last is current.
struct ContextStack {
  static constexpr int kMost = 32;
  Card* cards[kMost];
  int depth;
};
ContextStack& context_stack();
// The current context, or the error code of calls: there is none, it is gone, or broken.
STANDIN_EXPORT int current_context(Primary** context);
// False if there are too many streams: every context has one.
bool begin_context(Card& card);
// Ends the context's life: destroys everything that belongs to it.
void end_context(Card& card);
// Writes one line to the file of the option `contexts`.
STANDIN_EXPORT void note_context(const char* what, const char* state, int card);

}  // namespace standin
