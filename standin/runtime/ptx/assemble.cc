// From a kernel's text to a program: operands become places of registers, labels become indices, calls become
// copies of the called function's body.
#include <string.h>

#include <algorithm>
#include <atomic>
#include <set>

#include "program.h"

namespace standin {
namespace ptx {

void place_registers(Program& program, const std::string& kinds, std::vector<std::vector<uint32_t>>& operands,
                     const std::set<uint32_t>& fixed);

namespace {

// What a name stands for.
struct Symbol {
  enum class Kind : uint8_t { reg, local, parameter } kind;
  uint32_t id = 0;      // a register's number
  uint64_t offset = 0;  // of a local array or a parameter
  uint64_t bytes = 0;
};

const char* kSpecials[] = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
                           "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
                           "%nctaid.y", "%nctaid.z", "%laneid",  "%warpid"};

// What stands between the outermost braces, brackets or parentheses, at its commas.
std::vector<std::string> inside(const std::string& text) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (size_t i = 1; i + 1 < text.size(); ++i) {
    char c = text[i];
    if (c == '{' || c == '[' || c == '(') ++depth;
    if (c == '}' || c == ']' || c == ')') --depth;
    if (c == ',' && depth == 0) {
      parts.push_back(part);
      part.clear();
    } else {
      part += c;
    }
  }
  if (!part.empty()) parts.push_back(part);
  return parts;
}

std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> list;
  for (size_t at = 0; at < text.size();) {
    size_t end = std::min(text.find(' ', at), text.size());
    list.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return list;
}

class Assembler {
 public:
  Assembler(Module& module, Program& program) : module_(module), program_(program) {}

  Error run(const Function& entry) {
    program_.name = entry.name;
    scopes_.emplace_back();
    if (parameters(entry)) expand(entry);
    Statement end;
    end.kind = Statement::Kind::instruction;
    end.name = "ret";
    end.line = entry.body_line;
    if (error_.empty()) instruction(end, nullptr);
    resolve_labels();
    if (!error_.empty()) return error_;
    place_registers(program_, kinds_, operands_, fixed_);
    return "";
  }

 private:
  bool fail(const std::string& what) {
    if (error_.empty()) error_ = format("%s:%u: %s", module_.source.name.c_str(), line_, what.c_str());
    return false;
  }

  // ---- names ----------------------------------------------------------------------------------------------

  uint32_t new_register(char kind) {
    kinds_ += kind;
    return static_cast<uint32_t>(kinds_.size()) - 1;
  }
  const Symbol* find(const std::string& name) const {
    for (size_t i = scopes_.size(); i-- > 0;) {
      auto at = scopes_[i].find(name);
      if (at != scopes_[i].end()) return &at->second;
    }
    return nullptr;
  }

  bool parameters(const Function& entry) {
    for (const Variable& v : entry.parameters) {
      uint32_t at = (program_.argument_bytes + v.align - 1) / v.align * v.align;
      program_.arguments.push_back({static_cast<uint32_t>(v.bytes), v.align});
      program_.argument_offsets.push_back(at);
      program_.argument_bytes = at + static_cast<uint32_t>(v.bytes);
      scopes_.back()[v.name] = {Symbol::Kind::parameter, 0, at, v.bytes};
    }
    return true;
  }

  bool declare(const Statement& s) {
    for (const Variable& v : s.variables) {
      if (v.space == "reg" || v.space == "param") {
        char kind = v.type == "pred" ? 'p' : v.bytes == 8 ? 'l' : 'w';
        if (v.copies > 1u << 20) return fail(format("%u registers `%s`", v.copies, v.name.c_str()));
        if (v.bytes > 8)
          return fail(format("`%s` has %llu bytes: a register has 8 at most", v.name.c_str(),
                             static_cast<unsigned long long>(v.bytes)));
        if (!v.copies) scopes_.back()[v.name] = {Symbol::Kind::reg, new_register(kind), 0, v.bytes};
        for (uint32_t i = 0; i < v.copies; ++i)
          scopes_.back()[v.name + std::to_string(i)] = {Symbol::Kind::reg, new_register(kind), 0, v.bytes};
      } else if (v.space == "local") {
        uint32_t at = (program_.local_bytes + v.align - 1) / v.align * v.align;
        scopes_.back()[v.name] = {Symbol::Kind::local, 0, at, v.bytes};
        program_.local_bytes = at + static_cast<uint32_t>(v.bytes);
      } else {
        return fail(format("`.%s %s` in a function: kernels divide the one buffer of smem_base()",
                           v.space.c_str(), v.name.c_str()));
      }
    }
    return true;
  }

