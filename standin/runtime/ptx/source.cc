#include "source.h"

#include <stdlib.h>
#include <string.h>

#include "../report.h"

namespace standin {
namespace ptx {

uint32_t size_of_type(const std::string& type) {
  if (type.size() < 2) return 0;
  if (type == "f16x2" || type == "bf16x2") return 4;
  const char* digits = type.c_str();
  while (*digits && (*digits < '0' || *digits > '9')) ++digits;
  std::string letters = type.substr(0, static_cast<size_t>(digits - type.c_str()));
  for (const char* known : {"b", "u", "s", "f", "bf"}) {
    if (letters != known) continue;
    int bits = atoi(digits);
    return bits == 8 || bits == 16 || bits == 32 || bits == 64 || bits == 128
               ? static_cast<uint32_t>(bits / 8)
               : 0;
  }
  return 0;
}

bool read_number(const std::string& text, uint64_t* value) {
  if (text.empty()) return false;
  const char* start = text.c_str();
  char* end = nullptr;
  if (start[0] == '0' && strchr("fFdD", start[1]) && start[1]) {
    *value = strtoull(start + 2, &end, 16);
    return end == start + text.size() && text.size() == (strchr("fF", start[1]) ? 10u : 18u);
  }
  if (start[0] != '-' && (start[0] < '0' || start[0] > '9')) return false;
  *value = start[0] == '-' ? static_cast<uint64_t>(strtoll(start, &end, 0)) : strtoull(start, &end, 0);
  while (*end == 'U') ++end;
  return end == start + text.size();
}

namespace {

bool is_name(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '$' ||
         c == '%' || c == '.';
}

// Moves over a text. The first error is kept.
class Reader {
 public:
  Reader(const Source& source, size_t from, size_t to, uint32_t line)
      : source_(source), text_(source.text), at_(from), end_(to), line_(line) {}

  Error error;

  bool fail(const std::string& what) {
    if (error.empty()) error = format("%s:%u: %s", source_.name.c_str(), line_, what.c_str());
    return false;
  }

  uint32_t line() const { return line_; }
  size_t at() const { return at_; }
  bool done() {
    skip();
    return at_ >= end_ || !error.empty();
  }
  char peek() {
    skip();
    return at_ < end_ ? text_[at_] : '\0';
  }
  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  bool expect(char c) { return take(c) || fail(format("`%c` is missing", c)); }

  // A name, directive or number; empty if none comes next.
  std::string word() {
    skip();
    size_t from = at_;
    while (at_ < end_ && (is_name(text_[at_]) || (text_[at_] == '-' && at_ == from))) ++at_;
    return text_.substr(from, at_ - from);
  }
  // What the quotes contain.
  std::string quoted() {
    if (!expect('"')) return "";
    size_t close = text_.find('"', at_);
    if (close == std::string::npos || close >= end_) {
      fail("a quote that does not end");
      return "";
    }
    std::string inside = text_.substr(at_, close - at_);
    at_ = close + 1;
    return inside;
  }
  uint64_t number() {
    std::string text = word();
    uint64_t value = 0;
    if (!read_number(text, &value)) fail(format("`%s` where a number belongs", text.c_str()));
    return value;
  }
  // The rest of the line.
  std::string to_line_end() {
    size_t from = at_;
    while (at_ < end_ && text_[at_] != '\n') ++at_;
    return text_.substr(from, at_ - from);
  }
  // Up to the closing brace of the one just taken. False if there is none.
  bool skip_braces() {
    for (int depth = 1; at_ < end_; ++at_) {
      char c = text_[at_];
      if (c == '\n') ++line_;
      if (c == '"') {
        at_ = text_.find('"', at_ + 1);
        if (at_ == std::string::npos) break;
      }
      if (c == '/' && at_ + 1 < end_ && text_[at_ + 1] == '/') {
        while (at_ + 1 < end_ && text_[at_ + 1] != '\n') ++at_;
      }
      if (c == '{') ++depth;
      if (c == '}' && --depth == 0) {
        ++at_;
        return true;
      }
    }
    at_ = end_;
    return fail("a brace that is not closed");
  }
  // One operand, up to the next comma or semicolon outside brackets, without its spaces.
  std::string operand() {
    std::string out;
    int depth = 0;
    for (skip(); at_ < end_; skip()) {
      char c = text_[at_];
      if (depth == 0 && (c == ',' || c == ';')) break;
      if (c == '{' || c == '[' || c == '(') ++depth;
      if (c == '}' || c == ']' || c == ')') --depth;
      out += c;
      ++at_;
    }
    return out;
  }

