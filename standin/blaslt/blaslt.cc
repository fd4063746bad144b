// cuBLASLt, the part that large matrix products need: libcublasLt.so's own names, attributes and refusals.
//
// What the real library documents as unsupported is refused here with its status. Calls that it would accept and then
// execute slowly (rows that are not a multiple of 16 bytes apart) are refused too, so that they are noticed. Names and
// numbers follow NVIDIA's cuBLAS documentation (CUDA 13.0), sections "Using the cuBLASLt API".
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <mutex>

#include "../runtime/driver.h"
#include "../runtime/launch.h"
#include "../runtime/options.h"
#include "../runtime/report.h"
#include "../runtime/stream.h"
#include "algorithms.h"

using namespace standin;

namespace {

enum Status {
  kSuccess = 0,
  kBadHandle = 1,
  kBadValue = 7,
  kArchMismatch = 8,
  kFailed = 13,
  kUnsupported = 15
};
enum DataType { kR32F = 0, kR16BF = 14 };
enum ComputeType { k32F = 68, k32FPedantic = 69, k32FFastTF32 = 77 };

struct Description {
  int compute, scale;
  int pointer_mode = 0;
  int transpose_a = 0, transpose_b = 0;
  uint32_t epilogue = 1;
  void* bias = nullptr;
  void* aux = nullptr;
  int64_t aux_ld = 0;
  int aux_type = -1, bias_type = -1;
};

struct Layout {
  int type;
  uint64_t rows, cols;
  int64_t ld;
  int order = 0;
  int32_t batches = 1;
  int64_t batch_stride = 0;
};

struct Preference {
  uint32_t search = 0;  // best fit
  uint64_t workspace = 0;
  uint32_t align[4] = {256, 256, 256, 256};
  uint32_t reductions = 7;
};

struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

// Whether a refusal is printed: that of a product is, that of a query is not.
bool loud = false;

int refuse(int status, const std::string& why) {
  publish({status, "cublasLtMatmul: " + why}, loud);
  return status;
}

bool epilogue_of(uint32_t number, Epilogue* e) {
  switch (number) {
    case 1: break;
    case 2: e->relu = true; break;
    case 4: e->bias = true; break;
    case 6: e->relu = e->bias = true; break;
    case 32: e->gelu = true; break;
    case 36: e->gelu = e->bias = true; break;
    case 160: e->gelu = e->aux_out = true; break;
    case 164: e->gelu = e->aux_out = e->bias = true; break;
    case 192: e->dgelu = true; break;
    case 208: e->dgelu = e->bias_gradient = true; break;
    case 256: e->gradient_a = true; break;
    case 512: e->gradient_b = true; break;
    default: return false;
  }
  return true;
}

// Fills in everything except the pointers and factors. kSuccess, or the status with which the real library refuses.
int understand(const Description& d, const Layout& a, const Layout& b, const Layout& c, const Layout& out,
               Matmul* p) {
  if (d.compute != k32F && d.compute != k32FPedantic && d.compute != k32FFastTF32) {
    return refuse(kUnsupported, format("compute type %d", d.compute));
  }
  if (d.pointer_mode != 0 && d.pointer_mode != 1)
    return refuse(kUnsupported, format("pointer mode %d", d.pointer_mode));
  if (d.scale != kR32F)
    return refuse(kUnsupported, format("scale type %d with a 32-bit compute type", d.scale));
  if ((a.type != kR32F && a.type != kR16BF) || a.type != b.type) {
    return refuse(kUnsupported, format("types %d and %d of A and B", a.type, b.type));
  }
  if (c.type != out.type) return refuse(kUnsupported, "C and D of different types");
  if (out.type != kR32F && !(out.type == kR16BF && a.type == kR16BF)) {
    return refuse(kUnsupported, format("type %d of D with type %d of A and B", out.type, a.type));
  }
  if (d.compute == k32FFastTF32 && a.type != kR32F)
    return refuse(kUnsupported, "TF32 with inputs that are not f32");
  for (const Layout* l : {&a, &b, &c, &out}) {
    if (l->order != 0 || l->batches != 1) return refuse(kUnsupported, "row-major or batched layouts");
    if (l->rows == 0 || l->cols == 0) return refuse(kBadValue, "an empty matrix");
    if (l->ld < static_cast<int64_t>(l->rows)) {
      return refuse(kBadValue,
                    format("a leading dimension of %lld for %llu rows", static_cast<long long>(l->ld),
                           static_cast<unsigned long long>(l->rows)));
    }
    uint32_t size = l->type == kR32F ? 4 : 2;
    if (l->ld * size % 16) {
      return refuse(
          kUnsupported,
          format("a leading dimension of %lld elements of %u bytes: columns are not 16-byte aligned",
                 static_cast<long long>(l->ld), size));
    }
  }
  p->transpose_a = d.transpose_a != 0;
  p->transpose_b = d.transpose_b != 0;
  p->m = p->transpose_a ? a.cols : a.rows;
  p->k = p->transpose_a ? a.rows : a.cols;
  p->n = p->transpose_b ? b.rows : b.cols;
  uint64_t k = p->transpose_b ? b.cols : b.rows;
  if (k != p->k || out.rows != p->m || out.cols != p->n || c.rows != p->m || c.cols != p->n) {
    auto u = [](uint64_t v) { return static_cast<unsigned long long>(v); };
    return refuse(kBadValue,
                  format("op(A) is %llu × %llu, op(B) %llu × %llu, C %llu × %llu, D %llu × %llu", u(p->m),
                         u(p->k), u(k), u(p->n), u(c.rows), u(c.cols), u(out.rows), u(out.cols)));
  }
  if ((p->m == 1 || p->n == 1) && options().thin != Thin::taken) {
    return refuse(options().thin == Thin::invalid ? kBadValue : kUnsupported,
                  "a matrix of one row or column");
  }
  p->input = a.type == kR32F ? Type::f32 : Type::bf16;
  p->output = out.type == kR32F ? Type::f32 : Type::bf16;
  p->tf32 = d.compute == k32FFastTF32;
  p->truncate = options().truncate && (p->tf32 || p->input == Type::bf16);
  p->lda = static_cast<uint64_t>(a.ld);
  p->ldb = static_cast<uint64_t>(b.ld);
  p->ldc = static_cast<uint64_t>(c.ld);
  p->ldd = static_cast<uint64_t>(out.ld);
  p->ld_aux = static_cast<uint64_t>(d.aux_ld);
  p->bias = d.bias;
  p->aux = d.aux;
  p->epilogue = {};
  if (!epilogue_of(d.epilogue, &p->epilogue)) return refuse(kUnsupported, format("epilogue %u", d.epilogue));
  const auto& refused = options().refused_epilogues;
  if (std::find(refused.begin(), refused.end(), d.epilogue) != refused.end())
    return refuse(kUnsupported, format("epilogue %u, on demand", d.epilogue));
  const Epilogue& e = p->epilogue;
  if (e.aux_out || e.dgelu) {
    if (d.aux_ld < static_cast<int64_t>(p->m) || d.aux_ld % 8) {
      return refuse(kBadValue,
                    format("EPILOGUE_AUX_LD %lld: at least the %llu rows of D, and a multiple of 8",
                           static_cast<long long>(d.aux_ld), static_cast<unsigned long long>(p->m)));
    }
    if (d.aux_type != -1 && d.aux_type != out.type)
      return refuse(kUnsupported, "an aux type that is not D's");
  }
  if (d.bias_type != -1 && d.bias_type != out.type)
    return refuse(kUnsupported, "a bias type that is not D's");
  if (options().capability < 80 && p->input == Type::bf16) return refuse(kArchMismatch, "bf16 before sm_80");
  return kSuccess;
}

// Whether the library accepts an algorithm for a product.
int validate(const Algorithm& algorithm, const Problem& problem) {
  if (!is_algorithm(algorithm)) return kBadValue;
  return fits(algorithm, problem) ? kSuccess : kUnsupported;
}

template <class T>
bool take(T* to, const void* from, size_t bytes) {
  if (!from || bytes != sizeof(T)) return false;
  memcpy(to, from, bytes);
  return true;
}

// Whether this thread may use the library now: its handle belongs to the current context.
int usable(const void* handle) {
  if (!handle) return kBadHandle;
  const Record& record = live(Kind::blaslt, handle);
  Primary* context;
  int code = current_context(&context);
  if (code == kInvalidContext || code == kContextIsDestroyed) return kBadHandle;
  same_context(record, *context);
  return kSuccess;
}

// Accesses the columns of a matrix that the product uses.
int touch_matrix(const Running& running, const void* base, uint64_t rows, uint64_t columns, uint64_t ld,
                 Type type, Access access, const char* what) {
  uint64_t size = bytes_of(type), start = reinterpret_cast<uint64_t>(base);
  if (ld == rows) return touch(running, start, rows * columns * size, access, what);
  for (uint64_t j = 0; j < columns; ++j) {
    if (int code = touch(running, start + j * ld * size, rows * size, access, what)) return code;
  }
  return 0;
}

int run(const Running& running, const Matmul& p) {
  const Epilogue& e = p.epilogue;
  auto in = [&](const void* at, uint64_t rows, uint64_t columns, uint64_t ld, Type type, const char* what) {
    return touch_matrix(running, at, rows, columns, ld, type, Access::read, what);
  };
  auto out = [&](const void* at, uint64_t rows, uint64_t columns, uint64_t ld, const char* what) {
    return touch_matrix(running, at, rows, columns, ld, p.output, Access::write, what);
  };
  int code = in(p.a, p.transpose_a ? p.k : p.m, p.transpose_a ? p.m : p.k, p.lda, p.input, "a matmul's A");
  if (!code)
    code = in(p.b, p.transpose_b ? p.n : p.k, p.transpose_b ? p.k : p.n, p.ldb, p.input, "a matmul's B");
  if (!code && p.beta != 0) code = in(p.c, p.m, p.n, p.ldc, p.output, "a matmul's C");
  if (!code && e.bias) code = in(p.bias, p.m, 1, p.m, p.output, "a matmul's bias");
  if (!code && e.dgelu) code = in(p.aux, p.m, p.n, p.ld_aux, p.output, "a matmul's aux");
  if (!code && e.aux_out) code = out(p.aux, p.m, p.n, p.ld_aux, "a matmul's aux");
  if (!code && bias_sums(e)) {
    code = out(p.bias, e.gradient_b ? p.n : p.m, 1, e.gradient_b ? p.n : p.m, "a matmul's bias gradient");
  }
  if (!code) code = out(p.d, p.m, p.n, p.ldd, "a matmul's D");
  if (code) return fail_sticky(running, code);
  bool more_than_bias = e.relu || e.gelu || e.dgelu || bias_sums(e);
  Slowed slowed(more_than_bias ? options().slow_epilogue : 1);
  run_matmul(p);
  return 0;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int
// Takes the driver's lock, as every call does, and notes its name. Returns whether refusals are printed.
#define ENTER(refusals_are_printed)                            \
  std::lock_guard<Lock> guard(machine().lock);                 \
  Call call(__func__);                                         \
  loud = refusals_are_printed

// ---- the library ------------------------------------------------------------------------------------------

extern "C" __attribute__((visibility("default"))) size_t cublasLtGetVersion() {
  return options().blaslt;
}
extern "C" __attribute__((visibility("default"))) size_t cublasLtGetCudartVersion() {
  return static_cast<size_t>(options().driver);
}
extern "C" __attribute__((visibility("default"))) const char* cublasLtGetStatusName(int status) {
  switch (status) {
    case kSuccess: return "CUBLAS_STATUS_SUCCESS";
    case kBadHandle: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case kBadValue: return "CUBLAS_STATUS_INVALID_VALUE";
    case kArchMismatch: return "CUBLAS_STATUS_ARCH_MISMATCH";
    case kFailed: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case kUnsupported: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "CUBLAS_STATUS_UNKNOWN";
  }
}
extern "C" __attribute__((visibility("default"))) const char* cublasLtGetStatusString(int status) {
  return cublasLtGetStatusName(status);
}
API cublasLtGetProperty(int which, int* value) {
  uint64_t v = options().blaslt;
  *value = static_cast<int>(which == 0 ? v / 10000 : which == 1 ? v / 100 % 100 : v % 100);
  return kSuccess;
}
API cublasLtCreate(void** handle) {
  ENTER(true);
  Primary* context;
  if (!machine().initialized || current_context(&context)) return kBadHandle;
  *handle = make_handle(Kind::blaslt, context, nullptr);
  note_context("cublaslt", "made", context->card);
  return kSuccess;
}
API cublasLtDestroy(void* handle) {
  ENTER(true);
  if (!handle) return kBadHandle;
  Record& record = live(Kind::blaslt, handle);
  end(record);
  note_context("cublaslt", "destroyed", record.context->card);
  return kSuccess;
}

// ---- descriptions -----------------------------------------------------------------------------------------

// Like the real library's, these look at sizes alone (seen in version 13.1.0): what a value means is found out when a
// product is described with it.
API cublasLtMatmulDescCreate(Description** description, int compute, int scale) {
  if (!description) return kBadValue;
  *description = new Description{compute, scale};
  return kSuccess;
}
API cublasLtMatmulDescDestroy(Description* description) {
  delete description;
  return kSuccess;
}
API cublasLtMatmulDescSetAttribute(Description* d, int attribute, const void* value, size_t bytes) {
  if (!d) return kBadValue;
  bool good;
  switch (attribute) {
    case 0: good = take(&d->compute, value, bytes); break;
    case 1: good = take(&d->scale, value, bytes); break;
    case 2: good = take(&d->pointer_mode, value, bytes); break;
    case 3: good = take(&d->transpose_a, value, bytes); break;
    case 4: good = take(&d->transpose_b, value, bytes); break;
    case 7: good = take(&d->epilogue, value, bytes); break;
    case 8: good = take(&d->bias, value, bytes); break;
    case 11: good = take(&d->aux, value, bytes); break;
    case 12: good = take(&d->aux_ld, value, bytes); break;
    case 15: good = value && bytes == 4; break;  // how many multiprocessors to use: a matter of speed
    case 22: good = take(&d->aux_type, value, bytes); break;
    case 25: good = value && bytes == 1; break;  // fast accumulation: FP8 only
    case 26: good = take(&d->bias_type, value, bytes); break;
    default: good = false;
  }
  return good ? kSuccess : refuse(kBadValue, format("attribute %d of a description in %zu bytes", attribute, bytes));
}
API cublasLtMatmulDescGetAttribute(const Description* d, int attribute, void* value, size_t bytes,
                                   size_t* written) {
  const void* from;
  size_t size;
  switch (attribute) {
    case 0: from = &d->compute, size = 4; break;
    case 3: from = &d->transpose_a, size = 4; break;
    case 4: from = &d->transpose_b, size = 4; break;
    case 7: from = &d->epilogue, size = 4; break;
    case 8: from = &d->bias, size = 8; break;
    case 11: from = &d->aux, size = 8; break;
    case 12: from = &d->aux_ld, size = 8; break;
    default: return kBadValue;
  }
  if (written) *written = size;
  if (bytes == 0) return kSuccess;
  if (!value || bytes < size) return kBadValue;
  memcpy(value, from, size);
  return kSuccess;
}

API cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  if (!layout) return kBadValue;
  *layout = new Layout{type, rows, cols, ld};
  return kSuccess;
}
API cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  return kSuccess;
}
API cublasLtMatrixLayoutSetAttribute(Layout* l, int attribute, const void* value, size_t bytes) {
  bool good;
  switch (attribute) {
    case 0: good = take(&l->type, value, bytes); break;
    case 1: good = take(&l->order, value, bytes); break;
    case 2: good = take(&l->rows, value, bytes); break;
    case 3: good = take(&l->cols, value, bytes); break;
    case 4: good = take(&l->ld, value, bytes); break;
    case 5: good = take(&l->batches, value, bytes); break;
    case 6: good = take(&l->batch_stride, value, bytes); break;
    default: return kBadValue;
  }
  return good ? kSuccess : kBadValue;
}

