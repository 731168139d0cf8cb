// Calls every kernel of every instruction set that this machine has, over buffers of exactly the size they need, for a
// sanitizer to watch. Twice each: whatever a kernel must not read is NaN in one run and another number in the other, so
// results have to be finite and the same to the bit.
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/launch.h"
#include "cpu/plan.h"

namespace fastrnn {
namespace {

constexpr int kNan = 0xff, kOther = 0x3f;  // bytes of a NaN, and of a number below 1, in every dtype

int64_t accumulate_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }

enum class Layout { dense, batch_first, padded_rows };

struct Shape {
  int64_t T, B, I, H;
  std::vector<bool> reverse = {false};
  std::vector<int64_t> lengths = {};  // of the rows, longest first: packed
  bool bias = true, states = true;
  Layout layout = Layout::dense;
  bool grouped = false;  // each group reads its own columns of x
  int64_t P = 0;         // for cells with a second state

  int G() const { return static_cast<int>(reverse.size()); }
};

const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all = {
      {1, 1, 1, 1},
      {1, 1, 5, 33, {false, true}},
      {2, 1, 3, 7, {false}, {}, true, false},
      {5, 3, 7, 17, {false, true}},
      {4, 2, 40, 100, {true}, {4, 2}, true, true, Layout::padded_rows},
      {7, 5, 16, 16, {false, true}, {7, 6, 6, 2, 1}},
      {6, 7, 9, 31, {true, false}, {6, 5, 5, 4, 1, 1, 1}, false, false},
      {3, 33, 9, 19, {false, true}, {}, false, true, Layout::batch_first},
      {3, 2, 65, 150, {true}},
      {2, 1, 130, 40, {false, true}, {}, true, false, Layout::padded_rows},
      {270, 1, 3, 5, {true}},
      {2, 100, 4, 24, {false}},
      {2, 127, 100, 95, {true}, {}, true, true, Layout::dense, false, 94},
      {3,
       70,
       2,
       9,
       {true, false},
       [] {
         std::vector<int64_t> lengths(70, 1);
         std::fill_n(lengths.begin(), 33, 2);
         lengths[0] = 3;
         return lengths;
       }()},
      {2, 2, 3, 3, {false, true, false, true, true, false, true, false}},
      {4, 7, 5, 21, {false, true}, {4, 3, 1, 0, 0, 0, 0}},
      {2, 3, 5, 21, {true, false}, {1, 1, 0}, true, false},
      {5, 6, 7, 18, {false, true, false}, {}, true, true, Layout::batch_first, true},
      {5, 26, 7, 18, {true, false}, {}, true, true, Layout::batch_first, true},
      {4, 97, 6, 20, {true}},
      {1, 3, 70, 9, {false, true}, {}, false, false, Layout::padded_rows, true},
      {1, 2, 5, 21, {false, true}, {}, true, false, Layout::dense, false, 7},
      {4, 35, 5, 70, {false}, {}, true, true, Layout::dense, false, 33},
      {5, 6, 3, 40, {true, false}, {5, 3, 3, 1, 0, 0}, false, true, Layout::dense, true, 17},
  };
  return all;
}

// Which gradients come in and which are wanted. Samples that are dealt out take every other row, and the last one none.
struct Wishes {
  const char* name;
  bool dy, dh_n, dc_n;
  bool dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh;
  bool only_first_group = false, dc = false;
  int samples = 1;
  bool dealt_out = false;
};

constexpr Wishes kAll = {"all", true, true, true, true, true, true, true, true, true, true, false, true};
constexpr Wishes kPartial[] = {
    {"from dy to dx", true, false, false, true, false, false, false, false, false, false},
    {"from h_n to w_hh", false, true, false, false, false, false, false, true, false, false},
    {"from c_n to the states", false, false, true, false, true, true, false, false, false, false},
    {"from y to b_hh of one group", true, false, false, false, false, false, false, false, false, true, true},
    {"from y to w_ih of one group", true, false, false, false, false, true, true, false, false, false, true},
    {"from c to w_hh", false, false, false, false, false, false, false, true, false, false, false, true},
    {"all of each sample", true, true, true, true, true, true, true, true, true, true, false, true, 2},
    {"all of rows dealt out", true, true, true, true, true, true, true, true, true, true, false, true, 3, true},
    {"from nothing", false, false, false, true, true, true, true, true, true, true},
};