 private:
  // Spaces and comments.
  void skip() {
    while (at_ < end_) {
      char c = text_[at_];
      if (c == '/' && at_ + 1 < end_ && text_[at_ + 1] == '/') {
        while (at_ < end_ && text_[at_] != '\n') ++at_;
      } else if (c == ' ' || c == '\t' || c == '\r' || c == '\n') {
        if (c == '\n') ++line_;
        ++at_;
      } else {
        break;
      }
    }
  }

  const Source& source_;
  const std::string& text_;
  size_t at_, end_;
  uint32_t line_;
};

// After the state space: `.align 4 .b8 name[16] = {1, 2}`, `.v4 .b32 …`, `.b32 %r<9>`.
bool read_variable(Reader& r, Variable* v) {
  uint64_t element = 0;
  bool pointee = false;  // what follows tells of what a pointer points to
  std::string word = r.word();
  while (word.size() > 1 && word[0] == '.') {
    std::string name = word.substr(1);
    if (name == "align") {
      uint32_t align = static_cast<uint32_t>(r.number());
      if (!pointee) v->align = align;
    } else if (name == "pred") {
      v->type = name;
    } else if (uint32_t size = size_of_type(name)) {
      v->type = name;
      element = size;
      if (v->align < size) v->align = size;
    } else if (name == "ptr" || name == "global" || name == "shared" || name == "const" || name == "local") {
      pointee = true;
    } else {
      return r.fail(format("`%s` in a declaration is not known", word.c_str()));
    }
    word = r.word();
  }
  v->name = word;
  if (v->name.empty() || v->type.empty()) return r.fail("a declaration without a type or a name");
  v->bytes = element;
  if (r.take('<')) {
    v->copies = static_cast<uint32_t>(r.number());
    if (!r.expect('>')) return false;
  }
  while (r.take('[')) {
    v->bytes *= r.peek() == ']' ? 0 : r.number();
    if (!r.expect(']')) return false;
  }
  if (r.take('=')) {
    v->initialised = true;
    bool list = r.take('{');
    do {
      uint64_t number = r.number();
      for (uint32_t b = 0; b < element; ++b) v->value.push_back(static_cast<uint8_t>(number >> (8 * b)));
    } while (list && r.take(','));
    if (list && !r.expect('}')) return false;
    if (v->value.size() > v->bytes) return r.fail(format("`%s` has more values than room", v->name.c_str()));
    v->value.resize(v->bytes);
  }
  return r.error.empty();
}

bool read_parameters(Reader& r, std::vector<Variable>* list) {
  if (!r.expect('(')) return false;
  while (!r.take(')')) {
    std::string space = r.word();
    Variable v;
    v.space = "param";
    if (space != ".param") return r.fail(format("`%s` where a parameter belongs", space.c_str()));
    if (!read_variable(r, &v)) return false;
    list->push_back(v);
    if (r.peek() != ')' && !r.expect(',')) return false;
  }
  return true;
}

bool read_function(Reader& r, bool entry, Source& source) {
  Function f;
  f.entry = entry;
  f.line = r.line();
  if (r.peek() == '(' && !read_parameters(r, &f.results)) return false;
  f.name = r.word();
  if (r.peek() == '(' && !read_parameters(r, &f.parameters)) return false;
  while (r.peek() == '.') {
    std::string directive = r.word();
    if (directive == ".maxntid") {
      f.max_threads = 1;
      do f.max_threads *= static_cast<uint32_t>(r.number());
      while (r.take(','));
    } else if (directive == ".minnctapersm") {
      f.min_blocks = static_cast<uint32_t>(r.number());
    } else if (directive == ".pragma") {
      r.quoted();
      if (!r.expect(';')) return false;
    } else if (directive != ".noreturn") {
      return r.fail(format("`%s` of function `%s` is not known", directive.c_str(), f.name.c_str()));
    }
  }
  if (r.take(';')) return r.error.empty();  // a declaration
  if (!r.expect('{')) return false;
  f.body = r.at();
  f.body_line = r.line();
  if (!r.skip_braces()) return false;
  f.body_end = r.at() - 1;
  source.functions[f.name] = f;
  return r.error.empty();
}

// `1 355 80, function_name $L__info_string0, inlined_at 1 241 3`
Place read_place(const std::string& text, const std::vector<Place>& places) {
  auto numbers = [](const char* from, Place* p) {
    char* end = nullptr;
    p->file = static_cast<uint32_t>(strtoul(from, &end, 10));
    p->line = static_cast<uint32_t>(strtoul(end, &end, 10));
    p->column = static_cast<uint32_t>(strtoul(end, &end, 10));
  };
  Place p;
  numbers(text.c_str(), &p);
  size_t at = text.find("inlined_at ");
  if (at == std::string::npos) return p;
  Place call;
  numbers(text.c_str() + at + 11, &call);
  // The call's own place was given shortly before.
  for (size_t i = places.size(); i-- > 0;) {
    if (places[i].file == call.file && places[i].line == call.line && places[i].column == call.column) {
      p.caller = static_cast<int>(i);
      break;
    }
  }
  return p;
}

bool read_pragma(Reader& r, uint32_t* used_bytes) {
  std::string what = r.quoted();
  if (what.compare(0, 16, "used_bytes_mask ") == 0) {
    *used_bytes = static_cast<uint32_t>(strtoul(what.c_str() + 16, nullptr, 0));
  } else if (what != "nounroll") {
    return r.fail(format("pragma `%s` is not known", what.c_str()));
  }
  return r.expect(';');
}

}  // namespace

Error read_outline(Source& source) {
  Reader r(source, 0, source.text.size(), 1);
  while (!r.done()) {
    std::string word = r.word();
    bool declared_elsewhere = false;
    while (word == ".visible" || word == ".extern" || word == ".weak" || word == ".common") {
      declared_elsewhere |= word == ".extern";
      word = r.word();
    }
    if (word == ".version" || word == ".address_size") {
      r.to_line_end();
    } else if (word == ".target") {
      source.target = r.word();
      r.to_line_end();
    } else if (word == ".file") {
      uint32_t number = static_cast<uint32_t>(r.number());
      source.files[number] = r.quoted();
      r.to_line_end();
    } else if (word == ".section") {
      r.word();
      if (r.expect('{')) r.skip_braces();
    } else if (word == ".entry" || word == ".func") {
      read_function(r, word == ".entry", source);
    } else if (word == ".global" || word == ".const" || word == ".shared") {
      Variable v;
      v.space = word.substr(1);
      if (!read_variable(r, &v) || !r.expect(';')) break;
      if (v.space == "shared" && (!declared_elsewhere || v.bytes)) {
        r.fail(format("`%s`: shared memory of a fixed size; kernels divide the one buffer of smem_base()",
                      v.name.c_str()));
      }
      source.variables.push_back(v);
    } else {
      r.fail(format("directive `%s` is not known",
                    word.empty() ? std::string(1, r.peek()).c_str() : word.c_str()));
    }
  }
  return r.error;
}

Error read_body(const Source& source, const Function& function, Body* body) {
  Reader r(source, function.body, function.body_end, function.body_line);
  int place = -1;
  uint32_t used_bytes = 0;
  while (!r.done()) {
    Statement s;
    s.line = r.line();
    s.place = place;
    if (r.take('{')) {
      s.kind = Statement::Kind::open;
      body->statements.push_back(s);
      continue;
    }
    if (r.take('}')) {
      s.kind = Statement::Kind::close;
      body->statements.push_back(s);
      continue;
    }
    if (r.take(';')) continue;
    if (r.take('@')) {
      s.negated = r.take('!');
      s.guard = r.word();
    }
    s.name = r.word();
    if (s.name == ".loc") {
      body->places.push_back(read_place(r.to_line_end(), body->places));
      place = static_cast<int>(body->places.size()) - 1;
      continue;
    }
    if (s.name == ".pragma") {
      if (!read_pragma(r, &used_bytes)) break;
      continue;
    }
    if (s.name == ".reg" || s.name == ".local" || s.name == ".param" || s.name == ".shared") {
      s.kind = Statement::Kind::variable;
      do {
        Variable v = s.variables.empty() ? Variable{} : s.variables.back();
        v.space = s.name.substr(1);
        v.copies = 0;
        if (s.variables.empty()) {
          if (!read_variable(r, &v)) break;
        } else {
          v.name = r.word();  // of the same type: `.reg .b32 a, b;`
        }
        s.variables.push_back(v);
      } while (r.take(','));
      if (!r.expect(';')) break;
      body->statements.push_back(s);
      continue;
    }
    if (s.name.empty() || s.name[0] == '.') {
      r.fail(format("`%s` is not known here",
                    s.name.empty() ? std::string(1, r.peek()).c_str() : s.name.c_str()));
      break;
    }
    if (r.take(':')) {
      if (r.take(':')) {
        s.name += "::";
        s.name += r.word();
      } else {
        s.kind = Statement::Kind::label;
        body->statements.push_back(s);
        continue;
      }
    }
    // Modifiers may contain `::`.
    while (r.take(':')) {
      if (!r.expect(':')) break;
      s.name += "::" + r.word();
    }
    s.kind = Statement::Kind::instruction;
    s.used_bytes = used_bytes;
    used_bytes = 0;
    while (r.peek() != ';' && !r.done()) {
      s.operands.push_back(r.operand());
      if (!r.take(',')) break;
    }
    if (!r.expect(';')) break;
    body->statements.push_back(s);
  }
  return r.error;
}

}  // namespace ptx
}  // namespace standin
