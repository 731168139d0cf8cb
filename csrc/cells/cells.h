// The list of cells. A new cell is its header and one line here.
#pragma once

#include "gru.h"
#include "lstm.h"
#include "rnn_relu.h"
#include "rnn_tanh.h"

namespace fastrnn {

template <class... Cells>
struct CellList {};

using AllCells = CellList<Lstm, Gru, RnnTanh, RnnRelu>;

}  // namespace fastrnn
