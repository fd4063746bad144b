// Contexts and handles: whose each of them is, which call made it, and whether it is still there.
//
// A driver follows what it is given. A handle that was destroyed before, or whose context is gone, ends there
// in a crash or in somebody else's memory. Here a handle is the address of a record that is never freed, so
// that each misuse is noticed at its call: it is reported, and the process ends with `abort()`.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>
#include <string>

#include "export.h"

namespace standin {

struct Stream;

// One life of a card's primary context: from its first reference to its last, or to a reset.
struct Primary {
  int card;
  Stream* legacy = nullptr;        // its default stream
  int sticky = 0;                  // the error that broke it; every later call in it returns that
  const char* ended_by = nullptr;  // the call that did, once it is over
};

// What a `CUcontext` points to: the same for every life of a card's primary context, as in the driver.
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
};

// The call that the program made, for reports: the outermost of this thread.
class STANDIN_EXPORT Call {
 public:
  explicit Call(const char* name);
  ~Call();
  static const char* name();

 private:
  bool outermost_;
};

// Reports what the call did, and ends the process.
[[noreturn]] STANDIN_EXPORT void misuse(const std::string& what);

STANDIN_EXPORT Record* make_handle(Kind kind, Primary* context, std::shared_ptr<void> object);
// The record of a handle; ends the process unless it is one of this kind that can still be used.
STANDIN_EXPORT Record& live(Kind kind, const void* handle);
// Destroys what a handle stands for. Returns the error that its context is broken with.
STANDIN_EXPORT int end(Record& record);
template <class T>
T& object_of(const Record& record) {
  return *static_cast<T*>(record.object.get());
}
// Ends the process unless both belong to one context.
STANDIN_EXPORT void same_context(const Record& record, const Record& other);
// The same for the context that is current, and for a stream's.
STANDIN_EXPORT void same_context(const Record& record, const Primary& current);

// Remembers an allocation.
Record* make_memory(Kind kind, Primary* context, uint64_t address, size_t bytes);
// As `live`, by the address that an allocation starts at.
Record& live_memory(Kind kind, uint64_t address);
// Ends the process where an address lies in page-locked memory that was freed.
void refuse_freed(uint64_t address);
// Ends the process where an address lies in memory of another card's context.
STANDIN_EXPORT void refuse_foreign(uint64_t address, const Primary& context);

// The card behind a `CUcontext`, or null.
Card* card_of(const void* context);
Card& card(int index);
// The contexts that this thread has put upon one another; the last is current.
struct ContextStack {
  static constexpr int kMost = 32;
  Card* cards[kMost];
  int depth;
};
ContextStack& context_stack();
// The current context, or the code with which calls fail: there is none, it is gone, or broken.
STANDIN_EXPORT int current_context(Primary** context);
// False where there are too many streams already: a context has one.
bool begin_context(Card& card);
// Ends the context's life: everything that belongs to it is gone.
void end_context(Card& card);
// Writes one line into the file of the option `contexts`.
STANDIN_EXPORT void note_context(const char* what, const char* state, int card);

}  // namespace standin
