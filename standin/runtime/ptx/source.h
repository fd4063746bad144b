// The text of a PTX module, taken apart: its functions, tables and statements, each with its line in the text
// and its place in the kernel's source (`.loc`). Nothing is interpreted here; what is not understood is an
// error with its line.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <map>
#include <string>
#include <vector>

namespace standin {
namespace ptx {

// What went wrong while a text was read; empty: nothing. It names the file and the line.
using Error = std::string;

// A variable of a module (a table of constants), of a function (`.reg`, `.local`, `.param`), or a parameter.
struct Variable {
  std::string space;  // reg, local, param, shared, global, const
  std::string type;   // u32, f64, pred, …
  std::string name;
  uint32_t align = 1;
  uint64_t bytes = 0;   // of all elements; 0: an array without a size
  uint32_t copies = 0;  // `.reg .b32 %r<9>`: 9 registers %r0 to %r8; else 0
  bool initialised = false;
  std::vector<uint8_t> value;
};

// A place in the kernel's source, and that of the call it was inlined into.
struct Place {
  uint32_t file = 0, line = 0, column = 0;
  int caller = -1;  // index into the function's places
};

struct Statement {
  enum class Kind : uint8_t { instruction, label, open, close, variable };
  Kind kind;
  bool negated = false;  // @!%p
  uint32_t line = 0;     // in the text
  int place = -1;        // index into the function's places; -1: none yet
  // Of a load: the bytes whose values are used (the compiler widened it); 0: all.
  uint32_t used_bytes = 0;
  std::string guard;  // the predicate's name
  std::string name;   // the instruction with its modifiers, or the label
  std::vector<std::string> operands;
  std::vector<Variable> variables;
};

struct Function {
  std::string name;
  bool entry = false;
  uint32_t line = 0;
  uint32_t max_threads = 0, min_blocks = 0;  // 0: not said
  std::vector<Variable> results, parameters;
  // Where the body lies in the text, between its braces; it is taken apart when the function is first needed.
  size_t body = 0, body_end = 0;
  uint32_t body_line = 0;
};

struct Body {
  std::vector<Statement> statements;
  std::vector<Place> places;
};

struct Source {
  std::string name;  // of the file, for reports
  std::string text;
  std::string target;                     // sm_90
  std::map<uint32_t, std::string> files;  // `.file`
  std::map<std::string, Function> functions;
  std::vector<Variable> variables;
};

// The module's outline: everything but the bodies.
Error read_outline(Source& source);
Error read_body(const Source& source, const Function& function, Body* body);

// Bytes of one value of a type; 0: no such type (and for predicates).
uint32_t size_of_type(const std::string& type);
// A number as PTX writes it: 12, -12, 0x1F, 0f3F800000, 0d3FF0000000000000. False if it is none.
bool read_number(const std::string& text, uint64_t* value);

}  // namespace ptx
}  // namespace standin
