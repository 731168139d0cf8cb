// From tensors to what the kernels are told: every size is checked here against the others.
#pragma once

#include <stdexcept>
#include <vector>

#include "cpu/dispatch.h"
#include "tensor.h"

namespace fastrnn {

using Tensors = std::vector<Tensor>;

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// What every call begins with, and what follows from it.
struct Call {
  const KernelTable& table;
  const CellInfo& cell;
  const CellKernels& kernels;
  Dtype dtype;
  int threads;

  Call(int index, Dtype type, int thread_count)
      : table(fastrnn::kernels()),
        cell(table.info[checked(index, table.cells)]),
        kernels(table.kernels[index][static_cast<int>(type)]),
        dtype(type),
        threads(thread_count) {
    require(threads >= 1, "threads must be at least 1");
  }

 private:
  static int checked(int index, int count) {
    require(index >= 0 && index < count, "there is no cell of that index");
    return index;
  }
};

// The row at which each step of a packed batch begins.
inline std::vector<int64_t> step_offsets(const Sequence& seq) {
  std::vector<int64_t> offsets(static_cast<size_t>(seq.T));
  int64_t rows = 0, before = seq.B;
  for (int64_t t = 0; t < seq.T; ++t) {
    const int64_t n = seq.batch_sizes[t];
    require(n > 0 && n <= before, "batch_sizes must be positive, at most B, and must not grow");
    offsets[static_cast<size_t>(t)] = rows;
    rows += before = n;
  }
  require(rows == seq.N, "batch_sizes must add up to the rows given");
  return offsets;
}

// A flat list of what belongs to weights: of each group w_ih, w_hh, b_ih, b_hh, and w_hr with a projection; or these
// once, stacked, each a tensor for all groups.
class WeightList {
 public:
  WeightList(const Tensors& tensors, size_t groups)
      : tensors_(tensors), groups_(groups), stacked_(groups > 1 && tensors.size() <= 5) {
    require(groups && groups <= kMaxGroups, "there are too many groups, or none");
    const size_t lists = stacked_ ? 1 : groups;
    require(tensors.size() == 4 * lists || tensors.size() == 5 * lists, "each group has 4 or 5 weights");
    each_ = tensors.size() / lists;
  }

  size_t each() const { return each_; }
  // Whether those of kind `kind` are contiguous and of so many elements in one group.
  bool fit(size_t kind, int64_t elements) const {
    if (kind >= each_) return true;
    if (stacked_) return tensors_[kind].fits(elements * static_cast<int64_t>(groups_));
    for (size_t g = 0; g < groups_; ++g) {
      if (!tensors_[each_ * g + kind].fits(elements)) return false;
    }
    return true;
  }
  void* of(size_t group, size_t kind) const {
    if (kind >= each_) return nullptr;
    return stacked_ ? tensors_[kind].part(group, groups_) : tensors_[each_ * group + kind].data();
  }

 private:
  const Tensors& tensors_;
  size_t groups_, each_;
  bool stacked_;
};

// One layer and its inputs, which it keeps alive.
class Layer {
 public:
  // `batch` is B, which a packed batch does not tell.
  Layer(int cell, int threads, const std::vector<bool>& reverse, int64_t batch, const Tensor& x,
        const Tensor& batch_sizes, const Tensor& h0, const Tensor& c0, const Tensors& weights)
      : call_(cell, x.dtype(), threads),
        batch_sizes_(batch_sizes.contiguous()),
        h0_(h0.contiguous()),
        c0_(c0.contiguous()) {
    weights_.reserve(weights.size());
    for (const Tensor& w : weights) weights_.push_back(w.contiguous());
    const WeightList list(weights_, reverse.size());
    take_sizes(x, batch, reverse.size(), list.each());
    take_weights(reverse, list);
    take_input(x);
    require(h0_.fits(args_.G * args_.seq.B * args_.out()), "h0 has another size");
    require(c0_.fits(args_.G * args_.seq.B * args_.H), "c0 has another size");
    args_.h0 = h0_.data();
    args_.c0 = c0_.data();
  }
  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;

  const Call& call() const { return call_; }
  const LayerArgs& args() const { return args_; }
  bool has_c() const { return call_.cell.states > 1; }