// Exactly this many bytes from the heap, so that its neighbours are out of bounds.
class Buffer {
 public:
  Buffer() = default;
  Buffer(int64_t bytes, int fill) : bytes_(bytes), data_(std::malloc(static_cast<size_t>(bytes))) { this->fill(fill); }
  static Buffer aligned(int64_t bytes, int fill) {
    Buffer buffer;
    buffer.bytes_ = bytes;
    buffer.data_ = std::aligned_alloc(64, static_cast<size_t>(bytes));
    buffer.fill(fill);
    return buffer;
  }
  Buffer(Buffer&& other) noexcept
      : bytes_(std::exchange(other.bytes_, 0)), data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  bool operator==(const Buffer& other) const {
    return bytes_ == other.bytes_ && (bytes_ == 0 || !std::memcmp(data_, other.data_, static_cast<size_t>(bytes_)));
  }

 private:
  void fill(int byte) {
    if (!data_) std::abort();
    std::memset(data_, byte, static_cast<size_t>(bytes_));
  }

  int64_t bytes_ = 0;
  void* data_ = nullptr;
};

void put(void* data, Dtype dtype, int64_t i, double value) {
  const float single = static_cast<float>(value);
  if (dtype == Dtype::f64) static_cast<double*>(data)[i] = value;
  if (dtype == Dtype::f32) static_cast<float*>(data)[i] = single;
  if (dtype == Dtype::bf16)
    std::memcpy(static_cast<char*>(data) + 2 * i, reinterpret_cast<const char*>(&single) + 2, 2);
}

double get(const void* data, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f64) return static_cast<const double*>(data)[i];
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[i];
  float single = 0;
  std::memcpy(reinterpret_cast<char*>(&single) + 2, static_cast<const char*>(data) + 2 * i, 2);
  return single;
}

bool finite(const Buffer& buffer, Dtype dtype) {
  for (int64_t i = 0; i < buffer.bytes() / element_size(dtype); ++i) {
    if (!std::isfinite(get(buffer.data(), dtype, i))) return false;
  }
  return true;
}

// What one layer call is given; the incoming gradients as well.
class Inputs {
 public:
  Inputs(const Shape& shape, const CellInfo& cell, Dtype dtype)
      : shape_(shape), dtype_(dtype), P_(cell.states > 1 ? shape.P : 0) {
    seq = {shape.T, shape.B, shape.T * shape.B, nullptr, nullptr};
    if (!shape.lengths.empty()) find_steps();
    make_x();
    const double scale = 1 / std::sqrt(static_cast<double>(shape.H));
    const int64_t rows = cell.gates * shape.H, out = P_ ? P_ : shape.H;
    for (bool reverse : shape.reverse) {
      const void* const w_ih = numbers(rows * shape.I, scale);
      const void* const w_hh = numbers(rows * out, scale);
      const void* const b_ih = shape.bias ? numbers(rows, scale) : nullptr;
      const void* const b_hh = shape.bias ? numbers(rows, scale) : nullptr;
      const void* const w_hr = P_ ? numbers(P_ * shape.H, scale) : nullptr;
      groups.push_back({w_ih, w_hh, b_ih, b_hh, w_hr, reverse});
    }
    const int64_t lead = shape.G() * shape.B;
    if (shape.states) h0 = numbers(lead * out, 1);
    if (shape.states && cell.states > 1) c0 = numbers(lead * shape.H, 1);
    dy = numbers(seq.N * shape.G() * out, 1);
    dh_n = numbers(lead * out, 1);
    if (cell.states > 1) dc_n = numbers(lead * shape.H, 1);
    if (cell.states > 1) dc = numbers(seq.N * shape.G() * shape.H, 1);
  }
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;

  Sequence seq;
  std::vector<Group> groups;
  const void *x = nullptr, *h0 = nullptr, *c0 = nullptr, *dy = nullptr, *dh_n = nullptr, *dc_n = nullptr, *dc = nullptr;
  int64_t x_stride_t = 0, x_stride_b = 0;

  template <class Args>
  Args arguments() const {
    Args args{};
    args.seq = seq;
    args.I = shape_.I;
    args.H = shape_.H;
    args.P = P_;
    args.G = shape_.G();
    args.groups = groups.data();
    args.x = x;
    args.x_stride_t = x_stride_t;
    args.x_stride_b = x_stride_b;
    args.x_stride_g = shape_.grouped ? shape_.I : 0;
    args.h0 = h0;
    args.c0 = c0;
    return args;
  }