  uint32_t constant(uint64_t value, char kind) {
    if (kind != 'l') value = static_cast<uint32_t>(value);
    auto [at, fresh] = constants_.emplace(std::make_pair(value, kind), 0);
    if (fresh) {
      at->second = new_register(kind);
      fixed_.insert(at->second);
      program_.constants.push_back({at->second, kind == 'l', value});
    }
    return at->second;
  }

  // A source operand of that kind: a register, a number, or the address of a variable.
  bool source(const std::string& text, char kind, uint32_t* id) {
    if (const Symbol* symbol = find(text)) {
      if (symbol->kind != Symbol::Kind::reg) {
        *id = constant(symbol->offset, kind);
        return kind != 'p' || fail(format("`%s` is no predicate", text.c_str()));
      }
      *id = symbol->id;
      return kinds_[*id] == kind ||
             fail(format("register `%s` has another width than `%s` reads", text.c_str(), form_->name));
    }
    for (size_t i = 0; i < sizeof kSpecials / sizeof *kSpecials; ++i) {
      if (text != kSpecials[i] || kind != 'w') continue;
      auto [at, fresh] = specials_.emplace(i, 0);
      if (fresh) {
        at->second = new_register('w');
        fixed_.insert(at->second);
        program_.specials.push_back({at->second, static_cast<Special>(i)});
      }
      *id = at->second;
      return true;
    }
    uint64_t number;
    if (read_number(text, &number)) {
      *id = constant(kind == 'p' ? (number ? ~uint64_t{0} : 0) : number, kind);
      return true;
    }
    for (const Variable& v : module_.source.variables) {
      if (v.name != text) continue;
      auto table = module_.tables.find(text);
      *id = constant(table == module_.tables.end() ? 0 : table->second, kind);
      if (table != module_.tables.end() && kind != 'l')
        return fail(format("`%s` needs 64 bits", text.c_str()));
      return true;
    }
    return fail(format("operand `%s` of `%s` is not known", text.c_str(), form_->name));
  }

  bool destination(const std::string& text, char kind, uint32_t* id) {
    if (text == "_") {
      *id = new_register(kind);
      return true;
    }
    const Symbol* symbol = find(text);
    if (!symbol || symbol->kind != Symbol::Kind::reg)
      return fail(format("`%s` is no register", text.c_str()));
    *id = symbol->id;
    return kinds_[*id] == kind ||
           fail(format("register `%s` has another width than `%s` writes", text.c_str(), form_->name));
  }

  // [register], [register+8], [variable+8], [16]
  bool address(const std::string& text, Instruction& i, int which, std::vector<uint32_t>& sources) {
    if (text.size() < 3 || text[0] != '[' || text.back() != ']')
      return fail(format("`%s` is no address", text.c_str()));
    std::string base = text.substr(1, text.size() - 2);
    size_t plus = base.find('+');
    uint64_t offset = 0;
    if (plus != std::string::npos) {
      if (!read_number(base.substr(plus + 1), &offset))
        return fail(format("`%s` is no address", text.c_str()));
      base.resize(plus);
    }
    i.offset[which] = static_cast<int64_t>(offset);
    const Symbol* symbol = find(base);
    if (symbol && symbol->kind == Symbol::Kind::parameter) {
      i.offset[which] += static_cast<int64_t>(symbol->offset);
      if (static_cast<int64_t>(offset) < 0 || offset >= symbol->bytes)
        return fail(format("`%s` lies outside the parameter's %llu bytes", text.c_str(),
                           static_cast<unsigned long long>(symbol->bytes)));
      return true;
    }
    bool table = module_.tables.count(base) != 0;
    bool wide = symbol && symbol->kind == Symbol::Kind::reg ? kinds_[symbol->id] == 'l' : table;
    i.wide_address[which] = wide;
    uint32_t id;
    if (!source(base, wide ? 'l' : 'w', &id)) return false;
    sources.push_back(id);
    return true;
  }

  // ---- instructions ---------------------------------------------------------------------------------------

  // Whether the operands have the numbers and vectors that a form wants.
  static bool fits(const Form& form, const std::vector<std::string>& operands) {
    std::vector<std::string> wanted = words(form.operands);
    if (wanted.size() != operands.size()) return false;
    for (size_t k = 0; k < wanted.size(); ++k) {
      size_t count = static_cast<size_t>(atoi(wanted[k].c_str()));
      bool vector = operands[k][0] == '{';
      bool wants_vector = wanted[k].size() > 1;
      if (wanted[k].back() == 'T') {
        std::vector<std::string> parts = inside(operands[k]);
        if (parts.size() != 2 || parts[1][0] != '{' || inside(parts[1]).size() != count) return false;
        continue;
      }
      if (vector != wants_vector || (vector && inside(operands[k]).size() != count)) return false;
    }
    return true;
  }

