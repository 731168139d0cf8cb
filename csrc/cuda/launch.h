// What needs the CUDA run time; tests/emulation has a twin of it that runs the kernels on the host.
#pragma once

#include "plan.h"

namespace fastrnn::cuda {

// Why no device can be used here, or an empty string.
std::string unavailable();
// Of device `index`. Throws std::runtime_error with CUDA's words where it cannot be asked.
Limits device_limits(int index);

// Runs all launches of a plan on a stream of the device.
void launch(const Plan& plan, const Kernel<ForwardArgs>& kernel, ForwardArgs args, int device, void* stream);
void launch(const Plan& plan, const Kernel<BackwardArgs>& kernel, BackwardArgs args, int device, void* stream);

}  // namespace fastrnn::cuda