 private:
  void find_steps() {
    int64_t rows = 0;
    for (int64_t t = 0; t < shape_.T; ++t) {
      offsets_.push_back(rows);
      sizes_.push_back(std::count_if(shape_.lengths.begin(), shape_.lengths.end(), [t](int64_t n) { return n > t; }));
      rows += sizes_.back();
    }
    seq = {shape_.T, shape_.B, rows, sizes_.data(), offsets_.data()};
  }

  void make_x() {
    const int64_t columns = shape_.grouped ? shape_.G() * shape_.I : shape_.I;
    const int64_t row = shape_.layout == Layout::padded_rows ? columns + 3 : columns;
    const bool batch_first = shape_.layout == Layout::batch_first;
    x_stride_t = batch_first ? row : shape_.B * row;
    x_stride_b = batch_first ? shape_.T * row : row;
    x = numbers((seq.N - 1) * row + columns, 1);
  }

  const void* numbers(int64_t count, double scale) {
    buffers_.emplace_back(count * element_size(dtype_), kNan);
    std::uniform_real_distribution<double> uniform(-scale, scale);
    for (int64_t i = 0; i < count; ++i) put(buffers_.back().data(), dtype_, i, uniform(random_));
    return buffers_.back().data();
  }

  const Shape& shape_;
  Dtype dtype_;
  int64_t P_;
  std::mt19937 random_{1};
  std::vector<Buffer> buffers_;
  std::vector<int64_t> sizes_, offsets_;
};

struct Kernel {
  const KernelTable& table;
  const CellInfo& cell;
  const CellKernels& functions;
  Dtype dtype;

  Plan plan(int threads, const ForwardArgs& args) const {
    return plan_forward(table, cell, dtype, {threads, true}, args);
  }
  Plan plan(int threads, const BackwardArgs& args) const {
    return plan_backward(table, cell, dtype, {threads, true}, args);
  }
  int64_t bytes(const ForwardArgs& args, const Plan& plan) const { return functions.forward_bytes(args, plan); }
  int64_t bytes(const BackwardArgs& args, const Plan& plan) const { return functions.backward_bytes(args, plan); }
  void run(const ForwardArgs& args, const Plan& plan, const Team& team, int thread) const {
    functions.forward(args, plan, team, thread);
  }
  void run(const BackwardArgs& args, const Plan& plan, const Team& team, int thread) const {
    functions.backward(args, plan, team, thread);
  }
};

// How the work is shared out: as planned, or, since other machines' plans differ, rows by units in narrow panels,
// where there are tiles of values or of their parts.
struct Division {
  int threads, rows, units;  // rows 0: as planned
  bool own_panels, by_parts;

  template <class Args>
  Plan plan(const Kernel& kernel, const Args& args) const {
    Plan plan = kernel.plan(threads, args);
    if (rows == 0) return plan;
    const int lanes = kernel.table.lanes[static_cast<int>(kernel.dtype)];
    plan.group_parts = 1;
    plan.panel_vectors = plan.proj_vectors = 1;
    plan.row_parts = static_cast<int>(std::min<int64_t>(rows, args.seq.B));
    plan.unit_parts = static_cast<int>(std::min<int64_t>(units, ceil_div(args.H, lanes)));
    plan.own_panels = own_panels;
    plan.split_input = plan.split_state = by_parts && plan.pack && kernel.table.splits[static_cast<int>(kernel.dtype)];
    plan.chunk = 2;
    return plan;
  }
};

constexpr Division kDivisions[] = {{3, 0, 0, false, false}, {4, 2, 2, true, true},   {3, 1, 3, false, true},
                                   {1, 0, 0, false, false}, {2, 0, 0, false, false}, {4, 0, 0, false, false},
                                   {3, 3, 1, true, false},  {4, 2, 2, false, false}};
constexpr int kFewDivisions = 3;

std::string current;  // what runs now, for the report
int64_t calls = 0;
int failures = 0;

void fail(const char* what) {
  ++failures;
  std::printf("FAILED: %s: %s\n", what, current.c_str());
}