API cublasLtMatmulPreferenceCreate(Preference** preference) {
  if (!preference) return kBadValue;
  *preference = new Preference;
  return kSuccess;
}
API cublasLtMatmulPreferenceDestroy(Preference* preference) {
  delete preference;
  return kSuccess;
}
API cublasLtMatmulPreferenceSetAttribute(Preference* p, int attribute, const void* value, size_t bytes) {
  if (!p) return kBadValue;
  bool good;
  switch (attribute) {
    case 0: good = take(&p->search, value, bytes); break;
    case 1: good = take(&p->workspace, value, bytes); break;
    case 3: good = take(&p->reductions, value, bytes); break;
    case 5:
    case 6:
    case 7:
    case 8: good = take(&p->align[attribute - 5], value, bytes); break;
    case 9: good = value && bytes == 4; break;  // the most waves of blocks
    default: good = false;
  }
  return good ? kSuccess : kBadValue;
}

// ---- algorithms -------------------------------------------------------------------------------------------

API cublasLtMatmulAlgoGetHeuristic(void* handle, const Description* d, const Layout* a, const Layout* b,
                                   const Layout* c, const Layout* out, const Preference* preference,
                                   int wanted, HeuristicResult* results, int* found) {
  ENTER(false);
  *found = 0;
  if (int status = usable(handle)) return status;
  if (!d || !a || !b || !c || !out || !preference || wanted < 1) return kBadValue;
  Matmul p{};
  if (int status = understand(*d, *a, *b, *c, *out, &p)) return status;
  if (options().heuristic == Finding::refusal) return kUnsupported;
  if (options().heuristic == Finding::nothing) return kSuccess;
  for (uint32_t align : preference->align) {
    if (!align || align & (align - 1))
      return refuse(kBadValue, format("an alignment of %u bytes: not a power of two", align));
  }
  if (preference->search != 0) return refuse(kUnsupported, format("search mode %u", preference->search));
  uint32_t align = *std::min_element(preference->align, preference->align + 4);
  if (align < 16)
    return refuse(kUnsupported, format("alignment of %u bytes: nothing fast is found below 16", align));
  Problem problem{p, d->epilogue};
  for (uint32_t number : offers(problem, preference->reductions, preference->workspace)) {
    if (*found == std::min(wanted, options().algorithms)) break;
    HeuristicResult& r = results[(*found)++];
    r = {};
    r.algorithm = algorithm_for(problem, number, align);
    r.workspace = r.algorithm.workspace;
    r.state = options().heuristic == Finding::unfit ? kUnsupported : kSuccess;
    r.waves = static_cast<float>((p.m + 127) / 128 * ((p.n + 127) / 128) * r.algorithm.split) /
              static_cast<float>(options().multiprocessors);
  }
  return *found ? kSuccess : kUnsupported;
}