  bool one_operand(char kind, const std::string& text, Instruction& i, std::vector<uint32_t>& d,
                   std::vector<uint32_t>& s) {
    uint32_t id;
    char lower = static_cast<char>(kind | 0x20);
    switch (kind) {
      case 'W':
      case 'L':
      case 'P':
        if (!destination(text, lower, &id)) return false;
        d.push_back(id);
        return true;
      case 'A':
        if (!destination(text, 'w', &id)) return false;
        d.push_back(id);
        s.push_back(id);
        return true;
      case 'Q': {
        size_t bar = text.find('|');
        if (!destination(text.substr(0, bar), 'w', &id)) return false;
        d.push_back(id);
        id = kNoRegister;
        if (bar != std::string::npos && !destination(text.substr(bar + 1), 'p', &id)) return false;
        d.push_back(id);
        return true;
      }
      // A register of 64 bits gets the value, or gives it, through one of 32.
      case 'X': {
        const Symbol* symbol = find(text);
        if (!symbol || symbol->kind != Symbol::Kind::reg || kinds_[symbol->id] != 'l')
          return one_operand('W', text, i, d, s);
        d.push_back(new_register('w'));
        widened_.emplace_back(symbol->id, d.back());
        return true;
      }
      case 'x': {
        const Symbol* symbol = find(text);
        if (!symbol || symbol->kind != Symbol::Kind::reg || kinds_[symbol->id] != 'l')
          return one_operand('w', text, i, d, s);
        s.push_back(new_register('w'));
        emit_conversion("cvt.u32.u64", s.back(), symbol->id, i);
        return true;
      }
      case 'm': return address(text, i, addresses_++, s);
      case 't':
        branches_.push_back({static_cast<uint32_t>(program_.code.size()), text, scope_ids_, i.line});
        return true;
      case 'i': {
        uint64_t number;
        if (!read_number(text, &number)) return fail(format("`%s` is no number", text.c_str()));
        i.literals[literals_++] = static_cast<int64_t>(number);
        return true;
      }
      default:
        if (!source(text, kind, &id)) return false;
        s.push_back(id);
        return true;
    }
  }

  bool instruction(const Statement& st, const Body* body) {
    line_ = st.line;
    std::string name = st.name;
    std::vector<std::string> operands = st.operands;
    if (name == "call.uni" || name == "call") return call(st);
    // A parameter of a call is a register here.
    if (name.compare(0, 8, "ld.param") == 0 || name.compare(0, 8, "st.param") == 0) {
      if (operands.size() < 2) return fail(format("`%s` without its operands", name.c_str()));
      std::string& place = operands[name[0] == 'l' ? operands.size() - 1 : 0];
      if (place.size() < 3) return fail(format("`%s` is no address", place.c_str()));
      std::string base = place.substr(1, std::min(place.find('+'), place.size() - 1) - 1);
      const Symbol* symbol = find(base);
      if (symbol && symbol->kind == Symbol::Kind::reg && is_call_parameter(base)) {
        size_t plus = place.find('+'), dot = name.rfind('.');
        if (plus != std::string::npos && place.substr(plus) != "+0]")
          return fail(
              format("`%s`: parts of a call's parameter are not known to the stand-in", place.c_str()));
        name = "mov" + name.substr(dot);
        place = base;
      }
    }
    if (name == "ret" && !returns_.empty()) {
      name = "bra";
      operands = {returns_.back()};
    }
    const std::vector<const Form*>* forms = find_forms(name);
    if (!forms) return fail(format("instruction `%s` is not known to the stand-in", name.c_str()));
    form_ = nullptr;
    for (const Form* form : *forms) {
      if (fits(*form, operands)) form_ = form;
    }
    if (!form_) {
      std::string text;
      for (const std::string& operand : operands) text += (text.empty() ? " " : ", ") + operand;
      return fail(format("`%s%s`: the stand-in does not know these operands", name.c_str(), text.c_str()));
    }
    Instruction i;
    i.form = form_;
    i.step = form_->step;
    i.flow = form_->flow;
    i.line = st.line;
    i.negated = st.negated;
    i.used_bytes = st.used_bytes;
    // A text without line information has its own lines.
    i.site = body && st.place >= 0 ? site(*body, st.place)
                                   : Site{module_.source.name.c_str(), static_cast<int>(st.line)};
    addresses_ = literals_ = 0;
    std::vector<uint32_t> d, s;
    if (!st.guard.empty() && !source(st.guard, 'p', &i.guard)) return false;
    std::vector<std::string> wanted = words(form_->operands);
    for (size_t k = 0; k < wanted.size(); ++k) {
      char kind = wanted[k].back();
      if (kind == 'T') {
        std::vector<std::string> parts = inside(operands[k]);
        i.wide_address[addresses_++] = true;
        if (!one_operand('l', parts[0], i, d, s)) return false;
        for (const std::string& part : inside(parts[1])) {
          if (!one_operand('w', part, i, d, s)) return false;
        }
      } else if (wanted[k].size() == 1) {
        if (!one_operand(kind, operands[k], i, d, s)) return false;
      } else {
        for (const std::string& part : inside(operands[k])) {
          if (!one_operand(kind, part, i, d, s)) return false;
        }
      }
    }
    for (const char* start : {"mbarrier.", "wgmma.", "cp.async.bulk.", "fence.proxy.async"})
      program_.asynchronous |= name.compare(0, strlen(start), start) == 0;
    program_.code.push_back(i);
    operands_.push_back(d);
    operands_.push_back(s);
    bool has_sign = name[name.rfind('.') + 1] == 's';
    for (const auto& [wide, word] : widened_)
      emit_conversion(has_sign ? "cvt.s64.s32" : "cvt.u64.u32", wide, word, i);
    widened_.clear();
    return true;
  }