template <class Args>
void call(const Kernel& kernel, const Division& division, Args& args, int fill) {
  const Plan plan = division.plan(kernel, args);
  const Buffer workspace = Buffer::aligned(kernel.bytes(args, plan), fill);
  args.workspace = workspace.data();
  const auto context = std::make_pair(&kernel, static_cast<const Args*>(&args));
  const TeamBody body = [](const void* c, const Plan& team_plan, const Team& team, int thread) {
    const auto& [team_kernel, team_args] = *static_cast<const std::pair<const Kernel*, const Args*>*>(c);
    team_kernel->run(*team_args, team_plan, team, thread);
  };
  if (!launch(plan, plan.threads, body, &context)) fail("no threads");
  ++calls;
}

struct Outputs {
  std::vector<Buffer> results;  // finite in every element
  std::vector<Buffer> saved;    // with padding that nobody writes

  void* result(int64_t count, Dtype dtype, bool wanted = true) {
    if (!wanted) return nullptr;
    return results.emplace_back(count * element_size(dtype), kNan).data();
  }
  void* save(int64_t count, Dtype dtype, bool wanted) {
    if (!wanted) return nullptr;
    return saved.emplace_back(count * accumulate_size(dtype), kNan).data();
  }
};

struct Forward : Outputs {
  ForwardArgs args{};
};

Forward forward(const Kernel& kernel, const Division& division, const Inputs& inputs, bool save, int fill) {
  Forward out;
  ForwardArgs& args = out.args = inputs.arguments<ForwardArgs>();
  const int64_t lead = args.G * args.seq.B, units = args.G * args.seq.N * round_up(args.H, kUnitPad);
  const bool has_c = kernel.cell.states > 1;
  args.y = out.result(args.seq.N * args.G * args.out(), kernel.dtype);
  args.h_n = out.result(lead * args.out(), kernel.dtype);
  args.c_n = out.result(lead * args.H, kernel.dtype, has_c);
  args.c = out.result(args.seq.N * args.G * args.H, kernel.dtype, has_c);
  args.gates = out.save(units * kernel.cell.saved, kernel.dtype, save);
  args.cells = out.save(units, kernel.dtype, save && has_c);
  args.whole_h = out.result(args.seq.N * args.G * args.H, kernel.dtype, save && args.P);
  call(kernel, division, args, fill);
  return out;
}

Outputs backward(const Kernel& kernel, const Division& division, const Inputs& inputs, const ForwardArgs& before,
                 const Wishes& wishes, int fill) {
  Outputs out;
  BackwardArgs args = inputs.arguments<BackwardArgs>();
  const Dtype dtype = kernel.dtype;
  const int64_t lead = args.G * args.seq.B, rows = kernel.cell.gates * args.H;
  args.y = before.y;
  args.gates = before.gates;
  args.cells = before.cells;
  args.whole_h = before.whole_h;
  args.dy = wishes.dy ? inputs.dy : nullptr;
  args.dh_n = wishes.dh_n ? inputs.dh_n : nullptr;
  args.dc_n = wishes.dc_n ? inputs.dc_n : nullptr;
  args.dc = wishes.dc ? inputs.dc : nullptr;
  args.dx = out.result(args.seq.N * args.inputs() * args.I, dtype, wishes.dx);
  args.dh0 = out.result(lead * args.out(), dtype, wishes.dh0);
  args.dc0 = out.result(lead * args.H, dtype, wishes.dc0 && kernel.cell.states > 1);
  std::vector<int64_t> sample_of_row;
  for (int64_t n = 0; n < args.seq.N && wishes.dealt_out; ++n) sample_of_row.push_back(n % (wishes.samples - 1));
  args.samples = {wishes.samples, wishes.dealt_out ? sample_of_row.data() : nullptr};
  std::vector<GroupGradients> gradients;
  const int64_t S = wishes.samples;
  for (int g = 0; g < args.G; ++g) {
    const bool wanted = g == 0 || !wishes.only_first_group, bias = wanted && args.groups[g].b_ih;
    void* const dw_ih = out.result(S * rows * args.I, dtype, wanted && wishes.dw_ih);
    void* const dw_hh = out.result(S * rows * args.out(), dtype, wanted && wishes.dw_hh);
    void* const db_ih = out.result(S * rows, dtype, bias && wishes.db_ih);
    void* const db_hh = out.result(S * rows, dtype, bias && wishes.db_hh);
    void* const dw_hr = out.result(S * args.P * args.H, dtype, wanted && wishes.dw_hh && args.P);
    gradients.push_back({dw_ih, dw_hh, db_ih, db_hh, dw_hr});
  }
  args.gradients = gradients.data();
  call(kernel, division, args, fill);
  return out;
}