API cublasLtMatmulAlgoCheck(void* handle, const Description* d, const Layout* a, const Layout* b,
                            const Layout* c, const Layout* out, const Algorithm* algorithm,
                            HeuristicResult* result) {
  ENTER(false);
  if (int status = usable(handle)) return status;
  if (!d || !a || !b || !c || !out || !algorithm || !result) return kBadValue;
  Matmul p{};
  if (int status = understand(*d, *a, *b, *c, *out, &p)) return status;
  if (int status = validate(*algorithm, {p, d->epilogue})) return status;
  *result = {};
  result->algorithm = *algorithm;
  result->workspace = workspace_of(p, algorithm->number);
  result->state = kSuccess;
  result->waves = 1;
  return kSuccess;
}

API cublasLtMatmulAlgoConfigGetAttribute(const Algorithm* algorithm, int attribute, void* value, size_t bytes,
                                         size_t* written) {
  uint32_t v;
  size_t size;
  if (!algorithm || !configuration(*algorithm, attribute, &v, &size))
    return kBadValue;
  if (written) *written = size;
  if (bytes == 0) return kSuccess;
  if (!value || bytes < size) return kBadValue;
  memcpy(value, &v, size);
  return kSuccess;
}

// ---- the product ------------------------------------------------------------------------------------------