 private:
  void take_sizes(const Tensor& x, int64_t batch, size_t groups, size_t each) {
    const Tensor &w_ih = weights_[0], &w_hr = weights_[each - 1];
    require(w_ih && w_ih.dims() == (weights_.size() < each * groups ? 3 : 2), "w_ih must be a matrix");
    args_.G = static_cast<int>(groups);
    args_.H = w_ih.size(-2) / call_.cell.gates;
    args_.I = w_ih.size(-1);
    args_.P = each > 4 && w_hr.dims() >= 2 ? w_hr.size(-2) : 0;
    require(args_.I > 0 && args_.H > 0, "I and H must be positive");
    require(each == 4 || (args_.P > 0 && has_c()), "a cell with a projection keeps its own state in c");
    require(x.dims() == 2 || (x.dims() == 3 && !batch_sizes_), "x has another number of dimensions");
    const int64_t rows = x.size(0), T = x.dims() == 3 ? rows : 1;  // a matrix that is not packed is one step
    args_.seq = batch_sizes_ ? Sequence{batch_sizes_.numel(), batch, rows, batch_sizes_.data<const int64_t>(), nullptr}
                             : Sequence{T, batch, T * batch, nullptr, nullptr};
    require(args_.seq.T > 0 && args_.seq.B > 0 && args_.seq.N > 0, "T, B and N must be positive");
    require(batch_sizes_ || x.size(-2) == batch, "x has another batch size");
    if (!batch_sizes_) return;
    offsets_ = step_offsets(args_.seq);
    args_.seq.offsets = offsets_.data();
  }

  void take_weights(const std::vector<bool>& reverse, const WeightList& list) {
    const int64_t rows = call_.cell.gates * args_.H;
    require(list.fit(0, rows * args_.I) && list.fit(1, rows * args_.out()) && list.fit(2, rows) && list.fit(3, rows) &&
                list.fit(4, args_.P * args_.H),
            "a weight has another size");
    for (size_t g = 0; g < reverse.size(); ++g) {
      const Group group{list.of(g, 0), list.of(g, 1), list.of(g, 2), list.of(g, 3), list.of(g, 4), reverse[g]};
      require(group.w_ih && group.w_hh && (!args_.P || group.w_hr), "w_ih, w_hh and w_hr must be given");
      groups_.push_back(group);
    }
    args_.groups = groups_.data();
  }

  void take_input(const Tensor& x) {
    const bool apart = x.size(-1) != args_.I;
    require(!apart || x.size(-1) == args_.G * args_.I, "x has another width");
    x_ = x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
    args_.x = x_.data();
    args_.x_stride_t = x_.dims() == 3 ? x_.stride(0) : 0;
    args_.x_stride_b = x_.stride(-2);
    args_.x_stride_g = apart ? args_.I : 0;
  }

  Call call_;
  Tensor x_, batch_sizes_, h0_, c0_;
  Tensors weights_;
  std::vector<int64_t> offsets_;
  std::vector<Group> groups_;
  LayerArgs args_{};
};

// What forward saves and backward reads: gates, cells for a cell with c, whole_h with a projection. The tensors may be
// larger: they are allocated for the whole batch where only some of its steps are run.
struct Saved {
  void *gates, *cells = nullptr, *whole_h = nullptr;