  // An instruction of the stand-in's own, beside the one at hand.
  void emit_conversion(const char* name, uint32_t to, uint32_t from, const Instruction& beside) {
    Instruction i;
    i.form = find_forms(name)->front();
    i.step = i.form->step;
    i.line = beside.line;
    i.site = beside.site;
    i.guard = beside.guard;
    i.negated = beside.negated;
    program_.code.push_back(i);
    operands_.push_back({to});
    operands_.push_back({from});
  }

  bool is_call_parameter(const std::string& name) const {
    for (const auto& set : call_parameters_) {
      if (set.count(name)) return true;
    }
    return false;
  }

  // (results), function, (arguments)
  bool call(const Statement& st) {
    std::vector<std::string> results, arguments;
    std::string callee;
    for (const std::string& operand : st.operands) {
      if (operand[0] != '(') callee = operand;
      else (callee.empty() ? results : arguments) = inside(operand);
    }
    auto at = module_.source.functions.find(callee);
    if (!st.guard.empty() || at == module_.source.functions.end() || at->second.entry)
      return fail(format("a call of `%s`, which is not in the module or under a predicate", callee.c_str()));
    const Function& f = at->second;
    if (scopes_.size() > 64) return fail(format("`%s` calls itself", callee.c_str()));
    if (results.size() != f.results.size() || arguments.size() != f.parameters.size())
      return fail(format("a call of `%s` with other arguments than it has", callee.c_str()));
    std::map<std::string, Symbol> bound;
    std::set<std::string> names;
    auto bind = [&](const std::string& formal, const std::string& actual) {
      const Symbol* symbol = find(actual);
      if (!symbol || symbol->kind != Symbol::Kind::reg)
        return fail(format("`%s` is no parameter", actual.c_str()));
      bound[formal] = *symbol;
      names.insert(formal);
      return true;
    };
    for (size_t k = 0; k < results.size(); ++k) {
      if (!bind(f.results[k].name, results[k])) return false;
    }
    for (size_t k = 0; k < arguments.size(); ++k) {
      if (!bind(f.parameters[k].name, arguments[k])) return false;
    }
    scopes_.push_back(bound);
    call_parameters_.push_back(names);
    scope_ids_.push_back(++last_scope_);
    returns_.push_back(format("return %u", last_scope_));
    bool good = expand(f);
    labels_[{scope_ids_.back(), returns_.back()}] = static_cast<uint32_t>(program_.code.size());
    returns_.pop_back();
    scope_ids_.pop_back();
    call_parameters_.pop_back();
    scopes_.pop_back();
    return good;
  }

  bool expand(const Function& f) {
    Body body;
    error_ = read_body(module_.source, f, &body);
    if (!error_.empty()) return false;
    std::vector<Site> sites;
    std::swap(sites, sites_);
    open();
    for (const Statement& s : body.statements) {
      line_ = s.line;
      switch (s.kind) {
        case Statement::Kind::open: open(); break;
        case Statement::Kind::close: close(); break;
        case Statement::Kind::label:
          labels_[{scope_ids_.back(), s.name}] = static_cast<uint32_t>(program_.code.size());
          break;
        case Statement::Kind::variable:
          declare(s);
          for (const Variable& v : s.variables) {
            if (v.space == "param") call_parameters_.back().insert(v.name);
          }
          break;
        case Statement::Kind::instruction: instruction(s, &body); break;
      }
      if (!error_.empty()) return false;
    }
    close();
    std::swap(sites, sites_);
    return true;
  }

