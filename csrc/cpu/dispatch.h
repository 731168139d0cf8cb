// Which instruction sets this build and this processor share, and which one serves.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fastrnn {

// Best first; "portable" is always among them.
std::vector<std::string> supported_isas();

// The table in use: the best one, the one FASTRNN_ISA names, or the one last given to use_isa.
// Both throw std::invalid_argument for a name that is not supported here.
const KernelTable& kernels();
void use_isa(const std::string& name);

}  // namespace fastrnn