  Saved(const Layer& layer, const Tensors& saved) {
    const LayerArgs& args = layer.args();
    const size_t number = 1 + layer.has_c() + (args.P > 0);
    require(saved.size() == number, "gates, and what the cell and the projection need, are saved together");
    const int64_t units = args.G * args.seq.N * round_up(args.H, kUnitPad);
    require(saved[0].numel() >= units * layer.call().cell.saved, "gates are too small");
    gates = saved[0].data();
    if (layer.has_c()) {
      require(saved[1].numel() >= units, "cells are too small");
      cells = saved[1].data();
    }
    if (!args.P) return;
    require(saved.back().numel() >= args.seq.N * args.G * args.H, "whole_h is too small");
    whole_h = saved.back().data();
  }
};

// `saved` may be empty: then nothing is.
inline ForwardArgs forward_args(const Layer& layer, const Tensor& y, const Tensor& h_n, const Tensor& c_n,
                                const Tensor& c, const Tensors& saved) {
  ForwardArgs args{layer.args()};
  const int64_t G = args.G, N = args.seq.N, B = args.seq.B;
  require(y && h_n && (c_n || !layer.has_c()), "y and the last states must be given");
  require(y.fits(N * G * args.out()) && h_n.fits(G * B * args.out()), "y or h_n has another size");
  require(c_n.fits(G * B * args.H) && c.fits(N * G * args.H), "c_n or c has another size");
  args.y = y.data();
  args.h_n = h_n.data();
  args.c_n = c_n.data();
  args.c = c.data();
  if (saved.empty()) return args;
  const Saved each(layer, saved);
  args.gates = each.gates;
  args.cells = each.cells;
  args.whole_h = each.whole_h;
  return args;
}

// What backward reads and writes, with all the tensors that it keeps alive.
class Backward {
 public:
  // `grads` are those of y, h_n, c_n and c; `states` receives those of x, h0 and c0, `weights` those of the weights, of
  // each sample.
  Backward(const Layer& layer, const Tensor& y, const Tensors& saved, const Tensors& grads, const Tensors& states,
           const Tensors& weights, int64_t samples, const Tensor& sample_of_row)
      : args_{layer.args()}, y_(y.contiguous()), sample_of_row_(sample_of_row.contiguous()) {
    require(grads.size() == 4 && states.size() == 3, "there are four outputs, and three inputs beside the weights");
    grads_.reserve(grads.size());
    for (const Tensor& grad : grads) grads_.push_back(grad.contiguous());
    const Saved each(layer, saved);
    args_.y = y_.data();
    args_.gates = each.gates;
    args_.cells = each.cells;
    args_.whole_h = each.whole_h;
    take_grads(states);
    take_samples(samples);
    take_weights(layer, weights);
  }
  Backward(const Backward&) = delete;
  Backward& operator=(const Backward&) = delete;

  const BackwardArgs& args() const { return args_; }

 private:
  void take_grads(const Tensors& states) {
    const int64_t G = args_.G, N = args_.seq.N, B = args_.seq.B, H = args_.H, out = args_.out();
    const int64_t outputs[] = {N * G * out, G * B * out, G * B * H, N * G * H};
    const int64_t inputs[] = {N * args_.inputs() * args_.I, G * B * out, G * B * H};
    require((y_ || args_.seq.T == 1) && y_.fits(outputs[0]), "y has another size");  // of one step it is not read
    for (size_t k = 0; k < 4; ++k) require(grads_[k].fits(outputs[k]), "the gradient of an output has another size");
    for (size_t k = 0; k < 3; ++k) require(states[k].fits(inputs[k]), "the gradient of an input has another size");
    args_.dy = grads_[0].data();
    args_.dh_n = grads_[1].data();
    args_.dc_n = grads_[2].data();
    args_.dc = grads_[3].data();
    args_.dx = states[0].data();
    args_.dh0 = states[1].data();
    args_.dc0 = states[2].data();
  }

  void take_weights(const Layer& layer, const Tensors& weights) {
    const size_t groups = static_cast<size_t>(args_.G);
    const WeightList list(weights, groups);
    require(list.each() == (args_.P ? 5 : 4), "each weight has a gradient, or None in its place");
    const int64_t rows = layer.call().cell.gates * args_.H;
    const int64_t sizes[] = {rows * args_.I, rows * args_.out(), rows, rows, args_.P * args_.H};
    for (size_t kind = 0; kind < 5; ++kind) {
      require(list.fit(kind, args_.samples.number * sizes[kind]), "the gradient of a weight has another size");
    }
    for (size_t g = 0; g < groups; ++g) {
      gradients_.push_back({list.of(g, 0), list.of(g, 1), list.of(g, 2), list.of(g, 3), list.of(g, 4)});
    }
    args_.gradients = gradients_.data();
  }

  void take_samples(int64_t number) {
    require(number >= 1, "there must be a sample");
    args_.samples = {number, sample_of_row_.data<const int64_t>()};
    if (!sample_of_row_) return;
    require(sample_of_row_.numel() == args_.seq.N, "each row belongs to a sample");
    for (int64_t n = 0; n < args_.seq.N; ++n) {
      const int64_t sample = args_.samples.of_row[n];
      require(sample >= 0 && sample < number, "there is no such sample");
    }
  }

  BackwardArgs args_;
  Tensor y_, sample_of_row_;
  Tensors grads_;
  std::vector<GroupGradients> gradients_;
};

}  // namespace fastrnn