API cublasLtMatmul(void* handle, const Description* d, const void* alpha, const void* a,
                   const Layout* a_layout, const void* b, const Layout* b_layout, const void* beta,
                   const void* c, const Layout* c_layout, void* out, const Layout* out_layout,
                   const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream) {
  ENTER(true);
  if (int status = usable(handle)) return status;
  if (!d || !alpha || !beta || !a || !b || !out || !a_layout || !b_layout || !c_layout || !out_layout)
    return kBadValue;
  Stream* s;
  if (find_stream(stream, &s)) return kFailed;
  same_context(*static_cast<const Record*>(handle), *s->context);
  Matmul p{};
  if (int status = understand(*d, *a_layout, *b_layout, *c_layout, *out_layout, &p)) return status;
  if (options().heuristic == Finding::refusal || (!algorithm && options().heuristic != Finding::algorithms))
    return kUnsupported;
  const Epilogue& e = p.epilogue;
  if ((e.bias || bias_sums(e)) && !p.bias) return refuse(kBadValue, "this epilogue wants a bias pointer");
  if ((e.aux_out || e.dgelu) && !p.aux) return refuse(kBadValue, "this epilogue wants an aux pointer");
  uint32_t number = 0, align = 16;
  if (algorithm) {
    if (int status = validate(*algorithm, {p, d->epilogue}))
      return refuse(status, "an algorithm that was found for another product");
    number = algorithm->number;
    align = std::max(align, algorithm->align);
    size_t needed = workspace_of(p, number);
    if (needed && (!workspace || workspace_bytes < needed)) {
      return refuse(kBadValue, format("a workspace of %zu bytes where the algorithm needs %zu",
                                      workspace_bytes, needed));
    }
    if (needed && reinterpret_cast<uint64_t>(workspace) % 16)
      return refuse(kBadValue, "a workspace that is not 16-byte aligned");
  }
  struct Pointer {
    const char* name;
    const void* at;
    bool used;
    uint32_t align;
  };
  // C and the workspace may be absent; the bias is read one element at a time.
  for (const Pointer& q :
       {Pointer{"A", a, true, align}, Pointer{"B", b, true, align}, Pointer{"C", c, c != nullptr, align},
        Pointer{"D", out, true, align}, Pointer{"aux", p.aux, e.aux_out || e.dgelu, 16},
        Pointer{"bias", p.bias, e.bias || bias_sums(e), bytes_of(p.output)}}) {
    if (q.used && reinterpret_cast<uint64_t>(q.at) % q.align) {
      return refuse(kBadValue,
                    format("%s at %p is not %u-byte aligned, as the algorithm was told it would be", q.name,
                           q.at, q.align));
    }
    if (q.used) refuse_foreign(reinterpret_cast<uint64_t>(q.at), *s->context);
  }
  if (static_cast<int>(number) == options().fail_algorithm) return options().fail_status;
  sum_as(number, &p);
  p.a = a;
  p.b = b;
  p.c = c;
  p.d = out;
  bool on_device = d->pointer_mode == 1;
  if (!on_device) {
    memcpy(&p.alpha, alpha, 4);
    memcpy(&p.beta, beta, 4);
    if (p.beta != 0 && !c) return refuse(kBadValue, "beta without C");
  }
  if (p.c == p.d && p.ldc != p.ldd)
    return refuse(kBadValue, "C and D in one place with different leading dimensions");
  size_t scratch = workspace_of(p, number);
  Task task;
  task.run = [=](const Running& running) {
    Matmul now = p;
    if (on_device) {
      memcpy(&now.alpha, alpha, 4);
      memcpy(&now.beta, beta, 4);
    }
    if (scratch) {
      // Two products that share a workspace on unordered streams corrupt each other.
      if (int code = touch(running, reinterpret_cast<uint64_t>(workspace), scratch, Access::write,
                           "a matmul's workspace")) {
        return fail_sticky(running, code);
      }
    }
    return run(running, now);
  };
  return submit(s, std::move(task)) ? kFailed : kSuccess;
}
