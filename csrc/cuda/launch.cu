#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "launch.h"

namespace fastrnn::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a later call must not find it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// The device of the launch, and afterwards the caller's again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// Cooperative, so that CUDA refuses what could not run all at once: blocks wait for each other.
template <class Args>
void launch_all(const Plan& plan, Kernel<Args> kernel, Args& args, int device, void* stream) {
  const DeviceGuard guard(device);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes)),
        "shared memory of a fastrnn kernel");
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  for (args.first_group = 0; args.first_group < args.G; args.first_group += plan.groups) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(plan.blocks(std::min(plan.groups, args.G - args.first_group))));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cooperative;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, kernel, args), "launch of a fastrnn kernel");
  }
}

}  // namespace

std::string unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count ? "" : "no CUDA device is present";
  cudaGetLastError();
  return std::string("CUDA cannot be used here: ") + cudaGetErrorString(error);
}

Limits device_limits(int index) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, index);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
  const bool cooperative = attribute(cudaDevAttrCooperativeLaunch, index) != 0;
  return {10 * major + minor, cooperative ? attribute(cudaDevAttrMultiProcessorCount, index) : 0,
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
}

void launch(const Plan& plan, const Kernel<ForwardArgs>& kernel, ForwardArgs args, int device, void* stream) {
  launch_all(plan, kernel, args, device, stream);
}
void launch(const Plan& plan, const Kernel<BackwardArgs>& kernel, BackwardArgs args, int device, void* stream) {
  launch_all(plan, kernel, args, device, stream);
}

}  // namespace fastrnn::cuda