void compare(const Outputs& a, const Outputs& b, Dtype dtype) {
  for (const Buffer& buffer : a.results) {
    if (!finite(buffer, dtype)) return fail("not finite");
  }
  if (!(a.results == b.results && a.saved == b.saved)) fail("two runs differ");
}

std::string describe(const Kernel& kernel, const Shape& shape, const Division& division, const char* what) {
  static const char* const dtypes[] = {"float32", "float64", "bfloat16"};
  char text[256];
  std::snprintf(text, sizeof text, "%s %s %s T=%ld B=%ld I=%ld H=%ld P=%ld G=%d%s, %d threads (%d x %d), %s",
                kernel.table.isa, kernel.cell.name, dtypes[static_cast<int>(kernel.dtype)], static_cast<long>(shape.T),
                static_cast<long>(shape.B), static_cast<long>(shape.I), static_cast<long>(shape.H),
                static_cast<long>(shape.P), shape.G(), shape.lengths.empty() ? "" : " packed", division.threads,
                division.rows, division.units, what);
  return text;
}

void check(const Kernel& kernel, const Shape& shape, const Division& division, const Inputs& inputs, bool partial) {
  const auto enter = [&](const char* what) { current = describe(kernel, shape, division, what); };
  const auto check_backward = [&](const Forward& before, const Wishes& wishes) {
    enter(wishes.name);
    compare(backward(kernel, division, inputs, before.args, wishes, kNan),
            backward(kernel, division, inputs, before.args, wishes, kOther), kernel.dtype);
  };
  enter("inference");
  compare(forward(kernel, division, inputs, false, kNan), forward(kernel, division, inputs, false, kOther),
          kernel.dtype);
  enter("forward");
  const Forward saved = forward(kernel, division, inputs, true, kNan);
  compare(saved, forward(kernel, division, inputs, true, kOther), kernel.dtype);
  check_backward(saved, kAll);
  if (!partial) return;
  for (const Wishes& wishes : kPartial) check_backward(saved, wishes);
}

void check_table(const KernelTable& table, bool few) {
  const int divisions = few ? kFewDivisions : static_cast<int>(std::size(kDivisions));
  for (int c = 0; c < table.cells; ++c) {
    for (int d = 0; d < kDtypes; ++d) {
      const Kernel kernel = {table, table.info[c], table.kernels[c][d], static_cast<Dtype>(d)};
      for (const Shape& shape : shapes()) {
        const Inputs inputs(shape, kernel.cell, kernel.dtype);
        for (int i = 0; i < divisions; ++i) check(kernel, shape, kDivisions[i], inputs, i == 0 && !few);
      }
    }
  }
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
#if defined(FASTRNN_HAVE_AMX)
  names.emplace_back("amx");
#endif
#if defined(FASTRNN_HAVE_AVX512_BF16)
  names.emplace_back("avx512_bf16");
#endif
#if defined(FASTRNN_HAVE_AVX512)
  names.emplace_back("avx512");
#endif
#if defined(FASTRNN_HAVE_AVX2)
  names.emplace_back("avx2");
#endif
  names.emplace_back("portable");
  return names;
}

int run(bool few) {
  const std::vector<std::string> supported = supported_isas();
  for (const std::string& isa : built_isas()) {
    if (std::find(supported.begin(), supported.end(), isa) == supported.end()) {
      std::printf("%s: SKIPPED, this processor or system does not have it\n", isa.c_str());
      continue;
    }
    use_isa(isa);
    calls = failures = 0;
    check_table(kernels(), few);
    std::printf("%s: %d cells, %d dtypes, %zu shapes, %ld calls, %d failures\n", isa.c_str(), kernels().cells, kDtypes,
                shapes().size(), static_cast<long>(calls), failures);
    std::fflush(stdout);
    if (failures) return 1;
  }
  return 0;
}

}  // namespace
}  // namespace fastrnn

// "few" leaves out most ways to share the work and the subsets of gradients.
int main(int argc, char** argv) {
  __sanitizer_set_death_callback([] {
    if (!fastrnn::current.empty()) std::fprintf(stderr, "while running: %s\n", fastrnn::current.c_str());
  });
  return fastrnn::run(argc > 1 && !std::strcmp(argv[1], "few"));
}
