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

int most_shared_bytes(int device) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }

// A launch that CUDA refuses if blocks that wait for each other could not run all at once.
class Together {
 public:
  Together(const void* kernel, int device, Tier tier, int slices, int64_t shared_bytes) {
    // Always all there is: it is the kernel's, not the launch's, and other threads launch it too.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes(device)),
          "shared memory of a fastrnn kernel");
    if (tier == Tier::grid) {
      attribute_.id = cudaLaunchAttributeCooperative;
      attribute_.val.cooperative = 1;
    } else {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
            "cluster of a fastrnn kernel");
      attribute_.id = cudaLaunchAttributeClusterDimension;
      attribute_.val.clusterDim = {static_cast<unsigned>(slices), 1, 1};
    }
    config_.blockDim = dim3(kThreads);
    config_.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config_.attrs = &attribute_;
    config_.numAttrs = 1;
  }
  Together(const Together&) = delete;
  Together& operator=(const Together&) = delete;

  const cudaLaunchConfig_t& of(int blocks, void* stream) {
    config_.gridDim = dim3(static_cast<unsigned>(blocks));
    config_.stream = static_cast<cudaStream_t>(stream);
    return config_;
  }

 private:
  cudaLaunchAttribute attribute_{};
  cudaLaunchConfig_t config_{};
};

template <class Args>
void launch_all(const Plan& plan, Kernel<Args> kernel, Args& args, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto address = reinterpret_cast<const void*>(kernel);
  Together together(address, device, plan.tier, plan.tiling.slices, plan.shared_bytes);
  for (args.first_group = 0; args.first_group < args.G; args.first_group += plan.groups) {
    const int blocks = plan.blocks(std::min(plan.groups, args.G - args.first_group));
    check(cudaLaunchKernelEx(&together.of(blocks, stream), kernel, args), "launch of a fastrnn kernel");
  }
}

// How many clusters run at once, by their size, of blocks that each have a multiprocessor to themselves.
void find_clusters(Limits& limits, int device) {
  if (!attribute(cudaDevAttrClusterLaunch, device)) return;
  const DeviceGuard guard(device);
  const auto kernel =
      reinterpret_cast<const void*>(kernels(Precision::f32).forward[0][static_cast<int>(Tier::cluster)]);
  for (int size = 1; size <= kMostCluster; ++size) {
    Together together(kernel, device, Tier::cluster, size, limits.shared_bytes);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &together.of(size, nullptr)) != cudaSuccess) {
      cudaGetLastError();
      clusters = 0;
    }
    if (!clusters) return;
    limits.cluster = size;
    limits.at_once[size] = clusters;
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
  Limits limits{10 * major + minor,
                cooperative ? attribute(cudaDevAttrMultiProcessorCount, index) : 0,
                most_shared_bytes(index),
                0,
                {}};
  find_clusters(limits, index);
  return limits;
}

void launch(const Plan& plan, const Kernel<ForwardArgs>& kernel, ForwardArgs args, int device, void* stream) {
  launch_all(plan, kernel, args, device, stream);
}
void launch(const Plan& plan, const Kernel<BackwardArgs>& kernel, BackwardArgs args, int device, void* stream) {
  launch_all(plan, kernel, args, device, stream);
}

}  // namespace fastrnn::cuda