  void open() {
    scopes_.emplace_back();
    call_parameters_.emplace_back();
    scope_ids_.push_back(++last_scope_);
  }
  void close() {
    scopes_.pop_back();
    call_parameters_.pop_back();
    scope_ids_.pop_back();
  }

  void resolve_labels() {
    for (const Branch& b : branches_) {
      bool found = false;
      for (size_t i = b.scopes.size(); i-- > 0 && !found;) {
        auto at = labels_.find({b.scopes[i], b.label});
        if (at == labels_.end()) continue;
        program_.code[b.from].target = at->second;
        found = true;
      }
      line_ = b.line;
      if (!found) fail(format("label `%s` does not exist", b.label.c_str()));
    }
  }

  // ---- places in the source -------------------------------------------------------------------------------

  // Where a reader looks: not at the functions that stand for single instructions, nor at the compiler's own
  // headers.
  static bool of_the_kernels(const std::string& file) {
    return file.find("kernels/ptx.cuh") == std::string::npos && file.find("/include/") == std::string::npos;
  }

  Site site(const Body& body, int at) {
    if (sites_.size() != body.places.size()) sites_.assign(body.places.size(), Site{nullptr, 0});
    Site& known = sites_[static_cast<size_t>(at)];
    if (known.file) return known;
    std::string callers;
    int shown = 0;
    for (int p = at; p >= 0 && shown < 4; p = body.places[static_cast<size_t>(p)].caller) {
      const Place& spot = body.places[static_cast<size_t>(p)];
      const std::string& file = file_name(spot.file);
      if (!of_the_kernels(file) && spot.caller >= 0) continue;
      if (shown++ == 0) known = {file.c_str(), static_cast<int>(spot.line)};
      else callers += ", called at " + place(Site{file.c_str(), static_cast<int>(spot.line)});
    }
    if (!callers.empty()) {
      program_.texts.push_back(callers);
      known.callers = program_.texts.back().c_str();
    }
    return known;
  }
  const std::string& file_name(uint32_t number) {
    static const std::string unknown = "unknown";
    auto at = module_.source.files.find(number);
    return at == module_.source.files.end() ? unknown : at->second;
  }

  struct Branch {
    uint32_t from;
    std::string label;
    std::vector<uint32_t> scopes;
    uint32_t line;
  };

  Module& module_;
  Program& program_;
  Error error_;
  uint32_t line_ = 0;
  const Form* form_ = nullptr;  // of the instruction at hand
  int literals_ = 0;
  int addresses_ = 0;  // that it has so far
  std::vector<std::pair<uint32_t, uint32_t>>
      widened_;               // its registers of 64 bits that get a value of 32, and that value's
  std::string kinds_;         // of each register: w, l or p
  std::set<uint32_t> fixed_;  // registers that are set before the kernel starts
  std::vector<std::vector<uint32_t>> operands_;  // of each instruction: what it writes, what it reads
  std::vector<std::map<std::string, Symbol>> scopes_;
  std::vector<std::set<std::string>> call_parameters_;
  std::vector<uint32_t> scope_ids_;
  uint32_t last_scope_ = 0;
  std::map<std::pair<uint64_t, char>, uint32_t> constants_;
  std::map<size_t, uint32_t> specials_;
  std::map<std::pair<uint32_t, std::string>, uint32_t> labels_;
  std::vector<Branch> branches_;
  std::vector<std::string> returns_;  // the labels after the calls that are being expanded
  std::vector<Site> sites_;           // of the function's places, as far as they are known
};

}  // namespace

Error assemble(Module& module, const Function& entry, Program* program) {
  Assembler assembler(module, *program);
  Error error = assembler.run(entry);
  if (!error.empty()) return error;
  static std::atomic<uint64_t> programs{0};
  program->number = ++programs;
  program->module = &module;
  program->kernel.bound = {program->name.c_str(), entry.max_threads ? entry.max_threads : kMaxThreads,
                           entry.min_blocks, false,
                           Site{module.source.name.c_str(), static_cast<int>(entry.line)}};
  program->kernel.argument_count = static_cast<uint32_t>(program->arguments.size());
  program->kernel.arguments = program->arguments.data();
  return "";
}

}  // namespace ptx
}  // namespace standin
